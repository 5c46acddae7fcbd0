"""Raw sensor values to uint8: what lies between two limits is spread over 0..255."""

import numpy as np


def stretch(pixels: np.ndarray, low, high) -> np.ndarray:
    """pixels: real (H, W, bands) -> uint8. `low` and below is 0, `high` and above 255; truncated, NaN is 0.

    low, high: numbers, or one per band. Where both are equal, as in a constant patch, the result is 0.
    """
    low, high = np.asarray(low, np.float32), np.asarray(high, np.float32)
    width = high - low
    scale = np.divide(np.float32(255), width, out=np.zeros_like(width), where=width > 0)
    values = (pixels.astype(np.float32) - low) * scale
    return np.clip(np.nan_to_num(values, copy=False, nan=0.0), 0, 255).astype(np.uint8)


def minmax(pixels: np.ndarray) -> tuple[float, float]:
    """The limits of the published cloud tiles: smallest and largest value over all bands together, fill included."""
    return float(np.nanmin(pixels)), float(np.nanmax(pixels))
