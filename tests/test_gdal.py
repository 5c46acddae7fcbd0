"""One reader: what training reads of a file is what prediction reads of it, upright, and what GDAL says it is."""

import concurrent.futures
import pathlib
import struct
import zlib

import numpy as np
import pytest
import rasterio
from PIL import Image
from test_images import error_of, write_raster

from ktda_jax import UserError
from ktda_jax.data import plain
from ktda_jax.data.gdal import upright
from ktda_jax.data.images import Reading, read_bands, read_image
from ktda_jax.data.labels import label_size, read_label
from ktda_jax.data.raster import RowReader, open_scene


def blocks(height=60, width=44, seed=0):
    """uint8 (H, W, 3) with hard edges between colours."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (-(-height // 4), -(-width // 4), 3), np.uint8)
    return np.kron(small, np.ones((4, 4, 1), np.uint8))[:height, :width]


def predicted(path, reading=Reading(), bands=3):  # noqa: B008 (frozen)
    """uint8 (H, W, bands) as prediction reads a scene, in two steps."""
    with RowReader(open_scene(pathlib.Path(path), reading, bands)) as reader:
        height = reader._scene.height
        parts = [reader.rows(0, height // 2)[0].copy(), reader.rows(height // 2, height)[0].copy()]
    return np.moveaxis(np.concatenate(parts, 1), 0, -1)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def grey_png(path, bits):
    pixels = zlib.compress(b"".join(b"\0" + bytes((7 * row + k) % 256 for k in range(8 * bits)) for row in range(60)))
    header = struct.pack(">IIBBBBB", 64, 60, bits, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))


ZOO = {
    "rgb.png": lambda p: Image.fromarray(blocks()).save(p),
    "rgba.png": lambda p: Image.fromarray(np.dstack([blocks(), np.full((60, 44), 255, np.uint8)])).save(p),
    "palette.png": lambda p: Image.fromarray(blocks()).quantize(20).save(p),
    "grey.png": lambda p: Image.fromarray(blocks()[..., 0]).save(p),
    "grey_alpha.png": lambda p: Image.fromarray(blocks()).convert("LA").save(p),
    "grey1.png": lambda p: grey_png(p, 1),
    "grey2.png": lambda p: grey_png(p, 2),
    "grey4.png": lambda p: grey_png(p, 4),
    "full.jpg": lambda p: Image.fromarray(blocks()).save(p, quality=90, subsampling=0),
    "half.jpg": lambda p: Image.fromarray(blocks()).save(p, quality=90, subsampling=2),
    "progressive.jpg": lambda p: Image.fromarray(blocks()).save(p, quality=90, progressive=True),
    "grey.jpg": lambda p: Image.fromarray(blocks()[..., 0]).save(p),
    "strips.tif": lambda p: Image.fromarray(blocks()).save(p, tiffinfo={278: 7}),
    "lzw.tif": lambda p: Image.fromarray(blocks()).save(p, compression="tiff_lzw"),
    "jpeg.tif": lambda p: Image.fromarray(blocks()).save(p, compression="jpeg"),
    "white_is_0.tif": lambda p: Image.fromarray(blocks()[..., 0]).save(p, tiffinfo={262: 0}),
    "one_bit.tif": lambda p: Image.fromarray(blocks()[..., 0] > 99).save(p),
    "planes.tif": lambda p: write_raster(p, blocks(), interleave="band", tiled=True, blockxsize=16, blockysize=32),
    "unnamed.tif": lambda p: write_raster(p, blocks(), photometric="MINISBLACK"),
    "fourth.tif": lambda p: write_raster(p, np.dstack([blocks(), blocks()[..., 0]]), photometric="RGB"),
    "big.tif": lambda p: write_raster(p, blocks(), BIGTIFF="YES", compress="zstd"),
}  # fmt: skip


@pytest.mark.parametrize("name", ZOO)
def test_training_and_prediction_read_the_same(tmp_path, name):
    path = tmp_path / name
    ZOO[name](path)
    pixels = read_image(str(path))
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, predicted(path))
    np.testing.assert_array_equal(pixels, read_bands(str(path), None, None, None)[0])
    if path.suffix != ".jpg" and name not in ("jpeg.tif", "fourth.tif", "unnamed.tif"):  # nothing for Pillow
        with Image.open(path) as file:
            np.testing.assert_array_equal(pixels, np.asarray(file.convert("RGB")))


@pytest.mark.parametrize("name", ["rgb.png", "grey.png", "strips.tif", "grey.tif", "big_endian.tif", "lzw.tif"])
def test_plain_files_are_what_gdal_makes_of_them(tmp_path, name):
    """They are read by OpenCV, also with a byte changed anywhere or cut short; None is for GDAL to say."""
    path, rng = tmp_path / name, np.random.default_rng(0)
    if name in ZOO:
        ZOO[name](path)
    elif name == "grey.tif":
        Image.fromarray(blocks()[..., 0]).save(path)
    else:
        write_raster(path, blocks(), ENDIANNESS="BIG", blockysize=7)
    with rasterio.open(path) as file:
        wanted = np.moveaxis(file.read(), 0, -1)
    assert (plain.decode(str(path)) is None) == (name == "lzw.tif")
    data, equal = path.read_bytes(), 0
    for place in (None, *rng.integers(8, len(data), 300)):
        damaged = bytearray(data)
        if place is not None:
            damaged[place] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        found = plain.decode(str(path))
        if found is not None:
            with rasterio.open(path) as file:
                np.testing.assert_array_equal(found.reshape(*found.shape[:2], -1), np.moveaxis(file.read(), 0, -1))
            equal += np.array_equal(found.reshape(wanted.shape), wanted)
    assert equal or name == "lzw.tif"
    for end in (30, len(data) // 2, len(data) - 13):
        path.write_bytes(data[:end])
        assert plain.decode(str(path)) is None


@pytest.mark.parametrize("compress", ["none", "deflate", "lzw"])
@pytest.mark.parametrize("nodata", [None, 7])
def test_blocks_that_are_not_stored(tmp_path, compress, nodata):
    """They lie at offset 0, where the file's header is; they hold no data, or 0."""
    values = blocks(128, 128)
    path = tmp_path / "sparse.tif"
    options = dict(driver="GTiff", height=128, width=128, dtype="uint8", tiled=True, blockxsize=64, blockysize=64,
                   SPARSE_OK=True, nodata=nodata, compress=compress)  # fmt: skip
    for count in (3, 1):
        with rasterio.open(path, "w", count=count, **options) as file:
            file.write(np.moveaxis(values, -1, 0)[:count, :64, 64:], window=((0, 64), (64, 128)))
        wanted = np.full((128, 128, 3), nodata or 0, np.uint8)
        wanted[:64, 64:] = values[:64, 64:] if count == 3 else values[:64, 64:, :1]
        np.testing.assert_array_equal(read_image(str(path)), wanted)
        read, present = read_bands(str(path), (1,), None, None)
        np.testing.assert_array_equal(read[..., 0], np.where(present, wanted[..., 0], 0))
        if nodata is None:
            np.testing.assert_array_equal(predicted(path), wanted)
    np.testing.assert_array_equal(read_label(str(path)), wanted[..., 0])


