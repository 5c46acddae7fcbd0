"""TFDS's own test harness, on the real tiles: they are generated."""

import pathlib

import pytest

from data_builders.meadow.meadow_dataset_builder import Builder

_REASON = "TFDS's test harness needs TensorFlow and dill: pip install -e '.[build]'"
pytest.importorskip("tensorflow", reason=_REASON)
harness = pytest.importorskip("tensorflow_datasets.testing.dataset_builder_testing", reason=_REASON)


class MeadowTest(harness.DatasetBuilderTestCase):
    DATASET_CLASS = Builder
    SPLITS = Builder.TILES
    EXAMPLE_DIR = pathlib.Path(__file__).parent  # it wants a folder of dummy data, and looks for nothing in it
