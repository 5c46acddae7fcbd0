"""Folder source and split check: how tiles are read, and the one line that each kind of bad data gives."""

import pathlib
import pickle
import unicodedata

import cv2
import numpy as np
import pytest
from absl import logging
from PIL import Image

from ktda_jax import UserError
from ktda_jax.data.check import check_split
from ktda_jax.data.images import read_image
from ktda_jax.data.sources import FolderSource
from ktda_jax.training.inputs import may_hide

SAMPLES = pathlib.Path(__file__).parents[2] / "shared" / "real_samples"


def write_tile(root, name, image, label, *, split="train", image_extension=".tif", palette=True):
    """One tile in the published layout: an RGB image and a label PNG of class indices (palette or grey)."""
    for kind in ("img_dir", "ann_dir"):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(root / "img_dir" / split / f"{name}{image_extension}")
    png = Image.fromarray(label)
    if palette:
        png.putpalette(list(range(255, -1, -1)) * 3)  # mode becomes P; all 256 entries, or 255 is not kept
    png.save(root / "ann_dir" / split / f"{name}.png")


def random_tile(seed, size=(32, 40), classes=3):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*size, 3), np.uint8), rng.integers(0, classes, size, np.uint8)


@pytest.fixture
def tiles(tmp_path):
    """Four good tiles t0..t3, 32 x 40 pixels, 3 classes."""
    for number in range(4):
        write_tile(tmp_path, f"t{number}", *random_tile(number))
    return tmp_path


def source_of(root, **kwargs):
    return FolderSource(root, "train", num_classes=3, **kwargs)


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_tile_comes_back_as_written(tiles):
    source = source_of(tiles)
    image, label = random_tile(2)
    assert len(source) == 4
    tile = source[2]
    np.testing.assert_array_equal(tile["image"], image)
    np.testing.assert_array_equal(tile["label"], label)  # palette indices, not colours
    assert tile["name"] == "t2" and tile["image"].dtype == tile["label"].dtype == np.uint8
    assert source.label_size(2) == (32, 40)
    assert source.describe(2) == "img_dir/train/t2.tif + ann_dir/train/t2.png"
    assert repr(pickle.loads(pickle.dumps(source))) == repr(source) and "tiles=4" in repr(source)


def test_extensions_in_any_case_and_strangers_ignored(tiles):
    write_tile(tiles, "a.b", *random_tile(7), image_extension=".PNG", palette=False)
    (tiles / "img_dir" / "train" / "notes.txt").write_text("not a tile")
    (tiles / "img_dir" / "train" / "._t0.tif").write_text("left by a Mac")
    assert source_of(tiles).names == ("a.b", "t0", "t1", "t2", "t3")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_harmless_image_modes_become_rgb(tmp_path, mode):
    image = Image.fromarray(random_tile(0)[0]).convert(mode)
    image.save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_image(str(tmp_path / "image.png")), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("extension", [".png", ".tif"])
def test_16_bit_images_are_refused(tmp_path, extension):
    path = str(tmp_path / f"deep{extension}")
    cv2.imwrite(path, np.full((8, 8, 3), 3000, np.uint16))
    assert "not 8-bit values; set config.data.scale" in error_of(read_image, path)


def test_only_what_is_read_by_bands_may_hide_pixels(tiles):
    """An alpha band that one tile has; 8-bit RGB is trained on as its labels say."""
    assert not may_hide(source_of(tiles, bands=(1, 2, 3)))
    Image.fromarray(random_tile(0)[0]).convert("RGBA").save(tiles / "img_dir/train/t2.tif")
    assert may_hide(source_of(tiles, bands=(1, 2, 3))) and not may_hide(source_of(tiles))


def test_missing_directory_says_what_is_there(tiles):
    message = error_of(FolderSource, tiles, "test", num_classes=3)
    assert str(tiles / "img_dir" / "test") in message and "holds train" in message
    assert "correct the data root" in error_of(source_of, tiles / "nowhere" / "deep")


def test_directory_without_images(tiles):
    for path in (tiles / "img_dir" / "train").iterdir():
        path.rename(path.with_suffix(".jp2"))
    message = error_of(source_of, tiles)
    assert "no .tif/.tiff/.png/.jpg/.jpeg files" in message and "t0.jp2" in message


def test_no_pair_shows_both_namings(tiles):
    for path in (tiles / "ann_dir" / "train").iterdir():
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    message = error_of(source_of, tiles)
    assert "t0, t1" in message and "t0_mask, t1_mask" in message
    assert "must be called NAME.png or NAME.tif or NAME.tiff; 4 of them are called NAME_mask: rename" in message


