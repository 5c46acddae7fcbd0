"""The confusion matrix of every tile as CSV, a row per cell that is not 0: how much tiles differ is in no sum."""

import csv
import io

import numpy as np

COLUMNS = ("tile", "label", "prediction", "pixels")
CELLS = 1 << 20  # of all tiles together, up to which they are kept


def suffice(tiles: int, classes: int) -> bool:
    """Whether so many are few enough to be kept."""
    return tiles * classes**2 <= CELLS


def to_csv(confusions: np.ndarray) -> str:
    """int64 (tiles, C, C), rows are labels."""
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(COLUMNS)
    places = np.argwhere(confusions)
    writer.writerows(np.column_stack([places, confusions[tuple(places.T)]]).tolist())
    return file.getvalue()


def from_csv(text: str, classes: int) -> np.ndarray:
    """int64 (tiles, C, C), of the tiles with pixels. ValueError for what `to_csv` has not written."""
    rows = list(csv.reader(io.StringIO(text)))
    if not rows or tuple(rows[0]) != COLUMNS:
        raise ValueError(f"its columns are not {', '.join(COLUMNS)}")
    cells = np.array(rows[1:], np.int64).reshape(-1, len(COLUMNS))
    if (cells < 0).any() or (cells[:, 1:3] >= classes).any():
        raise ValueError(f"a number is negative or of no class below {classes}")
    tiles, place = np.unique(cells[:, 0], return_inverse=True)
    out = np.zeros((len(tiles), classes, classes), np.int64)
    np.add.at(out, (place, cells[:, 1], cells[:, 2]), cells[:, 3])
    return out
