"""What the builders share: features of a labelled tile, its encoding, and reading the published folders.

TFDS can encode arrays only through TensorFlow; PNG files in memory it stores as they are. So every tile is
encoded here, losslessly, whatever the file it came from. And its GeneratorBasedBuilder sorts a split of more than
1 GB on disk, through TensorFlow again and with the whole split in memory at last, so that builders of real data
write file by file (ShardBasedBuilder).
"""

import functools
import io
import pathlib
from collections.abc import Callable, Iterator, Mapping

import cv2
import numpy as np
import tensorflow_datasets as tfds

from ktda_jax import UserError
from ktda_jax.data.check import check_split
from ktda_jax.data.datasets import IGNORE, dataset_info
from ktda_jax.data.sources import FolderSource

SHARD = 128  # tiles in one file: TFDS holds the tiles of a file in memory while it writes them


def tiles_info(
    builder: tfds.core.DatasetBuilder, *, description: str | None = None, features: Mapping | None = None
) -> tfds.core.DatasetInfo:
    """TFDS's description of a segmentation set, from our entry of the same name in `datasets.DATASETS`.

    `description` replaces that of the entry, `features` come on top of image, label and name.
    """
    info = dataset_info(builder.name)
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description or info.description,
        citation=info.citation or None,
        homepage=info.homepage or None,
        license=info.license or None,
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
                **(features or {}),
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


def folder_shards(folder, builder_name: str) -> dict[str, list[Callable[[], Iterator]]]:
    """{split: generators of (key, example), one per file to write} of the splits that `folder` holds.

    All tiles are checked before the first is yielded, and `train` must be there. UserError for missing folders
    and pairs, unreadable tiles, sizes that differ and label values that are no class.
    """
    info, folder = dataset_info(builder_name), pathlib.Path(folder)
    splits = [split for split in info.splits if split == "train" or (folder / "img_dir" / split).is_dir()]
    sources = {split: FolderSource(folder, split, num_classes=info.num_classes) for split in splits}
    for source in sources.values():
        check_split(source)
    return {
        split: [
            functools.partial(_examples, source, range(start, min(start + SHARD, len(source))))
            for start in range(0, len(source), SHARD)
        ]
        for split, source in sources.items()
    }


def _examples(source, indices):
    for index in indices:
        yield index, encode_tile(**source[index])


def _png(bgr_or_grey):
    ok, data = cv2.imencode(".png", bgr_or_grey)
    if not ok:
        raise UserError(f"OpenCV could not encode an array of shape {bgr_or_grey.shape} as PNG")
    return io.BytesIO(data.tobytes())
