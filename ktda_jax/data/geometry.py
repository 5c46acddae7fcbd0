"""Where a training crop lies, how large it was before it was resized, which way it is turned, what is pasted into it.

Images from above have no upright: `view` gives the eight that a square has. Every function is pure, and all that is
random comes from a numpy Generator. Images are uint8 (H, W, bands), labels uint8 (H, W).
"""

import dataclasses

import cv2
import numpy as np

TURNS = (None, cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)
MOST = 4  # bands that OpenCV turns and shrinks at once
VIEWS = 8  # 0 as it is, 1 its mirror image, 2 and 3 a quarter turn of these, ...


@dataclasses.dataclass(frozen=True)
class Rare:
    """Which tiles hold which class; classes come as often as their pixels are rare."""

    shares: np.ndarray  # float64 (C,), of the draws
    tiles: tuple[np.ndarray, ...]  # per class, int64: the tiles that hold it

    @classmethod
    def of(cls, by_tile: np.ndarray) -> "Rare":
        """by_tile: pixels per tile and class, int (tiles, C). A class without pixels is never drawn."""
        pixels = by_tile.sum(0).astype(np.float64)
        inverse = np.divide(1, pixels, out=np.zeros_like(pixels), where=pixels > 0)
        return cls(inverse / inverse.sum(), tuple(np.flatnonzero(column) for column in by_tile.T))

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """A class, and a tile that holds it."""
        chosen = int(rng.choice(len(self.shares), p=self.shares))
        return chosen, int(rng.choice(self.tiles[chosen]))


def view(array: np.ndarray, number: int) -> np.ndarray:
    """One of the `VIEWS` of (H, W, ...): mirrored where `number` is odd, then number // 2 quarter turns."""
    bands = array.shape[2:]
    if bands > (MOST,):  # slower: 0.6 ms a tile of 256 px instead of 0.06
        return np.ascontiguousarray(np.rot90(array[:, ::-1] if number % 2 else array, number // 2))
    if number % 2:
        array = cv2.flip(array, 1)
    if number // 2:
        array = cv2.rotate(array, TURNS[number // 2])
    return np.ascontiguousarray(array).reshape(*array.shape[:2], *bands)  # OpenCV drops a single band's axis


def turned(number: int) -> bool:
    """Whether height and width change places."""
    return number // 2 % 2 == 1


def draw_size(
    size: tuple[int, int], crop: tuple[int, int], zoom: tuple[float, float] | None, rng: np.random.Generator
) -> tuple[int, int]:
    """Of the window that becomes a crop: enlarged by a log-uniform factor of `zoom`, within a tile of `size`."""
    if zoom is None:
        return crop
    factor = np.exp(rng.uniform(*np.log(zoom)))
    factor = max(factor, *(c / s for c, s in zip(crop, size, strict=True)))
    return tuple(min(max(round(c / factor), 1), s) for c, s in zip(crop, size, strict=True))


def around(label: np.ndarray, chosen: int, crop: tuple[int, int], rng: np.random.Generator) -> tuple[int, int] | None:
    """The corner of a window, within the tile, around some pixel of a class; None where there is none."""
    places = np.flatnonzero(label == chosen)
    if not len(places):
        return None
    row, column = divmod(int(places[rng.integers(len(places))]), label.shape[1])
    corner = zip((row, column), crop, label.shape, strict=True)
    return tuple(min(max(place - side // 2, 0), full - side) for place, side, full in corner)


def resized(image: np.ndarray, label: np.ndarray, crop: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Both to the crop's size; the label keeps its values."""
    if label.shape == tuple(crop):
        return image, label
    how = cv2.INTER_AREA if label.shape[0] > crop[0] else cv2.INTER_LINEAR
    groups = [image[..., first : first + MOST] for first in range(0, image.shape[-1], MOST)]
    groups = [cv2.resize(bands, crop[::-1], interpolation=how).reshape(*crop, -1) for bands in groups]
    image = groups[0] if len(groups) == 1 else np.concatenate(groups, -1)
    return image, cv2.resize(label, crop[::-1], interpolation=cv2.INTER_NEAREST_EXACT)  # the same centres


def rectangle(size: tuple[int, int], patch: int, rng: np.random.Generator) -> tuple[slice, slice]:
    """CutMix's (Yun et al. 2019): a uniform share of the area, around any pixel; its edges at multiples of `patch`."""
    share, sides = np.sqrt(rng.random()), []
    for length in size:
        middle, half = rng.integers(length), length * share / 2
        first, last = (patch * round(min(max(edge, 0), length) / patch) for edge in (middle - half, middle + half))
        sides.append(slice(first, min(last, length)))
    return tuple(sides)
