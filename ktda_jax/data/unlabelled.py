"""Images without labels that a training also learns from: found, looked at, and every window checked once."""

import collections
import concurrent.futures
import dataclasses
import glob
import hashlib
import itertools
import os
from collections.abc import Iterator, Sequence

import numpy as np

from ktda_jax import UserError
from ktda_jax.data.addresses import Image, is_address, parse
from ktda_jax.data.check import complaint
from ktda_jax.data.gdal import SETTINGS, FileError
from ktda_jax.data.images import Reading
from ktda_jax.data.paths import absolute, expand, found, names
from ktda_jax.data.raster import open_scene
from ktda_jax.data.scene_windows import HELD_OUT, Axis, ImageFile, UnlabelledSource, enough
from ktda_jax.data.sources import IMAGE_EXTENSIONS, cpu_threads, some

SETTING = "config.data.unlabelled"
SLOW = 1 << 24  # pixels decoded for a window
LABELS = 16  # different values or fewer in all images are no image's
SATURATED, NOT_SATURATED, NARROW, FAR = 0.9, 0.5, 0.1, 2  # of `compare`


@dataclasses.dataclass(frozen=True)
class UnlabelledSummary:
    """What `open_unlabelled` found in the fixed windows; mean, std and saturated are of the pixels with data."""

    windows: int
    files: int
    empty: int  # windows left out since they have too little data
    fingerprint: str  # sha256 over names and pixels, in order, wherever the folders are
    mean: np.ndarray  # float64 (bands,), of 8-bit values
    std: np.ndarray
    saturated: float  # share of the values that are 0 or 255
    warnings: list[str]


def open_unlabelled(
    paths: Sequence[str],
    *,
    crop: int | tuple[int, int],
    bands: Sequence[int] | None = None,
    scale: Sequence | None = None,
    nodata: float | None = None,
    held_out: bool | None = None,
    on_corrupt: str = "stop",
    num_threads: int | None = None,
    setting: str = SETTING,
    leave_out: Sequence[str] = (),
) -> tuple[UnlabelledSource, UnlabelledSummary]:
    """The windows of images that `paths` name, as `paths.found` does: files, patterns, folders, addresses, lists.

    Every fixed window is read once, and one UserError has all that is wrong. Windows of which less than half holds data
    are left out. With on_corrupt='skip' so are those that cannot be read, with a warning. `bands`, `scale`, `nodata`:
    see `read_bands`. `setting`: the name of `paths`, for messages. `leave_out`: as `paths`, what is not taken.

    held_out: None for all windows; True for every tenth file by name, or of fewer than ten files the lowest tenth of
    each one's rows of windows, and of single rows the last file; False for the others, which share no pixel with them.
    """
    crop = (crop, crop) if isinstance(crop, int) else tuple(crop)
    reading = Reading(bands and tuple(bands), scale, nodata, by_band=any(x is not None for x in (bands, scale, nodata)))
    count, skip = len(bands) if bands else 3, on_corrupt == "skip"
    chosen = _listed(paths, setting)
    if leave_out:
        others = {absolute(path) for path in _listed(leave_out, f"{SETTING}_val")}
        chosen = [path for path in chosen if absolute(path) not in others]
        if not chosen:
            raise UserError(f"{setting}: all of its images are held out by {SETTING}_val; name others there")
    named = _named(chosen)
    threads = num_threads or cpu_threads()
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        looked = list(pool.map(lambda one: _look(*one, reading, count, crop), named.items()))
    files, errors = ([one for one in looked if isinstance(one, kind)] for kind in (ImageFile, FileError))
    if files and held_out is not None and (skip or not errors):
        files = _share(files, crop, held_out, setting)
    windows = [(k, *place) for k, file in enumerate(files) for place in np.ndindex(*file.grid)]
    source = UnlabelledSource(files, np.array(windows, np.int32).reshape(-1, 3), reading, count, crop, skip)
    with concurrent.futures.ThreadPoolExecutor(min(threads, _at_once(files, crop, count))) as pool:
        seen = list(pool.map(lambda row: _examine(source, row, skip), _rows(files)))
    errors += [error for row in seen for error in row.errors]
    digests = [digest for row in seen for digest in row.digests]
    empty, told = sum(row.empty for row in seen), _told(errors, len(named))
    if told and not (skip and any(digests)):
        raise UserError(f"{setting} (read as the tiles with labels are): " + " | ".join(told))
    if not any(digests):
        raise UserError(_nothing(files, empty, sum(row.black for row in seen), reading, crop, held_out, setting))
    source = source.only([k for k, digest in enumerate(digests) if digest])
    counts, values = sum(row.counts for row in seen), np.arange(256)
    mean = counts @ values / counts.sum(1)
    levels = np.flatnonzero((counts > 0).any(0))
    if len(levels) <= LABELS:
        raise UserError(
            f"{setting}: all that the images hold is the value{'s' * (len(levels) > 1)} {some(levels.tolist())}, as if "
            "they were labels; name the images"
        )
    return source, UnlabelledSummary(
        windows=len(source),
        files=len(files),
        empty=empty,
        fingerprint=hashlib.sha256(b"".join(filter(None, digests))).hexdigest(),
        mean=mean,
        std=np.sqrt((counts * (values - mean[:, None]) ** 2).sum(1) / counts.sum(1)),
        saturated=float(counts[:, [0, 255]].sum() / counts.sum()),
        warnings=[f"{setting}: skipped: {line}" for line in told]
        + _left_out(source, errors, setting)
        + _slow(files, crop, setting),
    )


