"""Pictures of how far to trust a model: reliability diagrams, and precision against recall."""

import os
from collections.abc import Sequence

import matplotlib.patheffects as effects
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ktda_jax.figures.plots import FAINT, LINES, RULE, TEXT, save_figure
from ktda_jax.metrics.calibration import BINS, Reliability, expected_calibration_error, maximum_calibration_error

BLUE, ORANGE = LINES[1], LINES[2]
GAP = {"facecolor": "none", "edgecolor": ORANGE, "hatch": "////"}  # seen on blue and on white
HALF = 128  # the level of probability 0.5 in metrics.curves


def save_reliability(
    path: str | os.PathLike,
    before: Reliability,
    after: Reliability | None = None,
    *,
    names: tuple[str, str] = ("as predicted", "with temperature"),
    temperature: float | None = None,
) -> None:
    """Share of right pixels by confidence, the gap to the confidence itself, and how many pixels each bin has.

    Two diagrams side by side with `after`; `temperature` is then named with it. ECE and MCE are in percent.
    """
    second = names[1] if temperature is None else f"{names[1]} {temperature:.2f}"
    panels = [(names[0], before)] if after is None else [(names[0], before), (second, after)]
    figure = Figure(figsize=(0.9 + 4 * len(panels), 5.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)  # inches; the numbers of two axes would touch
    grid = figure.subplots(2, len(panels), sharex=True, sharey="row", squeeze=False, height_ratios=(3, 1))
    for (upper, lower), (name, counts) in zip(grid.T, panels, strict=True):
        _draw_reliability(upper, counts)
        shares = 100 * counts.count / max(counts.count.sum(), 1)
        lower.bar(100 * np.arange(BINS) / BINS, shares, 100 / BINS, color=FAINT, edgecolor="white", align="edge")
        error, largest = expected_calibration_error(counts), maximum_calibration_error(counts)
        upper.set_title(f"ECE {_percent(error)} %", fontsize=13, weight="bold", color=TEXT, pad=22)
        beneath = f"{name}, MCE {_percent(largest)} %"
        place = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center"}
        upper.annotate(beneath, (0.5, 1), (0, 8), fontsize=9, color=FAINT, **place)
        for axes in (upper, lower):
            _plain(axes)
        lower.set_xlabel("confidence, %", fontsize=10, color=TEXT)
    first, pixels = grid[:, 0]
    first.set_ylabel("right pixels, %", fontsize=10, color=TEXT)
    pixels.set_ylabel("share of\npixels, %", fontsize=10, color=TEXT)
    pixels.set_ylim(0, None if any(counts.count.any() for _, counts in panels) else 100)
    entries = [Patch(facecolor=BLUE, label="right pixels"), Patch(**GAP, label="gap to the mean confidence")]
    figure.legend(handles=entries, loc="outside lower center", ncols=2, fontsize=9, frameon=False, labelcolor=TEXT)
    save_figure(figure, path)


def save_precision_recall(
    path: str | os.PathLike,
    precision: np.ndarray,
    recall: np.ndarray,
    average_precision: np.ndarray,
    classes: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
) -> None:
    """A curve per class in its colour, from `metrics.curves.precision_recall`: fractions (C, 256) and (C,).

    Classes that no pixel is labelled with have no curve and "–" in the legend. The dot is the threshold 0.5.
    """
    if not len(precision) == len(recall) == len(average_precision) == len(classes) == len(palette):
        counts = f"{len(precision)} precisions, {len(recall)} recalls, {len(average_precision)} averages"
        raise ValueError(f"{counts}, {len(classes)} classes and {len(palette)} palette colours")
    figure, width = Figure(figsize=(5.2, 5.2)), 2.2 if len(classes) <= 8 else 1.4
    axes = figure.add_axes((0, 0, 1, 1))  # names and title lie outside; saving extends the picture to them
    for index, (name, color) in enumerate(zip(classes, np.array(palette) / 255, strict=True)):
        average = average_precision[index]
        label = f"{'–' if np.isnan(average) else f'{100 * average:.1f}'}  {name}"
        # A dark edge: pale colours of palettes would be lost on white.
        edged = [effects.Stroke(linewidth=width + 1.2, foreground=TEXT), effects.Normal()]
        drawn = np.isfinite(precision[index]) & np.isfinite(recall[index])
        x, y = 100 * recall[index][drawn], 100 * precision[index][drawn]
        axes.plot(x, y, color=color, linewidth=width, path_effects=edged, label=label, solid_capstyle="round")
        if drawn[HALF]:
            x, y = 100 * recall[index, HALF], 100 * precision[index, HALF]
            axes.plot(
                x, y, "o", color=color, markersize=3.5 * width, markeredgecolor=TEXT, markeredgewidth=1.2, zorder=3
            )
    axes.set(xlim=(-1.5, 101.5), ylim=(-1.5, 101.5))
    axes.set_xlabel("recall, %", fontsize=10, color=TEXT)
    axes.set_ylabel("precision, %", fontsize=10, color=TEXT)
    _plain(axes)
    present = average_precision[~np.isnan(average_precision)]
    mean = f"{100 * present.mean():.2f}" if present.size else "–"
    axes.set_title(f"mean AP {mean}", fontsize=14, weight="bold", color=TEXT, pad=24)
    place = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "center"}
    note = "each class against the rest; dots: probability 50 %"
    axes.annotate(note, (0.5, 1), (0, 8), fontsize=9, color=FAINT, **place)
    legend = axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5), fontsize=9, frameon=False, labelcolor=TEXT)
    legend.set_title("average precision, %", prop={"size": 9})
    legend.set_alignment("left")
    legend.get_title().set_color(FAINT)
    save_figure(figure, path, bbox_inches="tight", pad_inches=0.15)


def _draw_reliability(axes: Axes, counts: Reliability) -> None:
    filled = np.flatnonzero(counts.count)
    right = 100 * counts.hits[filled] / counts.count[filled]
    confidence = 100 * counts.confidence[filled] / counts.count[filled]
    left, width = 100 * filled / BINS, 100 / BINS
    style = {"align": "edge", "linewidth": 0.8}
    axes.bar(left, right, width, color=BLUE, edgecolor="white", **style)
    low, gap = np.minimum(right, confidence), np.abs(right - confidence)
    axes.bar(left, gap, width, low, **GAP, **style)
    axes.plot((0, 100), (0, 100), color=TEXT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set(xlim=(0, 100), ylim=(0, 100))


def _plain(axes: Axes) -> None:
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=TEXT, labelsize=9)


def _percent(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"
