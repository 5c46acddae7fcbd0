"""Does a confidence of 90 % mean that 90 % of such pixels are right? Counts, the error, and one temperature to mend it.

Calibration error and temperature scaling as in Guo et al., On Calibration of Modern Neural Networks, ICML 2017
(arXiv 1706.04599). Confidence is the probability of the predicted class; 255 is the label of a pixel not counted,
and the caller leaves such pixels out of `confidence` and `hit`.
"""

import dataclasses

import numpy as np

from ktda_jax.data.datasets import IGNORE

BINS = 15  # of equal width, as in the paper
LOWEST, HIGHEST = 0.05, 20.0  # temperatures that a fit may give
TINY = np.finfo(np.float32).tiny  # stands for a probability of 0: its logarithm is finite
FLOOR = float(np.log(TINY))  # -87.3
BELOW_ONE = np.float32(1 - 2**-22)  # 4 float32 below 1: less than 1 also when both are divided by the same sum
_ROWS = 2**16  # of a fit at once, in float64: 16 MB an array with 30 classes


@dataclasses.dataclass(frozen=True)
class Reliability:
    """Per bin of confidence, (BINS,): pixels int64, sum of their confidence float64, hits int64. `a + b` adds up.

    Bin k is k / BINS < confidence <= (k + 1) / BINS; a confidence of 0 is in bin 0.
    """

    count: np.ndarray
    confidence: np.ndarray
    hits: np.ndarray

    def __add__(self, other: "Reliability") -> "Reliability":
        return Reliability(self.count + other.count, self.confidence + other.confidence, self.hits + other.hits)


def nothing() -> Reliability:
    """The sum to start from."""
    return Reliability(np.zeros(BINS, np.int64), np.zeros(BINS), np.zeros(BINS, np.int64))


def reliability(confidence: np.ndarray, hit: np.ndarray) -> Reliability:
    """Counts of pixels with these confidences, float32 (n,) of 0..1, and whether each was right, bool (n,).

    ValueError for unequal shapes, for NaN and for what is no probability (beyond 0..1 by more than rounding).
    """
    confidence, hit = np.asarray(confidence, np.float32), np.asarray(hit, bool)
    if confidence.shape != hit.shape or confidence.ndim != 1:
        raise ValueError(f"confidence {confidence.shape} and hit {hit.shape} should both be (n,)")
    if confidence.size and not (confidence.min() >= -1e-3 and confidence.max() <= 1 + 1e-3):  # NaN fails as well
        raise ValueError(f"confidences are 0..1, got {confidence.min()} to {confidence.max()}")
    # In float32, where 0.2 * 15 is 3: in float64 the 0.2 of a float32 is above the edge.
    place = np.clip(np.ceil(confidence * np.float32(BINS)) - 1, 0, BINS - 1).astype(np.intp)
    return Reliability(
        np.bincount(place, minlength=BINS),
        np.bincount(place, confidence, BINS),
        np.bincount(place[hit], minlength=BINS),
    )


def expected_calibration_error(counts: Reliability) -> float:
    """Mean over pixels of |share of hits - mean confidence| of their bin, in percent; NaN without pixels."""
    if not counts.count.any():
        return float("nan")
    return float(100 * np.abs(counts.hits - counts.confidence).sum() / counts.count.sum())


def maximum_calibration_error(counts: Reliability) -> float:
    """The largest |share of hits - mean confidence| of a bin with pixels, in percent; NaN without pixels."""
    filled = counts.count > 0
    if not filled.any():
        return float("nan")
    return float(100 * (np.abs(counts.hits - counts.confidence)[filled] / counts.count[filled]).max())