def compare(
    summary: UnlabelledSummary, labelled_mean: np.ndarray, labelled_std: np.ndarray, labelled_saturated: float
) -> list[str]:
    """Warnings if the images look unlike the tiles with labels; UserError if they plainly hold other values.

    labelled_mean, labelled_std: (bands,), of the tiles' 8-bit values; labelled_saturated: their share at 0 or 255.
    """
    mean, std = np.asarray(labelled_mean, np.float64), np.asarray(labelled_std, np.float64)
    means = f"means {_figures(summary.mean)} and {_figures(mean)}"
    spreads = f"standard deviations {_figures(summary.std)} and {_figures(std)}"
    remedy = (
        "both are read by the same config.data.bands, scale and nodata: convert these images to the values of the tiles"
    )
    if summary.saturated > SATURATED and labelled_saturated < NOT_SATURATED:
        raise UserError(
            f"{SETTING}: {summary.saturated:.0%} of the values are 0 or 255, and {labelled_saturated:.0%} of those of "
            f"the tiles with labels ({means}); {remedy}"
        )
    narrow, far = summary.std < NARROW * std, np.abs(summary.mean - mean) > FAR * std
    less = f"less than a tenth as much as in the tiles with labels ({spreads}; {means})"
    if narrow.all():
        raise UserError(f"{SETTING}: the values vary {less}; {remedy}")
    lines = [f"{SETTING}: the values of {_places(narrow)} vary {less}"] if narrow.any() else []
    if far.any():
        lines.append(
            f"{SETTING}: the mean of {_places(far)} is more than {FAR} standard deviations away from that of the tiles "
            f"with labels ({means}); are they images of the same kind?"
        )
    return lines


def _figures(values: np.ndarray) -> str:
    return " ".join(f"{value:.1f}" for value in values)


def _places(which: np.ndarray) -> str:
    """'band 1, 3', counted as they are read."""
    return f"band {some((np.flatnonzero(which) + 1).tolist())}"


def _listed(paths: Sequence[str], setting: str) -> list[Image]:
    """The files that are named, each once."""
    files, texts = {}, [paths] if isinstance(paths, str) else list(paths)
    for before, text in itertools.pairwise(texts):
        if is_address(before) and not (
            is_address(text) or expand(text).exists() or glob.glob(str(expand(text)), recursive=True)
        ):
            raise UserError(  # it may be of a signature
                f"{setting}: what follows the comma after {parse(before)} is no file; an address that holds a comma "
                "goes into a list.txt, one a line"
            )
    for text in texts:
        if not is_address(text) and (inside := expand(text) / "img_dir").is_dir():
            splits = sorted(path.name for path in inside.iterdir() if path.is_dir())
            split = splits[0] if splits and "train" not in splits else "train"
            raise UserError(f"{text} of {setting} is a folder of tiles and labels; name its images: {inside / split}")
        for path in found(text, IMAGE_EXTENSIONS, what="image", called=f"{text} of {setting}"):
            files.setdefault(absolute(path), path)
    if not files:
        raise UserError(f"{setting} names nothing; give images, patterns or folders")
    return list(files.values())


def _named(paths: list[Image]) -> dict[str, Image]:
    """The files by name, in order; those of the same name also by the folders that tell them apart."""
    named = collections.defaultdict(list)
    for name, path in zip(names(paths), paths, strict=True):
        named[name].append(path.absolute())
    for group in named.values():
        if len(group) > 1:  # URLs with other questions
            raise UserError(f"{group[0]} is given {len(group)} times; images need names of their own: download them")
    return {name: path for name, (path,) in sorted(named.items())}


def _look(
    name: str, path: Image, reading: Reading, bands: int, crop: tuple[int, int]
) -> ImageFile | FileError:  # fmt: skip
    """What the header of a file says, or what is wrong with it."""
    try:
        scene = open_scene(path, reading, bands, by="config")
    except FileError as error:
        return error
    size = scene.height, scene.width
    if size[0] < crop[0] or size[1] < crop[1]:
        remedy = f"the crop is {crop[0]} x {crop[1]}: set a smaller config.data.crop, or leave them out"
        return FileError("image", path, f"has only {size[0]} x {size[1]} pixels", remedy)
    rows, columns = (Axis(0, have - side, max(1, round(have / side))) for have, side in zip(size, crop, strict=True))
    return ImageFile(
        path,
        name,
        *size,
        scene.layout,
        scene.alphas,
        scene.orientation,
        rows,
        columns,
        scene.block,
        np.dtype(scene.dtype).itemsize,
    )


