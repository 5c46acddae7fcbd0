"""TFDS's own test harness over dummy_data/."""

import pytest

from data_builders.grass.grass_dataset_builder import Builder

_REASON = "TFDS's test harness needs TensorFlow and dill: pip install -e '.[build]'"
pytest.importorskip("tensorflow", reason=_REASON)
harness = pytest.importorskip("tensorflow_datasets.testing.dataset_builder_testing", reason=_REASON)


class GrassTest(harness.DatasetBuilderTestCase):
    DATASET_CLASS = Builder
    SPLITS = {"train": 3, "val": 2}  # noqa: RUF012 (the form TFDS prescribes)
