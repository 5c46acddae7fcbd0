"""Scenes as files: what they hold, and their rows as the model's 8-bit bands."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ktda_jax import UserError
from ktda_jax.data.images import alpha_bands, import_rasterio, read_window, unreadable

CHUNK = 1 << 21  # pixels read at once
TALLEST_BLOCK = 1024  # rows; of files with taller blocks a block may be decoded more than once
SETTINGS = {
    "GDAL_CACHEMAX": "256",  # MB, instead of a share of the machine's memory
    "GDAL_ERROR_ON_LIBJPEG_WARNING": "TRUE",  # half a JPEG is an error
    "GDAL_PAM_ENABLED": "YES",
}


@dataclasses.dataclass(frozen=True)
class Reading:
    """How stored values become the model's 8-bit bands; as config.data of a training has them."""

    bands: tuple[int, ...] | None = None  # counted from 1; None: 8-bit RGB
    scale: tuple | None = None  # (low, high), or one such pair per band; None: 8-bit values
    nodata: float | None = None  # beside what the file declares
    by_band: bool = False  # a missing band was 0 in training, instead of its value as in plain 8-bit RGB


@dataclasses.dataclass(frozen=True)
class Scene:
    """What is known of a raster before its pixels are read."""

    path: pathlib.Path
    height: int
    width: int
    dtype: str
    chosen: tuple[int, ...]  # bands to read
    palette: tuple | None  # 256 colours, where the one band holds numbers of colours
    alphas: tuple[int, ...]
    reading: Reading
    block: tuple[int, int]
    place: dict[str, Any]  # crs, transform, gcps, rpcs: what rasterio.open takes for a new file
    files: tuple[pathlib.Path, ...]  # all that are read, such as the sources of a VRT

    @property
    def located(self) -> bool:
        """Whether anything says where on Earth, or at least in some plane, it lies."""
        return any(self.place.get(name) for name in ("crs", "gcps", "rpcs")) or not self.place["transform"].is_identity


