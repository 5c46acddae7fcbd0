"""How scenes are read: data and nodata, alpha, palettes; an odd or broken one gives a right map or one line."""

import numpy as np
import pytest
import rasterio
import scene_files as sf
from PIL import Image
from rasterio.enums import ColorInterp

from ktda_jax import UserError
from ktda_jax.data.images import Reading, read_bands
from ktda_jax.data.raster import RowReader, open_scene
from ktda_jax.prediction.mapping import trained_reading

READING = Reading()


def alpha(values):
    holes = np.full((*values.shape[:2], 1), 255, np.uint8)
    holes[10:50, 20:60] = 0
    rgba = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)
    return np.concatenate([values, holes], -1), dict(colorinterp=rgba), None


def declared(values):
    values[10:50, 20:60] = 7
    return values, dict(nodata=7), None


def given(values):
    values[10:50, 20:60] = 7
    return values, {}, Reading(nodata=7)


def not_numbers(values):
    values = values.astype(np.float32)
    values[10:50, 20:60] = np.nan
    values[5, 5, 0] = np.nan  # one band alone: the pixel has data
    return values, {}, Reading(scale=(0, 255))


@pytest.mark.parametrize("how", [alpha, declared, given, not_numbers])
def test_where_the_scene_has_no_data_the_map_has_none(tmp_path, how):
    values, profile, reading = how(sf.smooth(130, 140) | 8)
    sf.map_one(sf.write(tmp_path / "scene.tif", values, **profile), tmp_path / "map.tif", reading=reading or Reading())
    missing = np.zeros((130, 140), bool)
    missing[10:50, 20:60] = True
    np.testing.assert_array_equal(sf.read(tmp_path / "map.tif") == 255, missing)


@pytest.mark.parametrize("nodata", [None, 0])
def test_a_mask_within_the_file(tmp_path, nodata):
    """It counts beside a value that a training or a flag gives."""
    path, missing = tmp_path / "scene.tif", np.zeros((130, 140), bool)
    missing[10:50, 20:60] = True
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        sf.write(path, sf.smooth(130, 140) | 1)
        with rasterio.open(path, "r+") as file:
            file.write_mask(~missing)
    sf.map_one(path, tmp_path / "map.tif", reading=Reading(nodata=nodata))
    np.testing.assert_array_equal(sf.read(tmp_path / "map.tif") == 255, missing)


def pixels_of(path, reading=READING):
    scene = open_scene(path, reading, 3)
    with RowReader(scene) as reader:
        pixels, present = reader.rows(0, scene.height)
    return np.moveaxis(pixels, 0, -1), present


def test_plain_rgb_keeps_a_band_that_equals_nodata(tmp_path):
    """As Pillow reads it for a training; one that chose bands has 0 there."""
    values = sf.smooth(40, 50)
    values[3, 4], values[5, 6] = (255, 200, 210), 255
    path = sf.write(tmp_path / "scene.tif", values, nodata=255)
    pixels, present = pixels_of(path)
    assert tuple(pixels[3, 4]) == (255, 200, 210) and present.sum() == 40 * 50 - 1 and not present[5, 6]
    chosen = trained_reading(dict(bands=(1, 2, 3)))
    np.testing.assert_array_equal(pixels_of(path, chosen)[0], read_bands(str(path), (1, 2, 3), None, None)[0])
    assert tuple(pixels_of(path, chosen)[0][3, 4]) == (0, 200, 210)


def test_alpha_of_a_picture_may_be_soft(tmp_path):
    """PNG, and grey with alpha, have no band that could be infrared."""
    values, alpha = sf.smooth(60, 70), np.repeat(np.uint8([0, 128, 255]), 20)[:, None] + np.zeros((1, 70), np.uint8)
    for bands in (3, 1):
        path = tmp_path / f"{bands}.png"
        Image.fromarray(np.dstack([values[..., :bands], alpha])).save(path)
        pixels, present = pixels_of(path)
        np.testing.assert_array_equal(present, alpha > 0)
        np.testing.assert_array_equal(pixels[20:], np.broadcast_to(values[20:, :, :bands], (40, 70, 3)))


def test_a_lake_is_no_hole(tmp_path):
    """Data only where no sample of the fourth band is taken, and water, whose near infrared is 0."""
    values = np.zeros((2000, 2000, 4), np.uint8)
    values[300:500, 300:500] = 100
    values[350:400, 350:400, 3] = 0
    _, present = pixels_of(sf.write(tmp_path / "scene.tif", values), Reading(bands=(1, 2, 3)))
    assert present[350:400, 350:400].all()


def test_near_infrared_is_no_alpha(tmp_path):
    """GDAL calls every fourth band of 8 bits alpha; as a band of the model it is data, also where it is 0."""
    values = sf.smooth(100, 100, bands=4)
    path = sf.write(tmp_path / "scene.tif", values)
    with rasterio.open(path) as file:
        assert file.colorinterp[3] == ColorInterp.alpha
    sf.map_one(path, tmp_path / "four.tif", stub=sf.model(bands=4, classes=4), reading=Reading(bands=(1, 2, 3, 4)))
    np.testing.assert_array_equal(sf.read(tmp_path / "four.tif"), values.argmax(-1))
    sf.map_one(path, tmp_path / "three.tif")
    np.testing.assert_array_equal(sf.read(tmp_path / "three.tif"), values[..., :3].argmax(-1))


