"""Maps scored against labels while they are made, strip by strip: memory holds one scene's label and map."""

import pathlib
from collections.abc import Mapping

import numpy as np

from ktda_jax import UserError
from ktda_jax.config import workdir as records
from ktda_jax.data.addresses import Image
from ktda_jax.data.datasets import IGNORE
from ktda_jax.figures import plots
from ktda_jax.figures import trust as figures
from ktda_jax.metrics import boundary
from ktda_jax.metrics.confusion import count, summarize
from ktda_jax.prediction import labelled
from ktda_jax.tiling.pipeline import Finished
from ktda_jax.training.evaluate import Evaluation, write_scores
from ktda_jax.training.trust import Sums

NAME = "scores"
FILES = (f"{NAME}.json", f"{NAME}.csv", "confusion.png", "reliability.png", f"{NAME}_tiles.csv")
BLOCK = 1 << 24  # pixels of which edges are found at once


class Scores:
    """Takes the strips of all scenes from top to bottom, one scene after the other.

    Pixels that a label ignores or where the scene has no data are not counted.
    """

    def __init__(self, labels: Mapping[Image, Image], mapping: Mapping | None, classes: int):
        """labels: {scene: label}; mapping: as `read_label` takes it."""
        self._labels, self._mapping, self._classes = labels, mapping, classes
        self._index = {scene: index for index, scene in enumerate(labels)}
        self._sums, self._total = Sums(len(labels), classes), np.zeros((classes, classes), np.int64)
        # Of the scene at hand: label and map (H, W), labelled pixels of it all and of its rows so far, and counts.
        self._label = self._map = np.zeros((0, 0), np.uint8)
        self._labelled = self._seen = 0
        self._confusion = np.zeros((classes, classes), np.int64)

    def take(self, strip: Finished) -> None:
        """Its probabilities are float32. UserError where they are not finite."""
        row, scene = strip.row, strip.row.scene
        if row.index == 0:
            self._begin(scene.path, (scene.height, scene.width))
        rows, index = slice(row.top, row.end), self._index[scene.path]
        label = self._label[rows]  # a view
        before, self._seen = self._seen, self._seen + int(np.count_nonzero(label < self._classes))
        label[~row.present] = IGNORE
        self._map[rows] = strip.labels
        self._confusion += count(label, strip.labels, self._classes)
        # A scene gives as many pixels as any other, and each of its strips as many as it has of its labelled ones.
        taken = min(self._sums.each, self._labelled)
        most = self._seen * taken // max(self._labelled, 1) - before * taken // max(self._labelled, 1)
        self._sums.add_pixels(index, scene.path.name, label, strip.probabilities, most)
        if row.last:
            edges = edge_counts(self._label, self._map, self._classes)
            self._sums.add_counts(index, self._confusion, edges)
            self._total += self._confusion

    def _begin(self, scene: Image, size: tuple[int, int]) -> None:
        self._label = labelled.read(self._labels[scene], self._mapping)
        if self._label.shape != size:
            raise UserError(f"the label {self._labels[scene]} of {scene} has changed while we were at work")
        self._map = np.empty(size, np.uint8)
        self._labelled, self._seen = int(np.count_nonzero(self._label < self._classes)), 0
        self._confusion = np.zeros((self._classes, self._classes), np.int64)

    def result(self, temperature: float) -> Evaluation:
        """temperature: by which the probabilities were divided. UserError if no pixel was counted."""
        confusion = self._total
        if not confusion.any():
            raise UserError("no labelled pixel lies where its image has data, so there is nothing to score")
        return Evaluation(confusion, summarize(confusion), [], self._sums.result(temperature))


def edge_counts(label: np.ndarray, prediction: np.ndarray, classes: int, block: int = BLOCK) -> np.ndarray:
    """`boundary.count` of a scene of any size, in blocks of rows: int64 (2, C)."""
    height, width = label.shape
    distance = boundary.default_distance(height, width)
    total, step = np.zeros((2, classes), np.int64), max(block // width, 1)
    for top in range(0, height, step):
        end = min(top + step, height)
        first, last = max(top - distance, 0), min(end + distance, height)
        part, rows = slice(first, last), slice(top - first, end - first)
        total += boundary.count(label[part], prediction[part], classes, distance=distance, rows=rows)
    return total


def write(result: Evaluation, folder: pathlib.Path, classes: tuple[str, ...]) -> None:
    """FILES, in the form of a training's figures. UserError if they cannot be written."""
    with records.writing(folder):
        write_scores(result, folder, NAME, classes)
        plots.save_confusion(folder / FILES[2], result.confusion, classes)
        figures.save_reliability(folder / FILES[3], result.trust.before, names=("as predicted", ""))
