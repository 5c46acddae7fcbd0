"""Image files of every kind that users bring: what comes out, or the one line that says what is wrong."""

import pathlib
import warnings

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp

from ktda_jax import UserError
from ktda_jax.data.check import check_split
from ktda_jax.data.images import Reading, read_bands, read_image
from ktda_jax.data.raster import RowReader, open_scene
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


def soft_alpha(size=80):
    """uint8 (size, size): 0 outside, a ramp of 6 pixels, 255 in the middle."""
    inside = np.minimum(np.arange(size), np.arange(size)[::-1])
    return np.clip((np.minimum(inside[:, None], inside) - 9) * 40, 0, 255).astype(np.uint8)


def soft_png(path, values, alpha):
    Image.fromarray(np.dstack([values, alpha])).save(path.with_suffix(".png"))
    return path.with_suffix(".png"), (1, 2, 3), None


def soft_grey(path, values, alpha):
    Image.fromarray(np.dstack([values[..., 0], alpha]), "LA").save(path.with_suffix(".png"))
    return path.with_suffix(".png"), (1,), None


def soft_tiff(path, values, alpha, scale=None):
    kinds = ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha
    write_raster(path, np.dstack([values, alpha]), photometric="RGB", alpha="unspecified")
    with rasterio.open(path, "r+") as file:
        file.colorinterp = kinds
    return path, (1, 2, 3), scale


def soft_grey_tiff(path, values, alpha):
    write_raster(path, np.dstack([values[..., 0], alpha]))
    with rasterio.open(path, "r+") as file:
        file.colorinterp = ColorInterp.gray, ColorInterp.alpha
    return path, (1,), None


def soft_16_bits(path, values, alpha):
    return soft_tiff(path, values * np.uint16(200), alpha * np.uint16(257), (0, 51000))


@pytest.mark.parametrize("nodata", [None, 7])
@pytest.mark.parametrize("make", [soft_png, soft_grey, soft_tiff, soft_grey_tiff, soft_16_bits])
def test_soft_edges_of_an_alpha_band_mean_the_same_everywhere(tmp_path, make, nodata):
    """Training, inspection (which reads as training) and prediction: what is transparent altogether is no data."""
    values, alpha = random((80, 80, 3), np.uint8) | 8, soft_alpha()
    path, bands, scale = make(tmp_path / "a.tif", values, alpha)
    pixels, present = read_bands(str(path), bands, scale, nodata)
    np.testing.assert_array_equal(present, alpha > 0)
    assert 0.05 < np.isin(alpha[present], range(1, 255)).mean() and not pixels[~present].any()
    scene = open_scene(path, Reading(bands, scale, nodata, by_band=True), len(bands))
    with RowReader(scene) as reader:
        mapped = reader.rows(0, 80)
        np.testing.assert_array_equal(np.moveaxis(mapped[0], 0, -1), pixels)
        np.testing.assert_array_equal(mapped[1], present)


@pytest.mark.parametrize("kind", [ColorInterp.alpha, ColorInterp.undefined])
def test_near_infrared_is_data_whatever_it_is_called(tmp_path, kind):
    """Noise, patches of which a third is saturated, and what looks like soft edges but never reaches 255."""
    for number, infrared in enumerate([random((80, 80), np.uint8) // 2 * (random((80, 80), np.uint8, 1) > 60),
                                       np.uint8([0, 90, 200, 255]).repeat(20)[:, None] * np.ones(80, np.uint8),
                                       soft_alpha() // 2]):  # fmt: skip
        values = np.dstack([random((80, 80, 3), np.uint8), infrared.astype(np.uint8)])
        path = write_raster(tmp_path / f"{number}.tif", values, photometric="RGB")
        with rasterio.open(path, "r+") as file:
            file.colorinterp = *file.colorinterp[:3], kind
        assert (infrared == 0).any() and read_bands(path, (1, 2, 3), None, None)[1].all()
        with RowReader(open_scene(pathlib.Path(path), Reading((1, 2, 3)), 3)) as reader:
            assert reader.rows(0, 80)[1].all()


def test_a_given_value_stands_before_the_declared_one_but_not_before_a_mask(tmp_path):
    values = np.full((8, 9, 3), 50, np.uint8)
    values[0], values[1] = 7, 9
    path = write_raster(tmp_path / "declared.tif", values, nodata=7)
    np.testing.assert_array_equal(read_bands(path, None, None, 9)[1], values[..., 0] != 9)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        path = write_raster(tmp_path / "masked.tif", values)
        with rasterio.open(path, "r+") as file:
            file.write_mask(values[..., 0] != 7)
    np.testing.assert_array_equal(read_bands(path, None, None, 9)[1], values[..., 0] == 50)


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
