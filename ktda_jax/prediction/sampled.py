"""What is known of a map's errors: counts of its classes against reference classes, as one of three kinds of file has
them.
"""

import csv
import dataclasses
import io
import json
import pathlib

import numpy as np

from ktda_jax import UserError
from ktda_jax.data import buckets
from ktda_jax.data.paths import place
from ktda_jax.metrics import areas, by_tile

ROWS = ("map", "reference")  # what the first cell of a CSV says of its rows
PROBABILITY = "holds for a probability sample of the mapped area, which validation tiles seldom are"
CLUSTERED = "pixels counted as independent, which those of a tile are not: the true errors are larger"


@dataclasses.dataclass(frozen=True)
class Sample:
    """Rows are map classes, columns are reference classes."""

    classes: tuple[str, ...]
    counts: np.ndarray  # int64 (C, C)
    by_tile: np.ndarray | None  # int64 (tiles, C, C)
    unit: str  # what was drawn: 'tile', 'pixel', or 'sampled unit' of a CSV
    remark: str

    @property
    def units(self) -> int:
        return int(self.counts.sum()) if self.by_tile is None else int(self.by_tile.any((1, 2)).sum())

    def estimate(self, mapped: np.ndarray) -> areas.Estimate:
        """mapped: areas of the map classes (C,)."""
        if self.by_tile is None:
            return areas.stratified(mapped, self.counts)
        return areas.clustered(mapped, self.by_tile)


def read(text: str) -> Sample:
    """text: a workdir or a folder of `evaluate`, a .json of theirs, or a .csv. UserError says what is wrong with it."""
    path = place(text)
    if path.is_dir():
        path = _in_folder(path)
    elif not path.exists():
        raise UserError(f"there is no --confusion={text}")
    try:
        return _of_csv(path) if path.suffix.lower() == ".csv" else _of_json(path)
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        words = f"it lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"--confusion={path} cannot be used: {words}") from error


def _in_folder(folder: pathlib.PurePath) -> pathlib.PurePath:
    found = sorted([*folder.glob("figures/*.json"), *folder.glob("scores.json")], key=str)
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"--confusion={folder} holds several: {', '.join(map(str, found))}; give one of them")
    raise UserError(
        f"--confusion={folder} holds no figures/SPLIT.json and no scores.json; evaluate first, by --mode=eval or "
        "ktda_jax.evaluate"
    )


def _of_json(path: pathlib.PurePath) -> Sample:
    values = json.loads(buckets.read_text(path))
    confusion, classes = np.array(values["confusion"], np.int64), tuple(map(str, values["classes"]))
    if confusion.shape != (len(classes),) * 2 or (confusion < 0).any() or not confusion.any():
        raise ValueError(f"no counts for {len(classes)} classes")
    counts, aside = confusion.T, path.with_name(f"{path.stem}_tiles.csv")
    if aside.exists():
        single = by_tile.from_csv(buckets.read_text(aside), len(classes))
        if (single.sum(0) == confusion).all():
            return Sample(classes, counts, np.swapaxes(single, 1, 2), "tile", PROBABILITY)
    return Sample(classes, counts, None, "pixel", f"{PROBABILITY}; {CLUSTERED} (evaluate again to count by tiles)")


def _of_csv(path: pathlib.PurePath) -> Sample:
    """A head with what the rows are, 'map' or 'reference', and the columns' classes; then a row per class."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(buckets.read_text(path))) if any(row)]
    head = rows[0][0].lstrip("\ufeff").lower() if rows else ""
    if head not in ROWS:
        raise ValueError(f"its first cell is {head!r}; write there what the rows are, {' or '.join(ROWS)}")
    classes, names = tuple(rows[0][1:]), tuple(row[0] for row in rows[1:])
    if names != classes or any(len(row) != len(classes) + 1 for row in rows):
        raise ValueError(f"rows {', '.join(names)} and columns {', '.join(classes)} are not the same classes in order")
    counts = np.array([[int(cell or 0) for cell in row[1:]] for row in rows[1:]], np.int64)
    if (counts < 0).any() or not counts.any():
        raise ValueError("a count is negative, or all are 0")
    return Sample(
        classes, counts if head == "map" else counts.T, None, "sampled unit",
        "holds for a probability sample of the mapped area",
    )  # fmt: skip
