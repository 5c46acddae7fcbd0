"""The cloud tiles of KTDA (Landsat-8 Biome) from the published folders.

In this folder: `tfds build --file_format=array_record --manual_dir=DIR`.
"""

import tensorflow_datasets as tfds

from data_builders import tiles


class Builder(tfds.core.GeneratorBasedBuilder):
    """Splits train, val, test, as far as DIR has them; TFDS names the set after this file: `l8_biome`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}  # noqa: RUF012 (the form TFDS prescribes)
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    Download the data set from https://huggingface.co/datasets/XavierJiezou/ktda-datasets and unpack it. The
    manual directory must hold img_dir/{train,val,test}/NAME.png and ann_dir/{train,val,test}/NAME.png.
    """

    def _info(self) -> tfds.core.DatasetInfo:
        return tiles.tiles_info(self)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager):
        sources = tiles.folder_splits(dl_manager.manual_dir, self.name)
        return {split: self._generate_examples(source) for split, source in sources.items()}

    def _generate_examples(self, source):
        yield from tiles.examples(source)
