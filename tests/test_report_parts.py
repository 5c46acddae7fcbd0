"""Parts of the report that need no run: charts, the size of its pictures, the colours of feature maps."""

import dataclasses
import html
import json
import pathlib
import re

import numpy as np
import pytest
import runs

from ktda_jax.reports import charts, features, page, panels
from ktda_jax.reports.tiles import Tile
from ktda_jax.reports.workdir import Run


def test_ticks_enclose_the_values():
    for low, high in ((0, 1), (37.2, 58.04), (1e-6, 2e-3), (5, 5), (-3, 8)):
        ticks, first, last = charts._ticks(low, high)
        assert first <= low <= high <= last and 2 <= len(ticks) <= 7
    ticks, first, last = charts._log_ticks(np.array([0.09, 2.4]))
    assert first <= 0.09 and last >= 2.4 and 0.5 in [round(t, 6) for t in ticks]


def drawn(text: str) -> dict:
    (line,) = json.loads(html.unescape(re.search('data-lines="([^"]+)"', text)[1]))["lines"]
    assert len(line["steps"]) == len(line["values"]) <= charts.POINTS
    return dict(zip(line["steps"], line["values"], strict=True))


def test_a_long_line_is_thinned():
    values = np.linspace(0, 50, 1000)
    values[501] = 99
    line = charts.Line("x", np.arange(1000.0), values, 0)
    means, highest = (charts.chart("title", "%", [line], best) for best in (False, True))
    assert "<b>50</b> <small>last, step 999<" in means and "means of neighbouring values" in means
    assert np.mean(list(drawn(means).values())) == pytest.approx(values.mean(), rel=1e-2)
    assert "<b>99</b> <small>best, step 501<" in highest and drawn(highest)[501] == 99
    short = charts.chart("title", "%", [charts.Line("x", line.steps[:9], values[:9], 0)])
    assert "neighbouring" not in short and len(drawn(short)) == 9


def test_many_large_tiles_stay_below_ten_megabytes():
    """Noise, which no format makes smaller."""
    rng, size = np.random.default_rng(0), (600, 600)
    label, image = rng.integers(0, 5, size).astype(np.uint8), rng.integers(0, 256, (*size, 3)).astype(np.uint8)
    tile = Tile("noise", 0, image, label, label[::-1], 20.0, 10.0)
    settings = runs.settings(pathlib.Path("unused"))
    palette = ((0, 0, 0), (50, 0, 0), (0, 50, 0), (0, 0, 50), (9, 9, 9))
    run = Run(pathlib.Path("x"), "x", settings, classes=tuple("abcde"), palette=palette, split="val")
    run.worst = run.best = [tile] * 4
    assert panels._side([run]) == 512
    assert 1e6 < panels.PICTURES / 4 * len(panels._tile([(run, tile)], False, 512)) < 1e7
    followers = [dataclasses.replace(run, followed="x")] * 5
    assert (4 + 5 * 2) * 8 * panels._side([run, *followers]) ** 2 <= panels.PICTURES * 512**2


def test_teacher_and_student_have_the_same_colours():
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(16, 16)))[0]
    weights = rng.normal(size=(5, 6, 16)) * np.array([9, 3, 1] + [0.01] * 13)
    teacher = (weights @ directions.T).astype(np.float32)
    ((level,),) = features._levels([[(teacher, teacher)]])
    np.testing.assert_array_equal(level.teacher, level.student)
    assert level.cosine == pytest.approx(1)
    for channel in range(3):  # each colour is one direction, up to its sign
        assert abs(np.corrcoef(level.teacher[..., channel].ravel(), weights[..., channel].ravel())[0, 1]) > 0.99
    ((level,),) = features._levels([[(teacher, 0 * teacher)]])
    assert len(np.unique(level.student.reshape(-1, 3), axis=0)) == 1 and len(np.unique(level.teacher)) > 20


def test_settings_are_shown_without_what_signs_an_address():
    values = {
        "data.unlabelled": "https://h/a.tif?sig=SECRET",
        "data.unlabelled_val": "https://me:SECRET@h/b.tif",
        "x": "what?",
    }
    one = Run(pathlib.Path("x"), "x", runs.settings(pathlib.Path("unused")), values=values)
    for found in ([one], [one, dataclasses.replace(one, values={})]):
        text = page._config(found)
        assert (
            "https://h/a.tif?***" in text and "https://***@h/b.tif" in text and "what?" in text and "SECRET" not in text
        )
