"""Tiles of one scene, or side by side, in two splits: scores then flatter, since neighbours look alike.

A scene is known by the beginning of its tiles' names: up to the first part between _ and - that holds a digit, apart
from parts that all tiles share and from names of satellites and products. So `area2_0_256` is of `area2`,
`Wetlands_01_0416` of `Wetlands_01`, `urban_LC80640452014041LGN00_patch_1536_5120` of that Landsat scene. No scene is
seen in `Forest_17` or `tile_001`, where nothing follows that part, in names without _ and -, and where a tile of it is
called alike in both splits: then each split counts its own images from 0.
"""

import collections
import itertools
import re
from collections.abc import Mapping, Sequence

import numpy as np

from ktda_jax.data import places

PRODUCT = re.compile(r"S[1-6][A-D]?|L[COETM]?0?[1-9]|MSIL[12][AC]|L[1-4][A-Z]{0,2}|1S[SD][HV]", re.IGNORECASE)
ADVICE = "; hold whole areas out by config.data.folds (name, or place:K), or deal the tiles anew"
SHOWN = 3


def by_name(names: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for every two splits that share scenes. names: those of the tiles, by split."""
    lines = []
    for one, other in itertools.combinations(names, 2):
        columns = zip(*(_parts(name) for name in (*names[one], *names[other])), strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
        ours, theirs = (_scenes(names[split], common) for split in (one, other))
        shared = [scene for scene in ours if scene in theirs and not set(ours[scene]) & set(theirs[scene])]
        if shared:
            few = "; ".join(f"{one}/{ours[s][0]} and {other}/{theirs[s][0]}" for s in shared[:SHOWN])
            counts = (sum(len(scenes[scene]) for scene in shared) for scenes in (ours, theirs))
            numbers = " and ".join(
                f"{count:,} tile(s) of {split}" for count, split in zip(counts, (one, other), strict=True)
            )
            lines.append(
                f"{numbers} are of the same {len(shared):,} scene(s), by the beginning of their names, so scores "
                f"flatter: {few}{ADVICE}"
            )
    return lines


def _parts(name: str) -> list[str]:
    return re.split("[_-]", name)


def _scenes(names: Sequence[str], common: int) -> dict[str, list[str]]:
    """{beginning: names}, in order. common: parts with which all names begin."""
    scenes = collections.defaultdict(list)
    for name in sorted(names):
        parts = _parts(name)
        for number, part in enumerate(parts[:-1]):
            if number >= common and re.search(r"\d", part) and not PRODUCT.fullmatch(part):
                scenes["_".join(parts[: number + 1])].append(name)
                break
    return scenes


def by_place(extents: Mapping[str, places.Extents], names: Mapping[str, Sequence[str]]) -> list[str]:
    """A line for every two splits with tiles that touch or overlap, by their files; names as the extents.

    Files that name no coordinate system may count pixels from their own corner: they are left out. Where all tiles have
    one and the same extent, they were cut without it, and nothing is said.
    """
    lines = []
    for one, other in itertools.combinations(extents, 2):
        known = {split: np.flatnonzero(extents[split].located & (extents[split].crs != "")) for split in (one, other)}
        ours, theirs = (extents[split].only(known[split]) for split in (one, other))
        if len(np.unique(np.concatenate([ours.boxes, theirs.boxes]), axis=0)) < 2:
            continue
        found = places.touching(theirs, ours)
        near = np.flatnonzero(found >= 0).tolist()
        if near:
            pairs = ((names[other][known[other][k]], names[one][known[one][found[k]]]) for k in near[:SHOWN])
            few = "; ".join(f"{other}/{theirs} and {one}/{ours}" for theirs, ours in pairs)
            lines.append(
                f"{len(near):,} of {len(names[other]):,} tile(s) of {other} touch or overlap tiles of {one}, by their "
                f"coordinates, so scores flatter: {few}{ADVICE}"
            )
    return lines
