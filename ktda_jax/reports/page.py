"""The page: one HTML file that holds its styles, script and pictures. Whatever comes from outside is escaped."""

import importlib.resources
import math
import time
from collections.abc import Callable, Sequence
from html import escape

from ktda_jax.config.workdir import flatten
from ktda_jax.data.addresses import masked
from ktda_jax.figures.html import document
from ktda_jax.figures.plots import LOSS_TERMS
from ktda_jax.metrics.confusion import summarize
from ktda_jax.reports import panels
from ktda_jax.reports.charts import Line, chart
from ktda_jax.reports.panels import cell, percent, swatch, table
from ktda_jax.reports.workdir import Run

SECTIONS = {  # id: heading
    "scores": "Scores", "curves": "Curves", "classes": "Classes", "trust": "Trust",
    "tiles": "Best and worst tiles",
    "features": "Teacher and student", "shares": "Class shares", "config": "Settings", "environment": "Environment",
}  # fmt: skip


def render(runs: Sequence[Run]) -> str:
    """HTML for one run, or for several side by side."""
    title = "KTDA: " + ", ".join(run.name for run in runs)
    bodies = {
        "scores": _scores(runs),
        "curves": _curves(runs),
        "classes": _classes(runs),
        "trust": _each(runs, "trust", panels.trust),
        "tiles": panels.tiles(runs),
        "features": _each(runs, "features", panels.features),
        "shares": _each(runs, "shares", panels.shares),
        "config": _config(runs),
        "environment": _environment(runs),
    }
    sections = "\n".join(
        f'<section id="{name}"><h2>{SECTIONS[name]}</h2>{body}</section>' for name, body in bodies.items()
    )
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading in SECTIONS.items())
    body = (
        f"<header><h1>{escape(title)}</h1><nav>{links}</nav></header>\n<main>\n{sections}\n</main>\n"
        f"<footer>made by python -m ktda_jax.report, {time.strftime('%Y-%m-%d %H:%M')}</footer>"
    )
    return document(title, body, style=_file("page.css"), script=_file("page.js"))


