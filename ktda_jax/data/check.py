"""The check of a split that is made before the first step: every tile is read once."""

import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Sequence

import numpy as np
from absl import logging

from ktda_jax import UserError
from ktda_jax.data import classes
from ktda_jax.data.datasets import IGNORE
from ktda_jax.data.gdal import FileError
from ktda_jax.data.sources import Source, cpu_threads, labels_are, read_tile, some, tile_name

SHOWN = 3  # tiles named for each kind of fault


@dataclasses.dataclass(frozen=True)
class SplitSummary:
    """What `check_split` found: pixels int64 (num_classes,) per class; sizes are the (H, W) that occur."""

    tiles: int
    sizes: frozenset[tuple[int, int]]
    pixels: np.ndarray
    ignored: int
    fingerprint: str  # sha256 over names and pixels: the same tiles give it from any storage form
    labels: str  # sha256 over names and labels alone: the same for other bands of the same tiles
    by_tile: np.ndarray  # int64 (tiles, num_classes): the same of each tile; 0 where it cannot be read
    unreadable: tuple[str, ...] = ()  # tiles that will be skipped in training; empty unless on_corrupt='skip'


@dataclasses.dataclass(frozen=True)
class _Tile:
    """One examined tile: `problem` is None, a key of `_PROBLEMS` or a file's fault; `text` names the offender."""

    problem: str | tuple[str, str] | None = None
    text: str = ""
    found: str = ""  # what a faulty file holds, said once if all hold the same
    size: tuple[int, int] = (0, 0)
    counts: np.ndarray | None = None  # int64 (256,)
    digest: bytes = b""
    label: bytes = b""  # digest of name and label


_PROBLEMS = {  # what is wrong with {bad} of {total} tiles -> what to do
    "size": ("image and label differ in size in {bad} of {total} tiles", "cut both to the same extent"),
    "crop": (
        "{bad} of {total} images are smaller than the crop of {crop}",
        "set a smaller crop or leave them out",
    ),
    "values": (
        "label values outside 0..{last} that are not 255 in {bad} of {total} tiles",
        "correct the labels or num_classes; 255 is for ignored pixels",
    ),
}


def check_split(
    source: Source,
    *,
    crop: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    on_corrupt: str = "stop",
    num_threads: int | None = None,
) -> SplitSummary:
    """Reads every tile once and raises one UserError with all that is wrong, before anything is compiled.

    `crop` (side or (H, W) in pixels) is the size that training cuts out. Unreadable tiles are errors unless
    `on_corrupt` is 'skip', which warns and lists them in the summary.
    """
    if not len(source):
        raise UserError(f"{source!r} has no tiles")
    num_classes = num_classes or source.num_classes
    crop = (crop, crop) if isinstance(crop, int) else crop
    problems: dict[str | tuple[str, str], list[_Tile]] = {}
    counts, sizes, readable = np.zeros(256, np.int64), set(), 0
    fingerprint, labels, by_tile = hashlib.sha256(), hashlib.sha256(), []
    with concurrent.futures.ThreadPoolExecutor(num_threads or cpu_threads()) as pool:
        for tile in pool.map(lambda index: _examine(source, index, num_classes, crop), range(len(source))):
            if tile.counts is not None:
                counts += tile.counts
            by_tile.append(np.zeros(num_classes, np.int64) if tile.counts is None else tile.counts[:num_classes])
            if tile.problem:
                problems.setdefault(tile.problem, []).append(tile)
                continue
            readable += 1
            sizes.add(tile.size)
            fingerprint.update(tile.digest)
            labels.update(tile.label)

    unreadable = []
    if on_corrupt == "skip" and readable:
        for fault in [fault for fault in problems if isinstance(fault, tuple)]:
            unreadable += [f"{tile.text} {tile.found}".strip() for tile in problems.pop(fault)]
    if unreadable:
        logging.warning(
            "%r: %d of %d tiles cannot be read and will be skipped: %s",
            source, len(unreadable), len(source), some(unreadable, SHOWN),
        )  # fmt: skip
    if problems:
        made = labels_are(source)
        lines = [_complaint(kind, tiles, len(source), num_classes, crop) for kind, tiles in problems.items()]
        values = (
            f" | {classes.shares(counts)}{classes.advice(counts, num_classes, made)}" if "values" in problems else ""
        )
        raise UserError(f"{source!r}: " + " | ".join(lines) + values)
    if not counts[:num_classes].any():
        raise UserError(
            f"{source!r}: every pixel of every label is 255 (ignored), so there is nothing to learn or to score; check "
            "how the labels were written, or map 255 to a class by config.data.label_map"
        )
    return SplitSummary(
        tiles=len(source),
        sizes=frozenset(sizes),
        pixels=counts[:num_classes],
        ignored=int(counts[IGNORE]),
        fingerprint=fingerprint.hexdigest(),
        labels=labels.hexdigest(),
        by_tile=np.stack(by_tile),
        unreadable=tuple(unreadable),
    )


