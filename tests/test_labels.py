"""Label files of every kind that users bring: which classes they hold, or the one line that says what is wrong."""

import struct
import zlib

import cv2
import numpy as np
import pytest
import rasterio
from PIL import Image
from test_images import error_of, write_raster

from ktda_jax.data.labels import label_size, read_label


def write_label(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)
    return str(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_stored_values_become_classes(tmp_path, dtype):
    values = np.array([[0, 64, 128], [255, 192, 64]], dtype)
    path = write_label(tmp_path / "biome.tif", values)
    mapping = {0: 255, 64: 1, 128: 0, 192: 2, 255: 3}
    assert read_label(path, mapping).tolist() == [[255, 1, 0], [3, 2, 1]]
    del mapping[192], mapping[64]
    text = error_of(read_label, path, mapping)
    assert path in text and "values that config.data.label_map does not name: 64, 192; add them" in text


def test_negative_values_can_be_mapped(tmp_path):
    path = write_label(tmp_path / "a.tif", np.array([[-1, 7], [7, 300]], np.int32))
    assert read_label(path, {-1: 255, 7: 0, 300: 1}).tolist() == [[255, 0], [0, 1]]
    assert "holds values from -1 to 300" in error_of(read_label, path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colours_become_classes(tmp_path, mode):
    colours = np.array([[(255, 0, 0), (0, 255, 1)], [(0, 0, 0), (255, 0, 0)]], np.uint8)
    Image.fromarray(colours).convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / "drawn.png")
    path = str(tmp_path / "drawn.png")
    assert read_label(path, {(255, 0, 0): 0, (0, 255, 1): 1, (0, 0, 0): 255}).tolist() == [[0, 1], [255, 0]]
    assert "colours that config.data.label_map does not name: (0, 255, 1)" in error_of(
        read_label, path, {(255, 0, 0): 0, (0, 0, 0): 255}
    )


def test_tiff_labels_whose_numbers_pillow_would_change(tmp_path):
    """8-bit signed and 32-bit unsigned numbers keep their value; what cannot be told is refused."""
    for dtype, extreme in (("int8", -1), ("uint32", 2**32 - 1)):
        path = write_raster(tmp_path / f"{dtype}.tif", np.array([extreme, 3], dtype).reshape(1, 2, 1))
        assert read_label(path, {extreme: 255, 3: 0}).tolist() == [[255, 0]]
        assert "holds values from" in error_of(read_label, path)
    two = write_raster(tmp_path / "two.tif", np.ones((4, 4, 2), np.uint8))
    assert "has 2 bands, not one of class indices" in error_of(read_label, two)
    path = str(tmp_path / "inverted.tif")
    Image.fromarray(np.ones((4, 4), np.uint8)).save(path, tiffinfo={262: 0})
    assert "white as 0" in error_of(read_label, path)


def test_what_is_wrong_with_a_label_is_one_line(tmp_path):
    floats = write_label(tmp_path / "float.tif", np.full((4, 4), 0.5, np.float32))
    assert f"label {floats} holds fractions, such as 0.5; write the index" in error_of(read_label, floats)
    drawn = write_label(tmp_path / "drawn.png", np.zeros((4, 4, 3), np.uint8))
    assert "has 3 bands, not one of" in (text := error_of(read_label, drawn)) and "config.data.label_map" in text
    grey = write_label(tmp_path / "grey.tif", np.zeros((4, 4), np.int32))
    text = error_of(read_label, grey, {(0, 0, 0): 0})
    assert "holds 1 band(s) of int32, not 8-bit RGB, though config.data.label_map maps colours" in text


def test_labels_of_other_depths(tmp_path):
    label = np.random.default_rng(0).integers(0, 3, (32, 40), np.uint8)
    path = str(tmp_path / "label.png")
    cv2.imwrite(path, label.astype(np.uint16))
    np.testing.assert_array_equal(read_label(path), label)
    cv2.imwrite(path, label.astype(np.uint16) + 300)
    assert "302" in error_of(read_label, path)
    Image.fromarray(label == 1).save(path)
    np.testing.assert_array_equal(read_label(path), label == 1)  # one bit: classes 0 and 1


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_labels_of_few_bits_keep_their_numbers(tmp_path, bits):
    # Pillow stretches these to 0..255 on reading (2 bits: 0, 85, 170, 255), which would turn 3 into 'ignore'.
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8 // bits, 1, bits, 0, 0, 0, 0)  # one byte of pixels
    pixels = zlib.compress(bytes([0, 0b00_01_10_11]))
    path = tmp_path / "label.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    assert read_label(str(path)).tolist() == {2: [[0, 1, 2, 3]], 4: [[0b0001, 0b1011]]}[bits]


@pytest.mark.parametrize(
    "dtype, options",
    [("int64", {}), ("uint64", {}), ("float64", {}), ("float32", {}), ("int8", {}), ("uint32", dict(ENDIANNESS="BIG")),
     ("int16", dict(compress="lzw", predictor=2)), ("uint8", dict(compress="lerc", max_z_error=0)),
     ("int64", dict(BIGTIFF="YES")), ("uint16", dict(compress="deflate", tiled=True, blockxsize=16, blockysize=16)),
     ("uint8", dict(nbits=3))],
)  # fmt: skip
def test_whole_numbers_are_labels_whatever_their_type(tmp_path, dtype, options):
    """GDAL's rasterize writes float64 in places, and GIS software 64 bits: Pillow knows neither."""
    label = np.random.default_rng(0).integers(0, 5, (40, 50)).astype(dtype)
    path = write_raster(tmp_path / "label.tif", label[..., None], **options)
    read = read_label(path)
    assert read.dtype == np.uint8 and label_size(path) == (40, 50)
    np.testing.assert_array_equal(read, label)
    np.testing.assert_array_equal(read_label(path, {k: 4 - k for k in range(5)}), 4 - label)


def test_lossless_webp(tmp_path):
    """Three bands, since WEBP knows no single one: a mask drawn in colours."""
    label = np.random.default_rng(0).integers(0, 3, (40, 50))
    drawn = np.uint8([(255, 0, 0), (0, 200, 0), (7, 7, 7)])[label]
    path = write_raster(tmp_path / "label.tif", drawn, compress="webp", webp_lossless=True)
    np.testing.assert_array_equal(read_label(path, {(255, 0, 0): 0, (0, 200, 0): 1, (7, 7, 7): 2}), label)


def test_numbers_keep_all_their_digits(tmp_path):
    extreme = np.array([[2**64 - 1, 2**63], [0, 5]], np.uint64)
    path = write_raster(tmp_path / "label.tif", extreme[..., None])
    assert read_label(path, {2**64 - 1: 1, 2**63: 2, 0: 0, 5: 255, -7: 3}).tolist() == [[1, 2], [0, 255]]
    assert f"does not name: {2**64 - 1}; add" in error_of(read_label, path, {2**63: 2, 0: 0, 5: 255})
    assert f"holds values from 0 to {2**64 - 1}; class indices must fit" in error_of(read_label, path)


@pytest.mark.parametrize("mapping", [None, {0: 0, 1: 1}])
def test_floating_labels(tmp_path, mapping):
    """Whole ones are taken, no number is no label, and fractions and infinity are named."""
    path = write_raster(tmp_path / "a.tif", np.float64([[0, 1], [np.nan, 1]])[..., None])
    assert read_label(path, mapping).tolist() == [[0, 1], [255, 1]]
    for value, shown in ((0.25, "0.25"), (np.inf, "inf")):
        path = write_raster(tmp_path / "b.tif", np.float32([[0, 1], [value, 1]])[..., None])
        assert f"holds fractions, such as {shown};" in error_of(read_label, path, mapping)


@pytest.mark.parametrize("nodata", [-9999.0, -3.4028234663852886e38])
def test_what_a_floating_label_declares_as_no_data_is_ignored(tmp_path, nodata):
    path = write_raster(tmp_path / "a.tif", np.float32([[0, 1], [nodata, 1]])[..., None], nodata=nodata)
    assert read_label(path).tolist() == read_label(path, {0: 0, 1: 1}).tolist() == [[0, 1], [255, 1]]


def test_several_bands_are_named_for_what_they_are(tmp_path):
    classes = np.random.default_rng(0).integers(0, 4, (20, 20))
    for one in (1, 255):
        path = write_raster(tmp_path / "a.tif", np.eye(4, dtype=np.uint8)[classes] * one, photometric="MINISBLACK")
        assert "one band per class, it seems" in error_of(read_label, path)
    path = write_raster(tmp_path / "a.tif", np.full((8, 8, 3), 7, np.uint8))
    assert "has 3 bands" in (text := error_of(read_label, path)) and "per class" not in text


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_alpha_beside_class_numbers(tmp_path, extension):
    """Opaque everywhere it says nothing; else nobody can tell whether transparent is background or unlabelled."""
    label, alpha = np.random.default_rng(0).integers(0, 4, (20, 20), np.uint8), np.full((20, 20), 255, np.uint8)
    path = tmp_path / f"a.{extension}"
    Image.merge("LA", [Image.fromarray(label), Image.fromarray(alpha)]).save(path)
    np.testing.assert_array_equal(read_label(str(path)), label)
    alpha[:5] = 0
    Image.merge("LA", [Image.fromarray(label), Image.fromarray(alpha)]).save(path)
    assert "alpha band that is not opaque" in error_of(read_label, str(path))


def test_transparent_colours_of_a_palette_are_numbers_like_others(tmp_path):
    label = np.random.default_rng(0).integers(0, 4, (20, 20), np.uint8)
    picture = Image.fromarray(label)
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.save(tmp_path / "a.png", transparency=0)
    np.testing.assert_array_equal(read_label(str(tmp_path / "a.png")), label)
    colours = {(0, 0, 0): 0, (255, 0, 0): 1, (0, 255, 0): 2, (0, 0, 255): 3}
    np.testing.assert_array_equal(read_label(str(tmp_path / "a.png"), colours), label)


def test_red_green_and_blue_with_a_band_that_nobody_named(tmp_path):
    label = np.random.default_rng(0).integers(0, 2, (20, 20))
    drawn = np.dstack([np.uint8([(255, 0, 0), (0, 200, 0)])[label], np.full((20, 20), 9, np.uint8)])
    path = write_raster(tmp_path / "a.tif", drawn, photometric="RGB")
    np.testing.assert_array_equal(read_label(path, {(255, 0, 0): 0, (0, 200, 0): 1}), label)


def test_a_mask_larger_than_pillow_allows(tmp_path):
    """Pillow takes 180 Mpixel for a decompression bomb; the header of one of 200 is all that is read here."""
    path = tmp_path / "large.tif"
    options = dict(driver="GTiff", height=14_200, width=14_200, count=1, dtype="uint8", SPARSE_OK=True, compress="lzw")
    with rasterio.open(path, "w", **options):
        pass
    assert label_size(str(path)) == (14_200, 14_200) and read_label(str(path)).shape == (14_200, 14_200)
