"""Images with their labels: which belong together, and whether they fit, before minutes are spent on maps."""

import ast
import concurrent.futures
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ktda_jax import UserError
from ktda_jax.data.addresses import Address, Image
from ktda_jax.data.check import SHOWN, complaint
from ktda_jax.data.classes import advice, doubts, shares
from ktda_jax.data.datasets import IGNORE
from ktda_jax.data.gdal import FileError, is_located, opened, orientation_of, place_of, unreadable
from ktda_jax.data.labels import read_label
from ktda_jax.data.paths import image
from ktda_jax.data.reading import as_mapping, check_label_map
from ktda_jax.data.sources import LABEL_EXTENSIONS, check_pairs, cpu_threads, files_by_stem, same_name, some

FLAG = "--label_map"
CLOSE = 0.1  # pixels by which a label may lie beside its image: numbers are rounded in files


def find(images: Sequence[Image], labels: str) -> tuple[list[Image], str | None]:
    """The label of each image, by `FolderSource`'s rules, and a line about labels without an image, if there are any.

    labels: a folder that holds NAME.png, .tif or .tiff of an image NAME; a file, or its address, for one image.
    UserError for images without a label.
    """
    place = image(labels)
    if isinstance(place, Address) or place.is_file():
        if len(images) > 1:
            raise UserError(f"--labels={place} is one file for {len(images)} images; give the folder of their labels")
        return [place], None
    if not place.is_dir():
        raise UserError(f"there is no file or folder --labels={labels}")
    named: dict[str, Image] = {}
    for path in images:
        other = named.setdefault(same_name(path.stem), path)
        if other is not path:
            raise UserError(
                f"two images named {path.stem}: {other} and {path}; choose one kind, such as --images='DIR/*.tif', or "
                "score them one after the other"
            )
    own = {path.name for path in images if path.resolve().parent == place.resolve()}
    held = files_by_stem(place, LABEL_EXTENSIONS, root="--labels", without=own)
    folders = {path.parent for path in images}
    line = check_pairs(
        {stem: path.name for stem, path in named.items()}, held,
        f"in {folders.pop()}" if len(folders) == 1 else "of --images", f"in {place}",
    )  # fmt: skip
    return [place / held[stem] for stem in named], line


def label_map(text: str | None) -> dict | None:
    """{stored value or colour: class} of --label_map; UserError for what is none."""
    if text is None:
        return None
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        found = None
    pairs = tuple(found.items()) if isinstance(found, dict) else found
    if not isinstance(pairs, tuple | list) or not pairs:
        raise UserError(
            f'{FLAG}={text} is no map; give ((stored value or colour, class), ...), such as {FLAG}="((0, 0), (255, 1))"'
        )
    check_label_map(pairs, IGNORE, FLAG)
    return as_mapping(pairs)


def check_fit(images: Sequence[Image], labels: Sequence[Image]) -> None:
    """UserError unless each label has the size of its image and, where both say it, its place on Earth."""
    found = _of_all(_misfit, images, labels)
    lines = []
    for kind, what, remedy in (
        ("size", "differ in size", "cut both to the same extent"),
        ("place", "lie in different places", "warp the labels to the grid of their images"),
    ):
        texts = [text for each, text in filter(None, found) if each == kind]
        if texts:
            named = some(texts, SHOWN)
            lines.append(f"image and label {what} in {len(texts)} of {len(images)} pairs: {named}; {remedy}")
    if lines:
        raise UserError(" | ".join(lines))


def _misfit(image: Image, label: Image) -> tuple[str, str] | None:
    """In what the two differ, and how; None if they fit, as far as can be told without their pixels."""
    (size, place), (other, elsewhere) = _header(image), _header(label)
    if size != other:
        return "size", f"{image} is {size[0]} x {size[1]}, {label} {other[0]} x {other[1]}"
    if difference := _apart(place, elsewhere, size):
        return "place", f"{label} ({difference})"
    return None


def _header(path: Image) -> tuple[tuple[int, int], dict[str, Any]]:
    """(H, W), upright, and the place."""
    with opened(path) as file:
        size = (file.width, file.height) if orientation_of(file) >= 5 else (file.height, file.width)
        return size, place_of(file)


