"""The grass cover tiles of KTDA from the published folders or archives.

In this folder: `tfds build --file_format=array_record --manual_dir=DIR`.
"""

import tensorflow_datasets as tfds

from data_builders import tiles
from data_builders.published import published_folder


class Builder(tfds.core.ShardBasedBuilder):
    """Splits train, val, as far as DIR has them; TFDS names the set after this file: `grass`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}  # noqa: RUF012 (the form TFDS prescribes)
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    Download the data set from https://huggingface.co/datasets/XavierJiezou/ktda-datasets. The manual directory
    must hold the archive, or unpacked img_dir/{train,val}/NAME.tif and ann_dir/{train,val}/NAME.png.
    """

    def _info(self) -> tfds.core.DatasetInfo:
        return tiles.tiles_info(self)

    def _download_and_prepare(self, dl_manager, download_config=None):
        # Archives are unpacked beside the files being written (data_path is temporary here) and gone before TFDS
        # gives the folder its final name.
        with published_folder(dl_manager.manual_dir, self.name, self.data_path) as self._folder:
            super()._download_and_prepare(dl_manager, download_config)

    def _shard_iterators_per_split(self, dl_manager):
        return tiles.folder_shards(self._folder, self.name)
