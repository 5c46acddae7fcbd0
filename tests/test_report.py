"""`python -m ktda_jax.report`: the page says what was computed, escapes all, asks no network, works in a browser."""

import html.parser
import io
import json
import os
import re
import shutil

import numpy as np
import pytest
import runs

import ktda_jax
from ktda_jax import UserError, extract, report
from ktda_jax.config import workdir as records
from ktda_jax.config.settings import Settings
from ktda_jax.data.check import check_split
from ktda_jax.data.sources import FolderSource
from ktda_jax.reports import features, page, panels
from ktda_jax.reports.gather import gather
from ktda_jax.reports.page import render
from ktda_jax.reports.trained import load
from ktda_jax.training import loop
from ktda_jax.training.checkpoint import Checkpoints
from ktda_jax.training.inputs import open_source
from ktda_jax.training.program import build
from ktda_jax.training.writers import Writer

EVIL = '<script>alert("1")</script>&'
NAMES = (f"low {EVIL}", "b", "c", "d", "e")
SETTINGS = {
    "data.classes": NAMES,
    "data.palette": ((185, 101, 71), (248, 202, 155), (211, 232, 158), (138, 191, 104), (92, 144, 77)),
    "total_steps": 4,
    "eval_every": 2,
    "model.student.depths": (0, 0, 0, 0),
    "mesh.data": 1,
    "data.on_corrupt": "skip",
}
KEEP = 2


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    root = runs.make_tiles(tmp_path_factory.mktemp("tiles"), train=4, val=6)
    label = np.full((72, 72), 255)
    label[:30] = 3
    runs.write_tile(root, "val", 'x<b>&"', label[..., None] * np.ones(3), label)
    runs.write_tile(root, "train", "t9", label, label)
    (root / "img_dir" / "train" / "t9.png").write_bytes(b"no picture")
    return root


def begun(path, config, score: float):
    """A workdir as training leaves it, of weights that no training made: that would take most of these tests' time."""
    path.mkdir(parents=True)
    records.write(path, Settings.of(config))
    kept = runs.random_state(build(Settings.of(config)))
    noise = np.random.default_rng(int(score))
    kept.params["decode_head/conv_seg/bias"] = noise.normal(size=runs.CLASSES).astype(np.float32)
    with Checkpoints(path / "checkpoints") as checkpoints:
        checkpoints.save(4, kept, {}, {"mIoU": score})
    with Writer(path, total_steps=4, stream=io.StringIO()) as writer:
        for step in range(1, 5):
            terms = {"loss": 4.0 / step, "decode": 2.0 / step, "aux": 1.0 / step, "distill": 0.1, "lr": 1e-3 * step}
            writer.write(step, {f"train/{k}": v for k, v in terms.items()})
        writer.write(4, {"val/mIoU": score})
    return path


@pytest.fixture(scope="module")
def trained(tiles, tmp_path_factory):
    """A finished one, evaluated by training's own code."""
    config = runs.config(tiles, SETTINGS)
    path = begun(tmp_path_factory.mktemp("runs") / "first", config, 12.5)
    loop.evaluate_workdir(config, path)
    records.write_run(
        path, Settings.of(config), {"val": check_split(open_source(Settings.of(config).data, "val")).fingerprint}
    )
    return path


@pytest.fixture(scope="module")
def other(trained, tiles):
    """Another one, still in training: the same tiles in other bands, another setting and other weights; no figures."""
    config = runs.config(tiles, {**SETTINGS, "data.bands": (3, 2, 1), "loss.alpha": 0.25, "total_steps": 100})
    path = begun(trained.with_name("second & co"), config, 30.0)
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "tra')
    return path


@pytest.fixture(scope="module")
def found(trained, other):
    """Both, gathered once."""
    return gather([trained, other], root=None, keep=KEEP, say=lambda text: None)


class Page(html.parser.HTMLParser):
    """Fails where tags do not match; collects elements by tag."""

    EMPTY = ("meta", "link", "img", "input", "br", "!doctype")

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.text = [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["script"], ["style"]):
            self.text += data + " "

    def all(self, tag, **wanted):
        return [a for t, a in self.elements if t == tag and all(a.get(k) == v for k, v in wanted.items())]


def test_the_page_of_one_run_has_all_parts_and_no_resource_outside(found):
    text = render([found[0]])
    parsed = Page(text)
    assert [a["id"] for a in parsed.all("section")] == list(page.SECTIONS)
    assert len(parsed.all("svg")) == 3 and "log scale" in text
    assert len(parsed.all("polyline")) == 4 + 1 + 1  # loss terms, mIoU, learning rate
    assert len(parsed.all("figure", **{"class": "tile"})) == 2 * KEEP
    for layer in panels.LAYERS:
        assert len(parsed.all("div", **{"class": "panel", "data-layer": layer})) == 2 * KEEP
    assert len(parsed.all("img", **{"class": "map"})) == 3 * 2 * 4  # tiles, teacher and student, levels
    assert len(parsed.all("table", **{"class": "confusion"})) == 1
    assert not parsed.all("p", **{"class": "missing"})
    for tag, attributes in parsed.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "srcset", "action", "data"):
                assert value.startswith(("data:", "#")), (tag, name, value[:80])
    assert "url(" not in text and "@import" not in text
    assert len(parsed.all("script")) == 1 and not parsed.all("b", **{"class": "x"})
    assert parsed.text.count(EVIL) > 5 and 'x<b>&"' in parsed.text + "".join(
        a.get("alt", "") for a in parsed.all("img")
    )
    assert len(text) < 1e6