def save_turned(path, array, number, **options):
    """array as stored, with the tag that says how it is meant."""
    image = Image.fromarray(array)
    if path.suffix == ".tif":
        return image.save(path, tiffinfo={274: number}, **options)
    exif = Image.Exif()
    exif[274] = number
    return image.save(path, exif=exif, **options)


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif", "lzw.tif", "a.jpg"])
def test_images_and_labels_are_read_upright(tmp_path, name, number):
    """As viewers, annotation tools and OpenCV show them: Pillow turns a copy for us."""
    stored, path = blocks(), tmp_path / name
    save_turned(path, stored, number, **{"a.jpg": dict(quality=95)}.get(name, {"compression": "tiff_lzw"} if
                "lzw" in name else {}))  # fmt: skip
    wanted = np.moveaxis(upright(np.moveaxis(stored, -1, 0), number), 0, -1)
    assert wanted.shape == ((60, 44, 3) if number < 5 else (44, 60, 3))
    read = read_image(str(path))
    if path.suffix == ".jpg":
        assert read.shape == wanted.shape and np.abs(read.astype(int) - wanted).mean() < 16
    else:
        np.testing.assert_array_equal(read, wanted)
    np.testing.assert_array_equal(predicted(path), read)
    np.testing.assert_array_equal(read_bands(str(path), (1, 2, 3), None, None)[0], read)
    if path.suffix != ".jpg":
        save_turned(path, stored[..., 0] % 4, number)
        np.testing.assert_array_equal(read_label(str(path)), wanted[..., 0] % 4)
        assert label_size(str(path)) == wanted.shape[:2]


def test_a_tag_behind_the_pixels_counts(tmp_path):
    """PNG allows it there, and some programs put it there."""
    path = tmp_path / "a.png"
    save_turned(path, blocks(), 6)
    data = path.read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    path.write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    np.testing.assert_array_equal(read_image(str(path)), np.rot90(blocks(), -1))


