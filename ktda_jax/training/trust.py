"""What a score alone does not tell: how sure it is, how far probabilities can be believed, and how good the edges are.

One pass over a split's tiles gives it all. Of every tile some pixels are kept for the calibration: `PIXELS` altogether.
"""

import dataclasses
import json
import math
import pathlib

import numpy as np

from ktda_jax import UserError, sharding
from ktda_jax.config import workdir as records
from ktda_jax.data import buckets
from ktda_jax.metrics import bootstrap, boundary, by_tile, calibration, curves
from ktda_jax.metrics.calibration import Reliability, expected_calibration_error
from ktda_jax.training.predicted import Predicted

PIXELS = 400_000  # kept for the calibration, over all tiles and processes
FILE = "calibration.json"  # in the workdir: the temperature, and which checkpoint it is of


@dataclasses.dataclass(frozen=True)
class Trust:
    """All of it in percent, and NaN where there is nothing to go by.

    The calibration error after is that of each half of the tiles by the temperature of the other half: of their own
    temperature it would flatter. Where none was fitted, `temperature` is that which the probabilities had already.
    """

    tiles: int  # that have labelled pixels
    interval: tuple[float, float]  # 95 % of mIoU, over resampled tiles
    intervals: np.ndarray  # (C, 2), of each class's IoU
    boundary: np.ndarray  # (C,) boundary IoU
    boundary_mean: float
    temperature: float  # of all tiles
    before: Reliability
    after: Reliability | None  # None: no temperature was fitted
    precision: np.ndarray  # (C, 256) by threshold
    recall: np.ndarray
    average_precision: np.ndarray  # (C,)
    confusions: np.ndarray | None = None  # int64 (tiles, C, C), rows are labels; None: they would be too many

    @property
    def errors(self) -> tuple[float, float]:
        """The expected calibration error before and after."""
        after = calibration.nothing() if self.after is None else self.after
        return expected_calibration_error(self.before), expected_calibration_error(after)

    @property
    def summary(self) -> dict[str, float]:
        """For metrics.jsonl."""
        before, after = self.errors
        low, high = self.interval
        return {
            "mIoU_low": low, "mIoU_high": high, "boundary_mIoU": self.boundary_mean, "calibration_error": before,
            "calibration_error_with_temperature": after, "temperature": self.temperature,
        }  # fmt: skip


