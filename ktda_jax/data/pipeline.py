"""From a source of tiles to batches: Grain does the threads, the prefetching and the checkpointable position.

Row r of global training batch k is tile number k * batch_size + r of an endless, reshuffled sequence, and all
of its random draws come from (seed, that number). So batches do not depend on threads, on how many processes
share them, or on whether the run was interrupted.
"""

from collections.abc import Iterator
from typing import TypedDict

import cv2
import grain
import numpy as np

from ktda_jax import UserError
from ktda_jax.data import libc
from ktda_jax.data.augment import Augmentation
from ktda_jax.data.datasets import IGNORE
from ktda_jax.data.foreign_features import ForeignFeatures
from ktda_jax.data.geometry import VIEWS, Rare
from ktda_jax.data.mixture import Mixture
from ktda_jax.data.rows import Shuffled, TrainRows
from ktda_jax.data.scene_windows import UnlabelledSource
from ktda_jax.data.sources import Source, cpu_threads, label_sizes, read_tile
from ktda_jax.data.teacher_features import AGAIN, TeacherFeatures

ON_CORRUPT = ("stop", "skip")


class Batch(TypedDict, total=False):
    """Rows of this process; which of the keys there are, train_iterator and eval_batches say."""

    image: np.ndarray  # uint8 (b, H, W, bands)
    label: np.ndarray  # uint8 (b, h, w), 255 = ignore
    mask: np.ndarray  # bool (b,), false for padding rows
    taps: tuple[np.ndarray | None, ...]  # of the teacher, by level: (b, h, w, C)
    skipped: int  # tiles that could not be read, in whose place others stand
    name: list[str]
    index: np.ndarray  # int64 (b,), into the source
    original: np.ndarray  # int32 (b, 2): height and width of the label


def train_iterator(
    source: Source | None,
    *,
    augmentation: Augmentation,
    batch_size: int,
    seed: int,
    rare: Rare | None = None,
    process_index: int = 0,
    process_count: int = 1,
    on_corrupt: str = "stop",
    num_threads: int | None = None,
    features: TeacherFeatures | ForeignFeatures | None = None,
    first_row: int = 0,
    unlabelled: UnlabelledSource | None = None,
    unlabelled_features: TeacherFeatures | None = None,
    mixture: Mixture | None = None,
) -> grain.DatasetIterator:
    """Endless training batches of this process; the iterator's `get_state` / `set_state` are its position.

    `batch_size` is global: process p gets rows p * b to (p + 1) * b, b = batch_size // process_count. A batch
    is `image` uint8 (b, H, W, bands), `label` uint8 (b, H, W), `mask` bool (b,) all true, and `skipped`, the
    number of its rows (int) that stand in for unreadable tiles. `on_corrupt='stop'` raises UserError with the
    tile's name; 'skip' takes the next readable tile instead and warns once per tile.

    `rare`: for augmentation.rare_crops. `first_row`: the tile of the endless sequence that batch 0 begins with; below 0
    where earlier batches were smaller, and the iterator is set to a later one.

    With `features` a batch also has `taps`, of each level (b, h, w, C) or None: what the teacher saw of each row, its
    view and what was pasted in included, colour changes not. Crops then begin at multiples of the teacher's patch.

    Of `unlabelled` images come the rows that `mixture` says, with labels of 255; without a `source`, all of them.
    """
    rows = _rows_per_process(batch_size, process_index, process_count)
    if on_corrupt not in ON_CORRUPT:
        raise UserError(f"on_corrupt is {on_corrupt!r}: choose one of {ON_CORRUPT}")
    if seed < 0:
        raise UserError(f"seed is {seed}: give a number from 0")
    for tiles, taps in ((source, features), (unlabelled, unlabelled_features)):
        if tiles is not None and not len(tiles):
            raise UserError(f"{tiles!r} has no tiles")
        if taps is not None and len(taps) != len(tiles):
            raise UserError(f"{len(taps)} tiles have teacher features, but {tiles!r} has {len(tiles)}")
        if taps is not None and augmentation.rotate and taps.views < VIEWS:
            raise UserError(
                f"the teacher features in {taps.folder} are of {taps.views} views of each tile, and config.data.rotate "
                f"needs {VIEWS}: {AGAIN}"
            )
    cv2.setNumThreads(0)  # the parallelism is Grain's: one thread per batch in flight
    libc.keep_tile_sized_blocks()
    skip = on_corrupt == "skip"
    rows_source = TrainRows(
        source and Shuffled(source, features, seed, skip),
        unlabelled and Shuffled(unlabelled, unlabelled_features, seed, skip, order=(1,)),
        mixture,
        seed=seed, augmentation=augmentation, rare=rare, first_row=first_row,
    )  # fmt: skip
    batches = grain.MapDataset.source(rows_source).batch(rows, batch_fn=_stack)[
        # Batches of b rows, every process_count-th one: local batch k of process p is then number
        # k * process_count + p, which holds exactly rows p * b to (p + 1) * b of global batch k.
        process_index::process_count
    ]
    return iter(batches.to_iter_dataset(_read_options(num_threads)))


