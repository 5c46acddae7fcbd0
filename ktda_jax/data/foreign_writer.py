"""Features of any teacher, for a student of ours to learn from: the format, and what writes it.

This file needs numpy alone, so that it can be imported, or copied, beside any framework (examples/foreign_teacher.py).
Training reads them with config.teacher.mode=precomputed and config.teacher.features=FOLDER.

    FOLDER/NAME.npz        of each training tile, DIR/img_dir/train/NAME.tif say; names that are no tile's do no harm
    FOLDER/manifest.json   written last: a folder without it is not complete

**NAME.npz** (numpy.savez or savez_compressed) holds `view0`, and as many views as the manifest says: each an array
(taps, h, w, C), float16 or float32, without NaN. A tap is what a layer of the teacher, or anything else, says of the
*whole* tile: row 0 at the top, column 0 at the left, no class token. All have one C, and of one tile one grid. A
picture with an orientation tag is turned upright first, as training does: PIL's ImageOps.exif_transpose.

**Grid.** With a `patch` of P pixels, token (i, j) is of the pixels from row P * i and column P * j on, and a tile of
H x W has ceil(H / P) x ceil(W / P) tokens: pad at the bottom and at the right what is no whole patch. Tiles may differ
in size, and be larger than the crop of the training, which then begins at whole patches. With `patch` null the tokens
cover the tile evenly, however many there are (a teacher that resizes every image to 224 x 224 gives 14 x 14); all tiles
then have the size of config.data.crop.

**Views.** Training mirrors tiles (config.data.flip), and config.data.rotate turns them too. Store
  1: the tile as it is. Its maps are mirrored and turned with it. That is an approximation: the teacher never saw the
     mirror image, of which a transformer does not say quite the same; and where tiles are no whole patches, what was
     padded on one side is then taken for a part of the image on the other.
  2: the tile, and its mirror image (left and right exchanged).
  8: all, as `view` below makes them of an image; with config.data.rotate.

**manifest.json**
  format      "foreign-1"
  name        of the teacher, as it will be told
  taps        names of the taps, in their order. Four levels of the student learn, each from one of them: spread evenly
              (of two taps 1, 1, 2, 2; of twelve 3, 6, 9, 12), or as config.model.teacher.taps says, counted from 1
  width       C
  dtype       "float16" or "float32"
  views       1, 2 or 8
  patch       P, or null
  grid        [h, w] of all tiles; null where they differ, which takes a patch
  statistics  null, or what else there is to tell of the images that it saw: {"bands": [...], "mean": [...], ...}
  files       {NAME: bytes of NAME.npz}
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FORMAT, MANIFEST, SUFFIX = "foreign-1", "manifest.json", ".npz"
DTYPES = ("float16", "float32")
VIEWS = (1, 2, 8)


def view(array: np.ndarray, number: int) -> np.ndarray:
    """One of the 8 of (H, W, ...): mirrored where `number` is odd, then number // 2 quarter turns to the left."""
    return np.rot90(array[:, ::-1] if number % 2 else array, number // 2)


class ForeignWriter:
    """`with ForeignWriter(FOLDER, name=..., taps=..., patch=...) as writer: writer.write(NAME, maps)`, tile by tile.

    ValueError says in a line what is wrong. After an error there is no manifest; the same again writes all anew.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        name: str,
        taps: Sequence[str],
        patch: int | None,
        views: int = 1,
        dtype: str = "float16",
        statistics: Mapping[str, Any] | None = None,
    ):
        self._folder = pathlib.Path(folder).expanduser()
        if (self._folder / MANIFEST).exists():
            raise ValueError(f"{self._folder} holds features already; choose another folder, or remove it")
        if not name or not taps:
            raise ValueError("name the teacher, and each of its taps")
        if patch is not None and not (isinstance(patch, int) and patch >= 1):
            raise ValueError(f"patch is {patch!r}; give a whole number of pixels, or None")
        if views not in VIEWS or dtype not in DTYPES:
            raise ValueError(f"views is {views!r} and dtype {dtype!r}; give one of {VIEWS} and one of {DTYPES}")
        self._manifest = dict(
            format=FORMAT, name=str(name), taps=list(map(str, taps)), width=None, dtype=dtype, views=views,
            patch=patch, grid=None, statistics=statistics and dict(statistics),
        )  # fmt: skip
        json.dumps(self._manifest)  # a TypeError now, not at the end
        self._files, self._grids = {}, set()
        self._folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, *views: Sequence[np.ndarray]) -> None:
        """Of the tile `name` (without .tif) all views, in their order; each a sequence of maps (h, w, C), one a tap."""
        told = self._manifest
        if not name or name != os.path.basename(name):
            raise ValueError(f"a tile is called {name!r}; give the name of its file without folder and ending")
        if name in self._files:
            raise ValueError(f"{name} was written already")
        if len(views) != told["views"]:
            raise ValueError(f"{name}: {len(views)} view(s), not the {told['views']} that were promised")
        arrays = {}
        for number, maps in enumerate(views):
            arrays[f"view{number}"] = self._stacked(f"{name}, view {number}", maps)
        grid = arrays["view0"].shape[1:3]
        for number in range(len(views)):
            expected = grid[::-1] if number // 2 % 2 else grid
            if (found := arrays[f"view{number}"].shape[1:3]) != expected:
                raise ValueError(
                    f"{name}: view {number} has {found[0]}x{found[1]} tokens, of view 0's {grid[0]}x{grid[1]}"
                )
        if told["patch"] is None and self._grids - {grid}:
            raise ValueError(f"{name}: {grid[0]}x{grid[1]} tokens, others have another number, which takes a patch")
        path = self._folder / f"{name}{SUFFIX}"
        partial = self._folder / f".{name}.part{SUFFIX}"  # savez would add the ending
        np.savez(partial, **arrays)
        os.replace(partial, path)
        self._files[name] = path.stat().st_size
        self._grids.add(grid)

    def _stacked(self, what: str, maps: Sequence[np.ndarray]) -> np.ndarray:
        """The taps of one view, (taps, h, w, C)."""
        told = self._manifest
        maps = [np.asarray(each) for each in maps]
        if len(maps) != len(told["taps"]):
            raise ValueError(f"{what}: {len(maps)} tap(s), not the {len(told['taps'])} that were named")
        shapes = [each.shape for each in maps]
        if len(set(shapes)) > 1 or len(shapes[0]) != 3 or not math.prod(shapes[0]):
            raise ValueError(f"{what}: maps of the shapes {shapes}; give (h, w, C), the same of all taps")
        told["width"] = told["width"] or shapes[0][2]
        if shapes[0][2] != told["width"]:
            raise ValueError(f"{what}: {shapes[0][2]} channels, the tiles before have {told['width']}")
        with np.errstate(over="ignore"):
            stacked = np.stack(maps).astype(told["dtype"])
        if not np.isfinite(stacked).all():
            finite = all(np.isfinite(each).all() for each in maps)
            raise ValueError(
                f"{what}: " + ("too large for float16; set dtype='float32'" if finite else "NaN or infinite")
            )
        return stacked

    def close(self) -> None:
        """Writes the manifest: the features are complete."""
        if not self._files:
            raise ValueError(f"no tile was written to {self._folder}")
        grid = next(iter(self._grids)) if len(self._grids) == 1 else None
        manifest = {**self._manifest, "grid": grid, "files": self._files}
        partial = self._folder / f".{MANIFEST}.part"
        partial.write_text(json.dumps(manifest, indent=1) + "\n")
        os.replace(partial, self._folder / MANIFEST)

    def __enter__(self) -> "ForeignWriter":
        return self

    def __exit__(self, kind, *_) -> None:
        if kind is None:
            self.close()