def _complaint(kind, tiles: list[_Tile], total: int, num_classes: int, crop) -> str:
    """One line on all tiles with one fault: what, the first few, how many more, and what to do."""
    if isinstance(kind, tuple):
        return complaint(*kind, [(tile.text, tile.found) for tile in tiles], f"{total} tiles")
    what, remedy = _PROBLEMS[kind]
    what = what.format(
        bad=len(tiles), total=total, last=num_classes - 1, crop=crop and f"{crop[0]} x {crop[1]}"
    )  # fmt: skip
    return f"{what}: {some([tile.text for tile in tiles], SHOWN)}; {remedy}"


def complaint(what: str, remedy: str, named: Sequence[tuple[str, str]], of: str) -> str:
    """The same of files: `named` has each and what it holds, said once if all hold the same; of: '20 tiles'."""
    head, found = f"{len(named)} of {of} {what}", {held for _, held in named}
    if len(found) == 1 and len(named) > 1:
        return f"{head}: {some([name for name, _ in named], SHOWN)}: {named[0][1]}; {remedy}"
    return f"{head}: {some([f'{name} {held}'.strip() for name, held in named], SHOWN)}; {remedy}"


def _examine(source, index: int, num_classes: int, crop: tuple[int, int] | None) -> _Tile:
    """Reads one tile: its first problem, or its size, label histogram and digest."""
    try:
        tile = read_tile(source, index)
    except FileError as error:
        root = getattr(source, "root", None)
        path = os.path.relpath(error.path, root) if root else error.path
        # GDAL's words often begin with the path.
        return _Tile((error.fault, error.remedy), path, error.found.replace(error.path, os.path.basename(path)))
    except UserError as error:
        return _Tile(("cannot be read", "repair or remove them"), str(error))
    image, label = tile["image"], tile["label"]
    name, (height, width) = tile_name(source, index), label.shape
    if image.shape[:2] != label.shape:
        return _Tile("size", f"{name} (image {image.shape[0]} x {image.shape[1]}, label {height} x {width})")
    if crop and (height < crop[0] or width < crop[1]):
        return _Tile("crop", f"{name} ({height} x {width})")
    counts = np.bincount(label.ravel(), minlength=256)
    if counts[num_classes:IGNORE].any():
        values = num_classes + np.flatnonzero(counts[num_classes:IGNORE])
        return _Tile("values", f"{name} (values {some(values.tolist(), 8)})", counts=counts)
    named = hashlib.sha256(f"{tile['name']}\0{height}x{width}\0".encode())
    digest = named.copy()
    digest.update(np.ascontiguousarray(image))
    digest.update(np.ascontiguousarray(label))
    named.update(np.ascontiguousarray(label))
    return _Tile(size=(height, width), counts=counts, digest=digest.digest(), label=named.digest())