def test_the_scores_are_those_of_training_and_the_tiles_the_worst(found, trained, tiles):
    run = found[0]
    assert run.confusion.tolist() == json.loads((trained / "figures" / "val.json").read_text())["confusion"]
    model, right = ktda_jax.load_pretrained(trained), {}
    for tile in FolderSource(tiles, "val", num_classes=runs.CLASSES):
        resized = tile["image"][4:-4, 4:-4]  # of the crop's size; accuracies differ by more than this changes
        predicted = model.predict(resized).labels
        label = tile["label"][4:-4, 4:-4]
        right[tile["name"]] = 100 * (predicted == label)[label != 255].mean()
    ordered = [tile.accuracy for tile in run.worst] + [tile.accuracy for tile in run.best[::-1]]
    assert ordered == sorted(ordered) and len({tile.name for tile in run.worst + run.best}) == 2 * KEEP
    for tile in run.worst + run.best:
        assert tile.accuracy == pytest.approx(right[tile.name], abs=8)
        counted = tile.label != 255
        assert tile.accuracy == pytest.approx(100 * (tile.prediction == tile.label)[counted].mean())
    shares = run.shares["train"]  # without the one that cannot be read
    assert shares.predicted == shares.tiles == 4 and shares.predictions.sum() == shares.labels.sum() == 4 * 72 * 72
    assert run.shares["val"].ignored == 42 * 72


def test_two_runs_side_by_side(found):
    parsed = Page(render(found))
    first, second = found
    assert second.followed == "first" and second.status == "not finished: step 4 of 100"
    assert [t.name for t in second.worst + second.best] == [t.name for t in first.worst + first.best]
    assert any((a.prediction != b.prediction).any() for a, b in zip(first.worst, second.worst, strict=True))
    assert len(parsed.all("figure", **{"class": "tile"})) == 2 * KEEP
    assert len(parsed.all("div", **{"class": "panel", "data-layer": "prediction"})) == 2 * 2 * KEEP
    assert len(parsed.all("div", **{"class": "panel", "data-layer": "label"})) == 2 * KEEP
    settings = page._config(found)
    assert re.findall(r'data-key="([^"]+)"', settings) == ["data.bands", "loss.alpha", "total_steps"]
    assert "second & co minus first" in " ".join(parsed.text.split())


def test_what_is_missing_is_said_in_its_place(trained, tiles, tmp_path):
    moved = tmp_path / "run"
    shutil.copytree(trained, moved)
    settings = json.loads((moved / "config.json").read_text())
    settings["data"]["root"] = str(tmp_path / "gone")
    (moved / "config.json").write_text(json.dumps(settings))
    (run,) = gather([moved], root=None, keep=KEEP)
    assert "no such directory" in run.missing["tiles"] and "--root=... says where" in run.missing["tiles"]
    assert run.scored == "figures/val.json" and run.curves and "scores" not in run.missing
    text = render([run])
    assert Page(text).all("table", **{"class": "confusion"}) and not Page(text).all("figure", **{"class": "tile"})
    assert text.count("no such directory") == 3

    for impossible in (-1, 10**30):
        values = {"classes": NAMES, "confusion": [[impossible] * 5] * 5}
        (moved / "figures" / "val.json").write_text(json.dumps(values))
        (run,) = gather([moved], root=None, keep=0)
        assert "val.json cannot be used: " in run.missing["scores"] and run.confusion is None

    shutil.rmtree(moved / "checkpoints")
    shutil.rmtree(moved / "figures")
    (run,) = gather([moved], root=str(tiles), keep=KEEP)
    assert run.missing["tiles"] == "no checkpoint in the workdir yet" and "not evaluated yet" in run.missing["scores"]
    Page(render([run]))
    assert not (moved / "checkpoints").exists()
    (run,) = gather([moved], root=None, keep=0)
    assert run.missing["shares"] == "left out by --tiles=0"

    (moved / "config.json").write_text('{"seed": 1, "data": {}}')
    (moved / "run.json").write_text("{")
    (moved / "metrics.jsonl").write_text("")
    (run,) = gather([moved], root=None, keep=KEEP)
    assert "written by another version" in run.missing["config"] and "no values yet" in run.missing["curves"]
    Page(render([run, run]))


def test_what_is_no_workdir_is_an_error(tmp_path, trained):
    with pytest.raises(UserError, match="is no folder; give the folder of a training"):
        report.run([str(tmp_path / "none")])
    with pytest.raises(UserError, match="is no workdir: neither config.json nor metrics.jsonl is in it"):
        report.run([str(tmp_path)], str(tmp_path / "new" / "r.html"))
    with pytest.raises(UserError, match="is a folder; give a file"):
        report.run([str(trained)], str(tmp_path))
    with pytest.raises(UserError, match="cannot write to --output=/proc/x/r.html: "):
        report.run([str(trained)], "/proc/x/r.html")
    assert not list(tmp_path.iterdir())


