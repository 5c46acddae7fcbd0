"""How sure a mIoU is: 95 % intervals by the percentile bootstrap over tiles.

Whole tiles are drawn with replacement, since pixels of one tile are alike: to draw pixels would make the interval
far too narrow. Tiles of one scene are alike as well, which this cannot know. Efron and Tibshirani, An Introduction to
the Bootstrap, 1993, chapter 13.
"""

import numpy as np

PERCENTILES = (2.5, 97.5)
_CELLS = 2**22  # of the table of draws at once: 32 MB in float64


def counts(confusion: np.ndarray) -> np.ndarray:
    """Hits and unions, int64 (..., 2, C), of confusion matrices (..., C, C): all that IoU needs, and they add up."""
    hits = np.diagonal(confusion, axis1=-2, axis2=-1)
    return np.stack((hits, confusion.sum(-1) + confusion.sum(-2) - hits), -2)


def interval(by_tile: np.ndarray, *, samples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """Low and high end for the mIoU in percent. by_tile: int64 (n, 2, C), the `counts` of each tile.

    Tiles without a counted pixel are left out; NaN with fewer than 2 others.
    """
    iou = resampled_iou(by_tile, samples=samples, seed=seed)
    if not len(iou):
        return float("nan"), float("nan")
    present = ~np.isnan(iou)
    # As in `summarize`: the mean over the classes that are not NaN. At least one is, as every tile has pixels.
    mean = np.where(present, iou, 0).sum(1) / present.sum(1)
    low, high = np.percentile(mean, PERCENTILES)
    return float(low), float(high)


def class_intervals(by_tile: np.ndarray, *, samples: int = 1000, seed: int = 0) -> np.ndarray:
    """The same for the IoU of each class: float64 (C, 2).

    Draws that do not meet a class are left out for it; NaN for a class of no tile and with fewer than 2 tiles.
    """
    iou = resampled_iou(by_tile, samples=samples, seed=seed)
    out = np.full((iou.shape[1], 2), np.nan)
    for index, values in enumerate(iou.T):
        values = values[~np.isnan(values)]
        if values.size:
            out[index] = np.percentile(values, PERCENTILES)
    return out


def resampled_iou(by_tile: np.ndarray, *, samples: int = 1000, seed: int = 0) -> np.ndarray:
    """IoU per class in percent of each draw of n tiles: float64 (samples, C), NaN as in `summarize`.

    (0, C) with fewer than 2 tiles that have pixels.
    """
    by_tile = np.asarray(by_tile)
    if by_tile.ndim != 3 or by_tile.shape[1] != 2:
        raise ValueError(f"hits and unions of tiles are (n, 2, C), got {by_tile.shape}")
    classes = by_tile.shape[2]
    tiles = by_tile[by_tile[:, 1].any(1)].reshape(-1, 2 * classes).astype(np.float64)
    n = len(tiles)
    if n < 2:
        return np.empty((0, classes))
    rng = np.random.default_rng(seed)
    sums = np.empty((samples, 2 * classes))
    step = max(1, _CELLS // n)
    for start in range(0, samples, step):
        # How often each tile was drawn: a multinomial, got by counting draws, which is much quicker.
        draws = [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(min(step, samples - start))]
        sums[start : start + step] = np.array(draws, np.float64) @ tiles  # exact: whole numbers below 2**53
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * np.divide(sums[:, :classes], sums[:, classes:])
