"""Scenes as files: what they hold, and their rows as the model's 8-bit bands."""

import dataclasses
import os
import pathlib
from typing import Any

import numpy as np

from ktda_jax.data.addresses import Address, Image, located
from ktda_jax.data.gdal import FileError, dataset, is_located, one_line, opened, orientation_of, place_of, upright
from ktda_jax.data.images import Layout, Reading, alphas_of, layout_of, read_window

CHUNK = 1 << 21  # pixels read at once
TALLEST_BLOCK = 1024  # rows; of files with taller blocks a block may be decoded more than once
LARGEST_TURNED = 1 << 29  # pixels of a file that is not stored upright, which is read as a whole


@dataclasses.dataclass(frozen=True)
class Scene:
    """What is known of a raster before its pixels are read. Height and width are those of the upright scene."""

    path: Image
    height: int
    width: int
    dtype: str
    layout: Layout
    alphas: tuple[int, ...]
    reading: Reading
    block: tuple[int, int]
    orientation: int  # of the stored pixels, 1: upright
    place: dict[str, Any]  # crs, transform, gcps, rpcs: what rasterio.open takes for a new file
    files: tuple[Image, ...]  # all that are read, such as the sources of a VRT

    @property
    def located(self) -> bool:
        """Whether anything says where on Earth, or at least in some plane, it lies."""
        return is_located(self.place)

    def reader(self) -> "RowReader":
        return RowReader(self)


def open_scene(path: Image, reading: Reading, bands: int, *, by: str = "flags") -> Scene:
    """Looks at a raster without reading its pixels. UserError unless it can give a model of `bands` bands its input.

    by: whether flags or settings are to be named, see `layout_of`.
    """
    with opened(path) as file:
        layout = layout_of(file, reading, bands, by=by)
        alphas, orientation, height, width = alphas_of(file, layout), orientation_of(file), file.height, file.width
        if orientation != 1 and height * width > LARGEST_TURNED:
            raise FileError("image", path, f"lies on its side (orientation {orientation})", "save it upright")
        if orientation >= 5:
            height, width = width, height
        fetched = isinstance(path, Address) and file.name != os.fspath(path)
        files = (path,) if fetched else tuple(_named(name) for name in file.files)
        return Scene(
            path, height, width, file.dtypes[layout.bands[0] - 1], layout, alphas, reading, file.block_shapes[0],
            orientation, place_of(file), files,
        )  # fmt: skip


def _named(text: str) -> Image:
    found = located(text)
    return found if isinstance(found, Address) else pathlib.Path(found)


class RowReader:
    """The rows of a scene from top to bottom: every block is read and decoded once, and rows are kept while needed."""

    def __init__(self, scene: Scene):
        self._scene = scene
        options = {"NUM_THREADS": "ALL_CPUS"} if scene.path.suffix.lower() in (".tif", ".tiff") else {}
        self._file = dataset(scene.path, **options)
        self._first = self._end = 0  # rows in the buffer
        self._pixels = self._present = None

    def rows(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 (bands, rows, W) and bool (rows, W) of rows [first, end), views until the next call.

        `first` may not go back; UserError if the file cannot be read.
        """
        scene = self._scene
        if scene.orientation != 1:
            return self._turned(first, end)
        if self._pixels is None:
            spare = scene.block[0] if scene.block[0] <= TALLEST_BLOCK else 0
            bands = 3 if scene.layout.table is not None else len(scene.layout.bands)
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
        return read_window(self._file, scene.layout, scene.reading, scene.alphas, window)

    def _turned(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows of a scene that is not stored upright: read once as a whole."""
        scene = self._scene
        if self._pixels is None:
            with one_line(scene.path):
                read = read_window(self._file, scene.layout, scene.reading, scene.alphas)
            self._pixels, self._present = (upright(array, scene.orientation) for array in read)
        return self._pixels[:, first:end], self._present[first:end]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()
