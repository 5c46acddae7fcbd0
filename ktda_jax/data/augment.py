"""Published training augmentation on uint8 tiles in numpy and OpenCV, with mmsegmentation's arithmetic to the bit.

Every function is pure: its randomness is a strength or a numpy Generator that the caller passes in.
Images are uint8 (H, W, bands), RGB unless said otherwise, labels uint8 (H, W).
"""

import dataclasses

import cv2
import numpy as np


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What config.data says of it. Off are those that are not published."""

    crop: tuple[int, int]  # height, width
    flip: float = 0.5  # probability of a mirror image
    rotate: bool = False  # quarter turns, too
    zoom: tuple[float, float] | None = None  # by which crops are enlarged
    cutmix: float = 0.0  # probability that a part of another crop is pasted in
    rare_crops: float = 0.0  # share of crops that lie around a rare class
    photometric: bool = True


def random_crop(
    image: np.ndarray, label: np.ndarray, size: int | tuple[int, int], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Cuts the same window of `size` (side or (H, W)) from both, every position equally likely; views."""
    height, width = (size, size) if isinstance(size, int) else size
    if image.shape[:2] != label.shape:
        raise ValueError(
            f"image is {image.shape[0]} x {image.shape[1]} but its label {label.shape[0]} x {label.shape[1]}"
        )
    if label.shape[0] < height or label.shape[1] < width:
        raise ValueError(f"tile of {label.shape[0]} x {label.shape[1]} is smaller than the crop of {height} x {width}")
    top = int(rng.integers(label.shape[0] - height + 1))
    left = int(rng.integers(label.shape[1] - width + 1))
    window = np.s_[top : top + height, left : left + width]
    return image[window], label[window]


def random_flip(
    image: np.ndarray, label: np.ndarray, rng: np.random.Generator, probability: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Mirrors both left to right with `probability`."""
    if rng.random() < probability:
        return mirror(image, label)
    return image, label


def mirror(image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both left to right."""
    return cv2.flip(image, 1).reshape(image.shape), cv2.flip(label, 1)  # OpenCV drops a single band's axis


def _affine(pixels: np.ndarray, alpha: float = 1.0, beta: float = 0.0) -> np.ndarray:
    """uint8(clip(float32(pixels) * alpha + beta, 0, 255)), truncated like mmseg's `convert`.

    The result depends on a pixel's value alone, so 256 results are computed and looked up: exact, and about
    ten times faster than the arithmetic on the whole image.
    """
    table = np.arange(256, dtype=np.float32) * np.float32(alpha) + np.float32(beta)
    return cv2.LUT(pixels, np.clip(table, 0, 255).astype(np.uint8)).reshape(pixels.shape)


def adjust_brightness(image: np.ndarray, strength: float) -> np.ndarray:
    """Adds `strength` (-255..255 grey levels)."""
    return _affine(image, beta=strength)


def adjust_contrast(image: np.ndarray, strength: float) -> np.ndarray:
    """Multiplies by `strength` (1 leaves the image as it is)."""
    return _affine(image, alpha=strength)


def adjust_saturation(image: np.ndarray, strength: float) -> np.ndarray:
    """Multiplies the S of OpenCV's 8-bit HSV by `strength`."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    hsv[..., 1] = _affine(hsv[..., 1], alpha=strength)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def adjust_hue(image: np.ndarray, strength: int) -> np.ndarray:
    """Turns the H of OpenCV's 8-bit HSV by `strength` steps of 2 degrees (180 make a full turn)."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    turned = ((np.arange(256) + int(strength)) % 180).astype(np.uint8)
    hsv[..., 0] = cv2.LUT(hsv[..., 0], turned)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


def photometric_distortion(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """mmseg's PhotoMetricDistortion with its published ranges; each operation happens with probability 0.5.

    brightness +-32, contrast 0.5-1.5 (first or last, by a coin), saturation 0.5-1.5, hue -18..17 of 180. Saturation
    and hue are those of three bands; images of more or fewer keep theirs.
    """
    coloured = image.shape[-1] == 3
    if rng.integers(2):
        image = adjust_brightness(image, rng.uniform(-32, 32))
    contrast_first = rng.integers(2)
    if contrast_first and rng.integers(2):
        image = adjust_contrast(image, rng.uniform(0.5, 1.5))
    if coloured and rng.integers(2):
        image = adjust_saturation(image, rng.uniform(0.5, 1.5))
    if coloured and rng.integers(2):
        image = adjust_hue(image, int(rng.integers(-18, 18)))
    if not contrast_first and rng.integers(2):
        image = adjust_contrast(image, rng.uniform(0.5, 1.5))
    return image
