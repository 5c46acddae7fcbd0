"""A map as one HTML page to look at: scene, classes, confidence, the legend with areas. It needs no network."""

import dataclasses
import importlib.resources
import json
from html import escape

import numpy as np

from ktda_jax.data.pixel_area import HECTARE, name_of
from ktda_jax.data.raster import Scene
from ktda_jax.figures.html import document
from ktda_jax.prediction import pyramid
from ktda_jax.prediction.pyramid import Layers
from ktda_jax.prediction.tally import Tally
from ktda_jax.tiling.blend import NODATA

SIDE = 4096  # pixels of the finest level at most
LIMIT = 24_000_000  # characters of its pictures: what browsers open at once, and mail takes


@dataclasses.dataclass(frozen=True)
class View:
    scene: Scene
    layers: Layers  # every `every`-th pixel of scene and map
    tally: Tally  # of the whole map
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    checkpoint: str = ""


def render(view: View, *, limit: int = LIMIT) -> str:
    view = dataclasses.replace(view, palette=_apart(view.palette))
    levels = pyramid.levels(view.layers, view.palette, limit)
    name, finest = view.scene.path.name, levels[0]
    data = {
        "size": [view.scene.height, view.scene.width],
        "tile": pyramid.TILE,
        "levels": [dataclasses.asdict(level) for level in levels],
        "classes": view.classes,
        "palette": view.palette,
        "confidence": pyramid.confidence_colours().tolist() if "confidence" in finest.tiles else None,
        "transform": list(view.scene.place["transform"])[:6] if _has_coordinates(view.scene) else None,
    }
    body = (
        f'<main><section class="stage"><canvas id="map" tabindex="0" role="application" aria-roledescription="map" '
        f'aria-label="{escape(_in_words(view))}" aria-describedby="keys"></canvas>'
        f'<div class="zoom">{_buttons()}</div><p class="readout" role="status">&nbsp;</p></section>\n'
        f'<aside><h1>{escape(name)}</h1><p class="note">{_size(view, finest)}</p>{_controls(finest)}\n{_legend(view)}\n'
        f'<p class="note" id="keys">Drag to move; wheel or two fingers to zoom. Keys on the map: arrows, + and −, '
        f"0 for the whole scene, 1 for single pixels.</p>\n{_about(view)}</aside></main>\n"
        f"<noscript><p>This page draws its map by JavaScript, which is switched off.</p></noscript>\n"
        f'<script type="application/json" id="data">{_json(data)}</script>'
    )
    return document(f"Map of {name}", body, style=_file("view.css"), script=_file("view.js"))


def _apart(palette) -> tuple[tuple[int, int, int], ...]:
    """The page knows a class by its colour: of two of one colour the second differs by a step that nobody sees."""
    found: list[tuple[int, int, int]] = []
    for red, green, blue in (map(int, colour) for colour in palette):
        blues = sorted(range(256), key=lambda other: abs(other - blue))
        found.append(next((red, green, other) for other in blues if (red, green, other) not in found))
    return tuple(found)


def _file(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _json(data) -> str:
    """Without what would end a script."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _has_coordinates(scene: Scene) -> bool:
    return "transform" in scene.place and not scene.place["transform"].is_identity


def _buttons() -> str:
    buttons = (("in", "+", "zoom in"), ("out", "−", "zoom out"), ("fit", "⤢", "show the whole scene"))
    return "".join(
        f'<button type="button" data-zoom="{name}" aria-label="{label}" title="{label}">{sign}</button>'
        for name, sign, label in buttons
    )


def _controls(finest: pyramid.Level) -> str:
    shown = [("map", "classes"), *([("confidence", "confidence")] if "confidence" in finest.tiles else [])]
    radios = "".join(
        f'<label><input type="radio" name="layer" value="{key}"{" checked" * (key == "map")}> {text}</label>'
        for key, text in shown
    )
    choice = f'<div class="choice" role="radiogroup" aria-label="layer over the scene">{radios}</div>'
    return (
        f'<form class="controls">{choice if len(shown) > 1 else ""}<label class="slider">opacity '
        f'<input type="range" id="opacity" min="0" max="100" value="55"> <output for="opacity">55 %</output></label>'
        f"</form>"
    )


def _legend(view: View) -> str:
    pixels, squares = view.tally.pixels, view.tally.square_metres
    mapped = int(pixels[: len(view.classes)].sum())
    numbers = pixels if squares is None else squares / HECTARE
    rows = []
    for k, (name, colour) in enumerate(zip(view.classes, view.palette, strict=True)):
        share = "–"
        if mapped:
            share = f"{100 * numbers[k] / numbers[: len(view.classes)].sum():.1f}" if numbers[k] else "0"
        chip = f'<span class="chip" style="background:rgb{tuple(map(int, colour))}"></span>'
        rows.append(_row(f"{chip}{escape(name)}", _amount(numbers[k], squares), share))
    total = numbers[: len(view.classes)].sum()
    foot = _row("all classes", _amount(total, squares), "100" if mapped else "–")
    if pixels[NODATA]:
        foot += _row('<span class="chip none"></span>no data', _amount(numbers[NODATA], squares), "")
    unit = "pixels" if squares is None else "hectares"
    scale = ""
    if view.layers.confidence is not None:
        colours = ",".join(f"rgb{tuple(colour)}" for colour in pyramid.confidence_colours().tolist())
        scale = (
            '<div class="scale" hidden><p>probability of the mapped class</p>'
            f'<div style="background:linear-gradient(to right,{colours})"></div>'
            "<p><span>0</span><span>1</span></p></div>"
        )
    return (
        f'{scale}<table><caption class="hidden">Classes and their areas</caption><thead><tr><th scope="col">class</th>'
        f'<th scope="col">{unit}</th><th scope="col">%</th></tr></thead><tbody>{"".join(rows)}</tbody>'
        f'<tfoot>{foot}</tfoot></table>\n<p class="note">{_areas(view)}</p>'
    )


def _row(name: str, amount: str, share: str) -> str:
    return f'<tr><th scope="row">{name}</th><td>{amount}</td><td>{share}</td></tr>'


def _amount(value: float, squares) -> str:
    if squares is None or value >= 1000 or not value:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 0.01 else f"{value:.1g}"


def _areas(view: View) -> str:
    if view.tally.square_metres is None:
        return f"No areas, only pixels: {escape(view.tally.area.how)}."
    return f"Areas of the pixels as they were mapped, errors included; {escape(view.tally.area.how)}."


def _size(view: View, finest: pyramid.Level) -> str:
    height, width = view.scene.height, view.scene.width
    size = f"{height:,} × {width:,} pixels"
    if (finest.height, finest.width) == (height, width):
        return f"{size}, all of them shown"
    return f"{size}, shown at {finest.height:,} × {finest.width:,}: one of {width / finest.width:.3g} in each direction"


def _about(view: View) -> str:
    crs = view.scene.place.get("crs")
    facts = [("CRS", name_of(crs))] if crs else []
    facts += [("model", view.checkpoint)] if view.checkpoint else []
    lines = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts)
    return f"<dl>{lines}</dl>" if facts else ""


def _in_words(view: View) -> str:
    """What somebody who does not see the map is told."""
    pixels = view.tally.pixels[: len(view.classes)]
    order = np.argsort(-pixels, kind="stable")[:5]
    shares = [f"{view.classes[k]} {100 * pixels[k] / pixels.sum():.0f} %" for k in order if pixels[k]]
    return f"Map of {view.scene.path.name}: {', '.join(shares) or 'no data'}"