def rasterio_for(path: str | os.PathLike):
    """rasterio with our settings of GDAL, which the environment may overrule."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    return import_rasterio(str(path))


@contextlib.contextmanager
def one_line(path) -> Iterator[None]:
    """Turns whatever GDAL raises into a UserError that names `path`."""
    rasterio = rasterio_for(path)
    try:
        yield
    except rasterio.errors.RasterioError as error:
        # GDAL's own words are in the cause; rasterio's are "Read failed. See previous exception for details."
        raise unreadable(str(path), error.__cause__ or error) from error
    except OSError as error:
        raise unreadable(str(path), error) from error


def open_scene(path: pathlib.Path, reading: Reading, bands: int) -> Scene:
    """Looks at a raster without reading its pixels. UserError unless it can give a model of `bands` bands its input."""
    rasterio = rasterio_for(path)
    with one_line(path), rasterio.open(path) as file:
        if not file.count:
            raise UserError(f"{path} holds several rasters and none of its own; name one of them")
        chosen, palette = _choose(path, file, reading, bands)
        kind = np.dtype(file.dtypes[chosen[0] - 1])
        if kind.kind not in "uif":
            raise UserError(f"{path} holds {kind}; only whole and floating numbers can be read")
        if reading.scale is None and kind != np.uint8:
            raise UserError(
                f"{path} holds {kind}, and the model was trained on 8-bit images; give --scale=LOW,HIGH, the values "
                "that become 0 and 255"
            )
        alphas = [band for band in alpha_bands(file, chosen) if _is_alpha(file, band)]
        place = {"transform": file.transform, "crs": file.crs}
        points, points_crs = file.gcps
        if points and file.transform.is_identity:
            place = {"gcps": points, "crs": points_crs}
        if file.rpcs:
            place["rpcs"] = file.rpcs
        return Scene(
            path, file.height, file.width, str(kind), chosen, palette, tuple(alphas), reading, file.block_shapes[0],
            place, tuple(map(pathlib.Path, file.files)),
        )  # fmt: skip


def _choose(path, file, reading: Reading, bands: int) -> tuple[tuple[int, ...], tuple | None]:
    """The bands to read, and the palette if they are numbers of colours."""
    from rasterio.enums import ColorInterp

    if reading.bands is not None:
        if missing := [band for band in reading.bands if band > file.count]:
            raise UserError(
                f"{path} has {file.count} band(s), and the model wants band {missing[0]} (bands {reading.bands}); give "
                "--bands, their numbers in this file in the order of the training, or another scene"
            )
        return tuple(reading.bands), None
    if bands != 3:
        raise UserError(f"{path}: the model takes {bands} bands; give --bands, their numbers in the order of training")
    colours = [k for k, kind in enumerate(file.colorinterp, 1) if kind != ColorInterp.alpha]
    if len(colours) == 3:
        return tuple(colours), None
    if len(colours) == 1 and file.colorinterp[colours[0] - 1] == ColorInterp.palette:
        if reading.scale is not None:
            raise UserError(f"{path} holds numbers of colours, which cannot be stretched; convert it to RGB")
        table = file.colormap(colours[0])
        return (colours[0],), tuple(table.get(k, (0, 0, 0, 0))[:3] for k in range(256))
    if len(colours) == 1:  # grey, as in training, where these become 0 to 255 too
        bits = int(file.tags(colours[0], ns="IMAGE_STRUCTURE").get("NBITS", 8))
        if file.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES":
            raise UserError(f"{path} is grey with white as 0; convert it to 'black is 0'")
        if bits < 8 and reading.scale is None:
            raise UserError(f"{path} is grey of {bits} bits; give --scale=0,{2**bits - 1}, or convert it to 8 bits")
        return (colours[0],) * 3, None
    raise UserError(
        f"{path} has {len(colours)} bands, and the model takes red, green and blue; name them, such as --bands=1,2,3"
    )


def _is_alpha(file, band: int) -> bool:
    """Whether a band that is called alpha says where data are: next to nothing but 0 and 255 in 16 places."""
    from rasterio.windows import Window

    if file.driver == "PNG" or file.count == 2:
        return True  # there nothing is called alpha that is not
    seen = []
    for row in np.linspace(0, max(file.height - 256, 0), 4).astype(int):
        for column in np.linspace(0, max(file.width - 256, 0), 4).astype(int):
            window = Window(column, row, min(256, file.width), min(256, file.height))
            seen.append(np.bincount(file.read(band, window=window).astype(np.uint8).ravel(), minlength=256))
    counts = np.sum(seen, 0)
    if not counts[1:].any():  # no data in these places, or a lake
        size = min(file.height, 1024), min(file.width, 1024)
        counts = np.bincount(file.read(band, out_shape=size).astype(np.uint8).ravel(), minlength=256)
    return counts[255] >= 0.9 * counts[1:].sum()


class RowReader:
    """The rows of a scene from top to bottom: every block is read and decoded once, and rows are kept while needed."""

    def __init__(self, scene: Scene):
        rasterio = rasterio_for(scene.path)
        self._scene = scene
        options = {"NUM_THREADS": "ALL_CPUS"} if scene.path.suffix.lower() in (".tif", ".tiff") else {}
        with one_line(scene.path):
            self._file = rasterio.open(scene.path, sharing=False, **options)
        self._first = self._end = 0  # rows in the buffer
        self._pixels = self._present = None

    def rows(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (bands, rows, W) and bool (rows, W) of rows [first, end), views until the next call.

        `first` may not go back; UserError if the file cannot be read.
        """
        scene = self._scene
        if self._pixels is None:
            spare = scene.block[0] if scene.block[0] <= TALLEST_BLOCK else 0
            bands = 3 if scene.palette else len(scene.chosen)
            self._pixels = np.empty((bands, min(end - first + spare, scene.height), scene.width), np.uint8)
            self._present = np.empty(self._pixels.shape[1:], bool)
        if first > self._first:
            keep, gone = max(self._end - first, 0), first - self._first
            for plane in (*self._pixels, self._present):
                plane[:keep] = plane[gone : gone + keep]
            self._first, self._end = first, first + keep
        if end > self._end:
            self._read(end)
        window = np.s_[..., : end - first, :]
        return self._pixels[window], self._present[window]

    def _read(self, end: int) -> None:
        scene, capacity = self._scene, self._pixels.shape[1]
        block, width = scene.block
        if block <= TALLEST_BLOCK:  # up to the end of a row of blocks
            end = min(-(-end // block) * block, scene.height, self._first + capacity)
        columns = scene.width if width >= scene.width else max(width, CHUNK // (end - self._end) // width * width)
        height = max(block, CHUNK // columns // block * block) if block <= TALLEST_BLOCK else end - self._end
        with one_line(scene.path):
            while self._end < end:
                stop = min(self._end // block * block + height, end) if block <= TALLEST_BLOCK else end
                rows = slice(self._end - self._first, stop - self._first)
                for left in range(0, scene.width, columns):
                    area = slice(left, min(left + columns, scene.width))
                    pixels, present = self._window(self._end, stop, area)
                    self._pixels[:, rows, area], self._present[rows, area] = pixels, present
                self._end = stop

    def _window(self, first: int, end: int, area: slice) -> tuple[np.ndarray, np.ndarray]:
        from rasterio.windows import Window

        scene = self._scene
        window = Window(area.start, first, area.stop - area.start, end - first)
        chosen = scene.chosen if len(set(scene.chosen)) == len(scene.chosen) else scene.chosen[:1]
        reading = scene.reading
        pixels, present = read_window(
            self._file, chosen, reading.scale, reading.nodata, window, scene.alphas, reading.by_band
        )
        if scene.palette is not None:
            pixels = np.array(scene.palette, np.uint8).T[:, pixels[0]] * present
        return pixels, present

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()
