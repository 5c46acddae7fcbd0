"""Overlapping tiles become one map: weights that sum to 1, and a strip of sums that moves down the scene.

Probabilities are blended and not logits: their average is a distribution again, so confidence keeps its meaning, and a
tile that is sure of itself beyond reason (logits have no bound) counts no more than any other.

Along an axis tile k has the weight c_k - c_{k+1}, where c_k rises from 0 to 1 around the middle of the overlap of tiles
k - 1 and k, over three quarters of it. So weights sum to 1 however many tiles meet, and the outer eighth of an overlap,
where a tile knows least of its surroundings, counts nothing.
"""

import numpy as np

from ktda_jax.tiling.windows import Axis

NODATA = 255  # in maps, where the scene has no data, and in probabilities
CERTAIN = 254  # stored value of probability 1


def weights(axis: Axis) -> np.ndarray:
    """float32 (tiles, tile), each row the weights of one tile along the axis."""
    at = np.add.outer(np.array(axis.starts), np.arange(axis.tile) + 0.5)
    seams, width = np.array(axis.seams())[:, None], max(axis.overlap * 3 / 4, 1e-6)
    values = np.ones(at.shape)
    values[1:] = _rise((at[1:] - seams) / width)
    values[:-1] -= _rise((at[:-1] - seams) / width)
    return values.astype(np.float32)


def _rise(x: np.ndarray) -> np.ndarray:
    """0 below -1/2, 1 above 1/2, smooth at both ends."""
    x = np.clip(x + 0.5, 0, 1)
    return x * x * (3 - 2 * x)


class Strip:
    """Sums of weighted probabilities, float32 (classes, tile height, scene width): one row of tiles at a time."""

    def __init__(self, classes: int, height: int, width: int):
        self._sums = np.zeros((classes, height, width), np.float32)

    def add(self, tile: np.ndarray, left: int) -> None:
        """tile: probabilities times weights (classes, h, w); what is beyond the strip is padding."""
        place = self._sums[:, :, left : left + tile.shape[2]]
        place += tile[:, : place.shape[1], : place.shape[2]]

    def sums(self, rows: int) -> np.ndarray:
        """The first rows, a view."""
        return self._sums[:, :rows]

    def advance(self, rows: int) -> None:
        """Moves down the scene."""
        keep = self._sums.shape[1] - rows
        for sums in self._sums:
            sums[:keep] = sums[rows:]
            sums[keep:] = 0


def labels(sums: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """sums: (classes, H, W) -> the most probable class uint8 (H, W), NODATA where not `present`, and its sum (H, W).

    The first class wins a tie. A loop over classes: numpy's argmax across planes takes several times as long.
    """
    best = sums[0].copy()
    found = np.zeros(best.shape, np.uint8)
    better = np.empty(best.shape, bool)
    for index in range(1, len(sums)):
        np.greater(sums[index], best, out=better)
        found[better] = index
        np.maximum(best, sums[index], out=best)
    if not present.all():
        found[~present] = NODATA
    return found, best


def stored(probabilities: np.ndarray, present: np.ndarray) -> np.ndarray:
    """float32 (..., H, W) in 0..1 -> uint8: 0 to CERTAIN, NODATA where not `present` (H, W)."""
    scaled = np.clip(np.rint(probabilities * CERTAIN), 0, CERTAIN).astype(np.uint8)
    if not present.all():
        scaled[..., ~present] = NODATA
    return scaled