def test_palette_and_grey_are_read_as_colours(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
    numbers = sf.smooth(90, 100, bands=1)
    path = tmp_path / "palette.png"
    picture = Image.fromarray(numbers[..., 0], "P")
    picture.putpalette(colours.tobytes())
    picture.save(path)
    sf.map_one(path, tmp_path / "map.tif")
    np.testing.assert_array_equal(sf.read(tmp_path / "map.tif"), colours[numbers[..., 0]].argmax(-1))
    with RowReader(open_scene(sf.write(tmp_path / "grey.tif", numbers), Reading(), 3)) as reader:
        np.testing.assert_array_equal(reader.rows(0, 90)[0], np.repeat(numbers[..., 0][None], 3, 0))


def test_bands_and_stretch_are_those_of_training(tmp_path):
    values = np.random.default_rng(0).integers(0, 5000, (80, 90, 5)).astype(np.uint16)
    path = sf.write(tmp_path / "scene.tif", values)
    reading = Reading(bands=(4, 2, 5), scale=((0, 4000), (100, 3000), (0, 5000)))
    expected, _ = read_bands(str(path), reading.bands, reading.scale, None)
    with RowReader(open_scene(path, reading, 3)) as reader:
        np.testing.assert_array_equal(reader.rows(0, 80)[0], np.moveaxis(expected, -1, 0))


@pytest.mark.parametrize(
    "profile",
    [dict(), dict(tiled=True, blockxsize=16, blockysize=32), dict(tiled=True, blockxsize=128, blockysize=128),
     dict(blockysize=300), dict(interleave="band", blockysize=7)],
)  # fmt: skip
def test_rows_however_the_file_is_laid_out(tmp_path, profile, monkeypatch):
    monkeypatch.setattr("ktda_jax.data.raster.CHUNK", 3000)
    monkeypatch.setattr("ktda_jax.data.raster.TALLEST_BLOCK", 128)
    values = sf.smooth(300, 210)
    path = sf.write(tmp_path / "scene.tif", values, **profile)
    with RowReader(open_scene(path, Reading(), 3)) as reader:
        for first in (0, 48, 96, 144, 192, 236):
            pixels, present = reader.rows(first, first + 64)
            np.testing.assert_array_equal(np.moveaxis(pixels, 0, -1), values[first : first + 64])
            assert present.shape == (64, 210) and present.all()


def test_a_scene_without_data_and_one_without_a_place(tmp_path):
    path = sf.write(tmp_path / "scene.tif", np.zeros((100, 90, 3), np.uint8), nodata=0, crs=None)
    said = sf.map_one(path, tmp_path / "map.tif")
    assert said[:2] == [
        f"warning: {path}: no CRS; their maps will have none either",
        f"warning: {path} holds no data at all; its map is all 255",
    ]
    assert (sf.read(tmp_path / "map.tif") == 255).all()


def test_values_of_another_unit_are_said(tmp_path):
    """Reflectance from 0 to 1, where the training stretched 0 to 3000."""
    path = sf.write(tmp_path / "scene.tif", sf.smooth(100, 90).astype(np.float32) / 256)
    said = sf.map_one(path, tmp_path / "map.tif", reading=Reading(scale=(0, 3000)))
    assert said[0] == f"warning: {path}: all its values become 0 with --scale=(0, 3000); is its unit another?"
    assert not any("warning" in line for line in sf.map_one(path, tmp_path / "map.tif", reading=Reading(scale=(0, 1))))


def two_bands(path):
    sf.write(path, sf.smooth(60, 60, bands=2), photometric="MINISBLACK")
    return Reading(), 3, "has 2 bands, of which none is named .*; choose some with --bands, such as --bands=1,2,3"


def too_few(path):
    sf.write(path, sf.smooth(60, 60))
    return Reading(bands=(2, 3, 4, 8)), 4, r"has 3 band.*, and bands \(2, 3, 4, 8\) are wanted; set --bands"


def bands_unknown(path):
    sf.write(path, sf.smooth(60, 60, bands=4))
    return Reading(), 4, "has 4 band.*, and the model takes 4; set --bands"


def sixteen_bits(path):
    sf.write(path, sf.smooth(60, 60).astype(np.uint16))
    return Reading(), 3, "holds uint16 from 0 to .*, not 8-bit values; set --scale=LOW,HIGH"


def complex_numbers(path):
    sf.write(path, sf.smooth(60, 60).astype(np.complex64))
    return Reading(scale=(0, 1)), 3, "holds complex64; only whole and floating numbers"


def stretched_palette(path):
    Image.fromarray(sf.smooth(60, 60)).quantize(16).save(path)
    return Reading(scale=(0, 100)), 3, "holds numbers of colours, which cannot be stretched"


def no_raster(path):
    path.write_bytes(b"not a raster" * 100)
    return Reading(), 3, "cannot read .*scene.tif: .*not recognized"


def empty(path):
    path.write_bytes(b"")
    return Reading(), 3, "cannot read .*scene.tif: "


def truncated(path):
    sf.write(path, np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:200_000])
    return Reading(), 3, "cannot read .*scene.tif: "


@pytest.mark.parametrize(
    "spoil",
    [two_bands, too_few, bands_unknown, sixteen_bits, complex_numbers, stretched_palette,
     no_raster, empty, truncated],
)  # fmt: skip
def test_a_scene_that_cannot_be_mapped_is_named_and_leaves_nothing(tmp_path, spoil):
    path = tmp_path / "scene.tif"
    reading, bands, message = spoil(path)
    with pytest.raises(UserError, match=message) as error:
        sf.map_one(path, tmp_path / "maps" / "map.tif", stub=sf.model(bands=bands), reading=reading)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not list(tmp_path.glob("maps/*"))
