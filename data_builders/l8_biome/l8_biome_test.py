from data_builders.folder_cases import FolderCases
from data_builders.l8_biome.l8_biome_dataset_builder import Builder
from ktda_jax.data.datasets import dataset_info


class TestL8Biome(FolderCases):
    info = dataset_info("l8_biome")
    builder_cls = Builder
    extension = ".png"
