"""Raw sensor values to uint8: what lies between two limits is spread over 0..255."""

import numpy as np


def stretch(pixels: np.ndarray, low, high) -> np.ndarray:
    """pixels: real (H, W, bands) -> uint8. `low` and below is 0, `high` and above 255; truncated, NaN is 0.

    low, high: numbers, or one per band. Where both are equal, as in a constant patch, the result is 0.
    """
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    width = high - low
    # In 64 bits, and by a division at the end: whole numbers are exact then, and `high` is 255 and not 254.
    values = (pixels.astype(np.float64) - low) * 255
    values = np.divide(values, width, out=np.zeros_like(values), where=width > 0)
    return np.clip(np.nan_to_num(values, copy=False, nan=0.0) + 1e-9, 0, 255).astype(np.uint8)


def minmax(pixels: np.ndarray) -> tuple[float, float]:
    """The limits of the published cloud tiles: smallest and largest value over all bands together, fill included."""
    return float(np.nanmin(pixels)), float(np.nanmax(pixels))
