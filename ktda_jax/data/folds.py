"""Whole areas held out for validation: the tiles of one split dealt into areas, by their names or by where they lie.

Tiles beside each other look alike, so that scores on neighbours of what was trained on say little about new ground.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ktda_jax import UserError
from ktda_jax.data import places
from ktda_jax.data.sources import some

SHOWN = 12  # areas listed in a message


class Area(NamedTuple):
    name: str
    tiles: list[int]


@dataclasses.dataclass(frozen=True)
class Fold:
    """How a part of a split came about. tiles: of each area, by name."""

    folds: str
    number: int
    tiles: tuple[tuple[str, int], ...]
    left_out: int  # tiles of the other areas that touch the one held out

    def __str__(self) -> str:
        name, count = self.tiles[self.number]
        text = f"fold {self.number} of 0 to {len(self.tiles) - 1}: {name} held out, {count:,} tiles"
        return f"{text}; {self.left_out:,} that touch them left out" if self.left_out else text

    def table(self) -> str:
        lines = [f"areas by config.data.folds={self.folds}, with tiles:"]
        for number, (name, count) in enumerate(self.tiles):
            lines.append(f"  {number:3}  {count:8,}  {name}{'  (held out)' * (number == self.number)}")
        if self.left_out:
            lines.append(f"  {self.left_out:,} tiles of the others touch those held out, and are not trained on")
        return "\n".join(lines)


def parse(folds: str) -> tuple[str, int | None]:
    """('name', None), ('name', K) or ('place', K); UserError for anything else."""
    match = re.fullmatch(r"name|(name|place):(\d+)", folds)
    if not match or (match[2] and int(match[2]) < 2):
        raise UserError(
            f"config.data.folds is {folds!r}; give name (an area is what tiles are called up to the first _ or -), "
            "name:K (K groups of such areas) or place:K (K areas by the tiles' coordinates), K from 2"
        )
    return ("name", None) if match[1] is None else (match[1], int(match[2]))


def check(folds: str | None, fold: int, *, records: bool) -> None:
    """What can be said before a tile is looked at. records: whether tiles come from records instead of files."""
    if folds is None:
        if fold:
            raise UserError(f"config.data.fold is {fold}, but no areas are made; set config.data.folds (name, place:K)")
        return
    if parse(folds)[0] == "place" and records:
        raise UserError(f"config.data.folds={folds} needs files with coordinates, and records have none; give name")


def part(source, folds: str, fold: int, *, held_out: bool, num_threads: int | None = None):
    """The tiles of area `fold` of a split (a FolderSource or TfdsSource), or those of all other areas.

    By place, tiles that touch the area held out are in neither. UserError if the split cannot be dealt so.
    """
    kind, count = parse(folds)
    if kind == "name":
        extents, areas = None, by_name(source.names, count)
    else:
        extents = places.read(source.image_paths, num_threads=num_threads)
        areas = _placed(source, extents, folds, count)
    listed = some([f"{area.name} ({len(area.tiles):,} tiles)" for area in areas], SHOWN)
    if len(areas) < 2:
        raise UserError(
            f"config.data.folds={folds} finds one area alone in {source!r}, {listed}, and nothing to train on beside "
            "it; call tiles AREA_..., give place:K where files have coordinates, or leave it out"
        )
    if fold >= len(areas):
        raise UserError(
            f"config.data.fold is {fold}, but config.data.folds={folds} makes {len(areas)} areas: {listed}; "
            f"give 0 to {len(areas) - 1}"
        )
    held = areas[fold].tiles
    others = sorted(index for area in areas if area is not areas[fold] for index in area.tiles)
    near = 0
    if extents is not None:
        apart = places.touching(extents.only(others), extents.only(held)) < 0
        others, near = [index for index, far in zip(others, apart, strict=True) if far], int((~apart).sum())
    if not others:
        raise UserError(
            f"config.data.fold is {fold}: all tiles of the other areas touch those of {areas[fold].name}, and none is "
            f"left to train on ({listed}); give another config.data.folds than {folds}"
        )
    made = Fold(folds, fold, tuple((area.name, len(area.tiles)) for area in areas), near)
    return source.only(held if held_out else others, made)


def by_name(names: Sequence[str], count: int | None = None) -> list[Area]:
    """Areas in the order of their names; or these dealt into `count` groups of about as many tiles.

    A tile's area is what its name begins with, up to the first _ or -. UserError where no name has one of these.
    """
    areas = collections.defaultdict(list)
    for index, name in enumerate(names):
        areas[re.split("[_-]", name, maxsplit=1)[0]].append(index)
    found = [Area(name, areas[name]) for name in sorted(areas)]
    if not any(re.search("[_-]", name) for name in names):
        raise UserError(
            "config.data.folds=name takes for an area what stands before the first _ or - of a tile's name, and no "
            f"name has one: {some(sorted(names), 3)}; call tiles AREA_..., or give place:K where files have coordinates"
        )
    if count is None:
        return found
    if count > len(found):
        listed = some([f"{area.name} ({len(area.tiles):,} tiles)" for area in found], SHOWN)
        raise UserError(
            f"config.data.folds is name:{count}, but there are {len(found)} areas: {listed}; give a smaller number, "
            "or name for each one alone"
        )
    groups = [[] for _ in range(count)]
    for area in sorted(found, key=lambda area: -len(area.tiles)):  # the largest first, each to the smallest group
        min(groups, key=lambda group: sum(len(a.tiles) for a in group)).append(area)
    groups = [sorted(group) for group in groups]
    return [Area(some([a.name for a in group], 3), sorted(i for a in group for i in a.tiles)) for group in groups]


def _placed(source, extents: places.Extents, folds: str, count: int) -> list[Area]:
    """`by_place` of a source; UserError where tiles have no coordinates, or fewer places than areas."""
    if (lost := np.flatnonzero(~extents.located)).size:
        named = [source.describe(index) for index in lost[:3].tolist()]
        raise UserError(
            f"config.data.folds={folds} deals tiles by their coordinates, and {len(lost)} of {len(source)} images have "
            f"none that can be read (like the others'): {some(named)}; give GeoTIFFs, or config.data.folds=name"
        )
    middles, degrees = places.centres(extents)
    distinct = len(np.unique(middles, axis=0))
    if count > distinct:
        raise UserError(
            f"config.data.folds is {folds}, but {source!r} has {len(source)} tiles at {distinct} places; "
            + (f"give place:2 to place:{distinct}" if distinct > 1 else "give name, or leave it out")
        )
    return by_place(middles, count, degrees=degrees)


def by_place(middles: np.ndarray, count: int, *, degrees: bool = False) -> list[Area]:
    """middles: float64 (n, 2), x and y of the tiles, at `count` places or more -> `count` areas of about as many tiles.

    The tiles are cut in two across the longer side of the ground that they cover, and so are the parts. Tiles at one
    place stay together.
    """
    spots, spot_of = np.unique(middles, axis=0, return_inverse=True)
    spot_of, metric = spot_of.ravel(), spots.copy()
    if degrees:  # of longitude are shorter
        metric[:, 0] *= math.cos(math.radians(float(np.clip(spots[:, 1].mean(), -89, 89))))
    areas = []
    for chosen in _bisect(metric, np.bincount(spot_of), np.arange(len(spots)), count):
        tiles = np.flatnonzero(np.isin(spot_of, chosen)).tolist()
        x, y = (f"{value:.{3 if degrees else 0}f}" for value in middles[tiles].mean(0))
        areas.append(Area(f"around ({x}, {y})", tiles))
    return areas


def _bisect(spots: np.ndarray, tiles: np.ndarray, chosen: np.ndarray, count: int) -> list[np.ndarray]:
    """spots (m, 2), tiles (m,) at each; `chosen` of them -> `count` groups of theirs."""
    if count == 1:
        return [chosen]
    axis = int(np.argmax(np.ptp(spots[chosen], 0)))
    order = chosen[np.lexsort((spots[chosen, 1 - axis], spots[chosen, axis]))]
    first = count // 2
    before = np.cumsum(tiles[order])  # tiles left of a cut behind each spot
    cut = int(np.argmin(np.abs(before - before[-1] * first / count))) + 1
    cut = min(max(cut, first), len(order) - (count - first))  # a spot for each area, at least
    halves = ((order[:cut], first), (order[cut:], count - first))
    return [group for half, share in halves for group in _bisect(spots, tiles, half, share)]
