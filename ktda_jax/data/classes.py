"""What the values of labels say about how they were written: classes that are missing, and the likely cause."""

from collections.abc import Sequence

import numpy as np

from ktda_jax.data.datasets import IGNORE
from ktda_jax.data.reading import SETTING

_SHOWN = 8  # values in one line


def doubts(
    pixels: np.ndarray, ignored: int, classes: Sequence[str], *, split: str | None, trained: bool, made: str,
    called: str = SETTING,
) -> list[str]:  # fmt: skip
    """What would train or score as silent garbage, one line each.

    pixels: int (classes,), labelled pixels of a split, or, where that is None, of all labels there are; `ignored`:
    those of 255. `trained`: whether the split is the one to learn from, which must hold every class. `made`, `called`:
    see `advice`.
    """
    where = "all labels" if split is None else f"split {split!r}"
    if len(classes) == 1:
        return [
            f"there is one class, {classes[0]!r}, so that everything scores 100; add one for the rest, such as "
            "'background'"
        ]
    found, absent = np.flatnonzero(pixels), [k for k, count in enumerate(pixels) if not count]
    lines = []
    if len(found) == 1:
        only = classes[found[0]]
        lines.append(
            f"every labelled pixel of {where} is {only!r}, "
            + ("so there is nothing to learn" if trained else f"so that a map of {only!r} alone scores 100")
        )
    elif trained and absent:
        names = ", ".join(repr(classes[k]) for k in absent[:_SHOWN])
        names += f" and {len(absent) - _SHOWN} more" if len(absent) > _SHOWN else ""
        lines.append(f"no pixel of {where} is labelled {names}, so it cannot be learnt")
    elif trained and ignored > pixels.sum() / 20 and pixels.min() < pixels.sum() / 1e4:
        rare = int(np.argmin(pixels))
        lines.append(f"only {pixels[rare]} pixels of {where} are labelled {classes[rare]!r}; many are ignored")
    if lines:
        counts = np.zeros(256, np.int64)
        counts[: len(pixels)], counts[IGNORE] = pixels, ignored
        lines[0] += f" ({shares(counts)})" + advice(counts, len(classes), made, called)
    return lines


def shares(counts: np.ndarray) -> str:
    """'values 0: 75.0 %, 255 (ignored): 25.0 %' of int (256,) pixels by value."""
    held = np.flatnonzero(counts)
    some = ", ".join(
        f"{value}{' (ignored)' if value == IGNORE else ''}: {100 * counts[value] / counts.sum():.3g} %"
        for value in held[:_SHOWN]
    )
    return f"values {some}" + (f" and {len(held) - _SHOWN} more" if len(held) > _SHOWN else "")


def advice(counts: np.ndarray, num_classes: int, made: str, called: str = SETTING) -> str:
    """'; ...' what the values look like and what would mend it; '' where nothing can be told.

    made: 'stored' in files as they are, 'mapped' by the label map, 'built' into a TFDS data set. called: the setting
    or flag of the label map.
    """
    held = np.flatnonzero(counts).tolist()
    below = [value for value in held if value != IGNORE]
    looks, pairs = "", []
    if made == "mapped":
        return f"; {called} turns nothing into what is missing, it seems"
    if held == [0, IGNORE] and num_classes == 2:
        looks, pairs = "masks drawn as 0 and 255", [(0, 0), (IGNORE, 1)]
    elif below == list(range(1, num_classes + 1)):
        looks, pairs = "classes counted from 1", [(v, v - 1) for v in below]
    elif below == list(range(num_classes + 1)):
        looks = f"classes counted from 1, with 0 where nothing is labelled (or {num_classes + 1} classes)"
        pairs = [(0, IGNORE), *((v, v - 1) for v in below[1:])]
    elif IGNORE in held and below and below[-1] > IGNORE - 6:
        return "; they look like masks drawn as 0 and 255 with soft edges: write them without smoothing"
    elif below and below[-1] >= num_classes and num_classes in (len(below), len(held)):
        values = below if len(below) == num_classes else held
        looks, pairs = "classes under other numbers", [(v, k) for k, v in enumerate(values)]
    elif below and 0 not in below and below[-1] < num_classes:
        looks, pairs = "classes counted from 1, perhaps", [(v, v - 1) for v in range(1, num_classes + 1)]
    if not looks:
        return ""
    if IGNORE in held and IGNORE not in dict(pairs):
        pairs.append((IGNORE, IGNORE))
    mend = "build the set with 0, 1, ..."
    if made == "stored":
        quote = '"' if called.startswith("--") else ""  # for the shell
        mend = f"set {called}={quote}({', '.join(map(str, pairs))}){quote}"
    return f"; they look like {looks}: if so, {mend}"
