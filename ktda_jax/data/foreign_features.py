"""Features of a teacher that is not ours, as foreign_writer.py describes them: read, and checked beforehand."""

import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from ktda_jax import UserError
from ktda_jax.data.foreign_writer import DTYPES, FORMAT, MANIFEST, SUFFIX, VIEWS
from ktda_jax.data.geometry import turned
from ktda_jax.data.sources import cpu_threads, same_name, some

AGAIN = "write them again (ktda_jax/data/foreign_writer.py)"
SHOWN = 3  # faulty tiles in a message


@dataclasses.dataclass(frozen=True)
class Manifest:
    """See foreign_writer.py."""

    name: str
    taps: tuple[str, ...]
    width: int
    dtype: str
    views: int
    patch: int | None
    grid: tuple[int, int] | None
    statistics: dict[str, Any] | None
    files: dict[str, int]

    def __post_init__(self):
        """ValueError for what is none."""
        whole = [self.width, *(self.grid or ()), *([] if self.patch is None else [self.patch])]
        for fits, what in (
            (isinstance(self.name, str) and self.name, "name"),
            (self.taps and isinstance(self.taps, tuple) and all(isinstance(tap, str) for tap in self.taps), "taps"),
            (self.grid is None or (isinstance(self.grid, tuple) and len(self.grid) == 2), "grid"),
            (all(isinstance(x, int) and x >= 1 for x in whole), "width, patch or grid"),
            (self.patch or self.grid, "patch and grid, which are both null,"),
            (self.dtype in DTYPES, "dtype"),
            (self.views in VIEWS, "views"),
            (self.files and all(isinstance(size, int) for size in self.files.values()), "files"),
        ):
            if not fits:
                raise ValueError(f"its {what} cannot be")

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Tokens of a tile."""
        return self.grid if self.patch is None else (-(-height // self.patch), -(-width // self.patch))


def are_there(folder: pathlib.Path) -> bool:
    """Whether a folder's manifest is of such features."""
    try:
        return str(json.loads((folder / MANIFEST).read_text()).get("format", "")).startswith("foreign")
    except (OSError, ValueError, AttributeError):
        return False


def read_manifest(folder: pathlib.Path) -> Manifest:
    """UserError says what is wrong with it."""
    path = folder / MANIFEST
    try:
        told = json.loads(path.read_text())
        if told["format"] != FORMAT:
            raise UserError(f"the teacher features in {folder} have format {told['format']}, not {FORMAT}: {AGAIN}")
        values = {field.name: told[field.name] for field in dataclasses.fields(Manifest)}
        values |= {name: tuple(values[name]) for name in ("taps", "grid") if isinstance(values[name], list)}
        return Manifest(**{**values, "files": dict(values["files"])})
    except FileNotFoundError as error:
        raise UserError(f"no teacher features in {folder} (no {MANIFEST}): {AGAIN}") from error
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{path} lacks {error}: {AGAIN}") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}; {AGAIN}") from error


