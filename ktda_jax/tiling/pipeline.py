"""Scenes to finished strips of their maps, with reading, computing and blending at the same time.

    read -> compute -> blend -> whoever writes

Scenes are files, or tiles in memory (`Held`). Each stage is a generator that runs in a thread of its own, at most a few
items ahead, so that memory is bounded by rows of tiles, whatever the height of a scene. Many small images share
batches: padding comes at the very end only. So a file that cannot be read to its end fails in the middle of a batch,
with others' tiles before and behind its own.
"""

import collections
import contextlib
import dataclasses
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ktda_jax import UserError
from ktda_jax.data.raster import Scene
from ktda_jax.data.sources import Tile
from ktda_jax.metrics.calibration import tempered
from ktda_jax.tiling import blend
from ktda_jax.tiling.device import Step
from ktda_jax.tiling.windows import Grid, grid

ROWS_AHEAD = 4  # rows without a tile to compute that may wait for a batch to fill
ROWS_HELD, BYTES_HELD = 64, 1 << 26  # the same of rows with some tiles, and of their `present`
IN_FLIGHT = 2  # batches that the device has while the host goes on


@dataclasses.dataclass(frozen=True)
class Held:
    """A tile in memory, as a scene; all of it is data."""

    tile: Tile

    @property
    def height(self) -> int:
        return self.tile["image"].shape[0]

    @property
    def width(self) -> int:
        return self.tile["image"].shape[1]

    def reader(self) -> contextlib.AbstractContextManager["Held"]:
        return contextlib.nullcontext(self)

    def rows(self, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """As those of a `RowReader`."""
        return np.moveaxis(self.tile["image"][first:end], -1, 0), np.ones((end - first, self.width), bool)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of tiles. After it, the pixel rows `top` to `end` are finished."""

    scene: Scene | Held
    grid: Grid
    index: int
    present: np.ndarray  # bool (end - top, W)
    previews: dict[int, np.ndarray]  # by longest side, uint8 (bands, h, w): every `every`-th pixel of these rows
    uniform: int | None  # 0 or 255, if all data of the scene down to here are that in all bands

    @property
    def top(self) -> int:
        return self.grid.rows.starts[self.index]

    @property
    def end(self) -> int:
        return self.grid.rows.done(self.index)

    @property
    def last(self) -> bool:
        return self.end == self.scene.height


@dataclasses.dataclass(frozen=True)
class Finished:
    """Final pixels of a map: rows from `row.top`."""

    row: Row
    labels: np.ndarray  # uint8 (h, W), 255 where the scene has no data
    confidence: np.ndarray | None  # uint8 (h, W), see blend.stored
    probabilities: np.ndarray | None  # uint8 (classes, h, W), or float32 as they were blended


@dataclasses.dataclass(frozen=True)
class Failed:
    """A scene of which nothing more comes, whatever came before, since its file cannot be read."""

    scene: Scene | Held
    error: UserError


class Batch:
    """Tiles on their way to the device, and in `order` the rows and tiles (place in the batch, left edge) it holds."""

    def __init__(self, step: Step):
        count, _, height, width = step.shape
        self.images = np.zeros(step.shape, np.uint8)
        self.rows, self.columns = np.zeros((count, height), np.float32), np.zeros((count, width), np.float32)
        self.order: list[Row | Failed | tuple[int, int]] = []
        self.tiles = 0

    @property
    def full(self) -> bool:
        waiting = [item.present.nbytes for item in self.order if isinstance(item, Row)]
        most = ROWS_HELD if self.tiles else ROWS_AHEAD
        return self.tiles == len(self.images) or len(waiting) >= most or sum(waiting) >= BYTES_HELD

    def add(self, pixels: np.ndarray, rows: np.ndarray, columns: np.ndarray, left: int) -> None:
        """pixels: uint8 (bands, h, w); smaller than a tile only if the scene is, and then continued by reflection."""
        missing = [side - have for side, have in zip(self.images.shape[2:], pixels.shape[1:], strict=True)]
        if any(missing):
            pixels = np.pad(pixels, ((0, 0), (0, missing[0]), (0, missing[1])), mode="reflect")
        self.images[self.tiles], self.rows[self.tiles], self.columns[self.tiles] = pixels, rows, columns
        self.order.append((self.tiles, left))
        self.tiles += 1


def finished(
    scenes: Iterable[Scene | Held], step: Step, *, classes: int, overlap: int, probabilities: bool | str = False,
    confidence=False, temperature=1.0, previews: Sequence[int] = (), keep_going=False,
) -> Iterator[Finished | Failed]:  # fmt: skip
    """The maps of `scenes` from top to bottom, one after the other. Close it to stop the threads.

    probabilities: True for 8 bits, 'float32' for all there are. temperature: of these, which leaves the map as it is.
    previews: longest sides of the subsampled scenes that come along. keep_going: a scene that cannot be read is
    Failed, instead of an error that ends all.
    """
    with_probabilities = dict(probabilities=probabilities, confidence=confidence, temperature=temperature)
    batches = ahead(_read(scenes, step, overlap, previews, keep_going), 2)
    return ahead(_blend(ahead(_compute(batches, step), 1), classes, **with_probabilities), 2)


def every(scene: Scene, preview: int) -> int:
    """Every how many pixels one is taken, so that a scene fits `preview` pixels."""
    return max(-(-max(scene.height, scene.width) // preview), 1)


def _read(scenes, step: Step, overlap: int, previews: Sequence[int], keep_going=False) -> Iterator[Batch]:
    batch = Batch(step)
    for item in _items(scenes, step.shape[2:], overlap, previews, keep_going):
        if isinstance(item, (Row, Failed)):
            batch.order.append(item)
        else:
            batch.add(*item)
        if batch.full:
            yield batch
            batch = Batch(step)
    if batch.order:
        yield batch


def _items(
    scenes, tile: tuple[int, int], overlap: int, previews: Sequence[int], keep_going: bool
) -> Iterator[Row | Failed | tuple]:
    for scene in scenes:
        try:
            yield from _rows_and_tiles(scene, tile, overlap, previews)
        except UserError as error:
            if not keep_going:
                raise
            yield Failed(scene, error)


def _rows_and_tiles(
    scene: Scene, tile: tuple[int, int], overlap: int, previews: Sequence[int]
) -> Iterator[Row | tuple]:  # fmt: skip
    """Each row, and behind it its tiles as `Batch.add` takes them, whose pixels are to be copied before the next."""
    height, width = tile
    tiles = grid(scene.height, scene.width, tile, overlap)
    row_weights, column_weights = blend.weights(tiles.rows), blend.weights(tiles.columns)
    uniform = {0, 255}
    with scene.reader() as reader:
        for index, top in enumerate(tiles.rows.starts):
            pixels, present = reader.rows(top, min(top + height, scene.height))
            done = tiles.rows.done(index) - top
            steps = {preview: every(scene, preview) for preview in previews}
            small = {preview: pixels[:, -top % k : done : k, ::k].copy() for preview, k in steps.items()}
            if uniform and present[:done].any():
                data = pixels[:, :done][:, present[:done]]
                uniform &= {int(data.min()), int(data.max())} if data.min() == data.max() else set()
            value = min(uniform) if len(uniform) == 1 else None
            yield Row(scene, tiles, index, present[:done].copy(), small, value)
            filled = np.flatnonzero(present.any(0))
            for column, left in enumerate(tiles.columns.starts):
                place = np.searchsorted(filled, left)
                if place == len(filled) or filled[place] >= left + width:
                    continue  # no data: nothing to compute
                yield pixels[:, :, left : left + width], row_weights[index], column_weights[column], left


def _compute(batches, step: Step) -> Iterator[tuple[Batch, np.ndarray | None]]:
    """Weighted probabilities (B, classes, h, w) of each batch; None for one without tiles."""
    flying = collections.deque()
    for batch in batches:
        flying.append((batch, step(batch.images, batch.rows, batch.columns) if batch.tiles else None))
        if len(flying) > IN_FLIGHT:
            yield _landed(*flying.popleft())
    while flying:
        yield _landed(*flying.popleft())


def _landed(batch, found):
    return batch, None if found is None else np.asarray(found)


def _kept(sums: np.ndarray, present: np.ndarray, probabilities: bool | str) -> np.ndarray | None:
    if probabilities == "float32":
        return sums.copy()  # the strip moves on
    return blend.stored(sums, present) if probabilities else None


def _blend(
    results, classes: int, *, probabilities: bool | str, confidence: bool, temperature: float
) -> Iterator[Finished | Failed]:
    row = strip = None

    def finish() -> Finished:
        count = row.end - row.top
        sums = strip.sums(count)
        labels, best = blend.labels(sums, row.present)
        if temperature != 1 and (probabilities or confidence):
            sums = tempered(sums, temperature)
            best = sums.max(0)  # of the same class
        made = Finished(
            row, labels,
            blend.stored(best, row.present) if confidence else None,
            _kept(sums, row.present, probabilities),
        )  # fmt: skip
        strip.advance(count)
        return made

    for batch, found in results:
        for item in batch.order:
            if isinstance(item, tuple):
                place, left = item
                strip.add(found[place], left)
                continue
            if row is not None and not (isinstance(item, Failed) and item.scene is row.scene):  # whose tiles may lack
                yield finish()
            if isinstance(item, Failed):
                row = None
                yield item
                continue
            if item.index == 0:
                tile = item.grid.rows.tile
                strip = blend.Strip(classes, min(tile, item.scene.height), item.scene.width)
            row = item
    if row is not None:
        yield finish()


_END = object()


def ahead(items: Iterator, depth: int) -> Iterator:
    """`items`, made in a thread of its own, at most `depth` ahead. Errors come out here; closing stops the thread."""
    waiting, stopped = queue.Queue(depth), threading.Event()

    def put(item) -> bool:
        while not stopped.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                pass
        return False

    def work():
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((_END, None))
        except BaseException as error:
            put((_END, error))
        finally:
            items.close()

    def follow():
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while True:
                item, error = waiting.get()
                if error is not None:
                    raise error
                if item is _END:
                    return
                yield item
        finally:
            stopped.set()
            thread.join(timeout=5)  # a compilation cannot be stopped

    return follow()
