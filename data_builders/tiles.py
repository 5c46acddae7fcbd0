"""What the builders share: features of a labelled tile, its encoding, and reading the published folders.

TFDS can encode arrays only through TensorFlow; PNG files in memory it stores as they are. So every tile is
encoded here, losslessly, whatever the file it came from.
"""

import io
import pathlib
from collections.abc import Iterator

import cv2
import numpy as np
import tensorflow_datasets as tfds

from ktda_jax.data.check import check_split
from ktda_jax.data.datasets import IGNORE, dataset_info
from ktda_jax.data.images import DataError
from ktda_jax.data.sources import FolderSource


def tiles_info(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetInfo:
    """TFDS's description of a segmentation set, from our entry of the same name in `datasets.DATASETS`."""
    info = dataset_info(builder.name)
    return tfds.core.DatasetInfo(
        builder=builder,
        description=info.description,
        citation=info.citation or None,
        homepage=info.homepage or None,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png", doc="RGB"),
                "label": tfds.features.LabeledImage(
                    labels=list(info.classes),
                    shape=(None, None, 1),
                    encoding_format="png",
                    doc=f"class, {IGNORE} = ignore",
                ),
                "name": tfds.features.Text(doc="file stem of the tile"),
            }
        ),
        supervised_keys=("image", "label"),
        metadata=tfds.core.MetadataDict(
            classes=list(info.classes), palette=[list(c) for c in info.palette], ignore=IGNORE
        ),
        # Records keep the sorted order of the files: tile i is the same tile as in FolderSource. Training
        # shuffles by itself.
        disable_shuffling=True,
    )


def encode_tile(image: np.ndarray, label: np.ndarray, name: str) -> dict:
    """image uint8 (H, W, 3) RGB, label uint8 (H, W) -> an example of the features above."""
    return {"image": _png(image[..., ::-1]), "label": _png(label), "name": name}


def folder_splits(manual_dir, builder_name: str) -> dict[str, FolderSource]:
    """The published splits that `manual_dir` holds, all tiles checked before anything is written.

    `train` must be there. DataError for missing folders and pairs, unreadable tiles, sizes that differ and
    label values that are no class.
    """
    info = dataset_info(builder_name)
    splits = [
        split for split in info.splits if split == "train" or (pathlib.Path(manual_dir) / "img_dir" / split).is_dir()
    ]
    sources = {split: FolderSource(manual_dir, split, num_classes=info.num_classes) for split in splits}
    for source in sources.values():
        check_split(source)
    return sources


def examples(source: FolderSource) -> Iterator[tuple[int, dict]]:
    """(key, example) pairs for `_generate_examples`."""
    for index in range(len(source)):
        yield index, encode_tile(**source[index])


def _png(bgr_or_grey):
    ok, data = cv2.imencode(".png", bgr_or_grey)
    if not ok:
        raise DataError(f"OpenCV could not encode an array of shape {bgr_or_grey.shape} as PNG")
    return io.BytesIO(data.tobytes())