class ForeignFeatures:
    """Random access to the features of a split's tiles, with what training asks of `TeacherFeatures`.

    names: of the tiles, in their order; None for one that needs no features. levels: for each of the student's the tap
    it learns from, or None. UserError for tiles that have no features; `check` says what is wrong with those that have.
    """

    def __init__(self, folder: pathlib.Path, names: Sequence[str | None], levels: Sequence[int | None]):
        self.folder, self.manifest = folder, read_manifest(folder)
        told, self.levels = self.manifest, list(levels)
        self.patch = told.patch  # None: tiles are never cut
        self.views = 8 if told.views == 1 else told.views  # of one all others are made
        by_level = ", ".join("none" if k is None else told.taps[k] for k in levels)
        self.source = f"{told.name} ({told.width} channels; the levels learn from {by_level})"
        written = {same_name(name): name for name in told.files}
        names = [name and same_name(name) for name in names]
        if lacking := [name for name in names if name and name not in written]:
            raise UserError(
                f"the teacher features in {folder} lack {len(lacking)} of {len(names)} tiles: {some(lacking, SHOWN)}; "
                f"they hold {some(sorted(written), SHOWN)}: write one file for each tile, called as its image"
            )
        self._names = [name and written[name] for name in names]
        self._paths = [folder / f"{name}{SUFFIX}" for name in self._names]
        self._needed = [index for index, name in enumerate(names) if name]

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, index: int, view: int) -> np.ndarray:
        """The taps (n, h, w, C) of a view of tile `index`."""
        stored = 0 if self.manifest.views == 1 else int(view)  # a report says False for 0
        try:
            with np.load(self._paths[index]) as file:
                taps = file[f"view{stored}"]
        except Exception as error:  # zipfile and zlib have their own
            raise UserError(f"cannot read {self._paths[index]}: {' '.join(str(error).split())}; {AGAIN}") from error
        if stored == view:
            return taps
        return np.rot90(taps[:, :, ::-1] if view % 2 else taps, view // 2, axes=(1, 2))

    def check(self, sizes: Sequence[tuple[int, int]], *, num_threads: int | None = None) -> str:
        """The files' lengths and what they say of their arrays; a digest of all that they hold, wherever they lie.

        sizes: (H, W) of the tiles that need features, in their order. UserError names some that are missing, cut short
        or not of the tile.
        """
        with concurrent.futures.ThreadPoolExecutor(num_threads or cpu_threads()) as pool:
            found = list(pool.map(self._look, self._needed, sizes))
        self._raise([problem for problem, _ in found])
        told = {k: v for k, v in dataclasses.asdict(self.manifest).items() if k != "files"}
        sums = [(self._names[index], sums) for index, (_, sums) in zip(self._needed, found, strict=True)]
        return hashlib.sha256(json.dumps([told, sums], sort_keys=True).encode()).hexdigest()

    def read_all(self, share: tuple[int, int] = (0, 1), *, num_threads: int | None = None) -> None:
        """All values, each file by its checksum; UserError for what is damaged, NaN or infinite.

        share: (k, n) for every n-th file from the k-th on.
        """
        with concurrent.futures.ThreadPoolExecutor(num_threads or cpu_threads()) as pool:
            self._raise(list(pool.map(self._examine, self._needed[share[0] :: share[1]])))

    def _raise(self, problems: Sequence[str | None]) -> None:
        if faulty := [problem for problem in problems if problem]:
            count = f"{len(faulty)} of {len(problems)} files"
            raise UserError(f"the teacher features in {self.folder}: {count}: {some(faulty, SHOWN)}: {AGAIN}")

    def _look(self, index: int, size: tuple[int, int]) -> tuple[str | None, list[int]]:
        """What is wrong with a file, without reading its values; and its checksums."""
        path, told, sums = self._paths[index], self.manifest, []
        try:
            length = path.stat().st_size
            if length != (written := told.files[self._names[index]]):
                return f"{path.name} has {length:,} bytes, not the {written:,} that were written", []
            with zipfile.ZipFile(path) as archive:
                for number in range(told.views):
                    if f"view{number}.npy" not in archive.namelist():
                        return f"{path.name} has no view{number}, and {told.views} view(s) are promised", []
                    shape, dtype = _header(archive, f"view{number}.npy")
                    sums.append(archive.getinfo(f"view{number}.npy").CRC)
                    if dtype != told.dtype:
                        return f"{path.name}: view{number} is {dtype}, not {told.dtype}", []
                    if problem := self._shape(shape, size, turned(number)):
                        return f"{path.name}: view{number} {problem}", []
        except FileNotFoundError:
            return f"{path.name} is not there", []
        except Exception as error:
            return f"{path.name} cannot be read ({' '.join(str(error).split())})", []
        return None, sums

    def _shape(self, shape: tuple[int, ...], size: tuple[int, int], turned: bool) -> str | None:
        """size: of the tile; a turned view of it lies on its side."""
        told = self.manifest
        if len(shape) != 4:
            return f"has the shape {shape}, not (taps, h, w, C)"
        if shape[0] != len(told.taps):
            return f"has {shape[0]} tap(s), not {len(told.taps)}"
        if shape[3] != told.width:
            return f"has {shape[3]} channels, not {told.width}"
        grid = told.grid_of(*size)
        if turned:
            grid, size = grid[::-1], size[::-1]
        if shape[1:3] != grid:
            of_patch = "" if told.patch is None else f", in patches of {told.patch} px,"
            return (
                f"has {shape[1]}x{shape[2]} tokens, and a tile of {size[0]}x{size[1]} px{of_patch} has "
                f"{grid[0]}x{grid[1]} (made from crops, or from tiles of another size?)"
            )
        return None

    def _examine(self, index: int) -> str | None:
        try:
            with np.load(self._paths[index]) as file:
                whole = all(np.isfinite(file[f"view{number}"]).all() for number in range(self.manifest.views))
        except Exception as error:
            return f"{self._paths[index].name} cannot be read ({' '.join(str(error).split())})"
        return None if whole else f"{self._paths[index].name} holds values that are NaN or infinite"


def _header(archive: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of an array in it."""
    with archive.open(name) as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
    return shape, str(dtype)
