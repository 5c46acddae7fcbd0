"""Pixels and square metres of a map by class, counted while it passes by."""

import cv2
import numpy as np

from ktda_jax.data.pixel_area import PixelArea

VALUES = 256  # a map's, 255 where it has no data
_AT_ONCE = 1 << 24  # OpenCV gives its counts in float32, which holds whole numbers so far


class Tally:
    def __init__(self, area: PixelArea):
        self.area = area
        self.pixels = np.zeros(VALUES, np.int64)
        self._square_metres = np.zeros(VALUES)

    @property
    def square_metres(self) -> np.ndarray | None:
        """float64 (256,); None where it is not known how large pixels are."""
        return None if self.area.rows is None else self._square_metres

    def add(self, labels: np.ndarray, top: int, inside: np.ndarray | None = None) -> None:
        """labels: uint8 (h, w), rows from `top` on of the raster that `area` is of; inside: uint8 (h, w), not 0 where
        they count.
        """
        rows, constant = self.area.rows, self.area.constant
        step = max(_AT_ONCE // labels.shape[1], 1) if constant else 1
        for first in range(0, len(labels), step):
            part = np.s_[first : first + step]
            mask = None if inside is None else inside[part]
            found = cv2.calcHist([np.ascontiguousarray(labels[part])], [0], mask, [VALUES], [0, VALUES]).ravel()
            self.pixels += found.astype(np.int64)
            if rows is not None:
                self._square_metres += found * rows[top + first]
