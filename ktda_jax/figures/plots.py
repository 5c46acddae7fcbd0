"""Pictures of a run and of its data: confusion matrix, training curves, class shares.

Figures are built without pyplot, so nothing global is changed and no display is needed, and written to a
temporary name first: a figure that exists is complete.
"""

import functools
import json
import math
import os
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from ktda_jax.data import buckets
from ktda_jax.data.paths import place
from ktda_jax.metrics.confusion import summarize

DPI = 150
CHARACTER = 0.085  # inches that a character of 10 pt takes, on the safe side
TEXT, FAINT, RULE = "#222222", "#8a8a8a", "#d9d9d9"
LOSS_TERMS = ("loss", "decode", "aux", "distill")  # as the training loss names them
LINES = ("#1b1b1b", "#2f6fb0", "#d9822b", "#3a9a5b", "#a0508f", "#8c6d46", "#5aa7b5")


def save_confusion(path: str | os.PathLike, confusion: np.ndarray, classes: Sequence[str]) -> None:
    """Heat map of a (C, C) confusion matrix: each row in percent of its label, the pixel count beneath."""
    confusion = np.asarray(confusion)
    scores = summarize(confusion).summary
    count = len(classes)
    if confusion.shape != (count, count):
        raise ValueError(f"{count} class names for a confusion matrix of {confusion.shape}")
    labelled = confusion.sum(1, keepdims=True)
    shares = 100 * confusion / np.maximum(labelled, 1)

    cell = 1.05 if count <= 8 else 0.68  # inches
    side = count * cell
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((0, 0, 1, 1))  # names and title lie outside; saving extends the picture to them
    axes.imshow(np.where(labelled > 0, shares, np.nan), cmap="Blues", vmin=0, vmax=100)
    axes.set_facecolor("#f0f0f0")  # rows of classes that no pixel is labelled with

    large, small = (12, 8.5) if count <= 8 else (8.5, 6.5)
    for row in range(count):
        for column in range(count):
            if not labelled[row, 0]:
                axes.text(column, row, "–", ha="center", va="center", color=FAINT, fontsize=large)
                continue
            color = "white" if shares[row, column] > 55 else TEXT
            weight = "bold" if row == column else "normal"
            value, pixels = f"{shares[row, column]:.1f}", _short_count(confusion[row, column])
            style = {"ha": "center", "va": "center", "color": color}
            axes.text(column, row - 0.1, value, fontsize=large, weight=weight, **style)
            axes.text(column, row + 0.22, pixels, fontsize=small, alpha=0.8, **style)

    slanted = CHARACTER * max(map(len, classes)) > cell - 0.05  # names wider than a cell would touch
    placed = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(range(count), classes, **placed)
    axes.set_yticks(range(count), classes)
    axes.set_xticks(np.arange(count - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(count - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0, labelsize=10, labelcolor=TEXT)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("predicted", fontsize=11, color=FAINT)
    axes.set_ylabel("label", fontsize=11, color=FAINT)
    title = f"mIoU {scores['mIoU']:.2f}   aAcc {scores['aAcc']:.2f}"
    axes.set_title(title, fontsize=14, weight="bold", color=TEXT, pad=24)
    axes.annotate(
        "percent of the label's pixels, pixel count beneath",
        (0.5, 1),
        (0, 8),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="center",
        fontsize=9,
        color=FAINT,
    )
    save_figure(figure, path, bbox_inches="tight", pad_inches=0.15)


def save_shares(
    path: str | os.PathLike,
    pixels: dict[str, np.ndarray],
    classes: Sequence[str],
    palette: Sequence[tuple[int, int, int]],
) -> None:
    """Bars of each class's share of the labelled pixels, a group per split. pixels: split -> int64 (C,)."""
    figure = Figure(figsize=(1.6 + 1.1 * len(classes) * max(1, 0.6 * len(pixels)), 3.4), layout="constrained")
    axes, width = figure.add_subplot(), 0.8 / len(pixels)
    for index, (split, counts) in enumerate(pixels.items()):
        shares = 100 * counts / max(counts.sum(), 1)
        places = np.arange(len(classes)) + (index - (len(pixels) - 1) / 2) * width
        colors = np.array(palette) / 255
        bars = axes.bar(places, shares, 0.92 * width, color=colors, edgecolor=FAINT, linewidth=0.6)
        axes.bar_label(bars, [f"{split}\n{share:.3g} %" for share in shares], fontsize=8, color=TEXT, padding=2)
    axes.set_xticks(range(len(classes)), classes, fontsize=10, color=TEXT)
    axes.set_ylabel("share of labelled pixels, %", fontsize=10, color=TEXT)
    axes.margins(y=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0, labelcolor=TEXT)
    save_figure(figure, path)


def save_curves(path: str | os.PathLike, metrics_jsonl_path: str | os.PathLike) -> None:
    """Loss terms, learning rate, validation mIoU or variance explained over steps, from a run's `metrics.jsonl`.

    A key is recognised by its last part, after the slashes: `LOSS_TERMS` or anything with `loss` in it, `lr`,
    `mIoU`. Panels without values are left out.
    """
    curves = read_curves(metrics_jsonl_path)
    last = {k: k.split("/")[-1] for k in curves}
    losses = {k: v for k, v in curves.items() if last[k] in LOSS_TERMS or "loss" in last[k]}
    rates = {k: v for k, v in curves.items() if last[k] == "lr"}
    scores = {k: v for k, v in curves.items() if last[k] == "mIoU"}
    shares = {k: v for k, v in curves.items() if k.startswith("val/explained")}
    explained = functools.partial(_draw_scores, what="variance explained")
    drawn = ((_draw_losses, losses), (_draw_scores, scores), (explained, shares), (_draw_rates, rates))
    panels = [(draw, found) for draw, found in drawn if found]
    if not panels:
        raise ValueError(f"{metrics_jsonl_path}: no loss, lr or mIoU to draw")
    heights = [1.2 if draw is _draw_rates else 2.6 for draw, _ in panels]
    figure = Figure(figsize=(8, sum(heights) + 0.6))
    figure.set_layout_engine("constrained")
    all_axes = np.atleast_1d(figure.subplots(len(panels), 1, sharex=True, height_ratios=heights))
    for axes, (draw, found) in zip(all_axes, panels, strict=True):
        draw(axes, found)
        axes.grid(color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(colors=TEXT, labelsize=9)
        axes.margins(x=0.02)
    figure.align_ylabels()
    all_axes[-1].set_xlabel("step", fontsize=10, color=TEXT)
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=(1, 2, 5, 10)))
    save_figure(figure, path)


def _draw_losses(axes: Axes, curves: dict[str, np.ndarray]) -> None:
    lowest, highest = np.inf, 0.0
    for index, (name, (steps, values)) in enumerate(curves.items()):
        color = LINES[index % len(LINES)]
        window = len(values) // 50  # a moving average once there are enough points to hide the trend
        if window > 1:
            axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.25)
            steps = np.convolve(steps, np.ones(window) / window, "valid")
            values = np.convolve(values, np.ones(window) / window, "valid")
        width, label = 2.0 if index == 0 else 1.4, name.removeprefix("train/")
        axes.plot(steps, values, color=color, linewidth=width, label=label, **_dots(values))
        lowest, highest = min(lowest, np.nanmin(values)), max(highest, np.nanmax(values))
    if lowest > 0 and highest > 20 * lowest:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if highest < 1000 * lowest else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("loss", fontsize=10, color=TEXT)
    axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=TEXT)