def renamed(folder, rename):
    for path in sorted(folder.iterdir()):
        path.rename(path.with_name(rename(path.name)))


@pytest.mark.parametrize(
    "rename, hint",
    [
        (str.upper, "; 4 label(s) differ from an image only in upper and lower case, as T0.PNG from t0.tif: rename"),
        (
            lambda name: name.replace("t", "ｔ"),
            "; 4 label(s) differ from an image only in letters that look alike (Unicode)",
        ),
        (lambda name: name.upper().replace(".", "_MASK."), "; 4 of them are called NAME_MASK: rename these to NAME"),
    ],
)
def test_labels_that_are_almost_called_as_the_images(tiles, rename, hint):
    renamed(tiles / "ann_dir" / "train", rename)
    message = error_of(source_of, tiles)
    assert message.startswith("no image in ") and hint in message


def test_one_label_in_other_case(tiles):
    (tiles / "ann_dir/train/t1.png").rename(tiles / "ann_dir/train/T1.Png")
    (tiles / "ann_dir/train/t3.png").unlink()
    message = error_of(source_of, tiles)
    assert "2 of 4 images in" in message and "t1.tif, t3.tif; add the labels" in message
    assert message.endswith("differ from an image only in upper and lower case, as T1.Png from t1.tif: rename "
                            "them as the images")  # fmt: skip


@pytest.mark.parametrize(
    "path, hint",
    [
        ("img_dir/train", "its Train differs from train only in upper and lower case: rename that, or correct"),
        ("ann_dir/train", "its Train differs from train only in upper and lower case: rename that, or correct"),
        ("ann_dir", "its Ann_Dir differs from ann_dir only in upper and lower case: rename that, or correct"),
    ],
)
def test_a_folder_in_other_case(tiles, path, hint):
    for number in range(6):  # so that it is none of those that are named as being there
        (tiles / path).with_name(f"A{number}").mkdir()
    (tiles / path).rename((tiles / path).with_name((tiles / path).name.title()))
    message = error_of(source_of, tiles)
    assert f"no such directory: {tiles / path}" in message and hint in message


def test_a_folder_with_its_umlauts_apart(tiles):
    names = [unicodedata.normalize(form, "Wälder") for form in ("NFC", "NFD")]
    for kind in ("img_dir", "ann_dir"):
        (tiles / kind / "train").rename(tiles / kind / names[1])
    message = error_of(FolderSource, tiles, names[0], num_classes=3)
    assert "only in letters that look alike (Unicode): rename that, or correct" in message


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_umlauts_of_macos_and_of_others_are_the_same(tmp_path, forms):
    names = [unicodedata.normalize(form, "Wäldchen é") for form in forms]
    write_tile(tmp_path, names[0], *random_tile(0))
    label = tmp_path / "ann_dir/train" / f"{names[0]}.png"
    label.rename(label.with_name(f"{names[1]}.png"))
    source = source_of(tmp_path)
    assert source.names == (names[0],)  # as the image has it, so that fingerprints stay
    np.testing.assert_array_equal(source[0]["label"], random_tile(0)[1])


def test_images_without_labels_are_named_and_counted(tiles):
    (tiles / "ann_dir" / "train" / "t1.png").unlink()
    (tiles / "ann_dir" / "train" / "t3.png").unlink()
    message = error_of(source_of, tiles)
    assert "2 of 4 images" in message and "t1.tif, t3.tif" in message


def test_two_files_for_one_name(tiles):
    Image.fromarray(random_tile(0)[0]).save(tiles / "img_dir" / "train" / "t0.png")
    assert "t0.png, t0.tif; keep one" in error_of(source_of, tiles)


def test_labels_without_images_only_warn(tiles, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))
    (tiles / "img_dir" / "train" / "t1.tif").unlink()
    assert source_of(tiles).names == ("t0", "t2", "t3")
    assert "t1.png" in warnings[0]


def test_check_counts_pixels_and_sizes(tiles):
    label = np.full((64, 64), 255, np.uint8)
    label[:2] = 1
    write_tile(tiles, "big", np.zeros((64, 64, 3), np.uint8), label)
    summary = check_split(source_of(tiles), crop=32)
    labels = np.concatenate([random_tile(n)[1].ravel() for n in range(4)] + [label.ravel()])
    assert summary.tiles == 5 and summary.sizes == {(32, 40), (64, 64)} and summary.unreadable == ()
    assert summary.pixels.dtype == np.int64
    np.testing.assert_array_equal(summary.pixels, [(labels == index).sum() for index in range(3)])
    assert summary.ignored == 62 * 64


