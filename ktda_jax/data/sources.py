"""What a source of tiles is; and tiles on disk, the published folder layout, as one."""

import collections
import concurrent.futures
import copy
import os
import pathlib
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, Protocol, TypedDict

import numpy as np
from absl import logging

from ktda_jax import UserError
from ktda_jax.data.datasets import IGNORE
from ktda_jax.data.gdal import unreadable
from ktda_jax.data.images import read_bands, read_image
from ktda_jax.data.labels import Colour, label_size, read_label
from ktda_jax.data.paths import expand

IMAGE_EXTENSIONS = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
LABEL_EXTENSIONS = (".png", ".tif", ".tiff")
IMAGE_DIR, LABEL_DIR = "img_dir", "ann_dir"


class Tile(TypedDict):
    image: np.ndarray  # uint8 (H, W, bands)
    label: np.ndarray  # uint8 (H, W) of class numbers, 255 = ignore
    name: str


class Origin(NamedTuple):
    """What decides on the tiles of a source that lie in files."""

    what: tuple  # which tiles of these files and how they are read, as plain Python values
    folders: tuple[pathlib.Path, ...]  # with all files right in them: those that GDAL reads beside an image, too


class Source(Protocol):
    """Tiles by index. Grain reads from many threads at once, so `__getitem__` keeps no state; `repr` is stable."""

    num_classes: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tile: ...


