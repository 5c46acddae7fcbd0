"""Tiles on disk: the published folder layout as a random access source, and the check run before training.

A source is anything with `len(source)`, `source[i] -> {'image', 'label', 'name'}`, `num_classes` and a stable
`repr`. Grain reads from it by index, from many threads at once, so `__getitem__` keeps no state.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Iterable

import numpy as np
from absl import logging
from PIL import Image

from ktda_jax.data.datasets import IGNORE

IMAGE_EXTENSIONS = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
LABEL_EXTENSIONS = (".png", ".tif", ".tiff")

# Pillow reads the files and not OpenCV, which turns palette labels into colours, returns half a JPEG without
# an error and prints a line for every GeoTIFF tag.

# Modes that become RGB without changing a value that we keep: grey repeats, palettes expand, alpha drops.
_RGB_LIKE = ("RGB", "RGBA", "L", "LA", "P", "1")
# Pillow stretches grey PNGs of 2 and 4 bits to 0..255; a label wants the stored numbers back.
_GREY_STRETCH = {"L;2": 85, "L;4": 17}


class DataError(ValueError):
    """Data that cannot be used; the message is one line that says what, where, and what to do about it."""


class FolderSource:
    """Pairs `root/<image_dir>/<split>/NAME.tif|png|jpg` with `root/<label_dir>/<split>/NAME.png|tif`.

    `source[i]` is `image` uint8 (H, W, 3) RGB, `label` uint8 (H, W) with 255 = ignore, `name` NAME; tiles are
    sorted by name. Missing directories, missing pairs and images without a label raise DataError here.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        split: str,
        *,
        num_classes: int,
        image_dir: str = "img_dir",
        label_dir: str = "ann_dir",
        classes: Iterable[str] | None = None,
    ):
        self.root = pathlib.Path(root).expanduser()
        self.split = split
        self.num_classes = num_classes
        self.classes = tuple(classes) if classes is not None else None
        if not 1 <= num_classes <= IGNORE:
            raise DataError(f"num_classes is {num_classes}: give 1 to {IGNORE}, since {IGNORE} means ignore")
        if self.classes is not None and len(self.classes) != num_classes:
            raise DataError(
                f"{len(self.classes)} class names {self.classes} for num_classes {num_classes}: give one name per class"
            )
        self.image_dir = self.root / image_dir / split
        self.label_dir = self.root / label_dir / split
        images = _files_by_stem(self.image_dir, IMAGE_EXTENSIONS)
        labels = _files_by_stem(self.label_dir, LABEL_EXTENSIONS)
        self.names = tuple(sorted(images.keys() & labels.keys()))
        if not self.names:
            raise DataError(
                f"no image in {self.image_dir} has a label in {self.label_dir}: images are named "
                f"{_some(sorted(images))}, labels {_some(sorted(labels))}; the two files of a "
                "pair must share their name up to the extension"
            )
        if unlabelled := sorted(images.keys() - labels.keys()):
            raise DataError(
                f"{len(unlabelled)} of {len(images)} images in {self.image_dir} have no label in "
                f"{self.label_dir}: {_some([images[stem] for stem in unlabelled])}; add the "
                "labels or remove the images"
            )
        if orphans := sorted(labels.keys() - images.keys()):
            logging.warning(
                "%d labels in %s have no image and are left out: %s",
                len(orphans),
                self.label_dir,
                _some([labels[stem] for stem in orphans]),
            )
        self.image_paths = tuple(str(self.image_dir / images[name]) for name in self.names)
        self.label_paths = tuple(str(self.label_dir / labels[name]) for name in self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict:
        return {
            "image": read_image(self.image_paths[index]),
            "label": read_label(self.label_paths[index]),
            "name": self.names[index],
        }

    def __repr__(self) -> str:
        return f"FolderSource({str(self.root)!r}, {self.split!r}, tiles={len(self)})"

    def describe(self, index: int) -> str:
        """The two files of a tile, relative to the root, for messages."""
        image, label = (os.path.relpath(paths[index], self.root) for paths in (self.image_paths, self.label_paths))
        return f"{image} + {label}"

    def label_size(self, index: int) -> tuple[int, int]:
        """(H, W) of one label from the file's header, without decoding it."""
        try:
            with Image.open(self.label_paths[index]) as file:
                return file.height, file.width
        except Exception as error:
            raise _unreadable(self.label_paths[index], error) from error


def _files_by_stem(directory: pathlib.Path, extensions: tuple[str, ...]) -> dict[str, str]:
    """{stem: file name} of the visible files in `directory` with one of `extensions`, in any case."""
    if not directory.is_dir():
        parent = next(path for path in directory.parents if path.is_dir())
        raise DataError(
            f"no such directory: {directory}; {parent} holds "
            f"{_some(sorted(entry.name for entry in parent.iterdir()))}; "
            "correct the data root or the split"
        )
    found, others = {}, []
    with os.scandir(directory) as entries:
        for name in sorted(entry.name for entry in entries if not entry.name.startswith(".")):
            stem, extension = os.path.splitext(name)
            if extension.lower() not in extensions:
                others.append(name)
            elif stem in found:
                raise DataError(f"two files named {stem} in {directory}: {found[stem]}, {name}; keep one")
            else:
                found[stem] = name
    if not found:
        raise DataError(
            f"no {'/'.join(extensions)} files in {directory}; it holds {_some(others)}; "
            "correct the data root or convert the files"
        )
    return found


def read_image(path: str) -> np.ndarray:
    """uint8 (H, W, 3) RGB. Grey is repeated and alpha dropped; 16-bit, float or CMYK data raise DataError."""
    try:
        with Image.open(path) as file:
            mode, stored = file.mode, _stored_mode(file)
            # Pillow calls 16-bit RGB 'RGB' too and would keep the high byte without a word.
            if mode in _RGB_LIKE and ";16" not in stored:
                return np.asarray(file if mode == "RGB" else file.convert("RGB"))
    except Exception as error:
        raise _unreadable(path, error) from error
    raise DataError(
        f"image {path} is stored as {stored or mode}, not 8-bit RGB: stretch or convert it to three bands of uint8"
    )


def read_label(path: str) -> np.ndarray:
    """uint8 (H, W) class indices; a palette image gives its indices, not its colours."""
    try:
        with Image.open(path) as file:
            mode, stored = file.mode, _stored_mode(file)
            values = np.asarray(file)
    except Exception as error:
        raise _unreadable(path, error) from error
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise DataError(
            f"label {path} is {mode}, not one band of class indices: write the index of the "
            "class in every pixel (8-bit grey or palette PNG)"
        )
    if values.dtype not in (np.uint8, np.bool_) and (values.min() < 0 or values.max() > IGNORE):
        raise DataError(
            f"label {path} ({mode}) holds values from {values.min()} to {values.max()}: class "
            f"indices must fit 0 to {IGNORE - 1}, with {IGNORE} for ignored pixels"
        )
    return values.astype(np.uint8, copy=False) // np.uint8(_GREY_STRETCH.get(stored, 1))


def _stored_mode(file: Image.Image) -> str:
    """Pillow's name for the pixel layout inside the file, such as 'RGB;16B'; ask before loading them."""
    args = file.tile[0].args if file.tile else ""
    return args if isinstance(args, str) else str(args[0]) if args else ""


def _unreadable(path: str, error: Exception) -> DataError:
    text = " ".join(str(error).split()) or type(error).__name__
    return DataError(f"cannot read {path}: {text}")


def _some(items: list, limit: int = 5) -> str:
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


def read_tile(source, index: int) -> dict:
    """`source[index]`, with any failure as a DataError that names the tile."""
    try:
        return source[index]
    except (DataError, MemoryError):
        raise
    except Exception as error:
        raise _unreadable(tile_name(source, index), error) from error


def label_sizes(source, *, num_threads: int | None = None) -> list[tuple[int, int]]:
    """(H, W) of every label: from headers where the source has `label_size`, else by decoding."""
    size = getattr(source, "label_size", None) or (lambda index: read_tile(source, index)["label"].shape)
    with concurrent.futures.ThreadPoolExecutor(num_threads or cpu_threads()) as pool:
        return list(pool.map(size, range(len(source))))


@dataclasses.dataclass(frozen=True)
class SplitSummary:
    """What `check_split` found: pixels int64 (num_classes,) per class; sizes are the (H, W) that occur."""

    tiles: int
    sizes: frozenset[tuple[int, int]]
    pixels: np.ndarray
    ignored: int
    fingerprint: str  # sha256 over names and pixels: the same tiles give it from any storage form
    unreadable: tuple[str, ...] = ()  # tiles that will be skipped in training; empty unless on_corrupt='skip'


@dataclasses.dataclass(frozen=True)
class _Tile:
    """One examined tile: `problem` is None or a key of `_PROBLEMS`, `text` names the offender."""

    problem: str | None = None
    text: str = ""
    size: tuple[int, int] = (0, 0)
    counts: np.ndarray | None = None  # int64 (256,)
    digest: bytes = b""


_PROBLEMS = {  # what is wrong with {bad} of {total} tiles -> what to do
    "unreadable": ("{bad} of {total} tiles cannot be read", "repair or remove them"),
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
    source,
    *,
    crop: int | tuple[int, int] | None = None,
    num_classes: int | None = None,
    on_corrupt: str = "stop",
    num_threads: int | None = None,
) -> SplitSummary:
    """Reads every tile once and raises one DataError with all that is wrong, before anything is compiled.

    `crop` (side or (H, W) in pixels) is the size that training cuts out. Unreadable tiles are errors unless
    `on_corrupt` is 'skip', which warns and lists them in the summary.
    """
    if not len(source):
        raise DataError(f"{source!r} has no tiles")
    num_classes = num_classes or source.num_classes
    crop = (crop, crop) if isinstance(crop, int) else crop
    with concurrent.futures.ThreadPoolExecutor(num_threads or cpu_threads()) as pool:
        tiles = list(pool.map(lambda index: _examine(source, index, num_classes, crop), range(len(source))))

    problems = {kind: [tile.text for tile in tiles if tile.problem == kind] for kind in _PROBLEMS}
    good = [tile for tile in tiles if not tile.problem]
    unreadable = []
    if on_corrupt == "skip" and good and (unreadable := problems.pop("unreadable")):
        logging.warning(
            "%r: %d of %d tiles cannot be read and will be skipped: %s",
            source,
            len(unreadable),
            len(tiles),
            _some(unreadable),
        )
    complaints = []
    for kind, offenders in problems.items():
        if offenders:
            what, remedy = _PROBLEMS[kind]
            what = what.format(
                bad=len(offenders),
                total=len(tiles),
                last=num_classes - 1,
                crop=crop and f"{crop[0]} x {crop[1]}",
            )
            complaints.append(f"{what}: {_some(offenders)}; {remedy}")
    if complaints:
        raise DataError(f"{source!r}: " + " | ".join(complaints))

    counts = np.sum([tile.counts for tile in good], axis=0, dtype=np.int64)
    if not counts[:num_classes].any():
        raise DataError(
            f"{source!r}: every pixel of every label is 255 (ignored), so there is nothing to "
            "learn or to score; check how the labels were written"
        )
    return SplitSummary(
        tiles=len(tiles),
        sizes=frozenset(tile.size for tile in good),
        pixels=counts[:num_classes],
        ignored=int(counts[IGNORE]),
        fingerprint=hashlib.sha256(b"".join(tile.digest for tile in tiles)).hexdigest(),
        unreadable=tuple(unreadable),
    )


def _examine(source, index: int, num_classes: int, crop: tuple[int, int] | None) -> _Tile:
    """Reads one tile: its first problem, or its size, label histogram and digest."""
    try:
        tile = read_tile(source, index)
    except DataError as error:
        return _Tile("unreadable", str(error))
    image, label = tile["image"], tile["label"]
    name, (height, width) = tile_name(source, index), label.shape
    if image.shape[:2] != label.shape:
        return _Tile("size", f"{name} (image {image.shape[0]} x {image.shape[1]}, label {height} x {width})")
    if crop and (height < crop[0] or width < crop[1]):
        return _Tile("crop", f"{name} ({height} x {width})")
    counts = np.bincount(label.ravel(), minlength=256)
    if counts[num_classes:IGNORE].any():
        values = num_classes + np.flatnonzero(counts[num_classes:IGNORE])
        return _Tile("values", f"{name} (values {_some(values.tolist(), 8)})")
    digest = hashlib.sha256(f"{tile['name']}\0{height}x{width}\0".encode())
    digest.update(np.ascontiguousarray(image))
    digest.update(np.ascontiguousarray(label))
    return _Tile(size=(height, width), counts=counts, digest=digest.digest())