def test_fingerprint_follows_the_pixels_not_the_files(tiles, tmp_path_factory):
    before = check_split(source_of(tiles)).fingerprint
    assert check_split(source_of(tiles), num_threads=1).fingerprint == before
    copy = tmp_path_factory.mktemp("copy")
    for number in range(4):
        write_tile(copy, f"t{number}", *random_tile(number), image_extension=".png", palette=False)
    assert check_split(source_of(copy)).fingerprint == before
    image, label = random_tile(3)
    label[0, 0] = (label[0, 0] + 1) % 3
    write_tile(copy, "t3", image, label, image_extension=".png")
    assert check_split(source_of(copy)).fingerprint != before


def test_check_names_label_values(tiles):
    image, label = random_tile(1)
    label[:2, :3] = 7
    label[5] = 9
    write_tile(tiles, "t1", image, label, palette=False)
    message = error_of(check_split, source_of(tiles))
    assert "label values outside 0..2 that are not 255 in 1 of 4 tiles" in message
    assert "ann_dir/train/t1.png (values 7, 9)" in message


def test_check_names_different_sizes_and_small_images(tiles):
    write_tile(tiles, "t1", random_tile(1)[0], random_tile(1, (32, 32))[1])
    write_tile(tiles, "t2", *random_tile(2, (16, 16)))
    message = error_of(check_split, source_of(tiles), crop=32)
    assert "t1.png (image 32 x 40, label 32 x 32)" in message
    assert "smaller than the crop of 32 x 32" in message and "t2.png (16 x 16)" in message


def test_check_names_three_and_counts_the_rest(tmp_path):
    for number in range(8):
        write_tile(tmp_path, f"t{number}", *random_tile(number, classes=5), palette=False)
    message = error_of(check_split, source_of(tmp_path))
    assert "in 8 of 8 tiles" in message and "t2.png" in message and "t3.png" not in message
    assert "and 5 more" in message


def test_check_says_the_same_once(tmp_path):
    """Three tiles and a count, their paths below the root, and one remedy for all."""
    for number in range(8):
        write_tile(tmp_path, f"t{number}", *random_tile(number))
        Image.fromarray(random_tile(number)[0]).save(tmp_path / "ann_dir/train" / f"t{number}.png")
    message = error_of(check_split, source_of(tmp_path))
    assert message.count(str(tmp_path)) == message.count("config.data.label_map") == 1
    assert message.endswith(
        "8 of 8 tiles have labels that cannot be used: ann_dir/train/t0.png, ann_dir/train/t1.png, "
        "ann_dir/train/t2.png and 5 more: has 3 bands, not one of class indices; write the index of the class in every "
        "pixel (8-bit grey or palette PNG), or map its colours by config.data.label_map"
    )


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_check_names_unreadable_files(tiles, damage):
    path = tiles / "img_dir" / "train" / "t2.tif"
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"<html>"}[damage])
    source = source_of(tiles)
    assert str(path) in error_of(source.__getitem__, 2)
    message = error_of(check_split, source)
    assert "1 of 4 tiles cannot be read: img_dir/train/t2.tif (" in message
    summary = check_split(source, on_corrupt="skip")  # the choice is the user's
    assert len(summary.unreadable) == 1 and "t2.tif" in summary.unreadable[0]


def test_check_refuses_labels_that_ignore_everything(tmp_path):
    write_tile(tmp_path, "t", random_tile(0)[0], np.full((32, 40), 255, np.uint8))
    assert "every pixel" in error_of(check_split, source_of(tmp_path))


def test_check_works_for_any_source():
    class Memory:
        num_classes = 3

        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 1:
                raise OSError("bad block")
            image, label = random_tile(index)
            return {"image": image, "label": label, "name": f"t{index}"}

        def __repr__(self):
            return "Memory()"

    assert "tile 1 of Memory() (bad block)" in error_of(check_split, Memory())
    assert check_split(Memory(), on_corrupt="skip").sizes == {(32, 40)}


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="real tiles are not here")
@pytest.mark.parametrize(
    "folder, split, classes, size, tiles",
    [("grass", "val", 5, 256, 2), ("l8_biome", "test", 4, 512, 1), ("l8_biome_256", "train", 4, 256, 16)],
)
def test_real_tiles(folder, split, classes, size, tiles):
    summary = check_split(FolderSource(SAMPLES / folder, split, num_classes=classes), crop=size)
    assert summary.tiles == tiles and summary.sizes == {(size, size)}
    assert summary.pixels.sum() + summary.ignored == tiles * size * size
