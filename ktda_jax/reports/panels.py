"""Pieces of the page: sortable tables, the confusion matrix, tiles with their layers, feature maps, class shares."""

import math
from collections.abc import Sequence
from html import escape

from ktda_jax.metrics.confusion import summarize
from ktda_jax.reports import charts, pictures
from ktda_jax.reports.features import Level
from ktda_jax.reports.tiles import Tile, shown
from ktda_jax.reports.workdir import Run

LAYERS = ("image", "label", "prediction", "error")
PICTURES = 32  # at full size: more become smaller, so that the page stays below about 10 MB


def cell(content: str, key: float | str | None = None, style: str = "") -> str:
    """A table's cell: HTML, and what to sort by where that is not its text."""
    if isinstance(key, float):
        key = "" if math.isnan(key) else f"{key:.6g}"
    sort = f' data-key="{escape(key, quote=True)}"' if key is not None else ""
    return f"<td{sort}{style}>{content}</td>"


def percent(value: float) -> str:
    """A cell with a bar behind the number."""
    value = float(value)
    if math.isnan(value):
        return cell("–", value)
    return cell(f"{value:.2f}", value, f' class="bar" style="--v:{value:.1f}%"')


def swatch(number: int) -> str:
    """The colour of a run."""
    return f'<i class="swatch c{number % charts.COLOURS}"></i>'


def class_cell(name: str, colour: tuple[int, int, int] | None) -> str:
    return cell(_class(name, colour), name)


def _class(name: str, colour) -> str:
    chip = f'<i class="chip" style="background:rgb({",".join(str(int(v)) for v in colour)})"></i>' if colour else ""
    return f"{chip}{escape(name)}"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], foot: Sequence[str] = ()) -> str:
    """Sorts by a click on a head; heads are HTML, rows of cells."""
    head = "".join(f'<th scope="col"><button type="button">{text}</button></th>' for text in heads)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    last = f"<tfoot><tr>{''.join(foot)}</tr></tfoot>" if foot else ""
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody>{last}</table></div>"
    )


def _palette(run: Run) -> list:
    return list(run.palette) or [None] * len(run.classes)


def per_class(run: Run) -> str:
    """The table of scores, and the confusion matrix."""
    if run.confusion is None:
        return ""
    metrics = summarize(run.confusion)
    labelled = run.confusion.sum(1)
    names = {"IoU": "IoU", "Acc": "accuracy", "Precision": "precision", "Fscore": "F1"}
    rows = []
    for index, (name, colour) in enumerate(zip(run.classes, _palette(run), strict=True)):
        scores = [percent(metrics.per_class[score][index]) for score in names]
        rows.append([class_cell(name, colour), percent(_share(labelled[index], labelled.sum())), *scores])
    foot = [cell("mean"), cell(""), *(percent(metrics.summary[f"m{score}"]) for score in names)]
    heads = ["class", "share of labels,&nbsp;%", *(f"{text},&nbsp;%" for text in names.values())]
    return table(heads, rows, foot) + confusion(run)


def trust(run: Run) -> str:
    """How sure the last evaluation is, how far its probabilities can be believed, and its diagrams."""
    if not run.trust:
        return '<p class="missing">not measured: --mode=eval does it</p>' if run.confusion is not None else ""
    (low, high), calibration = run.trust.get("interval", (None, None)), run.trust.get("calibration", {})
    told = {
        "mIoU in 95 % of draws of the tiles": f"{_number(low)} to {_number(high)}",
        "mIoU of boundaries": _number(run.trust.get("boundary_miou")),
        "calibration error, %": _number(calibration.get("error")),
        "… with the temperature of the other half of the tiles": _number(calibration.get("error_with_temperature")),
        "temperature": _number(calibration.get("temperature")),
    }
    rows = [[cell(escape(name), name), cell(value)] for name, value in told.items()]
    shown = []
    for name in ("reliability", "precision_recall"):
        path = run.path / "figures" / f"{run.split}_{name}.png"
        if path.is_file():
            shown.append(f'<img class="figure" alt="{name.replace("_", " and ")}" src="{pictures.file(path)}">')
    return table(["entry", "value"], rows) + "".join(shown)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _share(part: float, whole: float) -> float:
    return 100 * float(part) / float(whole) if whole else math.nan


