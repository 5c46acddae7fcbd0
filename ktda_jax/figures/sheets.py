"""Sheets of tiles: image, label, prediction, errors side by side, in the colours of the classes."""

import os
import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ktda_jax.data.datasets import IGNORE
from ktda_jax.figures.plots import CHARACTER, FAINT, TEXT, save_figure

WRONG = (214, 39, 40)  # red of the error map
STRIPES = ((238, 238, 238), (170, 170, 170))  # the two greys of ignored pixels; no class looks striped


def save_triptychs(
    path: str | os.PathLike,
    images: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    predictions: Sequence[np.ndarray],
    classes: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
    names: Sequence[str] | None = None,
    scores: Sequence[float] | None = None,
) -> None:
    """A row per tile: image, label, prediction and where they differ, with the classes in a legend.

    images: N of uint8 (H, W, 3); labels, predictions: N of integer (H, W); ignored label pixels are striped.
    scores: mIoU of each tile in percent, shown with its name. A handful of tiles makes a readable sheet.
    """
    if not len(images) == len(labels) == len(predictions) or not len(images):
        raise ValueError(f"{len(images)} images, {len(labels)} labels and {len(predictions)} predictions")
    if len(classes) != len(palette):
        raise ValueError(f"{len(classes)} classes and {len(palette)} palette colours")
    rows = []
    for image, label, prediction in zip(images, labels, predictions, strict=True):
        image, label, prediction = np.asarray(image), np.asarray(label), np.asarray(prediction)
        errors = paint_errors(image, label, prediction)
        rows.append([image, paint(label, palette), paint(prediction, palette), errors])
    captions = [_caption(row, names, scores) for row in range(len(rows))]
    red = np.array(WRONG) / 255
    wrong = Patch(facecolor=red, edgecolor=FAINT, linewidth=0.5, label="wrong class")
    save_sheet(path, rows, ("image", "label", "prediction", "errors"), captions, classes, palette, [wrong])


def save_sheet(
    path: str | os.PathLike,
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    captions: Sequence[str],
    classes: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
    entries_after: Sequence[Patch] = (),
) -> None:
    """A grid of uint8 (H, W, 3) panels with titles above, captions at the left and the classes in a legend."""
    side, header, panels = 2.3, 0.35, len(titles)  # inches
    entries = [
        Patch(facecolor=np.array(color) / 255, edgecolor=FAINT, linewidth=0.5, label=name)
        for name, color in zip(classes, palette, strict=True)
    ]
    light, dark = (np.array(grey) / 255 for grey in STRIPES)
    entries.append(Patch(facecolor=light, edgecolor=dark, hatch="/////", linewidth=0.5, label="ignored"))
    entries += entries_after
    columns = _legend_columns([entry.get_label() for entry in entries], panels * side)
    legend = 0.35 + 0.22 * -(-len(entries) // columns)

    caption = 0.45  # inches at the left, for the tile's name
    width, height = panels * side + caption + 0.1, len(rows) * side + header + legend
    figure = Figure(figsize=(width, height))
    grid = figure.add_gridspec(
        len(rows),
        panels,
        left=caption / width,
        right=1 - 0.1 / width,
        top=1 - header / height,
        bottom=legend / height,
        wspace=0.03,
        hspace=0.03,
    )
    for row, shown in enumerate(rows):
        for column, (title, panel) in enumerate(zip(titles, shown, strict=True)):
            axes = figure.add_subplot(grid[row, column])
            # Class colours are shown as they are; only photographs may be smoothed.
            flat = title in ("label", "prediction", "errors", "overlay")
            axes.imshow(panel, interpolation="nearest" if flat else "antialiased")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if row == 0:
                axes.set_title(title, fontsize=12, color=TEXT, pad=6)
            if column == 0:
                axes.set_ylabel(captions[row], fontsize=9, color=TEXT, labelpad=5, linespacing=1.4)
    figure.legend(
        handles=entries,
        loc="upper center",
        bbox_to_anchor=(0.5, (legend - 0.08) / height),
        ncols=columns,
        fontsize=10,
        frameon=False,
        handlelength=1.3,
        handleheight=1.1,
        columnspacing=1.4,
        labelcolor=TEXT,
    )
    save_figure(figure, path)


def paint(ids: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """Class ids (H, W) in their colours, uint8 (H, W, 3); ids without a colour, such as 255, are striped."""
    known = (ids >= 0) & (ids < len(palette))
    colors = np.asarray(palette, np.uint8)[np.where(known, ids, 0)]
    return np.where(known[..., None], colors, _stripes(ids.shape))


def paint_errors(image: np.ndarray, label: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """The image in pale grey with wrong pixels red and ignored ones striped, uint8 (H, W, 3)."""
    grey = image.astype(np.float64).mean(-1, keepdims=True).repeat(3, -1)
    pale = 255 - (255 - grey) * 0.45
    wrong = 0.8 * np.array(WRONG) + 0.2 * grey
    out = np.where((label != prediction)[..., None], wrong, pale).astype(np.uint8)
    return np.where((label == IGNORE)[..., None], _stripes(label.shape), out)


def overlay(image: np.ndarray, ids: np.ndarray, palette: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """The image with its classes half transparent, uint8 (H, W, 3); ignored pixels show the image alone."""
    mixed = (0.5 * image + 0.5 * paint(ids, palette)).astype(np.uint8)
    return np.where((ids == IGNORE)[..., None], image, mixed)


def _stripes(shape: tuple[int, int]) -> np.ndarray:
    """Diagonal stripes in two greys, uint8 (H, W, 3), about 24 across whatever the resolution."""
    rows, columns = np.indices(shape)
    period = max(2, min(shape) // 24)
    return np.array(STRIPES, np.uint8)[((rows + columns) // max(1, period // 2)) % 2]


def _legend_columns(names: Sequence[str], width: float) -> int:
    """Entries per line that fit into `width` inches, with the lines equally full."""
    symbol = 0.5
    if sum(symbol + CHARACTER * len(name) for name in names) <= width:
        return len(names)  # on one line every entry has a width of its own
    fit = max(1, int(width / (symbol + CHARACTER * max(map(len, names)))))
    return -(-len(names) // -(-len(names) // fit))


def _caption(row: int, names: Sequence[str] | None, scores: Sequence[float] | None) -> str:
    lines = []
    if names is not None:
        name = pathlib.PurePath(names[row]).name
        lines.append(name if len(name) <= 27 else f"{name[:10]}…{name[-16:]}")
    if scores is not None:
        lines.append(f"mIoU {scores[row]:.1f}" if np.isfinite(scores[row]) else "no labelled pixels")
    return "\n".join(lines)