def sample(label: np.ndarray, probabilities: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `count` labelled pixels of a tile, evenly spread, the same at every call.

    label: integer (H, W); probabilities: (C, H, W). Values that are no class (255) are left out.
    Gives log-probabilities float32 (k, C), at least FLOOR, and labels int64 (k,).
    """
    classes = len(probabilities)
    if probabilities.shape[1:] != label.shape:
        raise ValueError(f"probabilities {probabilities.shape} are not those of a label {label.shape}")
    labelled = np.flatnonzero((label >= 0) & (label < classes) & (label != IGNORE))
    taken = min(count, len(labelled))
    # One pixel from each of `taken` runs of equal length. Always the same place in its run would make columns where a
    # row is a whole number of runs; multiples of the golden ratio spread the places without a random generator.
    edges = np.arange(taken + 1) * len(labelled) // max(taken, 1)
    places = np.arange(taken) * 0.6180339887498949 % 1
    chosen = labelled[edges[:-1] + (places * np.diff(edges)).astype(np.intp)]
    rows, columns = np.unravel_index(chosen, label.shape)
    picked = np.asarray(probabilities[:, rows, columns].T, np.float32)
    return np.log(np.maximum(picked, TINY)), label[rows, columns].astype(np.int64)


def fit_temperature(log_probabilities: np.ndarray, labels: np.ndarray) -> float:
    """The T of LOWEST..HIGHEST for which softmax(log_probabilities / T) gives `labels` the least mean -log p.

    log_probabilities: float (N, C), logits will do; what is more than 87.3 below its row's maximum counts as that.
    labels: integers (N,) of 0..C-1. A bound where the best is beyond it, so LOWEST where every pixel is right;
    1 without pixels and where no T makes a difference. ValueError for NaN and for labels that are no class.
    """
    log_probabilities, labels = np.asarray(log_probabilities), np.asarray(labels)
    if log_probabilities.ndim != 2 or labels.shape != log_probabilities.shape[:1]:
        raise ValueError(f"log_probabilities {log_probabilities.shape} should be (N, C), labels {labels.shape} (N,)")
    if not len(labels):
        return 1.0
    if labels.min() < 0 or labels.max() >= log_probabilities.shape[1]:
        raise ValueError(f"labels {labels.min()} to {labels.max()} of {log_probabilities.shape[1]} classes")
    # The loss is convex in beta = 1 / T: its minimum is where the slope changes sign, or at an end.
    beta = 1.0
    slope, curvature = _slope_and_curvature(log_probabilities, labels, beta)
    if not np.isfinite(slope):
        raise ValueError("log_probabilities has NaN, or a row without a finite value")
    if slope == 0:
        return 1.0
    low, high = (beta, 1 / LOWEST) if slope < 0 else (1 / HIGHEST, beta)
    end = high if slope < 0 else low
    if _slope_and_curvature(log_probabilities, labels, end)[0] * slope >= 0:
        return LOWEST if slope < 0 else HIGHEST
    for _ in range(60):  # Newton's steps, halves of the bracket where one leaves it; 4 to 8 as a rule
        low, high = (beta, high) if slope < 0 else (low, beta)
        ahead = beta - slope / curvature if curvature > 0 else 0.0
        ahead = ahead if low <= ahead <= high else (low * high) ** 0.5
        done, beta = abs(ahead - beta) <= 1e-6 * beta, ahead
        if done:
            break
        slope, curvature = _slope_and_curvature(log_probabilities, labels, beta)
    return 1 / beta


def _slope_and_curvature(log_probabilities: np.ndarray, labels: np.ndarray, beta: float) -> tuple[float, float]:
    """First and second derivative of the mean loss by beta: means of E[z] - z[label] and of Var[z], in float64."""
    slope = curvature = 0.0
    for start in range(0, len(labels), _ROWS):
        z = log_probabilities[start : start + _ROWS].T.astype(np.float64, order="C")  # (C, rows): sums are quick
        with np.errstate(invalid="ignore"):  # of a row of -inf; the caller looks for NaN
            z -= z.max(0)
        np.maximum(z, FLOOR, out=z)
        wanted = np.take_along_axis(z, labels[None, start : start + _ROWS], 0)[0]
        weights = np.exp(beta * z)
        total = weights.sum(0)
        weights *= z
        mean = weights.sum(0) / total
        weights *= z
        slope += float((mean - wanted).sum())
        curvature += float((weights.sum(0) / total - mean**2).sum())
    return slope / len(labels), curvature / len(labels)


def tempered(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """p ** (1 / T), normalised over axis 0: float32 (C, ...) in and out; the same array for T = 1.

    Zeros stay zeros, and a pixel without any probability stays without. The argmax never changes, ties included.
    """
    if not 0 < temperature < float("inf"):
        raise ValueError(f"a temperature is above 0, got {temperature}")
    if temperature == 1:
        return probabilities
    highest = probabilities.max(0)
    ratio = np.divide(probabilities, np.where(highest > 0, highest, 1), dtype=np.float32)  # so that none underflows
    out = ratio ** np.float32(1 / temperature)
    # A high T takes neighbours of the maximum to 1 within rounding: the first of them would win and not the best.
    np.minimum(out, BELOW_ONE, out=out, where=ratio < 1)
    out /= np.maximum(out.sum(0), TINY)
    return out
