"""Windows of the crop's size out of images of any size, without labels: as a source for training and evaluation.

Each image has a fixed grid of windows, which are checked, counted and taken for evaluation. Training draws windows at
random places, each within its share of the image, so that all places come about equally often and nobody cuts tiles.
"""

import contextlib
import dataclasses
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ktda_jax import UserError
from ktda_jax.data.addresses import Image
from ktda_jax.data.datasets import IGNORE
from ktda_jax.data.gdal import one_line, open_file, upright
from ktda_jax.data.images import Layout, Reading, interleaved, read_window
from ktda_jax.data.sources import Tile, some

HELD_OUT = 10  # every so many-th file or row of windows is held out
KEPT_OPEN = 4  # files per thread


@dataclasses.dataclass(frozen=True)
class Axis:
    """The windows along one axis: `count` of them, whose starts are spread over `first` to `last`, both possible."""

    first: int
    last: int
    count: int

    def fixed(self, number: int) -> int:
        span = self.last - self.first
        return self.first + (span * number // (self.count - 1) if self.count > 1 else span // 2)

    def drawn(self, number: int, rng: np.random.Generator) -> int:
        starts = self.last - self.first + 1
        return self.first + int(rng.integers(starts * number // self.count, starts * (number + 1) // self.count))

    def divided(self, side: int) -> tuple["Axis", "Axis"] | None:
        """The last tenth of the windows, held out, and behind it others that share no pixel with it; None if too few.

        Of two windows that overlap neither can be held out.
        """
        held = max(1, round(self.count / HELD_OUT))
        begin = self.fixed(self.count - held) if self.count > 1 else 0
        if begin < side:
            return None
        return Axis(begin, self.last, held), Axis(0, begin - side, self.count - held)


@dataclasses.dataclass(frozen=True)
class ImageFile:
    """An image and its grid of windows. Height and width are those of the upright image."""

    path: Image
    name: str
    height: int
    width: int
    layout: Layout
    alphas: tuple[int, ...]
    orientation: int
    rows: Axis
    columns: Axis
    block: tuple[int, int]  # of stored pixels, which are decoded together
    itemsize: int  # bytes of a stored value

    def decoded(self, crop: tuple[int, int]) -> int:
        """Pixels that are decoded, at most, for a window."""
        turned = self.orientation >= 5
        sizes, sides = ((pair[::-1] if turned else pair) for pair in ((self.height, self.width), crop))
        touched = ((-(-(side - 1) // block) + 1) * block for side, block in zip(sides, self.block, strict=True))
        return math.prod(min(size, pixels) for size, pixels in zip(sizes, touched, strict=True))

    @property
    def in_strips(self) -> bool:
        return self.block[1] >= (self.height if self.orientation >= 5 else self.width)

    @property
    def grid(self) -> tuple[int, int]:
        return self.rows.count, self.columns.count

    def window(self, top: int, left: int, height: int, width: int) -> tuple[int, int, int, int]:
        """A window of the upright image in the pixels as they are stored: what `gdal.upright` does, backwards."""
        if self.orientation in (2, 3, 6, 7):
            left = self.width - left - width
        if self.orientation in (3, 4, 7, 8):
            top = self.height - top - height
        return (left, top, width, height) if self.orientation >= 5 else (top, left, height, width)


class _Open(threading.local):
    """The files that a thread used last, open; a copy or a pickle of it has none."""

    def __init__(self):
        self.files: dict[Image, Any] = {}

    def __reduce__(self):
        return _Open, ()

    @contextlib.contextmanager
    def file(self, path: Image) -> Iterator[Any]:
        """As `gdal.opened`. What has failed once is opened anew."""
        file = self.files.pop(path, None)
        if file is None:
            while len(self.files) >= KEPT_OPEN:
                self.files.pop(next(iter(self.files))).close()
            file = open_file(path)
        try:
            with one_line(path):
                yield file
        except BaseException:
            file.close()
            raise
        self.files[path] = file


class UnlabelledSource:
    """The windows that hold data, by index; see `unlabelled.open_unlabelled`. For many threads, and cheap to pickle.

    A window is `image` uint8 (H, W, bands) of the crop's size, `label` uint8 (H, W), 255 everywhere, and `name`, which
    ends with the pixel row and column where it begins.
    """

    def __init__(
        self, files: Sequence[ImageFile], windows: np.ndarray, reading: Reading, bands: int, crop: tuple[int, int],
        skip: bool,
    ):  # fmt: skip
        self.bands, self.crop = bands, crop
        self._files, self._reading, self._skip = tuple(files), reading, skip
        self._windows = windows  # int32 (n, 3): number of the file, row and column in its grid
        self._open = _Open()

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> Tile:
        """The fixed window."""
        return self.read(index)[0]

    def __repr__(self) -> str:
        names = some([file.name for file in self._files], 2)
        return f"UnlabelledSource({names}; windows={len(self)}, crop={self.crop[0]} x {self.crop[1]})"

    def draw(self, index: int, rng: np.random.Generator) -> Tile:
        """A window at a random place in this one's share of the image; the fixed one where too little data are.

        Also instead of what cannot be read, with on_corrupt='skip'.
        """
        file, row, column = self._place(index)
        place = file.rows.drawn(row, rng), file.columns.drawn(column, rng)
        try:
            window, data, _ = self._read(file, *place)
        except UserError:
            if not self._skip:
                raise
            return self[index]
        return window if enough(data) else self[index]

    def describe(self, index: int) -> str:
        """The file and the place of the fixed window, for messages."""
        file, row, column = self._place(index)
        return f"{file.path} @ {file.rows.fixed(row)},{file.columns.fixed(column)}"

    def label_size(self, index: int) -> tuple[int, int]:
        return self.crop

    def only(self, indices: Sequence[int]) -> "UnlabelledSource":
        """These windows alone."""
        return UnlabelledSource(
            self._files, self._windows[list(indices)], self._reading, self.bands, self.crop, self._skip
        )

    @property
    def image_paths(self) -> tuple[str, ...]:
        return tuple(str(file.path) for file in self._files)

    def unused(self) -> list[Image]:
        """The files without windows."""
        used = set(self._windows[:, 0].tolist())
        return [file.path for k, file in enumerate(self._files) if k not in used]

    def read(self, index: int) -> tuple[Tile, np.ndarray, np.ndarray]:
        """The fixed window; bool (H, W) where it has data, and where the file says so."""
        file, row, column = self._place(index)
        return self._read(file, file.rows.fixed(row), file.columns.fixed(column))

    def _place(self, index: int) -> tuple[ImageFile, int, int]:
        number, row, column = self._windows[index].tolist()
        return self._files[number], row, column

    def _read(self, file: ImageFile, top: int, left: int) -> tuple[Tile, np.ndarray, np.ndarray]:
        from rasterio.windows import Window

        first, second, height, width = file.window(top, left, *self.crop)
        with self._open.file(file.path) as dataset:
            pixels, present = read_window(
                dataset, file.layout, self._reading, file.alphas, Window(second, first, width, height),
                declared=self._reading.nodata is None,
            )  # fmt: skip
        data = present & (np.bitwise_or.reduce(pixels, 0) > 0)  # nobody declares the black around a turned image
        data, present = upright(data, file.orientation), upright(present, file.orientation)
        image = interleaved(upright(pixels, file.orientation))
        label = np.full(self.crop, IGNORE, np.uint8)
        return {"image": image, "label": label, "name": f"{file.name} @ {top},{left}"}, data, present


def enough(data: np.ndarray) -> bool:
    """Whether at least half of a window holds data."""
    return 2 * np.count_nonzero(data) >= data.size