def confusion(run: Run) -> str:
    """Rows are labels: the share of each that was predicted as what, and the pixels beneath."""
    chips = [_class(name, colour) for name, colour in zip(run.classes, _palette(run), strict=True)]
    head = "".join(f'<th scope="col">{chip}</th>' for chip in chips)
    rows = []
    for index, chip in enumerate(chips):
        counts, cells = run.confusion[index], []
        for column, count in enumerate(counts):
            share = _share(count, counts.sum())
            told = "–" if math.isnan(share) else f"{share:.1f} %"
            kind = ' class="right"' if column == index else ""
            heat = 0 if math.isnan(share) else share
            cells.append(f'<td{kind} style="--share:{heat:.1f}%">{told}<small>{int(count):,}</small></td>')
        rows.append(f'<tr><th scope="row">{chip}</th>{"".join(cells)}</tr>')
    return (
        '<h4>Confusion matrix</h4><p class="note">rows: label; columns: prediction; percent of the row, pixels</p>'
        f'<div class="scroll"><table class="confusion"><thead><tr><th class="corner">label ↓ predicted →</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def tiles(runs: Sequence[Run]) -> str:
    """The tiles that a leading run chose, with the predictions of all runs on the same tiles."""
    parts = [
        f'<p class="missing">{escape(run.name)}: {escape(run.missing["tiles"])}</p>'
        for run in runs
        if "tiles" in run.missing
    ]
    leaders = [run for run in runs if run.worst and not run.followed]
    if not leaders:
        return "".join(parts)
    boxes = "".join(f'<label><input type="checkbox" data-layer="{layer}" checked> {layer}</label>' for layer in LAYERS)
    parts.append(
        f'<fieldset class="controls"><legend>layers</legend>{boxes}'
        '<label><input type="checkbox" data-blink> blink label in prediction</label>'
        '<label>classes over image <input type="range" data-opacity min="0" max="100" value="100"></label></fieldset>'
    )
    side = _side(runs)
    for leader in leaders:
        members = [run for run in runs if run is leader or run.followed == leader.name]
        keys = "".join(f"<li>{_class(n, c)}</li>" for n, c in zip(leader.classes, leader.palette, strict=True))
        keys += '<li><i class="chip ignored"></i>ignored</li><li><i class="chip wrong"></i>wrong class</li>'
        parts.append(f'<ul class="key">{keys}</ul>')
        for group in ("worst", "best"):
            if getattr(leader, group):
                of = f" for {escape(leader.name)}" if len(runs) > 1 else ""
                parts.append(f"<h3>{group.capitalize()}{of}, by share of right pixels ({escape(leader.split)})</h3>")
            for index in range(len(getattr(leader, group))):
                parts.append(_tile([(run, getattr(run, group)[index]) for run in members], len(runs) > 1, side))
    return "".join(parts)


def _side(runs: Sequence[Run]) -> int:
    """Pixels of a picture at most. A leader's tile has four of them, a follower's two more."""
    count = sum((2 if run.followed else 4) * len(run.worst + run.best) for run in runs)
    return int(pictures.SIDE * math.sqrt(min(1.0, PICTURES / count)))


def _tile(found: list[tuple[Run, Tile]], several: bool, side: int) -> str:
    leader, first = found[0]
    image, name = shown(first, leader.settings.data.rgb_positions), escape(first.name, quote=True)
    pieces = [
        _panel("image", "image", pictures.photo(image, side), name),
        _panel("label", "label", pictures.classes(first.label, leader.palette, side), name),
    ]
    for run, tile in found:
        of = f", {escape(run.name)}" if several else ""
        scores = f"{tile.accuracy:.1f} % right, mIoU {tile.miou:.1f}" if not math.isnan(tile.miou) else ""
        painted = pictures.classes(tile.prediction, run.palette, side)
        wrong = pictures.errors(image, tile.label, tile.prediction, side)
        pieces.append(_panel("prediction", f"prediction{of}", painted, name))
        pieces.append(_panel("error", f"error{of}: {scores}", wrong, name))
    return f'<figure class="tile"><figcaption>{name}</figcaption><div class="panels">{"".join(pieces)}</div></figure>'


def _panel(layer: str, caption: str, uri: str, name: str) -> str:
    return (
        f'<div class="panel" data-layer="{layer}"><div class="frame"><img class="top" alt="{layer} of {name}" '
        f'src="{uri}"></div><span>{caption}</span></div>'
    )


def features(run: Run) -> str:
    if run.features is None:
        return ""
    maps, rows = run.features, []
    heads = "".join(f'<th scope="col">level {k + 1}</th>' for k in range(len(maps.levels[0])))
    rgb = list(run.settings.data.rgb_positions)
    for name, image, levels in zip(maps.names, maps.images, maps.levels, strict=True):
        uri = pictures.photo(image[..., rgb], 256)
        picture = f'<img class="photo" alt="image of {escape(name, quote=True)}" src="{uri}">'
        teacher = "".join(f"<td>{_map(level, 'teacher')}</td>" for level in levels)
        student = "".join(
            f"<td>{_map(level, 'student')}<small>cosine {level.cosine:.2f}</small></td>" for level in levels
        )
        rows.append(
            f'<tr><td rowspan="2">{picture}<small>{escape(name)}</small></td><th scope="row">teacher</th>{teacher}</tr>'
            f'<tr><th scope="row">student</th>{student}</tr>'
        )
    return (
        f'<p class="note">teacher: {escape(maps.teacher)}. Red, green and blue are the three main directions of the '
        "teacher's features, the same for both; cosine: mean over the patches</p>"
        f'<div class="scroll"><table class="maps"><thead><tr><th>tile</th><th></th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _map(level: Level, which: str) -> str:
    return f'<img class="map" alt="{which}" src="{pictures.pixels(getattr(level, which))}">'


def shares(run: Run) -> str:
    """Per split, what part of the pixels is labelled with a class, and what part predicted."""
    if not run.shares:
        return ""
    heads, notes = ["class"], []
    for split, found in run.shares.items():
        heads += [f"{escape(split)}<br>labels,&nbsp;%", f"{escape(split)}<br>predictions,&nbsp;%"]
        told = "all" if found.predicted == found.tiles else f"{found.predicted:,} evenly spread"
        pixels = found.labels.sum() + found.ignored
        notes.append(
            f"{escape(split)}: {found.tiles:,} tiles, {_share(found.ignored, pixels):.2f} % of the pixels ignored; "
            f"predictions of {told}, where there are labels"
        )
    rows = []
    for index, (name, colour) in enumerate(zip(run.classes, _palette(run), strict=True)):
        cells = [class_cell(name, colour)]
        for found in run.shares.values():
            cells += [percent(_share(part[index], part.sum())) for part in (found.labels, found.predictions)]
        rows.append(cells)
    return table(heads, rows) + "".join(f'<p class="note">{note}</p>' for note in notes)
