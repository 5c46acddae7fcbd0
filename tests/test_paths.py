"""~ in every flag and every setting that is a path is the home; the shell replaces it only at a word's beginning."""

import json
import types

import numpy as np
import pytest
import runs
from PIL import Image

import ktda_jax
from ktda_jax import UserError, evaluate, export, predict, report
from ktda_jax.config import checks
from ktda_jax.config import workdir as records
from ktda_jax.config.settings import StoredTaps
from ktda_jax.data.paths import expand
from ktda_jax.data.sources import FolderSource
from ktda_jax.data.tfds_source import find_built, prepare
from ktda_jax.training import inputs, loop
from ktda_jax.training.program import build


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def train(home):
    (home / "none" / "checkpoints" / "3").mkdir(parents=True)
    records.write(home / "none", runs.settings(home, {"batch_size": 8}))
    loop.train_and_evaluate(runs.config(home), "~/none")


def predicted(home):
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(home / "scene.png")
    try:
        predict.run("~/none", "~/scene.png", "~/maps/map.png")
    finally:
        assert (home / "maps").is_dir()


def scored(home):
    for name in ("image", "label"):
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(home / f"{name}.png")
    try:
        evaluate.run("~/none", "~/image.png", "~/label.png", "~/maps")
    finally:
        assert (home / "maps").is_dir()


def exported(home):
    (home / "x.onnx").touch()
    with pytest.raises(UserError, match=f"{home}/x.onnx exists"):
        export.run("~/none", "~/x.onnx", format="stablehlo")
    export.run("~/none", "~/y", format="stablehlo")


def scenes(home):
    (home / "none").mkdir()
    prepare("grass", "~/tfds", "~/none")


def model(what: str, **other):
    return lambda home: build(runs.settings(home, {f"weights.{what}": "~/none", **other}))


# What is said of ~/none, by the flag or setting that it was given for.
REFUSED = {
    "main --workdir": (train, "checkpoint HOME/none/checkpoints/3 is damaged"),
    "main --mode=eval --workdir": (lambda home: loop.evaluate_workdir(runs.config(home), "~/none"), "in HOME/none;"),
    "predict --checkpoint --input --output": (predicted, "no file or folder HOME/none"),
    "evaluate --checkpoint --images --labels --output": (scored, "no file or folder HOME/none"),
    "export --checkpoint --output": (exported, "no file or folder HOME/none"),
    "report --workdir": (lambda home: report.run(["~/none"]), "--workdir=HOME/none is no folder"),
    "load_pretrained": (lambda home: ktda_jax.load_pretrained("~/none"), "no file or folder HOME/none"),
    "config.data.root": (lambda home: FolderSource("~/none", "train", num_classes=5), "HOME/none/img_dir"),
    "config.data.root of tfds": (lambda home: find_built("grass", "~/none"), "in HOME/none/grass"),
    "config.data.manual_dir": (scenes, "is empty"),
    "config.weights.student": (model("student"), "config.weights.student: no file or folder HOME/none"),
    "config.weights.teacher": (model("teacher"), "config.weights.teacher: no file or folder HOME/none"),
    "config.weights.model": (model("model"), "config.weights.model: no file or folder HOME/none"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_there_is_looked_for_at_home(name, home, tmp_path):
    act, message = REFUSED[name]
    with pytest.raises(UserError, match=message.replace("HOME", str(home))):
        act(home)
    assert not list(tmp_path.glob("~*"))


def test_what_is_written_is_written_there(home, tmp_path, monkeypatch):
    assert inputs.features_folder(StoredTaps("precomputed", "~/f", "bfloat16", None), None) == home / "f"
    assert checks.check_output("~/a/b.json", "output") == home / "a" / "b.json" and (home / "a").is_dir()
    assert checks.check_output("~/trace", "trace", folder=True) == home / "trace" and (home / "trace").is_dir()
    for name in ("run", "other"):
        (home / name).mkdir()
        (home / name / "metrics.jsonl").write_text("")
    monkeypatch.setattr(report.flags, "FLAGS", types.SimpleNamespace(workdir=["~/run,~/other"]))
    report.run(report._workdirs(), "~/pages/both.html", tiles=0)
    assert (home / "pages" / "both.html").is_file()
    assert not list(tmp_path.glob("~*"))


def test_the_flags_of_real_commands(home, tmp_path):
    """Those that are read in no function above: a config at home, inspect's and the benchmark's outputs, convert's."""
    (home / "c.py").write_text((runs.REPOSITORY / "configs" / "grass.py").read_text())
    runs.make_tiles(home / "tiles")
    flags = runs.arguments("~/tiles", None)
    flags[0] = "--config=~/c.py:tiny"
    at_home = {"HOME": str(home)}
    runs.finish(runs.start(*flags, "--output=~/seen", verb="inspect", **at_home))
    assert json.loads((home / "seen" / "inspection.json").read_text())["splits"]["train"]["tiles"] == 6
    runs.finish(runs.start("--machine", "--output=~/speed.json", verb="benchmark", **at_home))
    assert (home / "speed.json").is_file()
    failed = runs.start("--input=~/none", "--output=~/w", verb="convert", **at_home)
    assert failed.communicate()[1].startswith(f"error: no file or folder {home}/none")
    assert not (runs.REPOSITORY / "~").exists()


def test_a_home_that_is_not_there_is_one_line():
    with pytest.raises(UserError, match="^~nosuchuser/x: "):
        expand("~nosuchuser/x")
