"""Arrays as data URIs, small enough for one page."""

import base64
import pathlib

import numpy as np
from PIL import Image

from ktda_jax.data.datasets import IGNORE
from ktda_jax.figures import sheets
from ktda_jax.figures.html import uri

SIDE = 512  # pixels of a picture at most


def photo(image: np.ndarray, side: int = SIDE) -> str:
    """uint8 (H, W, 3) -> JPEG of at most `side` pixels."""
    height, width = _fitting(image.shape[:2], side)
    picture = Image.fromarray(np.ascontiguousarray(image))
    if (height, width) != image.shape[:2]:
        picture = picture.resize((width, height), Image.Resampling.BOX)
    return uri(picture, "jpeg", quality=82, subsampling=0)


def classes(ids: np.ndarray, palette: tuple, side: int = SIDE) -> str:
    """Class ids (H, W) in their colours -> PNG of at most `side` pixels; ignored ones striped."""
    return uri(Image.fromarray(sheets.paint(_nearest(ids, side), palette)), "png")


def errors(image: np.ndarray, label: np.ndarray, prediction: np.ndarray, side: int = SIDE) -> str:
    """The image in pale grey with wrong pixels red and ignored ones striped."""
    image, label, prediction = (_nearest(x, side) for x in (image, label, prediction))
    prediction = np.where(label == IGNORE, label, prediction)
    return photo(sheets.paint_errors(image, label, prediction), side)


def pixels(image: np.ndarray) -> str:
    """A small map, uint8 (h, w, 3), pixel by pixel."""
    return uri(Image.fromarray(image if image.shape[-1] == 3 else np.repeat(image[..., :1], 3, -1)), "png")


def file(path: pathlib.Path) -> str:
    """A PNG as it is."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _fitting(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = min(1.0, side / max(size))
    return tuple(max(1, round(length * scale)) for length in size)


def _nearest(x: np.ndarray, side: int) -> np.ndarray:
    (height, width), (h, w) = x.shape[:2], _fitting(x.shape[:2], side)
    return x if (h, w) == (height, width) else x[np.arange(h) * height // h][:, np.arange(w) * width // w]
