"""What a data set holds: class shares, doubles across splits, class weights. Arrays in, arrays out."""

import concurrent.futures
import dataclasses
import hashlib

import numpy as np

from ktda_jax import UserError
from ktda_jax.data.sources import Source, cpu_threads, read_tile


@dataclasses.dataclass(frozen=True)
class SplitCounts:
    """Of one split: pixels int64 (256,) by label value, and the number of tiles that hold each value."""

    tiles: int
    pixels: np.ndarray
    tiles_with: np.ndarray
    sizes: dict[tuple[int, int], int]  # (H, W) -> tiles
    hashes: dict[str, list[str]]  # sha256 of an image's pixels -> names
    unreadable: list[str]


def count(source: Source, *, num_threads: int | None = None) -> SplitCounts:
    """Reads every tile once."""

    def examine(index: int):
        try:
            tile = read_tile(source, index)
        except UserError as error:
            return str(error)
        image = np.ascontiguousarray(tile["image"])
        digest = hashlib.sha256(str(image.shape).encode() + image.tobytes()).hexdigest()
        return tile["name"], tile["label"].shape, np.bincount(tile["label"].ravel(), minlength=256), digest

    pixels, tiles_with = np.zeros(256, np.int64), np.zeros(256, np.int64)
    sizes, hashes, unreadable = {}, {}, []
    with concurrent.futures.ThreadPoolExecutor(num_threads or cpu_threads()) as pool:
        for found in pool.map(examine, range(len(source))):
            if isinstance(found, str):
                unreadable.append(found)
                continue
            name, size, counts, digest = found
            pixels += counts
            tiles_with += counts > 0
            sizes[size] = sizes.get(size, 0) + 1
            hashes.setdefault(digest, []).append(name)
    return SplitCounts(len(source), pixels, tiles_with, sizes, hashes, unreadable)


def doubles(splits: dict[str, SplitCounts]) -> list[list[str]]:
    """Groups of 'split/name' whose images have the same pixels, within a split or across splits."""
    seen = {}
    for split, counts in splits.items():
        for digest, names in counts.hashes.items():
            seen.setdefault(digest, []).extend(f"{split}/{name}" for name in names)
    return [names for names in seen.values() if len(names) > 1]


def inverse_frequency(pixels: np.ndarray) -> np.ndarray:
    """Class weights proportional to 1 / share of the labelled pixels, mean 1; 0 for a class that never occurs."""
    return _normalized(np.divide(1.0, pixels, out=np.zeros(len(pixels)), where=pixels > 0))


def effective_number(tiles_with: np.ndarray, beta: float = 0.999) -> np.ndarray:
    """Class weights (1 - beta) / (1 - beta^n), mean 1 (Cui et al., 2019).

    n counts tiles with the class, not pixels: neighbouring pixels say nearly the same.
    """
    covered = 1.0 - beta ** tiles_with.astype(np.float64)
    return _normalized(np.divide(1.0 - beta, covered, out=np.zeros(len(covered)), where=tiles_with > 0))


def _normalized(weights: np.ndarray) -> np.ndarray:
    present = weights > 0
    return weights / weights[present].mean() if present.any() else weights
