"""Precision against recall of each class at every threshold, one class against the rest, from histograms.

A pixel is found as class c when the probability of c is at least the threshold, whatever the other classes have.
Probabilities are taken to 256 levels, so the sums have a fixed size however many pixels there are.
"""

import numpy as np

from ktda_jax.data.datasets import IGNORE

LEVELS = 256  # level k stands for a probability of k / 255


def histograms(label: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Pixels by level: int64 (C, 2, 256); [c, 1] of those labelled c, [c, 0] of the others. Sum it over tiles.

    label: integer (...); probabilities: float (C, ...) of 0..1. Pixels whose label is no class (255) are not counted.
    ValueError for NaN, and for what is no probability, where a pixel is counted.
    """
    classes = len(probabilities)
    if probabilities.shape[1:] != label.shape:
        raise ValueError(f"probabilities {probabilities.shape} are not those of a label {label.shape}")
    counted = (label >= 0) & (label < classes) & (label != IGNORE)
    every = bool(counted.all())
    label = label.ravel() if every else label[counted]
    out = np.zeros((classes, 2, LEVELS), np.int64)
    for index, values in enumerate(probabilities):  # class by class: little memory
        values = values.ravel() if every else values[counted]
        if values.size and not (values.min() >= -1e-3 and values.max() <= 1 + 1e-3):  # NaN fails as well
            raise ValueError(f"probabilities are 0..1, got {values.min()} to {values.max()}")
        level = np.clip(np.rint(values * np.float32(LEVELS - 1)), 0, LEVELS - 1).astype(np.uint8)
        out[index, 1] = np.bincount(level[label == index], minlength=LEVELS)
        out[index, 0] = np.bincount(level, minlength=LEVELS) - out[index, 1]
    return out


def precision_recall(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision and recall, float64 (C, 256), and average precision (C,), as fractions, of sums of `histograms`.

    Column k is that of the threshold k / 255. Precision is NaN where no pixel reaches the threshold, recall and
    average precision where no pixel has the class. Average precision is the sum of (R_n - R_{n-1}) P_n over
    descending thresholds, without interpolation, as in scikit-learn.
    """
    counts = np.asarray(counts, np.int64)
    found = counts[:, :, ::-1].cumsum(2)[:, :, ::-1]  # pixels at or above each level
    labelled = counts[:, 1].sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.divide(found[:, 1], found.sum(1))
        recall = np.divide(found[:, 1], labelled)
        # A level without a pixel of the class adds nothing, though its precision may be NaN.
        steps = np.where(counts[:, 1] > 0, counts[:, 1] * precision, 0).sum(1)
        average = np.divide(steps, labelled[:, 0])
    return precision, recall, average
