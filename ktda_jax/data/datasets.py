"""Class names and palettes of the data sets we know: the only place they are written down.

numpy and the standard library only, because the TFDS builders import this file.
"""

import dataclasses

import numpy as np

IGNORE = 255  # label value of pixels that no loss and no metric counts

_KTDA_CITATION = """\
@inproceedings{zhang2025ktda,
  title={Knowledge Transfer and Domain Adaptation for Fine-Grained Remote Sensing Image Segmentation},
  author={Zhang, Shun and Zou, Xuechao and Li, Kai and Lang, Congyan and
    Wang, Shiying and Tao, Pin and Cao, Tengfei},
  booktitle={IEEE International Conference on Multimedia and Expo (ICME)},
  year={2025},
  note={arXiv:2412.06664}
}"""


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What is constant about a data set: `classes[i]` is drawn in `palette[i]`, an RGB triple of 0..255."""

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    tile_size: int  # side of the published tiles in pixels, also the crop used for training
    splits: tuple[str, ...]  # as published; a local copy may hold fewer
    description: str = ""
    citation: str = ""
    homepage: str = ""

    def __post_init__(self):
        if len(self.classes) != len(self.palette):
            raise ValueError(
                f"data set {self.name!r}: {len(self.classes)} classes but {len(self.palette)} "
                "palette colours; give one RGB triple per class"
            )
        for name, colour in zip(self.classes, self.palette, strict=True):
            if len(colour) != 3 or not all(isinstance(v, int) and 0 <= v <= 255 for v in colour):
                raise ValueError(
                    f"data set {self.name!r}: the colour of {name!r} is {colour}; give red, green and blue "
                    "as whole numbers from 0 to 255"
                )

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def colours(self) -> np.ndarray:
        """Palette as uint8 (256, 3), indexable by a label image; undefined values and IGNORE are black."""
        table = np.zeros((256, 3), np.uint8)
        table[: self.num_classes] = self.palette
        return table


_INFOS = (
    DatasetInfo(
        name="grass",
        classes=("low", "middle-low", "middle", "middle-high", "high"),
        palette=((185, 101, 71), (248, 202, 155), (211, 232, 158), (138, 191, 104), (92, 144, 77)),
        tile_size=256,
        splits=("train", "val"),
        description="Grass cover of alpine meadow in five levels, 256 px RGB tiles from the air.",
        citation=_KTDA_CITATION,
        homepage="https://huggingface.co/datasets/XavierJiezou/ktda-datasets",
    ),
    DatasetInfo(
        name="l8_biome",
        classes=("Clear", "Cloud Shadow", "Thin Cloud", "Cloud"),
        palette=((79, 253, 199), (221, 53, 223), (251, 255, 41), (77, 2, 115)),
        tile_size=512,
        splits=("train", "val", "test"),
        description="Clouds and cloud shadows in Landsat-8 scenes (the Biome masks of the USGS), 512 px "
        "tiles of bands 4-3-2, min-max stretched per tile to uint8; fill is labelled Clear.",
        citation=_KTDA_CITATION,
        homepage="https://huggingface.co/datasets/XavierJiezou/ktda-datasets",
    ),
    DatasetInfo(
        name="meadow",
        classes=("bare soil", "sparse", "open", "closed", "dense"),
        palette=((166, 97, 61), (233, 183, 110), (236, 226, 150), (143, 190, 98), (46, 112, 68)),
        tile_size=128,
        splits=("train", "val"),
        description="Synthetic alpine meadow from the air: five classes of vegetation cover that colour and "
        "texture tell apart. Seeded and generated on the spot: the embedded default data.",
    ),
)
DATASETS = {info.name: info for info in _INFOS}


def dataset_info(name: str) -> DatasetInfo:
    """The entry of DATASETS; ValueError listing the known names otherwise."""
    if name not in DATASETS:
        raise ValueError(
            f"unknown data set {name!r}: known are {', '.join(sorted(DATASETS))}; for a folder "
            "of your own give classes and palette in configs/custom.py"
        )
    return DATASETS[name]
