"""Where the tiles of a scene lie. Along each axis they begin every `tile - overlap` pixels.

The last one is moved back until it ends with the scene: so the model sees the real surroundings of every pixel, instead
of invented ones, at the price of a larger last overlap. Only a scene smaller than a tile is padded.
"""

import dataclasses

from ktda_jax import UserError


@dataclasses.dataclass(frozen=True)
class Axis:
    """The tiles along one axis: `starts` in pixels, each tile `tile` pixels long, of a scene of `length` pixels."""

    length: int
    tile: int
    overlap: int
    starts: tuple[int, ...]

    def done(self, index: int) -> int:
        """The end of the pixels that no tile after `index` touches."""
        return self.starts[index + 1] if index + 1 < len(self.starts) else self.length

    def seams(self) -> list[float]:
        """The middles of the overlaps, where one tile hands over to the next."""
        return [(after + before + self.tile) / 2 for before, after in zip(self.starts, self.starts[1:], strict=False)]


@dataclasses.dataclass(frozen=True)
class Grid:
    rows: Axis
    columns: Axis


def axis(length: int, tile: int, overlap: int) -> Axis:
    """length, tile, overlap: pixels. UserError if tiles would not advance."""
    if length < 1 or not 0 <= overlap < tile:
        raise UserError(f"length {length}, tile {tile}, overlap {overlap}: an overlap is from 0 to below the tile")
    last = max(length - tile, 0)
    return Axis(length, tile, overlap, (*range(0, last, tile - overlap), last))


def usual_overlap(tile: tuple[int, int]) -> int:
    """A quarter of the tile: of maps, unless --overlap says otherwise, and of validation."""
    return min(tile) // 4


def grid(height: int, width: int, tile: tuple[int, int], overlap: int) -> Grid:
    return Grid(axis(height, tile[0], overlap), axis(width, tile[1], overlap))
