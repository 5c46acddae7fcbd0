"""A scene, its map and its confidence as square pictures in several resolutions, which together stay below a size.

Level 0 is the finest; every other one has half the side of the one before, rounded up.
"""

import dataclasses
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from ktda_jax.figures.html import uri
from ktda_jax.tiling.blend import CERTAIN, NODATA

TILE = 512  # pixels
STEPS = 32  # of confidence: noise of 254 values would fill the page
SMALLEST = 256  # pixels, to which a level is not shrunk for the sake of the size


@dataclasses.dataclass(frozen=True)
class Layers:
    scene: np.ndarray  # uint8 (H, W, 3)
    labels: np.ndarray  # uint8 (H, W), 255 where there are no data
    confidence: np.ndarray | None  # uint8 (H, W), see blend.stored

    @property
    def size(self) -> tuple[int, int]:
        return self.labels.shape

    def halved(self) -> "Layers":
        """Means of the scene and of confidence, the most frequent of four classes."""
        labels, confidence = _most_frequent(*_four(self.labels)), None
        if self.confidence is not None:
            confidence = _mean_of_data(*_four(self.confidence))
        scene = sum(part.astype(np.uint16) for part in _four(self.scene))
        return Layers(((scene + 2) // 4).astype(np.uint8), labels, confidence)

    def resized(self, size: tuple[int, int]) -> "Layers":
        """To a smaller (H, W)."""
        rows, columns = (np.arange(n) * full // n for n, full in zip(size, self.size, strict=True))
        scene = Image.fromarray(self.scene).resize(size[::-1], Image.Resampling.BOX)
        values = [None if x is None else x[rows][:, columns] for x in (self.labels, self.confidence)]
        return Layers(np.asarray(scene), *values)


def _four(x: np.ndarray) -> list[np.ndarray]:
    """Upper left, upper right, lower left and lower right of every 2 x 2 pixels; an odd edge is repeated."""
    x = np.pad(x, [(0, side % 2) for side in x.shape[:2]] + [(0, 0)] * (x.ndim - 2), mode="edge")
    return [x[row::2, column::2] for row in (0, 1) for column in (0, 1)]


def _most_frequent(a, b, c, d) -> np.ndarray:
    """The first wins a tie."""
    others = np.where((b == c) | (b == d), b, np.where(c == d, c, a))
    return np.where((a == b) | (a == c) | (a == d), a, others)


def _mean_of_data(*four) -> np.ndarray:
    there = [x != NODATA for x in four]
    total = sum(np.where(mask, x, 0).astype(np.uint16) for mask, x in zip(there, four, strict=True))
    count = sum(mask.astype(np.uint16) for mask in there)
    return np.where(count > 0, (total + count // 2) // np.maximum(count, 1), NODATA).astype(np.uint8)


@dataclasses.dataclass(frozen=True)
class Level:
    height: int
    width: int
    tiles: dict[str, list[str]]  # of each layer, row by row: data URIs


def levels(layers: Layers, palette: Sequence[Sequence[int]], most: int) -> list[Level]:
    """Finest first; the finest is shrunk until all together have at most so many characters."""
    while True:
        made, found = [], layers
        while True:
            made.append(_level(found, palette))
            if max(found.size) <= TILE:
                break
            found = found.halved()
        total = sum(len(tile) for level in made for tiles in level.tiles.values() for tile in tiles)
        if total <= most or max(layers.size) <= SMALLEST:
            return made
        factor = min(0.95 * (most / total) ** 0.5, 0.95)
        layers = layers.resized(tuple(max(round(side * factor), 1) for side in layers.size))


def _level(layers: Layers, palette) -> Level:
    colours = np.array(palette, np.uint8)
    ways = {
        "scene": (lambda x: uri(Image.fromarray(x), "jpeg", quality=82), layers.scene),
        "map": (lambda x: _indexed(x, colours), layers.labels),
    }
    if layers.confidence is not None:
        shades = confidence_colours()
        ways["confidence"] = lambda x: _indexed(steps(x), shades), layers.confidence
    with ThreadPoolExecutor() as pool:
        tiles = {name: list(pool.map(encode, _cut(values))) for name, (encode, values) in ways.items()}
    return Level(*layers.size, tiles)


def _cut(x: np.ndarray) -> list[np.ndarray]:
    height, width = x.shape[:2]
    corners = [(top, left) for top in range(0, height, TILE) for left in range(0, width, TILE)]
    return [np.ascontiguousarray(x[top : top + TILE, left : left + TILE]) for top, left in corners]


def _indexed(values: np.ndarray, colours: np.ndarray) -> str:
    """A PNG of numbers of colours, transparent where there are no data."""
    picture = Image.fromarray(np.minimum(values, len(colours)).astype(np.uint8), "P")
    picture.putpalette([*colours.ravel().tolist(), 0, 0, 0])
    return uri(picture, "png", transparency=len(colours))


def steps(confidence: np.ndarray) -> np.ndarray:
    """0 to STEPS - 1 for 0 to 1, 255 without data."""
    found = np.minimum(confidence.astype(np.uint16) * STEPS // CERTAIN, STEPS - 1).astype(np.uint8)
    return np.where(confidence == NODATA, np.uint8(NODATA), found)


def confidence_colours() -> np.ndarray:
    """uint8 (STEPS, 3), from dark and blue to bright and yellow, also for who does not see red."""
    from matplotlib import colormaps  # only here: it takes half a second

    return (colormaps["cividis"](np.linspace(0, 1, STEPS))[:, :3] * 255 + 0.5).astype(np.uint8)