class EvalBatches:
    """One pass over a split in batches of constant shape; iterate as often as you like. See `eval_batches`.

    `plan` int64 (batches, batch_size) holds the source index of every global row, -1 for padding; `sizes` are
    the label sizes that occur, one compiled evaluation step each.
    """

    def __init__(self, source, *, crop, batch_size, process_index, process_count, num_threads):
        if not len(source):
            raise UserError(f"{source!r} has no tiles")
        self._rows = _rows_per_process(batch_size, process_index, process_count)
        self._first = process_index * self._rows
        self._source, self._num_threads = source, num_threads
        self._crop = (crop, crop) if isinstance(crop, int) else crop and tuple(crop)
        by_size = {}
        for index, size in enumerate(label_sizes(source, num_threads=num_threads)):
            by_size.setdefault(tuple(size), []).append(index)
        self.sizes = tuple(sorted(by_size))
        self.batch_sizes, plan = [], []
        for size in self.sizes:  # a batch holds labels of one size; each size pads its own last batch
            indices = by_size[size]
            for start in range(0, len(indices), batch_size):
                chunk = indices[start : start + batch_size]
                plan.append(chunk + [-1] * (batch_size - len(chunk)))
                self.batch_sizes.append(size)
        self.plan = np.array(plan, np.int64).reshape(-1, batch_size)
        self.count = len(source)  # tiles, of all processes

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[dict]:
        return self.between(0, len(self))

    def between(self, start: int, stop: int) -> Iterator[dict]:
        """Batches `start` to `stop` of the plan."""
        cv2.setNumThreads(0)
        batches = grain.MapDataset.range(start, stop).map(self._batch)
        return iter(batches.to_iter_dataset(_read_options(self._num_threads)))

    def _batch(self, number: int) -> dict:
        """This process's rows of global batch `number`."""
        indices = self.plan[number, self._first : self._first + self._rows]
        size = self.batch_sizes[number]
        crop = self._crop or size
        image = np.zeros((self._rows, *crop, getattr(self._source, "bands", 3)), np.uint8)
        label = np.full((self._rows, *size), IGNORE, np.uint8)
        names = [""] * self._rows
        for row, index in enumerate(indices):
            if index >= 0:
                tile = read_tile(self._source, int(index))
                image[row] = _resized(tile["image"], crop)
                label[row], names[row] = tile["label"], tile["name"]
        return {
            "image": image,
            "label": label,
            "mask": indices >= 0,
            "name": names,
            "index": indices,
            "original": np.tile(np.array(size, np.int32), (self._rows, 1)),
        }


def eval_batches(
    source: Source,
    *,
    crop: int | tuple[int, int] | None,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int | None = None,
) -> EvalBatches:
    """Every tile once, ordered by label size and then by index; rows are dealt to processes as in training.

    A batch is `image` uint8 (b, *crop, bands), resized bilinearly unless `crop` is None, `label` uint8 (b, H, W) at its
    own size, `mask` bool (b,), `name` list of str, `index` int64 (b,) into the source, `original` int32 (b, 2), the
    label's (H, W). Padding rows have image 0, label 255, mask false, name '' and index -1. Unreadable tiles
    raise UserError: a score over fewer tiles would not be the score asked for.
    """
    return EvalBatches(
        source,
        crop=crop,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        num_threads=num_threads,
    )


class EvalTiles:
    """One pass over this process's tiles of a split, as they are and of any size: what `predict` would be given."""

    native = True

    def __init__(
        self, source: Source, *, process_index: int = 0, process_count: int = 1, num_threads: int | None = None
    ):
        if not len(source):
            raise UserError(f"{source!r} has no tiles")
        self._source, self._num_threads = source, num_threads
        self._mine = range(process_index, len(source), process_count)
        self.count = len(source)  # tiles, of all processes

    def __iter__(self) -> Iterator[dict]:
        """Tiles with their `index` in the split, decoded ahead in threads; unreadable ones raise UserError."""
        if not self._mine:  # of more processes than tiles
            return iter(())
        cv2.setNumThreads(0)
        tiles = grain.MapDataset.source(self._mine).map(lambda index: read_tile(self._source, index) | {"index": index})
        return iter(tiles.to_iter_dataset(_read_options(self._num_threads)))


def _rows_per_process(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch_size {batch_size} does not divide among {process_count} process(es): "
            f"use a positive multiple of {process_count}"
        )
    if not 0 <= process_index < process_count:
        raise UserError(f"process_index {process_index} is outside 0..{process_count - 1}")
    return batch_size // process_count


def _read_options(num_threads: int | None) -> grain.ReadOptions:
    """One batch in work per thread and two more ready; num_threads=0 reads in the caller's thread."""
    threads = cpu_threads() if num_threads is None else num_threads
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2 if threads else 0)


def _stack(rows: list[dict]) -> Batch:
    batch = {
        "image": np.stack([row["image"] for row in rows]),
        "label": np.stack([row["label"] for row in rows]),
        "mask": np.ones(len(rows), bool),
        "skipped": sum(int(row["skipped"]) for row in rows),
    }
    if "taps" in rows[0]:
        levels = zip(*(row["taps"] for row in rows), strict=True)
        batch["taps"] = tuple(None if level[0] is None else np.stack(level) for level in levels)
    return batch


def _resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """mmseg's Resize with keep_ratio=False: bilinear to exactly `size` (H, W), untouched if it has it."""
    if image.shape[:2] == size:
        return image
    resized = cv2.resize(image, size[::-1], interpolation=cv2.INTER_LINEAR)
    return resized.reshape(*size, image.shape[-1])  # OpenCV drops a single band's axis