def _draw_scores(axes: Axes, curves: dict[str, np.ndarray], what: str = "mIoU (%)") -> None:
    for index, (name, (steps, values)) in enumerate(curves.items()):
        color = LINES[1 + index % (len(LINES) - 1)]
        best = int(np.argmax(values))
        label = f"{name}\nbest {values[best]:.2f}\nat step {steps[best]:,.0f}"
        axes.plot(steps, values, color=color, linewidth=1.8, label=label, **_dots(values))
        ring = {"markersize": 8, "markerfacecolor": "white", "markeredgewidth": 2}
        axes.plot(steps[best], values[best], "o", color=color, **ring)
    axes.set_ylabel(what, fontsize=10, color=TEXT)
    axes.legend(fontsize=9, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), labelcolor=TEXT)


def _draw_rates(axes: Axes, curves: dict[str, np.ndarray]) -> None:
    for index, (steps, values) in enumerate(curves.values()):
        axes.plot(steps, values, color=LINES[index % len(LINES)], linewidth=1.6, **_dots(values))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    axes.yaxis.get_offset_text().set_fontsize(8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("learning rate", fontsize=10, color=TEXT)


def _dots(values: np.ndarray) -> dict[str, object]:
    """Markers while a curve is short: a single point would be invisible as a line."""
    return {"marker": "o", "markersize": 3.5} if len(values) < 15 else {}


def read_curves(path: str | os.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Of a `metrics.jsonl`: key to (steps, values), in order of appearance; what is no finite number is left out."""
    points: dict[str, list[tuple[float, float]]] = {}
    for line in buckets.read_text(place(path)).splitlines():
        try:
            row = json.loads(line, parse_int=float)
        except json.JSONDecodeError:  # a line cut short
            continue
        if not isinstance(row, dict) or not _finite(row.get("step")):
            continue
        for key, value in row.items():
            if key != "step" and _finite(value):
                points.setdefault(key, []).append((row["step"], value))
    return {key: tuple(np.array(sorted(pairs), np.float64).T) for key, pairs in points.items()}


def _finite(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value)


def _short_count(count: int) -> str:
    """4 characters or so: 987, 12.3k, 4.5M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{unit}" if count < 999.5 * size else f"{count / size:.0f}{unit}"
    return str(int(count))


def save_figure(figure: Figure, path: str | os.PathLike, **options: object) -> None:
    path = place(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with buckets.aside(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=DPI, facecolor="white", **options)
