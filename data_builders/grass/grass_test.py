from data_builders.folder_cases import FolderCases
from data_builders.grass.grass_dataset_builder import Builder
from ktda_jax.data.datasets import dataset_info


class TestGrass(FolderCases):
    info = dataset_info("grass")
    builder_cls = Builder
    extension = ".tif"