def _apart(image: dict[str, Any], label: dict[str, Any], size: tuple[int, int]) -> str | None:
    """How a label's place differs from its image's; None if either has none: a mask drawn in a plain PNG, say."""
    if not (is_located(image) and is_located(label)):
        return None
    systems = [place.get("crs") for place in (image, label)]
    if all(systems) and systems[0] != systems[1]:
        ours, theirs = (system.to_string()[:40] for system in systems)
        return f"{theirs}, image {ours}"
    grids = [place.get("transform") for place in (image, label)]
    if any(grid is None or grid.is_identity for grid in grids):  # ground control points, or RPCs
        return None
    (ours, here), (theirs, there) = (
        (np.array([[grid.a, grid.b], [grid.d, grid.e]]), np.array([[grid.c], [grid.f]])) for grid in grids
    )
    if not np.linalg.det(ours):
        return None
    corners = np.array([[0, 0, size[1], size[1]], [0, size[0], 0, size[0]]], float)
    moved = np.hypot(*(np.linalg.solve(ours, theirs @ corners + (there - here)) - corners)).max()
    return f"{moved:.1f} pixels beside the image" if moved > CLOSE else None


def count_values(labels: Sequence[Image], mapping: Mapping | None) -> np.ndarray:
    """Pixels by value, int64 (labels, 256). UserError for labels that cannot be read, or hold nothing but 255."""
    counts = np.stack(_of_all(lambda path: np.bincount(read(path, mapping).ravel(), minlength=256), labels))
    if not counts[:, :IGNORE].any():
        raise UserError(
            f"every pixel of every label is {IGNORE} (ignored), so there is nothing to score; check how the labels "
            f"were written, or map {IGNORE} to a class by {FLAG}"
        )
    return counts


def read(path: Image, mapping: Mapping | None) -> np.ndarray:
    """uint8 (H, W), see `read_label`."""
    return read_label(os.fspath(path), mapping, called=FLAG)


def check_values(
    labels: Sequence[Image], counts: np.ndarray, classes: Sequence[str], mapping: Mapping | None
) -> list[str]:
    """UserError for values that are no class of the model; lines on what would score as silent garbage.

    counts: of `count_values`.
    """
    if mapping:
        check_label_map(tuple(mapping.items()), len(classes), FLAG)
    total, made = counts.sum(0), "mapped" if mapping else "stored"
    strange = counts[:, len(classes) : IGNORE] > 0
    if strange.any():
        wrong = np.flatnonzero(strange.any(1))
        named = [f"{labels[k]} ({some((len(classes) + np.flatnonzero(strange[k])).tolist(), 8)})" for k in wrong]
        raise UserError(
            f"label values outside 0..{len(classes) - 1} that are not {IGNORE} in {len(wrong)} of {len(labels)} "
            f"labels: {some(named, SHOWN)}; the model knows {some(list(classes), 8)}; map the values to these by {FLAG}"
            f" | {shares(total)}{advice(total, len(classes), made, FLAG)}"
        )
    return doubts(
        total[: len(classes)], int(total[IGNORE]), classes, split=None, trained=False, made=made, called=FLAG
    )  # fmt: skip


def _of_all(function: Callable, *columns: Sequence[Image]) -> list:
    """`function` of each row of files, in several threads. One UserError about all those that cannot be read."""

    def kept(*paths):
        try:
            return function(*paths)
        except UserError as error:
            return error
        except MemoryError:
            raise
        except Exception as error:
            return unreadable(paths[-1], error)

    with concurrent.futures.ThreadPoolExecutor(cpu_threads()) as pool:
        found = list(pool.map(kept, *columns))
    errors = [each for each in found if isinstance(each, UserError)]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        kinds: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for error in errors:
            known = isinstance(error, FileError)
            kind = (error.fault, error.remedy) if known else ("cannot be used", "repair or remove them")
            kinds.setdefault(kind, []).append((error.path, error.found) if known else (str(error), ""))
        raise UserError(" | ".join(complaint(*kind, named, f"{len(found)} images") for kind, named in kinds.items()))
    return found
