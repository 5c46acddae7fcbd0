"""Image files of every kind that users bring: what comes out, or the one line that says what is wrong."""

import pathlib
import warnings

import numpy as np
import pytest
import rasterio
from PIL import Image

from ktda_jax import UserError
from ktda_jax.data.check import check_split
from ktda_jax.data.images import read_bands, read_image
from ktda_jax.data.sources import FolderSource
from ktda_jax.data.stretch import minmax, stretch


def write_raster(path, values, nodata=None, **more):
    """values: (H, W, bands) -> GeoTIFF without a place on Earth."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, count = values.shape
    options = dict(driver="GTiff", height=height, width=width, count=count, dtype=values.dtype, nodata=nodata, **more)
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    with rasterio.open(path, "w", **options) as file:
        file.write(np.moveaxis(values, -1, 0))
    return str(path)


def error_of(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def random(shape, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.uniform(-1, 1, shape).astype(dtype)
        if np.dtype(dtype).kind == "f"
        else (rng.integers(1, 4000 if dtype != np.uint8 else 256, shape).astype(dtype))
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint32, np.float32, np.float64])
def test_bands_are_chosen_in_order_and_scaled(tmp_path, dtype):
    values = random((20, 30, 6), dtype)
    path = write_raster(tmp_path / "six.tif", values)
    pixels, present = read_bands(path, (4, 3, 6), (0, 3000), None)
    wanted = np.clip(values[..., [3, 2, 5]].astype(np.float64) / 3000 * 255, 0, 255)
    assert pixels.dtype == np.uint8 and pixels.shape == (20, 30, 3) and present.all()
    assert np.abs(pixels - np.floor(wanted)).max() <= 1  # float32 arithmetic may fall on the other side of a step
    assert (pixels == np.floor(wanted)).mean() > 0.99


def test_one_scale_per_band(tmp_path):
    values = np.full((4, 4, 2), 500, np.uint16)
    pixels, _ = read_bands(write_raster(tmp_path / "a.tif", values), (1, 2), ((0, 1000), (500, 600)), None)
    assert pixels[0, 0].tolist() == [127, 0]


def test_8_bit_bands_stay_as_they_are(tmp_path):
    values = random((8, 9, 4), np.uint8)
    path = write_raster(tmp_path / "four.tif", values)
    np.testing.assert_array_equal(read_bands(path, (1, 2, 3, 4), None, None)[0], values)
    np.testing.assert_array_equal(read_bands(path, (2,), None, None)[0], values[..., 1:2])


@pytest.mark.parametrize("how", ["declared", "configured", "nan"])
def test_pixels_without_data(tmp_path, how):
    """No data where all bands have none; a single missing value is 0."""
    values, absent = np.full((6, 5, 2), 100, np.float32), np.nan if how == "nan" else -9999
    values[0] = absent
    values[1, :, 0] = absent
    path = write_raster(tmp_path / "holes.tif", values, nodata=-9999 if how == "declared" else None)
    pixels, present = read_bands(path, (1, 2), (0, 200), -9999 if how == "configured" else None)
    assert not present[0].any() and present[1:].all()
    assert not pixels[0].any() and pixels[1].tolist() == [[0, 127]] * 5 and (pixels[2:] == 127).all()


def test_pixels_without_data_are_ignored_in_training(tmp_path):
    values = np.full((64, 64, 4), 9, np.uint16)
    values[:16] = 0
    write_raster(tmp_path / "img_dir/train/a.tif", values, nodata=0)
    (tmp_path / "ann_dir/train").mkdir(parents=True)
    Image.fromarray(np.ones((64, 64), np.uint8)).save(tmp_path / "ann_dir/train/a.png")
    source = FolderSource(tmp_path, "train", num_classes=2, bands=(3, 2, 1, 4), scale=(0, 10))
    label = source[0]["label"]
    assert (label[:16] == 255).all() and (label[16:] == 1).all() and source.bands == 4
    assert check_split(source).ignored == 16 * 64


def test_a_fourth_band_is_no_alpha_unless_it_is_one(tmp_path):
    """rasterio marks the fourth band of an 8-bit file as alpha; near infrared of 0 is water, not missing data."""
    values = random((8, 8, 4), np.uint8)
    values[:4, :, 3] = 0
    path = write_raster(tmp_path / "rgbn.tif", values)
    for bands in ((1, 2, 3, 4), (1, 2, 3), (4, 3, 2)):
        pixels, present = read_bands(path, bands, None, None)
        np.testing.assert_array_equal(pixels, values[..., [b - 1 for b in bands]])
        assert present.all()
    values[4:, :, 3] = 255  # nothing but 0 and 255: an alpha band, as mosaics have it
    pixels, present = read_bands(write_raster(tmp_path / "rgba.tif", values), (1, 2, 3), None, None)
    assert not present[:4].any() and present[4:].all() and not pixels[:4].any()


def test_what_is_wrong_with_an_image_is_one_line(tmp_path):
    deep = write_raster(tmp_path / "deep.tif", random((8, 8, 3), np.uint16))
    for text in (error_of(read_image, deep), error_of(read_bands, deep, (1, 2, 3), None, None)):
        assert f"image {deep} holds uint16 from" in text and "set config.data.scale=(low, high)" in text
    text = error_of(read_bands, deep, (1, 8), None, None)
    assert "has 3 band(s), and bands (1, 8) are wanted; set config.data.bands" in text
    four = write_raster(tmp_path / "four.tif", random((8, 8, 4), np.uint16))
    for text in (error_of(read_image, four), error_of(read_bands, four, None, (0, 1), None)):
        assert "has 4 bands, of which none is named red, green or blue; choose some with config.data.bands" in text
    waves = write_raster(tmp_path / "waves.tif", np.ones((8, 8, 3), np.complex64))
    assert "holds complex64" in error_of(read_bands, waves, None, (0, 1), None)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "missing", "loop"])
@pytest.mark.parametrize("reader", ["RGB", "bands"])
def test_unreadable_images_are_named(tmp_path, capfd, damage, reader):
    path = pathlib.Path(write_raster(tmp_path / "a.tif", random((64, 64, 3), np.uint8)))
    content = path.read_bytes()
    path.unlink()
    if damage == "loop":
        path.symlink_to(path)
    elif damage != "missing":
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"<html>"}[damage])
    read = read_image if reader == "RGB" else lambda path: read_bands(path, (1, 2, 3), None, None)
    assert error_of(read, str(path)).startswith(f"cannot read {path}: ")
    assert capfd.readouterr() == ("", "")  # GDAL adds nothing of its own


def test_a_truncated_png_is_named(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(random((64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])
    assert error_of(read_image, str(path)).startswith(f"cannot read {path}: ")


def test_names_in_chinese_and_suffixes_in_any_case(tmp_path):
    values = random((32, 32, 4), np.uint16)
    write_raster(tmp_path / "数据/img_dir/train/草地_１.TIF", values)
    write_raster(tmp_path / "数据/img_dir/train/云.Tiff", values)
    for name in ("草地_１.PNG", "云.png"):
        path = tmp_path / "数据/ann_dir/train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ones((32, 32), np.uint8)).save(path)
    source = FolderSource(tmp_path / "数据", "train", num_classes=2, bands=(4, 1), scale=(0, 4000))
    assert source.names == ("云", "草地_１")
    wanted = stretch(values[..., [3, 0]], 0, 4000)
    for tile in source:
        np.testing.assert_array_equal(tile["image"], wanted)


def test_a_loop_of_symbolic_links_in_place_of_a_folder(tmp_path):
    (tmp_path / "img_dir").mkdir()
    (tmp_path / "img_dir" / "train").symlink_to(tmp_path / "img_dir" / "train")
    assert "img_dir/train" in error_of(FolderSource, tmp_path, "train", num_classes=2)


def test_stretch():
    values = np.array([[[0.0, 10.0], [np.nan, 99.0]]])
    assert stretch(values, 0, 20).tolist() == [[[0, 127], [0, 255]]]
    assert stretch(values, (0, 10), (1, 20)).tolist() == [[[0, 0], [0, 255]]]
    assert minmax(values) == (0.0, 99.0)
    assert not stretch(np.full((2, 2, 3), 7), 7, 7).any()  # a constant patch
    for high in (*range(1, 65536, 7), 0.3, 0.7, 1e-3):
        assert stretch(np.array([[[high]]]), 0, high)[0, 0, 0] == 255
