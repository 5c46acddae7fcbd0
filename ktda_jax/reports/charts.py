"""Line charts as inline SVG: colours come from the page's style sheet, so that they follow light and dark."""

import dataclasses
import json
import math
from collections.abc import Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 440, 250
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 14, 42  # room for the ticks and the axes' names
POINTS = 400  # of one line; longer ones become means of neighbours, or with `best` their highest values
COLOURS = 8  # that the style sheet has


@dataclasses.dataclass(frozen=True)
class Line:
    name: str
    steps: np.ndarray
    values: np.ndarray
    colour: int


def chart(title: str, unit: str, lines: Sequence[Line], best: bool = False) -> str:
    """A figure with a legend that gives each line's last value, or with `best` its highest; log scale where it helps.

    The page's script shows the values at the pointer, or by the arrow keys, from `data-lines`.
    """
    drawn = [_thinned(line, best) for line in lines]
    values, steps = (np.concatenate([getattr(line, name) for line in drawn]) for name in ("values", "steps"))
    log = unit == "loss" and values.min() > 0 and values.max() > 20 * values.min()
    first, last = float(steps.min()), max(float(steps.max()), float(steps.min()) + 1)
    ticks, low, high = _log_ticks(values) if log else _ticks(float(values.min()), float(values.max()))

    def x(step):
        return LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value):
        place = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return HEIGHT - BOTTOM - place * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks:
        at = f"{y(tick):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    for tick in _ticks(first, last, whole=True)[0]:
        if first <= tick <= last:
            where = f'x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}"'
            parts.append(f'<text class="tick" {where} text-anchor="middle">{tick:,.0f}</text>')
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>'
    )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text class="axis" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{escape(unit)}'
        f"{', log scale' if log else ''}</text>"
    )
    legend, told = [], []
    for line, thin in zip(lines, drawn, strict=True):
        points = [(x(s), y(v)) for s, v in zip(thin.steps, thin.values, strict=True)]
        colour = f"c{line.colour % COLOURS}"
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline class="line {colour}" points="{path}"/>')
        if len(points) < 15:
            parts += [f'<circle class="dot {colour}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>' for a, b in points]
        index = int(line.values.argmax()) if best else len(line.values) - 1
        what = "best" if best else "last"
        legend.append(
            f'<li><i class="swatch {colour}"></i>{escape(line.name)} <b>{_number(line.values[index])}</b> '
            f"<small>{what}, step {line.steps[index]:,.0f}</small></li>"
        )
        told.append({
            "name": line.name,
            "steps": [round(float(s)) for s in thin.steps],
            "values": [float(f"{v:.5g}") for v in thin.values],
        })  # fmt: skip
    area = {"first": first, "last": last, "left": LEFT, "right": WIDTH - RIGHT, "width": WIDTH}
    data = escape(json.dumps({**area, "lines": told}), quote=True)
    note = ""
    if any(len(thin.steps) < len(line.steps) for line, thin in zip(lines, drawn, strict=True)):
        note = f" <small>{'highest' if best else 'means'} of neighbouring values</small>"
    label = f"{escape(title)} over steps; the arrow keys go through the values"
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{note}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" tabindex="0" aria-label="{label}" data-lines="{data}">'
        f'{"".join(parts)}<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/>'
        f'</svg><ul class="legend">{"".join(legend)}</ul><p class="readout" aria-live="polite"></p></figure>'
    )


def _thinned(line: Line, best: bool) -> Line:
    group = -(-len(line.steps) // POINTS)
    if group == 1:
        return line
    starts = np.arange(0, len(line.steps), group)
    if best:
        kept = [start + int(line.values[start : start + group].argmax()) for start in starts]
        return dataclasses.replace(line, steps=line.steps[kept], values=line.values[kept])
    sizes = np.diff(np.append(starts, len(line.steps)))
    steps, values = (np.add.reduceat(x, starts) / sizes for x in (line.steps, line.values))
    return dataclasses.replace(line, steps=steps, values=values)


def _ticks(low: float, high: float, whole: bool = False) -> tuple[list[float], float, float]:
    """About five round numbers that enclose low..high, and the first and last of them."""
    if high <= low:
        spread = abs(low) * 0.1 or 1.0
        low, high = low - spread, high + spread
    raw = (high - low) / 4
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [k * step for k in range(start, stop + 1)]
    return ticks, ticks[0], ticks[-1]


def _log_ticks(values: np.ndarray) -> tuple[list[float], float, float]:
    """Powers of ten, with 2 and 5 between them where there are few."""
    low, high = float(values.min()), float(values.max())
    digits = (1, 2, 5) if high < 1000 * low else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [d * 10.0**p for p in powers for d in digits]
    below, above = [t for t in ticks if t <= low], [t for t in ticks if t >= high]
    first, last = max(below, default=low), min(above, default=high)
    return [t for t in ticks if first <= t <= last], first, last


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
