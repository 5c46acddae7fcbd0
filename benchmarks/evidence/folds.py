"""Tiles as cross-validation folds: scenes kept whole, biomes and classes spread, in the published folder layout.

A tile is named BIOME_SCENE_NUMBER; scenes are numbered within their biome. What training reads of a fold are folders of
links, so that neither folds nor shares of the labels need a setting of their own.
"""

import hashlib
import itertools
import os
import pathlib
import shutil

import numpy as np
from PIL import Image

IGNORE = 255


def scene_of(name: str) -> str:
    return name.rpartition("_")[0]


def biome_of(name: str) -> str:
    return name.split("_")[0]


def find_tiles(root: pathlib.Path) -> dict[str, tuple[pathlib.Path, pathlib.Path]]:
    """{name: (image, label)} of all splits below `root`, sorted by name; ValueError for what is not a set of tiles."""
    tiles = {}
    for image in sorted(root.glob("img_dir/*/*")):
        label = root / "ann_dir" / image.parent.name / f"{image.stem}.png"
        if not label.is_file():
            raise ValueError(f"{image} has no label {label}")
        if image.stem in tiles:
            raise ValueError(f"two tiles in {root} are named {image.stem}; rename one")
        if image.stem.count("_") < 2:
            raise ValueError(f"tile {image.stem} in {root} is not named BIOME_SCENE_NUMBER, by which folds are made")
        tiles[image.stem] = image, label
    if not tiles:
        raise ValueError(f"no tiles in {root}: it needs img_dir/SPLIT/BIOME_SCENE_NUMBER.png and ann_dir/SPLIT")
    return dict(sorted(tiles.items()))


def size(tiles: dict) -> tuple[int, int]:
    """(H, W) of all tiles; ValueError if they differ."""
    sizes = {}
    for image, _ in tiles.values():
        with Image.open(image) as opened:  # the header only
            sizes.setdefault(opened.size[::-1], image)
    if len(sizes) > 1:
        raise ValueError(f"tiles of different sizes: {', '.join(f'{v} {h}x{w}' for (h, w), v in sizes.items())}")
    return next(iter(sizes))


def count_classes(tiles: dict, num_classes: int) -> dict[str, np.ndarray]:
    """{name: int64 (num_classes,)}, labelled pixels per class."""
    from ktda_jax.data.labels import read_label

    counts = {}
    for name, (_, label) in tiles.items():
        values = np.bincount(read_label(str(label)).ravel(), minlength=256)
        if values[num_classes:IGNORE].any():
            raise ValueError(f"{label} holds class {np.flatnonzero(values[:IGNORE])[-1]}; there are {num_classes}")
        counts[name] = values[:num_classes]
    return counts


def assign(counts: dict[str, np.ndarray], folds: int) -> dict[str, int]:
    """{tile: fold}, deterministic; `counts` are the labelled pixels per class of every tile.

    A biome's scenes go to different folds, in turn, so that folds have the same number of scenes and of biomes to
    within one; then scenes of the same biome are exchanged until every class is spread as evenly as that can make it.
    ValueError if some fold's training part lacks a class.
    """
    scenes = sorted({scene_of(name) for name in counts})
    if len(scenes) < folds:
        raise ValueError(f"{len(scenes)} scenes are too few for {folds} folds")
    place = {scene: number % folds for number, scene in enumerate(scenes)}  # sorted: biome by biome
    pixels = {s: sum(np.asarray(counts[n], float) for n in counts if scene_of(n) == s) for s in scenes}
    total = np.maximum(sum(pixels.values()), 1)

    def unevenness():
        shares = np.array([sum((pixels[s] for s in scenes if place[s] == f), 0 * total) for f in range(folds)]) / total
        return float(np.square(shares - 1 / folds).sum())

    pairs = [p for p in itertools.combinations(scenes, 2) if biome_of(p[0]) == biome_of(p[1])]
    best, improved = unevenness(), True
    while improved:
        improved = False
        for a, b in pairs:
            place[a], place[b] = place[b], place[a]
            now = unevenness()
            if now < best - 1e-12:
                best, improved = now, True
            else:
                place[a], place[b] = place[b], place[a]
    assigned = {name: place[scene_of(name)] for name in counts}
    for fold in range(folds):
        check_classes([n for n in assigned if assigned[n] != fold], counts, f"the training part of fold {fold}")
    return assigned


def check_classes(names, counts: dict[str, np.ndarray], what: str) -> None:
    """ValueError if a class that exists has no pixel in `names`."""
    there = sum(counts[n] for n in names) > 0
    absent = np.flatnonzero((sum(counts.values()) > 0) & ~there)
    if len(absent):
        raise ValueError(f"{what} has no pixel of class {', '.join(map(str, absent))}")


def fewer(names, counts: dict[str, np.ndarray], percent: int, seed: int) -> list[str]:
    """`percent` of the tiles, rounded up, drawn by `seed`, with every class that `names` have.

    Of one seed, the tiles of a smaller share are among those of a larger one. Each next tile is the first in a random
    order with most classes that are still wanted; once none is, the order alone decides.
    """
    if not 0 < percent <= 100:
        raise ValueError(f"the share of labels is {percent} %; give 1 to 100")
    left = [sorted(names)[k] for k in np.random.default_rng(seed).permutation(len(names))]
    wanted = sum(counts[n] for n in names) > 0
    chosen = []
    while len(chosen) < -(-len(names) * percent // 100):
        gains = [int(((counts[n] > 0) & wanted).sum()) for n in left]
        name = left.pop(int(np.argmax(gains)))
        wanted &= counts[name] == 0
        chosen.append(name)
    if wanted.any():
        raise ValueError(f"{len(chosen)} tiles, {percent} % of {len(names)}, cannot hold every class; take more labels")
    return sorted(chosen)


def write_folder(root: pathlib.Path, tiles: dict, train, val, cut: int | None) -> None:
    """Makes `root` with img_dir/{train,val} and ann_dir/{train,val} as links to `tiles`; kept if it is there.

    Tiles larger than `cut` pixels are cut into squares of that size, NAME-0 the upper left one; ValueError if these do
    not fill a tile.
    """
    if root.exists():
        return
    temporary = root.with_name(f".{root.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for split, names in (("train", train), ("val", val)):
        for kind in range(2):
            folder = temporary / ("img_dir", "ann_dir")[kind] / split
            folder.mkdir(parents=True)
            for name in names:
                _cut(tiles[name][kind].resolve(), cut, folder)
    try:
        os.replace(temporary, root)
    except OSError:
        if not root.is_dir():
            raise
        shutil.rmtree(temporary)  # another process made it meanwhile


def _cut(source: pathlib.Path, cut: int | None, folder: pathlib.Path) -> None:
    with Image.open(source) as image:
        width, height = image.size
        if cut is None or (width, height) == (cut, cut):
            return (folder / source.name).symlink_to(source)
        if width % cut or height % cut:
            raise ValueError(f"{source} is {height}x{width}, which squares of {cut} pixels do not fill")
        corners = itertools.product(range(0, height, cut), range(0, width, cut))
        for number, (y, x) in enumerate(corners):
            image.crop((x, y, x + cut, y + cut)).save(folder / f"{source.stem}-{number}.png")


def fingerprint(tiles: dict) -> str:
    """sha256 over the names and the bytes of all tiles."""
    digest = hashlib.sha256()
    for name, paths in tiles.items():
        digest.update(name.encode())
        for path in paths:
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def digest_of(path: pathlib.Path) -> str:
    """sha256 of a file, or of the names and bytes of all files in a folder."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        digest.update(file.name.encode())
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
