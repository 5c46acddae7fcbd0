"""A model on the tiles of a split: the confusion matrix, the best and the worst tiles, the class shares."""

import dataclasses
import time
from collections.abc import Callable, Collection

import numpy as np

from ktda_jax import UserError
from ktda_jax.config.data import Data
from ktda_jax.data.sources import read_tile
from ktda_jax.metrics.confusion import summarize
from ktda_jax.reports.trained import Trained
from ktda_jax.training.inputs import to_evaluate

PREDICTED = 64  # tiles of a split that is not evaluated, for the shares of its predictions


@dataclasses.dataclass(frozen=True)
class Tile:
    name: str
    index: int  # in the split
    image: np.ndarray  # uint8 (h, w, bands), as the model sees it, which config.data.eval_scale says
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
    total, worst, best, named = np.zeros((classes, classes), np.int64), [], [], {}
    said = None  # the first tiles wait for a compilation
    for done, found in enumerate(
        trained.predictor(to_evaluate(data, source, batch_size), trained.params, trained.stats)
    ):
        confusion = found.confusion
        total += confusion
        if said is not None and time.monotonic() - said > 10:
            say(f"{done:,} of {len(source):,} tiles")
        if said is None or time.monotonic() - said > 10:
            said = time.monotonic()
        labelled = confusion.sum()
        if not labelled or not (keep or names):
            continue
        accuracy = 100 * float(np.trace(confusion)) / float(labelled)

        def make(found=found, accuracy=accuracy, confusion=confusion):
            arrays = (getattr(found, k).copy() for k in ("image", "label", "prediction"))  # not the whole batch
            return Tile(found.name, found.index, *arrays, accuracy, summarize(confusion).summary["mIoU"])

        _insert(worst, (accuracy, found.index), make, keep)
        _insert(best, (-accuracy, found.index), make, keep)
        if found.name in names:
            named[found.name] = make()
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