def _file(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _each(runs: Sequence[Run], section: str, make: Callable[[Run], str]) -> str:
    """A column per run: what `make` gives, or the line that says why there is nothing."""
    columns = []
    for number, run in enumerate(runs):
        head = f"<h3>{swatch(number)}{escape(run.name)}</h3>" if len(runs) > 1 else ""
        missing = run.missing.get(section)
        line = f'<p class="missing">{escape(missing)}</p>' if missing else ""
        columns.append(f'<div class="run">{head}{line}{make(run)}</div>')
    return f'<div class="runs">{"".join(columns)}</div>'


def _scores(runs: Sequence[Run]) -> str:
    names = {"mIoU": "mIoU", "aAcc": "accuracy", "mAcc": "mean accuracy", "mFscore": "mean F1"}
    rows, notes = [], []
    for number, run in enumerate(runs):
        steps, values = run.curves.get("val/mIoU", ((), ()))
        selected = "–"
        if len(values):
            selected = f"{values.max():.2f} <small>at step {steps[values.argmax()]:,.0f}</small>"
        scores = {} if run.confusion is None else summarize(run.confusion).summary
        cells = [percent(scores.get(name, math.nan)) for name in names]
        best = cell(selected, float(values.max()) if len(values) else math.nan)
        rows.append([cell(f"{swatch(number)}{escape(run.name)}", run.name), cell(escape(run.status)), *cells, best])
        where = f"{escape(run.name)} ({escape(str(run.path.resolve()))})"
        if "scores" in run.missing:
            notes.append(f'<p class="missing">{where}: {escape(run.missing["scores"])}</p>')
        else:
            notes.append(f'<p class="note">{where}: scores of {escape(run.scored)}</p>')
    heads = ["run", "training", *(f"{text},&nbsp;%" for text in names.values()), "best val mIoU in training,&nbsp;%"]
    return table(heads, rows) + "".join(notes)


def _curves(runs: Sequence[Run]) -> str:
    """One run: its loss terms in one chart. Several: a chart per quantity, a line per run."""
    missing = "".join(
        f'<p class="missing">{escape(run.name)}: {escape(run.missing["curves"])}</p>'
        for run in runs
        if "curves" in run.missing
    )
    drawn, losses = [], [f"train/{term}" for term in LOSS_TERMS]
    if len(runs) == 1:
        found = [key for key in losses if key in runs[0].curves]
        if found:
            lines = [Line(key.removeprefix("train/"), *runs[0].curves[key], k) for k, key in enumerate(found)]
            drawn.append(chart("Loss terms", "loss", lines))
    else:
        names = ("Loss", *(f"Loss term: {term}" for term in LOSS_TERMS[1:]))
        drawn += [_shared(runs, key, name, "loss") for key, name in zip(losses, names, strict=True)]
    drawn.append(_shared(runs, "val/mIoU", "Validation mIoU", "mIoU, %", best=True))
    drawn.append(_shared(runs, "train/lr", "Learning rate", "learning rate"))
    return f'{missing}<div class="charts">{"".join(drawn)}</div>'


def _shared(runs: Sequence[Run], key: str, title: str, unit: str, best: bool = False) -> str:
    lines = [Line(run.name, *run.curves[key], k) for k, run in enumerate(runs) if key in run.curves]
    return chart(title, unit, lines, best) if lines else ""


def _classes(runs: Sequence[Run]) -> str:
    compared = ""
    scored = [(k, run) for k, run in enumerate(runs) if run.confusion is not None]
    if len(scored) > 1:
        by_run = [dict(zip(r.classes, summarize(r.confusion).per_class["IoU"], strict=True)) for _, r in scored]
        colours = {name: colour for _, r in scored for name, colour in zip(r.classes, r.palette, strict=False)}
        rows = []
        for name in dict.fromkeys(name for values in by_run for name in values):
            values = [found.get(name, math.nan) for found in by_run]
            gains = [cell(_signed(v - values[0]), v - values[0]) for v in values[1:]]
            rows.append([panels.class_cell(name, colours.get(name)), *map(percent, values), *gains])
        first = escape(scored[0][1].name)
        heads = ["class", *(f"{swatch(k)}IoU,&nbsp;%<br>{escape(r.name)}" for k, r in scored)]
        heads += [f"{escape(r.name)}<br>minus {first}" for _, r in scored[1:]]
        compared = table(heads, rows)
    return compared + _each(runs, "scores", panels.per_class)


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.2f}".replace("-", "−")


def _config(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        run = runs[0]
        missing = f'<p class="missing">{escape(run.missing["config"])}</p>' if "config" in run.missing else ""
        rows = [[cell(f"<code>{escape(k)}</code>", k), cell(_value(v))] for k, v in sorted(run.values.items())]
        if not rows:
            return missing
        return f"{missing}<details><summary>{len(rows)} settings</summary>{table(['setting', 'value'], rows)}</details>"
    return _matrix(runs, "config", [run.values for run in runs], only_different=True)


def _environment(runs: Sequence[Run]) -> str:
    return _matrix(runs, "environment", [flatten(run.environment) for run in runs])


def _matrix(runs: Sequence[Run], section: str, values: list[dict], only_different: bool = False) -> str:
    """A row per key, a column per run; rows that differ are marked, or are the only ones."""
    missing = "".join(
        f'<p class="missing">{escape(run.name)}: {escape(run.missing[section])}</p>'
        for run in runs
        if section in run.missing
    )
    rows = []
    for key in sorted({key for found in values for key in found}):
        told = [_value(found[key]) if key in found else "<i>not set</i>" for found in values]
        differ = len(set(told)) > 1
        if differ or not only_different:
            mark = ' class="differs"' if differ else ""
            rows.append([cell(f"<code{mark}>{escape(key)}</code>", key), *map(cell, told)])
    if not rows:
        return missing or '<p class="note">all settings are the same</p>'
    heads = [f"{swatch(k)}{escape(run.name)}" for k, run in enumerate(runs)] if len(runs) > 1 else ["value"]
    note = '<p class="note">only the settings that differ</p>' if only_different else ""
    return missing + note + table(["setting" if only_different else "entry", *heads], rows)


def _value(value) -> str:
    """The page is passed on: without what signs an address."""
    return "<i>None</i>" if value is None else f"<code>{escape(masked(str(value)))}</code>"
