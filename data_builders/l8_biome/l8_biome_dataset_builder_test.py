"""TFDS's own test harness: the tiles over dummy_data/, the scenes over generated ones."""

import pathlib
import tempfile

import pytest

from data_builders.l8_biome.l8_biome_dataset_builder import Builder
from data_builders.l8_biome.scene_cases import random_scene, scene_id, write_scene
from data_builders.l8_biome.variants import variant

_REASON = "TFDS's test harness needs TensorFlow and dill: pip install -e '.[build]'"
pytest.importorskip("tensorflow", reason=_REASON)
harness = pytest.importorskip("tensorflow_datasets.testing.dataset_builder_testing", reason=_REASON)


class L8BiomeTest(harness.DatasetBuilderTestCase):
    DATASET_CLASS = Builder
    SPLITS = {"train": 3, "val": 2, "test": 2}  # noqa: RUF012 (the form TFDS prescribes)


class L8BiomeScenesTest(harness.DatasetBuilderTestCase):
    DATASET_CLASS = Builder
    BUILDER_CONFIG_NAMES_TO_TEST = [variant("scenes_32px")]  # noqa: RUF012
    SPLITS = {"train": 3, "val": 1, "test": 1}  # noqa: RUF012

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.dummy_data = pathlib.Path(folder.name)  # EXAMPLE_DIR comes too late: pytest looks at dummy_data before
        for number in range(5):
            write_scene(cls.dummy_data, scene_id(number), *random_scene(number, 32, 32))
