"""Every kind of broken or odd file: training and the TFDS builder say the same line, and leave nothing half-written."""

import pathlib
import re

import cv2
import numpy as np
import pytest
import runs
from PIL import Image

from ktda_jax import UserError
from ktda_jax.data.sources import FolderSource
from ktda_jax.data.tfds_source import TfdsSource, prepare
from ktda_jax.training import loop


@pytest.fixture
def tiles(tmp_path):
    return runs.make_tiles(tmp_path / "tiles", train=3, val=1)


def image_of(root) -> pathlib.Path:
    return root / "img_dir/train/t1.png"


def label_of(root) -> pathlib.Path:
    return root / "ann_dir/train/t1.png"


def truncated(root):
    path = image_of(root)
    path.write_bytes(path.read_bytes()[:3000])
    return r"1 of 3 tiles cannot be read: img_dir/train/t1.png \(.*\); repair or remove them"


def truncated_label(root):
    path = label_of(root)
    path.write_bytes(path.read_bytes()[:60])
    return r"1 of 3 tiles cannot be read: ann_dir/train/t1.png \(.*\); repair or remove them"


def zero_bytes(root):
    image_of(root).write_bytes(b"")
    return r"1 of 3 tiles cannot be read: img_dir/train/t1.png \("


def deep_image(root):
    cv2.imwrite(str(image_of(root)), np.full((72, 72, 3), 3000, np.uint16))
    return r"img_dir/train/t1.png holds uint16 from 3000 to 3000, not 8-bit values; set config.data.scale=\(low, high\)"


def deep_label(root):
    cv2.imwrite(str(label_of(root)), np.full((72, 72), 3000, np.uint16))
    return r"ann_dir/train/t1.png \(uint16\) holds values from 3000 to 3000; class indices must fit 0 to 254"


def float_label(root):
    label_of(root).unlink()
    Image.fromarray(np.full((72, 72), 1.5, np.float32)).save(label_of(root).with_suffix(".tif"))
    return r"ann_dir/train/t1.tif holds fractions, such as 1.5; write the index of the class"


def missing_label(root):
    label_of(root).unlink()
    return r"1 of 3 images in \S*img_dir/train have no label in \S*ann_dir/train: t1.png; add the labels \(NAME.png or "


def circular_link(root):
    image_of(root).unlink()
    image_of(root).symlink_to(image_of(root))
    return r"cannot be read: img_dir/train/t1.png \(.*[Ss]ymbolic links"


def folder_loop(root):
    folder = root / "ann_dir/train"
    folder.rename(root / "labels")
    folder.symlink_to(folder)
    return r"no such directory: \S*ann_dir/train"


def broken_link(root):
    image_of(root).unlink()
    image_of(root).symlink_to(root / "moved.png")
    return r"cannot be read: img_dir/train/t1.png \(.*No such file"


BROKEN = [
    truncated, truncated_label, zero_bytes, deep_image, deep_label, float_label, missing_label, circular_link,
    folder_loop,
]  # fmt: skip
BROKEN += [broken_link]


@pytest.mark.parametrize("spoil", BROKEN)
def test_a_broken_file_is_one_line_before_anything_is_written(tiles, tmp_path, spoil):
    message = spoil(tiles)
    with pytest.raises(UserError, match=message) as training:
        loop.train_and_evaluate(runs.config(tiles), tmp_path / "run")
    with pytest.raises(UserError, match=message) as building:
        prepare("grass", tmp_path / "tfds", tiles)
    assert "\n" not in f"{training.value}{building.value}"
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "tfds").rglob("*"))


def palette_labels(root):
    for path in (root / "ann_dir").rglob("*.png"):
        label = Image.open(path)
        label.putpalette([v for k in range(256) for v in (255 - k, k, 7)])
        label.save(path)
        assert Image.open(path).mode == "P"


def chinese_names(root):
    for path in root.rglob("t1.*"):
        path.rename(path.with_stem("青海 草地－１"))


def mixed_suffixes(root):
    image_of(root).rename(image_of(root).with_suffix(".PNG"))
    label_of(root).rename(label_of(root).with_suffix(".Png"))


@pytest.mark.parametrize("change", [palette_labels, chinese_names, mixed_suffixes])
def test_what_is_only_odd_is_read_as_it_was(tiles, tmp_path, change):
    before = [(t["image"], t["label"]) for t in FolderSource(tiles, "train", num_classes=5)]
    change(tiles)
    prepare("grass", tmp_path / "tfds", tiles)
    read = FolderSource(tiles, "train", num_classes=5)
    built = TfdsSource("grass", "train", data_dir=tmp_path / "tfds", num_classes=5)
    order = np.argsort([re.sub("青海 草地－１", "t1", tile["name"]) for tile in read])
    for source in (read, built):
        assert len(source) == 3
        for index, (image, label) in zip(order, before, strict=True):
            np.testing.assert_array_equal(source[int(index)]["image"], image)
            np.testing.assert_array_equal(source[int(index)]["label"], label)
    assert built[int(order[1])]["name"] == read.names[order[1]]