def test_the_command(trained, tmp_path):
    process = runs.start("--workdir=/none", verb="report")
    out, err = process.communicate()
    assert (process.returncode, out) == (
        1,
        "",
    ) and err == "error: --workdir=/none is no folder; give the folder of a training\n"
    strange = tmp_path / os.fsdecode(b"a, b\xff")  # a comma, and no UTF-8; the same one twice is one
    strange.mkdir()
    shutil.copy(trained / "metrics.jsonl", strange)
    out, _ = runs.finish(runs.start(f"--workdir={strange}", f"--workdir={strange}/", "--tiles=0", verb="report"))
    assert out.startswith(f"{tmp_path}/a, b?/report.html, 0.")
    assert "KTDA: a, b?" in Page((strange / "report.html").read_text()).text
    assert {path.name for path in strange.iterdir()} == {"metrics.jsonl", "report.html"}


@pytest.mark.slow  # compiles the teacher, too
def test_precomputed_features_are_those_on_disk(trained, tmp_path):
    """They are the training split's; of tiles as large as the crop, which the teacher also sees when it is run."""
    small, run = runs.make_tiles(tmp_path / "tiles", train=3, val=2, size=64), tmp_path / "run"
    settings = {**SETTINGS, "teacher.mode": "precomputed", "teacher.features": str(tmp_path / "features")}
    config = runs.config(small, settings)
    shutil.copytree(trained, run)
    records.write(run, Settings.of(config))
    extract.run(config)
    (found,) = gather([run], root=None, keep=1)
    assert "not the tiles that training scored" in found.scored  # its run.json speaks of others
    assert found.features.names == ["t0", "t1", "t2"] and "precomputed, made by a random" in found.features.teacher
    computed = features.computed(
        load(run, Settings.of(config)), None, config.seed, found.features.names, found.features.images
    )
    for ours, theirs in zip(computed.levels, found.features.levels, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.cosine == pytest.approx(b.cosine, abs=1e-3)
            assert np.abs(a.student.astype(int) - b.student).mean() < 8  # bfloat16
    shutil.rmtree(tmp_path / "features")
    (without,) = gather([run], root=None, keep=1)
    assert "no teacher features in" in without.missing["features"] and without.features is None


@pytest.fixture(scope="module")
def chromium():
    needed = "needs a browser: pip install playwright, then playwright install chromium or apt-get install chromium"
    playwright = pytest.importorskip("playwright.sync_api", reason=needed)
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as driver:
        try:
            browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except playwright.Error:
            pytest.skip(needed)
        yield browser
        browser.close()


@pytest.mark.parametrize("count", [1, 2])
def test_in_a_browser(chromium, found, tmp_path, count):
    path = tmp_path / "report.html"
    path.write_text(render(found[:count]), encoding="utf-8")
    context = chromium.new_context(offline=True, viewport={"width": 390, "height": 800})
    tab, said, asked = context.new_page(), [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("dialog", lambda dialog: (said.append("dialog"), dialog.dismiss()))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(path.as_uri())
    assert not said and [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    broken = "[...document.images].filter(picture => picture.complete && !picture.naturalWidth).length"
    assert tab.evaluate(broken) == 0 and tab.evaluate("document.images.length") > 8
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390  # wide tables scroll by themselves

    table = tab.locator("#classes table.sortable").last
    head, names = table.locator("th button").nth(2), table.locator("tbody td:nth-child(3)")
    for order, wanted in (("descending", True), ("ascending", False)):
        head.click()
        assert table.locator("th").nth(2).get_attribute("aria-sort") == order
        values = [float(text) for text in names.all_inner_texts() if text != "–"]
        assert len(values) > 1 and values == sorted(values, reverse=wanted)

    for layer in panels.LAYERS:
        shown = tab.locator(f'.panel[data-layer="{layer}"]').first
        assert shown.is_visible()
        tab.locator(f'input[data-layer="{layer}"]').uncheck()
        assert not shown.is_visible()
        tab.locator(f'input[data-layer="{layer}"]').check()
    truth = tab.locator(".panel .truth").first
    assert not truth.is_visible()
    tab.locator("input[data-blink]").check()
    assert truth.is_visible()
    truth.wait_for(state="hidden")  # by itself, after less than a second
    tab.locator("input[data-blink]").uncheck()
    tab.locator("input[data-opacity]").fill("40")
    top = tab.locator('.panel[data-layer="label"] .top').first
    assert top.evaluate("element => getComputedStyle(element).opacity") == "0.4"
    chart, readout = tab.locator("svg").first, tab.locator(".readout").first
    for key, step in (("ArrowLeft", 4), ("ArrowLeft", 3), ("ArrowRight", 4), ("ArrowRight", 4)):
        chart.press(key)
        assert readout.inner_text().startswith(f"step {step}: ")
    chart.blur()
    assert not readout.inner_text()
    chart.hover()
    assert readout.inner_text().startswith("step ")
    context.close()
