"""A model on the tiles of a split: the confusion matrix, the best and the worst tiles, the class shares."""

import dataclasses
import time
from collections.abc import Callable, Collection

import jax
import numpy as np

from ktda_jax import UserError, sharding
from ktda_jax.config.settings import Data
from ktda_jax.data import pipeline
from ktda_jax.data.sources import read_tile
from ktda_jax.metrics.confusion import count, summarize
from ktda_jax.reports.trained import Trained

PREDICTED = 64  # tiles of a split that is not evaluated, for the shares of its predictions


@dataclasses.dataclass(frozen=True)
class Tile:
    name: str
    index: int  # in the split
    image: np.ndarray  # uint8 (h, w, bands), as the model sees it
    label: np.ndarray  # uint8 (H, W)
    prediction: np.ndarray  # uint8 (H, W)
    accuracy: float  # percent of the labelled pixels
    miou: float  # percent


@dataclasses.dataclass(frozen=True)
class Shares:
    """Pixels by class, int64 (C,), of a split's labels and of the predictions for `predicted` of its tiles."""

    labels: np.ndarray
    ignored: int
    predictions: np.ndarray
    tiles: int
    predicted: int


@dataclasses.dataclass(frozen=True)
class Scored:
    confusion: np.ndarray  # (C, C) int64
    worst: list[Tile]
    best: list[Tile]
    named: dict[str, Tile]


def score(
    trained: Trained,
    source,
    data: Data,
    batch_size: int,
    *,
    keep: int = 0,
    names: Collection[str] = (),
    say: Callable[[str], None] = print,
) -> Scored:
    """Runs over all tiles, and keeps the `keep` best and worst by pixel accuracy, and those called `names`."""
    classes = trained.model.num_classes
    batches = pipeline.eval_batches(source, crop=data.crop, batch_size=batch_size, num_threads=data.num_threads)
    total, worst, best, named = np.zeros((classes, classes), np.int64), [], [], {}
    said = time.monotonic()

    def take(batch, predictions):
        for row in np.flatnonzero(batch["mask"]):
            prediction = predictions[row]
            confusion = count(batch["label"][row], prediction, classes)
            total[...] += confusion
            labelled, name, index = confusion.sum(), batch["name"][row], int(batch["index"][row])
            if not labelled or not (keep or names):
                continue
            accuracy = 100 * float(np.trace(confusion)) / float(labelled)

            def make(row=row, prediction=prediction, name=name, index=index, accuracy=accuracy, confusion=confusion):
                image, label = batch["image"][row].copy(), batch["label"][row].copy()  # not the whole batch
                miou = summarize(confusion).summary["mIoU"]
                return Tile(name, index, image, label, prediction.copy(), accuracy, miou)

            _insert(worst, (accuracy, index), make, keep)
            _insert(best, (-accuracy, index), make, keep)
            if name in names:
                named[name] = make()

    pending, done = None, 0
    for number, batch in enumerate(batches):
        arrays = {k: batch[k] for k in ("image", "label", "mask")}
        _, predictions = trained.eval_step(trained.params, trained.stats, sharding.to_global(trained.mesh, arrays))
        if pending is not None:  # one batch late: the device works while the host counts
            take(pending[0], np.asarray(pending[1]))
        pending = batch, predictions
        if number and time.monotonic() - said > 10:  # the first batch compiles
            said = time.monotonic()
            say(f"{done:,} of {len(source):,} tiles")
        done += int(batch["mask"].sum())
    if pending is not None:
        take(pending[0], np.asarray(jax.device_get(pending[1])))
    found = {tile.index: tile for _, tile in worst + best}
    ordered = sorted(found.values(), key=lambda tile: (tile.accuracy, tile.index))
    half = min(keep, -(-len(ordered) // 2))
    return Scored(total, ordered[:half], ordered[half:][::-1], named)


def _insert(kept: list, key: tuple, make: Callable[[], Tile], count: int) -> None:
    """Into the `count` smallest by key."""
    if count and (len(kept) < count or key < kept[-1][0]):
        kept.append((key, make()))
        kept.sort(key=lambda pair: pair[0])
        del kept[count:]


def shown(tile: Tile, rgb: tuple[int, int, int]) -> np.ndarray:
    """The tile's image for people, uint8 (H, W, 3) at the label's size."""
    height, width = tile.label.shape
    rows = np.arange(height) * tile.image.shape[0] // height
    columns = np.arange(width) * tile.image.shape[1] // width
    return tile.image[rows][:, columns][..., list(rgb)]


class Some:
    """At most `count` tiles of a source, evenly spread; with `skip` without those of them that cannot be read."""

    def __init__(self, source, count: int, *, skip: bool = False):
        self._source, self.num_classes = source, source.num_classes
        self.bands = getattr(source, "bands", 3)
        self.indices = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int))
        if skip:
            self.indices = [index for index in self.indices if self._readable(index)]

    def _readable(self, index: int) -> bool:
        try:
            read_tile(self._source, int(index))
        except UserError:
            return False
        return True

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict:
        return read_tile(self._source, int(self.indices[index]))
