"""Clouds and cloud shadows in Landsat-8 (Biome): the published tiles of KTDA, or tiles cut from the USGS scenes.

In this folder: `tfds build --file_format=array_record --manual_dir=DIR [--config=scenes]`.
"""

import tensorflow_datasets as tfds

from data_builders import tiles
from data_builders.l8_biome import scene_folders, scene_tiles
from data_builders.l8_biome.variants import VARIANTS, Variant, variant
from data_builders.published import published_folder


class Builder(tfds.core.ShardBasedBuilder):
    """`l8_biome/tiles` with the splits that DIR has, `l8_biome/scenes...` with splits by scene."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "Initial release."}  # noqa: RUF012 (the form TFDS prescribes)
    BUILDER_CONFIGS = [VARIANTS["tiles"]]  # noqa: RUF012 (`tfds build` without --config builds all that stand here)
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    Tiles: download the data set from https://huggingface.co/datasets/XavierJiezou/ktda-datasets. The manual
    directory must hold the archive, or unpacked img_dir/{train,val,test}/NAME.png and ann_dir/{...}/NAME.png.
    Scenes (--config=scenes): download scenes with their masks from the USGS page "Landsat 8 Cloud Cover Assessment
    Validation Data" (https://doi.org/10.5066/F7251GDH). The manual directory must hold BIOME/SCENE/SCENE_B2.TIF,
    _B3.TIF, _B4.TIF and SCENE_fixedmask.img, or their archives.
    """

    @tfds.core.utils.classproperty
    @classmethod
    def builder_configs(cls):
        return VARIANTS

    def _create_builder_config(self, builder_config, version):
        # TFDS takes no object with the name of a known configuration. Here a name has only one meaning.
        if isinstance(builder_config, str):
            return variant(builder_config.partition(":")[0])
        return builder_config or VARIANTS["tiles"]

    @property
    def _cuts_scenes(self) -> bool:
        return isinstance(self.builder_config, Variant) and self.builder_config.name != "tiles"

    def _info(self) -> tfds.core.DatasetInfo:
        if not self._cuts_scenes:
            return tiles.tiles_info(self)
        return tiles.tiles_info(
            self,
            description="Clouds and cloud shadows in Landsat-8 scenes (the Biome masks of the USGS). No scene is in "
            "two splits.",
            features=scene_tiles.METADATA,
        )

    def _download_and_prepare(self, dl_manager, download_config=None):
        # Archives are unpacked beside the files being written (data_path is temporary here) and gone before TFDS
        # gives the folder its final name.
        if self._cuts_scenes:
            opened = scene_folders.scene_folders(dl_manager.manual_dir, self.data_path)
        else:
            opened = published_folder(dl_manager.manual_dir, self.name, self.data_path)
        with opened as self._folders:
            super()._download_and_prepare(dl_manager, download_config)

    def _shard_iterators_per_split(self, dl_manager):
        if self._cuts_scenes:
            return scene_tiles.scene_shards(self._folders, self.builder_config)
        return tiles.folder_shards(self._folders, self.name)
