"""Name tables: from another library's tensors to our flat paths and layout, and back.

A table is a list of rows of two templates, `{}` standing for one part of the name:

    Row("backbone.stages.{}.{}.norm", "student/stages/{}/{}/norm", NORM)

The first row that matches counts, in both directions.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping

import numpy as np

NORM = {"weight": "scale", "bias": "bias"}
LAYER = {"weight": "kernel", "bias": "bias"}
POINT = {**LAYER, "1x1": ""}  # a 1x1 convolution there, a matrix here
BN = {**NORM, "running_mean": "mean", "running_var": "var", "num_batches_tracked": "num_batches_tracked"}


@dataclasses.dataclass(frozen=True)
class Row:
    theirs: str
    ours: str
    leaves: Mapping[str, str]  # their last part of the name -> ours
    part: tuple[int, int] | None = None  # (k, n): the k-th of n tensors that make up ours, stacked by output

    def forward(self, name: str) -> str | None:
        """Our path of their name, or None where this row says nothing about it."""
        return _translate(name, self.theirs, ".", self.ours, "/", self.leaves)

    def back(self, path: str) -> str | None:
        """Their name of our path, or None."""
        leaves = {ours: theirs for theirs, ours in self.leaves.items()}
        return _translate(path, self.ours, "/", self.theirs, ".", leaves)


@functools.cache
def _pattern(template: str, separator: str) -> re.Pattern:
    one = f"([^{re.escape(separator)}]+)"
    prefix = re.escape(template + separator if template else "").replace(re.escape("{}"), one)
    return re.compile(prefix + one)


def _translate(name, template, separator, target, joint, leaves) -> str | None:
    match = _pattern(template, separator).fullmatch(name)
    if match is None or match[match.lastindex] not in leaves:
        return None
    *parts, leaf = match.groups()
    return joint.join(filter(None, (target.format(*parts), leaves[leaf])))


def find(name: str, table: Iterable[Row]) -> tuple[Row, str] | None:
    """The first row that knows `name`, and our path."""
    for row in table:
        path = row.forward(name)
        if path is not None:
            return row, path
    return None


def to_our_layout(array: np.ndarray, path: str) -> np.ndarray:
    """torch's (out, in, ...) to (..., in, out), a view; a 1x1 convolution becomes a matrix."""
    if not path.endswith("/kernel"):
        return array
    if array.shape[2:] == (1, 1):
        array = array[:, :, 0, 0]
    return np.moveaxis(array, (0, 1), (-1, -2))


def to_their_layout(array: np.ndarray, row: Row) -> np.ndarray:
    """The inverse of `to_our_layout` for a kernel."""
    array = np.moveaxis(array, (-1, -2), (0, 1))
    return array[:, :, None, None] if "1x1" in row.leaves else array


def convert(
    tensors: Mapping[str, np.ndarray], table: list[Row], ignore: Callable[[str], bool]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Their tensors under our paths and in our layout, and the names that no row knows and `ignore` does not waive."""
    found, parts, unknown = {}, {}, []
    for name, array in tensors.items():
        hit = find(name, table)
        if hit is None:
            if not ignore(name):
                unknown.append(name)
            continue
        row, path = hit
        if row.part is None:
            found[path] = to_our_layout(array, path)
        else:
            parts.setdefault(path, {})[row.part] = array
    for path, pieces in parts.items():
        count = next(iter(pieces))[1]
        # DINOv3's keys have no bias: zeros do the same. A missing matrix is left to the check of shapes.
        like = np.zeros_like(next(iter(pieces.values())))
        rows = [pieces.get((k, count), like if path.endswith("/bias") else None) for k in range(count)]
        found[path] = to_our_layout(np.concatenate([r for r in rows if r is not None]), path)
    return found, unknown


def convert_back(arrays: Mapping[str, np.ndarray], table: list[Row]) -> dict[str, np.ndarray]:
    """Ours under their names and in their layout, bit for bit; ValueError where the table has no name."""
    found = {}
    for path, array in arrays.items():
        hits = ((row, row.back(path)) for row in table)
        row, name = next(((r, n) for r, n in hits if n is not None), (None, None))
        if row is None:
            raise ValueError(f"the published code has no tensor for {path}")
        found[name] = to_their_layout(array, row) if path.endswith("/kernel") else array
    return found
