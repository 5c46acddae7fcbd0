"""Where tiles lie on the map, by the headers of their files: extents, centres, and which tiles touch which."""

import concurrent.futures
import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from ktda_jax import UserError
from ktda_jax.data.gdal import opened, place_of
from ktda_jax.data.sources import cpu_threads

WORLD = "EPSG:4326"  # degrees, for tiles in several coordinate systems
NEAR = 0.5  # pixels between two extents that count as touching: corners are rounded


@dataclasses.dataclass(frozen=True)
class Extents:
    """Of n tiles: boxes float64 (n, 4), left, bottom, right, top in the units of `crs`, NaN where a file says nothing;
    pixels float64 (n,), the longer side of one in the same units; crs '' where none is named."""

    boxes: np.ndarray
    pixels: np.ndarray
    crs: np.ndarray

    @property
    def located(self) -> np.ndarray:
        """bool (n,). A plane without a name is a place only where no tile names one."""
        known = np.isfinite(self.boxes).all(1)
        return known & (self.crs != "") if (self.crs[known] != "").any() else known

    def only(self, indices: Sequence[int]) -> "Extents":
        chosen = np.asarray(indices, np.int64)
        return Extents(self.boxes[chosen], self.pixels[chosen], self.crs[chosen])


def read(paths: Sequence[str], *, num_threads: int | None = None) -> Extents:
    """About a millisecond a file. What cannot be read has no place: the check of the tiles tells of it."""
    with concurrent.futures.ThreadPoolExecutor(num_threads or cpu_threads()) as pool:
        found = list(pool.map(_look, paths))
    boxes, pixels, crs = zip(*found, strict=True) if found else ((), (), ())
    return Extents(np.array(boxes, np.float64).reshape(-1, 4), np.array(pixels, np.float64), np.array(crs, np.str_))


def _look(path: str) -> tuple[tuple[float, ...], float, str]:
    nowhere = (np.nan,) * 4, np.nan, ""
    try:
        with opened(path) as file:
            place, (width, height) = place_of(file), (file.width, file.height)
            if "gcps" in place:
                from rasterio.transform import from_gcps

                place["transform"] = from_gcps(place["gcps"])
            if place["transform"].is_identity:
                return nowhere
            a, b, x, d, e, y = place["transform"][:6]
            corners = [(x + a * c + b * r, y + d * c + e * r) for c in (0, width) for r in (0, height)]
            crs = place["crs"].to_string() if place["crs"] else ""
    except UserError:
        return nowhere
    (left, bottom), (right, top) = np.min(corners, 0).tolist(), np.max(corners, 0).tolist()
    return (left, bottom, right, top), max((right - left) / width, (top - bottom) / height), crs


def centres(extents: Extents) -> tuple[np.ndarray, bool]:
    """float64 (n, 2), x and y of the middles in one coordinate system, and whether these are degrees.

    All tiles must be `located`. Of several systems it is WGS 84.
    """
    boxes, names = extents.boxes, sorted(set(extents.crs.tolist()))
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    if len(names) == 1:
        return middles, _in_degrees(names[0])
    from rasterio.warp import transform

    for name in names:
        chosen = extents.crs == name
        try:
            middles[chosen] = np.transpose(transform(name, WORLD, *middles[chosen].T.tolist()))
        except Exception as error:  # PROJ's are many
            raise UserError(
                f"cannot turn coordinates in {name} into {WORLD}: {' '.join(str(error).split())}"
            ) from error
    return middles, True


@functools.cache
def _in_degrees(crs: str) -> bool:
    from rasterio.crs import CRS

    return bool(crs) and CRS.from_string(crs).is_geographic


def touching(tiles: Extents, others: Extents) -> np.ndarray:
    """int64 (n,): for each of the `tiles` one of the `others` that it touches or overlaps, -1 where there is none.

    Only tiles in the same coordinate system are held against each other. Corners touch, too. The others are sorted
    along one axis, so that each tile is compared with those of its strip alone.
    """
    found = np.full(len(tiles.boxes), -1, np.int64)
    for crs in sorted(set(tiles.crs.tolist()) & set(others.crs.tolist())):
        ours, theirs = (np.flatnonzero(e.located & (e.crs == crs)) for e in (tiles, others))
        if not len(ours) or not len(theirs):
            continue
        boxes = others.boxes[theirs]
        spans = np.ptp(boxes[:, :2], 0) / np.maximum(np.median(boxes[:, 2:] - boxes[:, :2], 0), 1e-300)
        axis = int(np.argmax(spans))
        order = np.argsort(boxes[:, axis], kind="stable")
        theirs, boxes = theirs[order], boxes[order]
        longest = (boxes[:, axis + 2] - boxes[:, axis]).max()
        for index in ours.tolist():
            low, high = tiles.boxes[index, :2], tiles.boxes[index, 2:]
            gap = NEAR * tiles.pixels[index]
            first = np.searchsorted(boxes[:, axis], low[axis] - gap - longest)
            last = np.searchsorted(boxes[:, axis], high[axis] + gap, "right")
            strip = boxes[first:last]
            near = ((strip[:, :2] <= high + gap) & (strip[:, 2:] >= low - gap)).all(1)
            if near.any():
                found[index] = theirs[first + int(np.argmax(near))]
    return found