class Sums:
    """Takes this process's tiles one by one; `result` is of those of all processes, which all call it."""

    def __init__(self, tiles: int, classes: int):
        """tiles: of all processes."""
        self._classes, self.each = classes, max(PIXELS // tiles, 1)  # pixels kept of a tile
        self._by_tile = np.zeros((tiles, 2, classes), np.int64)  # what IoU needs: C numbers more would be too many
        kept = tiles if by_tile.suffice(tiles, classes) else 0
        self._confusions = np.zeros((kept, classes, classes), np.int64)
        self._boundary = np.zeros((2, classes), np.int64)
        self._pixels: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []

    def add(self, found: Predicted) -> None:
        """A whole one; else its parts by the two below. UserError where the model has no probabilities to give."""
        edges = boundary.count(found.label, found.prediction, self._classes)
        self.add_counts(found.index, found.confusion, edges)
        self.add_pixels(found.index, found.name, found.label, found.probabilities, self.each)

    def add_counts(self, index: int, confusion: np.ndarray, edges: np.ndarray) -> None:
        """edges: int64 (2, C), see `boundary.count`."""
        self._by_tile[index] += bootstrap.counts(confusion)
        if len(self._confusions):
            self._confusions[index] += confusion
        self._boundary += edges

    def add_pixels(self, index: int, name: str, label: np.ndarray, probabilities: np.ndarray, most: int) -> None:
        """At most so many pixels of a tile, or of rows of it. label: (h, W), probabilities: float32 (C, h, W)."""
        values, labels = calibration.sample(label, probabilities, most)
        if not np.isfinite(values).all():
            raise UserError(f"the model's probabilities of tile {name} are not finite; its weights are of no use")
        self._pixels.append((values, labels, np.full(len(labels), index)))

    def result(self, temperature: float | None = None) -> Trust:
        """temperature: that which the probabilities have already; then none is fitted."""
        counts = sharding.sum_of_processes(self._by_tile)
        confusions = sharding.sum_of_processes(self._confusions) if len(self._confusions) else None
        iou, mean = boundary.boundary_iou(sharding.sum_of_processes(self._boundary))
        nothing = np.zeros((0, self._classes), np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64)
        columns = zip(nothing, *self._pixels, strict=True)
        values, labels, tiles = (sharding.rows_of_processes(np.concatenate(parts)) for parts in columns)
        if temperature is None:
            temperature, before, after = calibrated(values, labels, tiles)
        else:
            after, hit = None, values.argmax(1) == labels
            before = calibration.reliability(np.exp(values.max(1, initial=calibration.FLOOR)), hit)
        precision, recall, average = curves.precision_recall(curves.histograms(labels, np.exp(values.T)))
        held = int(counts[:, 1].any(1).sum())
        return Trust(
            held, bootstrap.interval(counts), bootstrap.class_intervals(counts), iou, mean, temperature, before,
            after, precision, recall, 100 * average, confusions,
        )  # fmt: skip


def calibrated(values: np.ndarray, labels: np.ndarray, tiles: np.ndarray) -> tuple[float, Reliability, Reliability]:
    """The temperature of all pixels, and reliability without and with one, see `Trust`.

    1 where a temperature makes it no better on tiles that it was not fitted to, or cannot be tried on others.

    values: log-probabilities float32 (n, C) of pixels; labels, tiles: int64 (n,), the class and the tile of each.
    """
    probabilities, hit = np.exp(values.T), values.argmax(1) == labels
    before, after = calibration.reliability(probabilities.max(0), hit), calibration.nothing()
    for half in (0, 1):
        measured = tiles % 2 == half
        if measured.all() or not measured.any():  # a single tile
            after = calibration.nothing()
            break
        temperature = calibration.fit_temperature(values[~measured], labels[~measured])
        confidence = calibration.tempered(probabilities[:, measured], temperature).max(0)
        after += calibration.reliability(confidence, hit[measured])
    better = expected_calibration_error(after) < expected_calibration_error(before)  # not if one is NaN
    return calibration.fit_temperature(values, labels) if better else 1.0, before, after


def in_words(trust: Trust, tiles: str = "tiles") -> str:
    """Two lines for the terminal; `tiles`: what they are called."""
    before, after = (f"{error:.2f}" for error in trust.errors)
    low, high = trust.interval
    spread = "" if math.isnan(low) else f"mIoU from {low:.2f} to {high:.2f} in 95 % of draws of {trust.tiles} {tiles}; "
    line = f"calibration error {before} %"
    if trust.after is not None and math.isnan(trust.errors[1]):
        line += "; no temperature, which could not be tried on other tiles"
    elif trust.after is not None and trust.temperature == 1:
        line += f"; no temperature, since it became {after} % (each half of the {tiles} by the other's)"
    elif trust.after is not None:
        line += f", with temperature {trust.temperature:.3g} {after} % (each half of the {tiles} by the other's)"
    elif trust.temperature != 1:
        line += f", with the model's temperature {trust.temperature:.3g}"
    return f"{spread}mIoU of boundaries {trust.boundary_mean:.2f}\n{line}"


def as_json(trust: Trust) -> dict:
    """For figures/SPLIT.json: None where a number is none."""
    before, after = trust.errors
    values = {
        "interval": trust.interval,
        "intervals": trust.intervals.tolist(),
        "boundary_iou": trust.boundary.tolist(),
        "boundary_miou": trust.boundary_mean,
        "average_precision": trust.average_precision.tolist(),
        "calibration": {"temperature": trust.temperature, "error": before},
    }
    if trust.after is not None:
        values["calibration"]["error_with_temperature"] = after
    return _without_nan(values)


def _without_nan(value):
    if isinstance(value, dict):
        return {k: _without_nan(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def has_temperature(workdir: pathlib.Path, step: int) -> bool:
    """Whether one was fitted to the checkpoint of that step."""
    return _read(workdir).get("step") == step


def write_temperature(workdir: pathlib.Path, step: int, split: str, trust: Trust) -> None:
    """Where `read_temperature` finds it: prediction with this workdir then uses it."""
    found = {"step": step, "split": split, "tiles": trust.tiles, **as_json(trust)["calibration"]}
    records.write_json(workdir / FILE, found)


def read_temperature(workdir: pathlib.Path, step: int) -> float:
    """Of the checkpoint of that step; 1 where none was fitted to it. UserError for a file that is none of ours."""
    found = _read(workdir)
    return found["temperature"] if found.get("step") == step else 1.0


def _read(workdir: pathlib.Path) -> dict:
    path = workdir / FILE
    if not path.exists():
        return {}
    try:
        found = json.loads(buckets.read_text(path))
        temperature, step = float(found["temperature"]), int(found["step"])
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature {temperature}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        words = " ".join(str(error).split())
        raise UserError(f"cannot read {path}: {words}; remove it, and --mode=eval writes it again") from error
    return {"step": step, "temperature": temperature}