def _share(files: list[ImageFile], crop: tuple[int, int], held_out: bool, setting: str) -> list[ImageFile]:
    """The files, or the rows of windows in them, that are held out, or the others; see `open_unlabelled`."""
    if len(files) >= HELD_OUT:
        return [file for k, file in enumerate(files, 1) if (k % HELD_OUT == 0) == held_out]
    parts = [file.rows.divided(crop[0]) for file in files]
    if any(parts):
        return [
            dataclasses.replace(file, rows=part[0 if held_out else 1]) if part else file
            for file, part in zip(files, parts, strict=True)
            if part or not held_out
        ]
    if len(files) > 1:
        return files[-1:] if held_out else files[:-1]
    raise UserError(
        f"{setting}: {files[0].path} has {files[0].height} rows of pixels, so that one window of {crop[0]} cannot be "
        "held out for validation beside another; name images for that in config.data.unlabelled_val"
    )


def _rows(files: list[ImageFile]) -> Iterator[range]:
    """The windows that lie side by side: read in turn, strips of a file are decoded once."""
    first = 0
    for file in files:
        rows, columns = file.grid
        for _ in range(rows):
            yield range(first, first + columns)
            first += columns


def _at_once(files: list[ImageFile], crop: tuple[int, int], bands: int) -> int:
    """How many rows of windows are examined at a time: strips, once decoded, are to stay in GDAL's cache."""
    sizes = [file.decoded(crop) * bands * file.itemsize for file in files if file.in_strips]
    return max((int(SETTINGS["GDAL_CACHEMAX"]) << 19) // max(sizes, default=1), 1)  # half of it


def _slow(files: list[ImageFile], crop: tuple[int, int], setting: str) -> list[str]:
    """A warning of files for whose windows much is decoded in vain."""
    slow = [file for file in files if file.decoded(crop) > max(SLOW, 8 * crop[0] * crop[1])]
    if not slow:
        return []
    most = max(file.decoded(crop) for file in slow) / 1e6
    return [
        f"{setting}: slow to read, since up to {most:.1f} million pixels are decoded for a window of {crop[0]} x "
        f"{crop[1]}: {some([str(file.path) for file in slow], 3)}; gdal_translate -co TILED=YES makes a file in tiles"
    ]


@dataclasses.dataclass
class _Row:
    """What was found in some windows: a digest of each, b'' without data and None if it cannot be read."""

    counts: np.ndarray  # int64 (bands, 256), of the pixels with data
    digests: list[bytes | None] = dataclasses.field(default_factory=list)
    empty: int = 0
    black: int = 0  # of these: only since values are 0
    errors: list[FileError] = dataclasses.field(default_factory=list)


def _examine(source: UnlabelledSource, windows: range, skip: bool) -> _Row:
    row = _Row(np.zeros((source.bands, 256), np.int64))
    for index in windows:
        try:
            window, data, present = source.read(index)
        except FileError as error:
            row.errors.append(error)
            row.digests.append(None)
            if skip:
                continue
            break  # a damaged file may take long to fail
        if not enough(data):
            row.empty += 1
            row.black += enough(present)
            row.digests.append(b"")
            continue
        image = window["image"]
        row.digests.append(hashlib.sha256(f"{window['name']}\0{source.crop}\0".encode() + image.tobytes()).digest())
        for band in range(source.bands):
            row.counts[band] += np.bincount(image[..., band][data], minlength=256)
    return row


def _told(errors: list[FileError], total: int) -> list[str]:
    """One line for each kind of fault."""
    kinds: dict[tuple[str, str], dict[str, str]] = collections.defaultdict(dict)
    for error in errors:  # of many windows, and GDAL's words often begin with the path
        held = error.found.replace(error.path, os.path.basename(error.path))
        kinds[error.fault, error.remedy].setdefault(error.path, held)
    return [complaint(*kind, list(those.items()), f"{total} files") for kind, those in kinds.items()]


def _nothing(files, empty: int, black: int, reading: Reading, crop, held_out: bool | None, setting: str) -> str:
    """That all windows are without data."""
    names = some([str(file.path) for file in files], 3)
    share = {None: "", True: " that would be held out", False: " that are not held out"}[held_out]
    size = f"{crop[0]} x {crop[1]}"
    text = f"{setting}: none of the {empty} windows of {size}{share} has data in half of its pixels ({names});"
    if black and reading.scale is not None:
        return (
            f"{text} {black} are 0 after config.data.scale={reading.scale}: are these images in the unit of the tiles?"
        )
    if held_out:
        return f"{text} name images to hold out in config.data.unlabelled_val"
    return f"{text} they are black, or missing by config.data.nodata or the files' own word: name other images"


def _left_out(source: UnlabelledSource, errors: list[FileError], setting: str) -> list[str]:
    """A warning that names the files of which no window has data."""
    unreadable = {error.path for error in errors}
    bare = [path for path in map(str, source.unused()) if path not in unreadable]
    if not bare:
        return []
    size = f"{source.crop[0]} x {source.crop[1]}"
    return [f"{setting}: left out, without a window of {size} with data in half of it: {some(bare, 3)}"]