class FolderSource:
    """Pairs `root/<image_dir>/<split>/NAME.tif|png|jpg` with `root/<label_dir>/<split>/NAME.png|tif`.

    `source[i]` is `image` uint8 (H, W, bands), by default 8-bit RGB, `label` uint8 (H, W) with 255 = ignore, `name`
    NAME; tiles are sorted by name. Missing directories, missing pairs and images without a label raise UserError here.
    For `bands`, `scale`, `nodata` see `read_bands`; pixels without data are ignored. For `label_map` see `read_label`.
    """

    fold = None  # of a part of a split, how it was made (folds.Fold)

    def __init__(
        self,
        root: str | os.PathLike,
        split: str,
        *,
        num_classes: int,
        image_dir: str = IMAGE_DIR,
        label_dir: str = LABEL_DIR,
        bands: Sequence[int] | None = None,
        scale: Sequence | None = None,
        nodata: float | None = None,
        label_map: Mapping[int | Colour, int] | None = None,
    ):
        self.root = expand(root)
        self.split = split
        self.num_classes = num_classes
        self.bands = len(bands) if bands else 3
        self.plain = bands is None and scale is None and nodata is None
        self._reading, self.label_map = (bands, scale, nodata), label_map
        if not 1 <= num_classes <= IGNORE:
            raise UserError(f"num_classes is {num_classes}: give 1 to {IGNORE}, since {IGNORE} means ignore")
        self.image_dir = self.root / image_dir / split
        self.label_dir = self.root / label_dir / split
        images = files_by_stem(self.image_dir, IMAGE_EXTENSIONS)
        labels = files_by_stem(self.label_dir, LABEL_EXTENSIONS)
        if line := check_pairs(images, labels, f"in {self.image_dir}", f"in {self.label_dir}"):
            logging.warning("%s", line)
        names = {os.path.splitext(images[same])[0]: same for same in images}
        self.names = tuple(sorted(names))
        self.image_paths = tuple(str(self.image_dir / images[names[name]]) for name in self.names)
        self.label_paths = tuple(str(self.label_dir / labels[names[name]]) for name in self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        label = read_label(self.label_paths[index], self.label_map)
        if self.plain:
            image = read_image(self.image_paths[index])
        else:
            image, present = read_bands(self.image_paths[index], *self._reading)
            if present.shape == label.shape:  # otherwise the check names both sizes
                label = np.where(present, label, np.uint8(IGNORE))
        return {"image": image, "label": label, "name": self.names[index]}

    def __repr__(self) -> str:
        return f"FolderSource({str(self.root)!r}, {self.split!r}, tiles={len(self)})"

    def only(self, indices: Sequence[int], fold=None) -> "FolderSource":
        """These tiles alone, in this order. `fold`: how they were chosen (folds.Fold)."""
        part = copy.copy(self)
        part.fold = fold
        for name in ("names", "image_paths", "label_paths"):
            setattr(part, name, tuple(getattr(self, name)[index] for index in indices))
        return part

    def describe(self, index: int) -> str:
        """The two files of a tile, relative to the root, for messages."""
        image, label = (os.path.relpath(paths[index], self.root) for paths in (self.image_paths, self.label_paths))
        return f"{image} + {label}"

    @property
    def origin(self) -> Origin:
        reading = (self.num_classes, *self._reading, self.label_map)
        pairs = tuple(zip(self.image_paths, self.label_paths, strict=True))
        return Origin((type(self).__name__, reading, self.names, pairs), (self.image_dir, self.label_dir))

    def label_size(self, index: int) -> tuple[int, int]:
        """(H, W) of one label from the file's header, without decoding it."""
        return label_size(self.label_paths[index])


def check_pairs(images: dict[str, str], labels: dict[str, str], of_images: str, of_labels: str) -> str | None:
    """UserError if an image has no label; a line about labels without an image, if there are any.

    images, labels: {stem: file name}. `of_images`, `of_labels`: where they are, such as 'in DIR'.
    """
    wanted = " or ".join(f"NAME{extension}" for extension in LABEL_EXTENSIONS)
    if not images.keys() & labels.keys():
        raise UserError(
            f"no image {of_images} has a label {of_labels}: images are named "
            f"{some(sorted(images), 3)}, labels {some(sorted(labels), 3)}; the label of an image NAME must "
            f"be called {wanted}{_respelt(images, labels) or _affix(images, labels)}"
        )
    if unlabelled := sorted(images.keys() - labels.keys()):
        raise UserError(
            f"{len(unlabelled)} of {len(images)} images {of_images} have no label "
            f"{of_labels}: {some([images[stem] for stem in unlabelled])}; add the labels "
            f"({wanted} of an image NAME) or remove the images{_respelt(images, labels)}"
        )
    if orphans := sorted(labels.keys() - images.keys()):
        names = some([labels[stem] for stem in orphans])
        return f"{len(orphans)} labels {of_labels} have no image and are left out: {names}"
    return None


def same_name(name: str) -> str:
    """macOS takes an umlaut apart and other systems do not, so the two files of a pair may differ in that."""
    return unicodedata.normalize("NFC", name)


def _spelt(name: str) -> str:
    """The same for T0 and t0, and for letters that look alike and are others to Unicode, such as full-width digits."""
    return unicodedata.normalize("NFKC", name).casefold()


def _unlike(name: str, other: str) -> str:
    """In what two names differ that `_spelt` makes one."""
    return "upper and lower case" if name.casefold() == other.casefold() else "letters that look alike (Unicode)"


def _respelt(images: dict[str, str], labels: dict[str, str]) -> str:
    """'; ...' if labels without an image are called as images without a label, but for the case of letters."""
    alone = {_spelt(name): name for name in images.keys() - labels.keys()}
    found = [(alone[_spelt(name)], name) for name in labels if name not in images and _spelt(name) in alone]
    if not found:
        return ""
    (image, label), how = found[0], _unlike(*found[0])
    return (
        f"; {len(found)} label(s) differ from an image only in {how}, as {labels[label]} from {images[image]}: "
        "rename them as the images"
    )


def _affix(images, labels) -> str:
    """'; ...' if labels are called as the images with something before or behind, as annotation tools have it."""
    found, names = collections.Counter(), {_spelt(name) for name in images}
    for name in labels:
        for cut in range(1, len(name)):
            if _spelt(name[:cut]) in names:
                found["NAME" + name[cut:]] += 1
            if _spelt(name[cut:]) in names:
                found[name[:cut] + "NAME"] += 1
    (pattern, count), *_ = found.most_common(1) or [("", 0)]
    return f"; {count} of them are called {pattern}: rename these to NAME" if count else ""


def files_by_stem(
    directory: pathlib.Path, extensions: tuple[str, ...], *, root: str = "the data root", without: Collection[str] = ()
) -> dict[str, str]:
    """{stem as `same_name` has it: file name} of the visible files in `directory` with these `extensions`, in any case.

    `root`: what to correct where there are none, for messages. `without`: names of files to leave alone.
    """
    if not directory.is_dir():
        parent = next(path for path in directory.parents if path.is_dir())
        held, missing = sorted(entry.name for entry in parent.iterdir()), directory.relative_to(parent).parts[0]
        twin = next((name for name in held if _spelt(name) == _spelt(missing) and (parent / name).is_dir()), None)
        rename = twin and f"its {twin} differs from {missing} only in {_unlike(twin, missing)}: rename that, or "
        raise UserError(
            f"no such directory: {directory}; {parent} holds {some(held)}; {rename or ''}correct {root} or the split"
        )
    found, others = {}, []
    with os.scandir(directory) as entries:
        for name in sorted(entry.name for entry in entries if not entry.name.startswith(".")):
            stem, extension = os.path.splitext(name)
            if extension.lower() not in extensions:
                others.append(name)
            elif name in without:
                continue
            elif same_name(stem) in found:
                raise UserError(f"two files named {stem} in {directory}: {found[same_name(stem)]}, {name}; keep one")
            else:
                found[same_name(stem)] = name
    if not found:
        held = "the images alone" if without and not others else some(others)
        raise UserError(
            f"no {'/'.join(extensions)} files in {directory}; it holds {held}; correct {root} or convert the files"
        )
    return found


def some(items: list, limit: int = 5) -> str:
    """The first few items in one line, and how many more there are."""
    if not items:
        return "nothing"
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(str(item) for item in items[:limit]) + more


def cpu_threads() -> int:
    """Reader threads for this process: one per usable core, 16 at most (decoding releases the GIL)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(16, cores or 1)


def tile_name(source, index: int) -> str:
    """The best name a source has for a tile, for messages."""
    return source.describe(index) if hasattr(source, "describe") else f"tile {index} of {source!r}"


def labels_are(source) -> str:
    """'stored' in files as they are, 'mapped' by config.data.label_map, or 'built' into a data set."""
    if not isinstance(source, FolderSource):
        return "built"
    return "mapped" if source.label_map else "stored"


def read_tile(source: Source, index: int) -> Tile:
    """`source[index]`, with any failure as a UserError that names the tile."""
    try:
        return source[index]
    except (UserError, MemoryError):
        raise
    except Exception as error:
        raise unreadable(tile_name(source, index), error) from error


def label_sizes(source, *, num_threads: int | None = None) -> list[tuple[int, int]]:
    """(H, W) of every label: from headers where the source has `label_size`, else by decoding."""
    size = getattr(source, "label_size", None) or (lambda index: read_tile(source, index)["label"].shape)
    with concurrent.futures.ThreadPoolExecutor(num_threads or cpu_threads()) as pool:
        return list(pool.map(size, range(len(source))))