@pytest.mark.parametrize("bigtiff", ["NO", "YES"])
def test_what_lies_on_earth_is_read_as_it_is_stored(tmp_path, bigtiff):
    """A GeoTIFF's place is that of the stored pixels, as GDAL has it; a tag of orientation then says nothing."""
    place = dict(crs="EPSG:32632", transform=rasterio.Affine(10, 0, 5e5, 0, -10, 5e6))
    for located in (place, {}):
        path = pathlib.Path(write_raster(tmp_path / "a.tif", blocks(), BIGTIFF=bigtiff, **located))
        add_orientation(path, 3)
        turned = blocks()[::-1, ::-1]
        np.testing.assert_array_equal(read_image(str(path)), blocks() if located else turned)
        np.testing.assert_array_equal(predicted(path), blocks() if located else turned)


def add_orientation(path, number):
    """A copy of the first directory with one more tag, at the end of the file."""
    data = bytearray(path.read_bytes())
    big = data[2] == 43
    where, count, entry = (8, "Q", 20) if big else (4, "H", 12)
    offset = struct.unpack_from("<Q" if big else "<I", data, where)[0]
    size = struct.calcsize(count)
    number_of = struct.unpack_from("<" + count, data, offset)[0]
    tags = [bytes(data[offset + size + k * entry :][:entry]) for k in range(number_of)]
    added = struct.pack("<HHQQ" if big else "<HHII", 274, 3, 1, number)
    tags = sorted([*tags, added], key=lambda tag: struct.unpack_from("<H", tag)[0])
    data += b"\0" * (len(data) % 2)
    struct.pack_into("<Q" if big else "<I", data, where, len(data))
    path.write_bytes(bytes(data) + struct.pack("<" + count, len(tags)) + b"".join(tags) + b"\0" * 8)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "progressive.jpg", "a.tif", "lzw.tif", "deflate.tif", "jpeg.tif"])
def test_half_a_file_is_no_image(tmp_path, name, capfd):
    """GDAL takes whatever lay in memory for the rest of a PNG, unless it is told to read it row by row."""
    path, options = tmp_path / name, {"progressive.jpg": dict(progressive=True)}
    for kind in ("lzw", "deflate", "jpeg"):
        options[f"{kind}.tif"] = dict(compression={"deflate": "tiff_adobe_deflate", "lzw": "tiff_lzw"}.get(kind, kind))
    array = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(array).save(path, **options.get(name, {}))
    data = path.read_bytes()
    for share in (0.3, 0.5, 0.7, 0.9, 0.98):
        path.write_bytes(data[: int(share * len(data))])
        readers = [lambda: read_image(str(path)), lambda: predicted(path)]
        if path.suffix != ".jpg":
            readers.append(lambda: read_label(str(path), {(0, 0, 0): 0}))
        for read in readers:
            with pytest.raises(UserError, match="^cannot read .*" + name):
                read()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "data", [b"", b"II*\0abc", b"II*\0\xff\xff\xff\xff", b"MM\0*", b"\x89PNG\r\n\x1a\n", b"<html>"]
)
def test_the_beginning_of_a_file_is_no_image(tmp_path, data):
    for name in ("a.tif", "a.png"):
        path = tmp_path / name
        path.write_bytes(data)
        for read in (read_image, read_label, label_size, predicted):
            assert f"cannot read {path}" in error_of(read, str(path))


@pytest.mark.parametrize("number", range(4))
def test_a_png_with_a_hole_is_no_image(tmp_path, number, capfd):
    """OpenCV refuses it, and GDAL alone would fill the hole with whatever lies in memory."""
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)).save(path)
    data, half = path.read_bytes(), path.stat().st_size // 2
    holes = [data[:8192] + data[12288:], data[:half] + data[-12:], data[:half] + bytes(half - 12) + data[-12:],
             data[: half - 1] + bytes([data[half - 1] ^ 255]) + data[half:]]  # fmt: skip
    path.write_bytes(holes[number])
    for read in (read_image, predicted, lambda path: read_label(path, {(0, 0, 0): 0})):
        assert f"cannot read {path}" in error_of(read, str(path))
    assert capfd.readouterr() == ("", "")


def test_many_threads_read_what_one_reads(tmp_path):
    paths = [str(tmp_path / f"{k}.{('tif', 'png', 'jpg')[k % 3]}") for k in range(24)]
    for number, path in enumerate(paths):
        Image.fromarray(blocks(seed=number)).save(path)
    alone = [read_image(path) for path in paths]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            for one, other in zip(alone, pool.map(read_image, paths), strict=True):
                np.testing.assert_array_equal(one, other)


def test_faults_are_told_alike_in_training_and_prediction(tmp_path):
    deep = write_raster(tmp_path / "deep.tif", np.full((8, 8, 3), 3000, np.uint16))
    assert "holds uint16 from 3000 to 3000, not 8-bit values; set config.data.scale=(low" in error_of(read_image, deep)
    assert "not 8-bit values; set --scale=LOW,HIGH" in error_of(open_scene, pathlib.Path(deep), Reading(), 3)
