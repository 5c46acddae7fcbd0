"""Synthetic meadow, the embedded default data, as TFDS: nothing to download, built in seconds."""

from concurrent.futures import ThreadPoolExecutor

import tensorflow_datasets as tfds

from data_builders import tiles
from data_builders.meadow.generate import generate_tile
from ktda_jax.data.datasets import dataset_info


class Builder(tfds.core.GeneratorBasedBuilder):
    """`train` and `val` of freshly generated tiles; TFDS names it `meadow`."""

    VERSION = tfds.core.Version("1.0.0")  # raise it when generate.py changes what it draws
    RELEASE_NOTES = {"1.0.0": "Initial release."}  # noqa: RUF012 (the form TFDS prescribes)
    SEED = 0
    TILES = {"train": 160, "val": 40}  # noqa: RUF012

    def _info(self) -> tfds.core.DatasetInfo:
        return tiles.tiles_info(self)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        return {split: self._generate_examples(split, count) for split, count in self.TILES.items()}

    def _generate_examples(self, split: str, count: int):
        size = dataset_info(self.name).tile_size
        with ThreadPoolExecutor() as pool:  # numpy works in several threads at a time
            drawn = pool.map(lambda index: generate_tile(self.SEED, index, size, split=split), range(count))
            for index, (image, label) in enumerate(drawn):
                yield index, tiles.encode_tile(image, label, f"{split}_{index:04d}")
