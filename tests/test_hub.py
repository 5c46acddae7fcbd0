"""`export --format=hub`: a folder and its card, which the hub's own client downloads and we read back to the bit."""

import csv
import dataclasses
import json
import pathlib
import shutil
import tarfile

import golden
import numpy as np
import pytest
import runs
from hub_server import REVISION, hub
from huggingface_hub import ModelCard

import ktda_jax
from ktda_jax import UserError, predict
from ktda_jax.config import workdir as records
from ktda_jax.config.settings import Settings
from ktda_jax.reports import card
from ktda_jax.reports.hub import publish
from ktda_jax.training import scoring
from ktda_jax.weights import folder, loading, sources

CLASSES = ("bare|soil", "water", "<grass>", "road", "field")
SETTINGS = {
    "data.name": "mine", "data.classes": CLASSES, "data.scale": (0, 255), "data.crop": (64, 64),
    "weights.teacher": "/home/somebody/dinov2.pth",
}  # fmt: skip


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return runs.make_tiles(tmp_path_factory.mktemp("tiles"))


@pytest.fixture(scope="module")
def workdir(tiles, tmp_path_factory):
    """A finished training's, but with random weights: scored, with figures and a temperature."""
    path = tmp_path_factory.mktemp("runs") / "meadow"
    made, *_ = runs.random_workdir(tiles, path, SETTINGS | {"weights.teacher": None}, sure=30.0)
    scoring.evaluate_workdir(made, path)
    saved = json.loads((path / "config.json").read_text())
    saved["weights"]["teacher"] = SETTINGS["weights.teacher"]
    (path / "config.json").write_text(json.dumps(saved))
    run = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps(run | {"tiles": {"val": 5}}))
    return path


@pytest.fixture(scope="module")
def published(workdir, tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "meadow"
    flags = f"--checkpoint={workdir}", "--format=hub", "--license=apache-2.0", f"--output={path}"
    out, err = runs.finish(runs.start(*flags, verb="export"))
    assert f"`hf upload ORG/NAME {path}` publishes it" in out and err == ""
    return path


def scores(workdir: pathlib.Path) -> dict:
    return json.loads((workdir / "figures" / "val.json").read_text())


# The card ---------------------------------------------------------------------------------------------------------


def test_the_front_matter_is_what_the_hub_reads(published, workdir):
    data = ModelCard.load(published / "README.md").data
    assert (data.license, data.pipeline_tag, data.library_name) == ("apache-2.0", "image-segmentation", "ktda_jax")
    assert {"remote-sensing", "jax", "convnext"} <= set(data.tags) and data.metrics == ["mean_iou", "accuracy"]
    assert data.datasets is None  # of one's own: on no hub
    found = {result.metric_type: result for result in data.eval_results}
    summary = scores(workdir)["summary"]
    assert found["mean_iou"].metric_value == round(summary["mIoU"], 4)
    assert found["accuracy"].metric_value == round(summary["aAcc"], 4)
    assert {(result.dataset_name, result.dataset_split) for result in data.eval_results} == {("mine", "val")}


def test_the_card_says_what_the_workdir_knows(published, workdir):
    text, values = ModelCard.load(published / "README.md").text, scores(workdir)
    assert set(section.split("\n")[0] for section in text.split("\n## ")[1:]) == {
        "Use", "Classes", "Images", "Data", "Scores", "Probabilities", "Training", "Licence", "Citation"
    }  # fmt: skip
    colours = folder.read(published).palette
    assert f"| 0 | bare\\|soil | `#{bytes(colours[0]).hex()}` {colours[0]} |" in text and "| 2 | &lt;grass> |" in text
    fingerprint = records.fingerprint(workdir, "val")
    assert f"| val | chose the checkpoint | 5 | `{fingerprint}` |" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| water | ") and "to" in line)
    (ours,) = (r for r in csv.DictReader((workdir / "figures" / "val.csv").open()) if r["class"] == "water")
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == f"{float(ours['IoU']):.2f}" and cells[-1] == f"{int(float(ours['pixels'])):,}"
    assert cells[-2] == f"{float(ours['IoU_low']):.2f} to {float(ours['IoU_high']):.2f}"
    assert "Tiles squeezed to 64 x 64. This split chose the checkpoint, which flatters it." in text
    assert f"mIoU {values['summary']['mIoU']:.2f} %" in text and "Stretch: 0 to 255 become 0 to 255" in text
    temperature = values["calibration"]["temperature"]
    assert temperature != 1 and f"divided by the temperature {temperature:.4g}" in text
    assert "teacher from `dinov2.pth`" in text and "oquab2024dinov2" in text and "liu2022convnet" in text
    assert "/home/somebody" not in text and str(workdir.parent) not in text + (published / "model.json").read_text()


def test_scores_of_another_checkpoint_or_none_are_not_told(workdir, tmp_path):
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    values = scores(again)
    (again / "figures" / "val.json").write_text(json.dumps(values | {"step": values["step"] - 1}))
    publish(str(again), tmp_path / "other")
    made = ModelCard.load(tmp_path / "other" / "README.md")
    assert "None: this checkpoint was not evaluated" in made.text and made.data.eval_results is None
    assert made.data.license == "unknown" and "**To be filled in**" in made.text
    del values["step"], values["scale"]  # as older versions wrote it: metrics.jsonl tells the step
    (again / "figures" / "val.json").write_text(json.dumps(values))
    found = card.training(again, 6)
    assert [entry.scale for entry in found.scores] == [None] and not card.training(again, 3).scores


def test_of_a_workdir_that_an_older_version_left(published, tmp_path):
    with tarfile.open(golden.GOLDENS / "workdir_c7d256a.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    text = card.render(folder.read(published), "old", card.training(tmp_path / "workdir", 2), None)
    assert "| train | trained on | not recorded | `" in text and "this checkpoint was not evaluated" in text


@pytest.mark.parametrize("form", ["pth", "folder"])
def test_of_other_weights_it_says_what_is_not_known(tmp_path, form):
    path = golden.GOLDENS / "grass_tiny.pth"
    if form == "folder":
        folder.save(tmp_path / "weights", sources.load(str(path), teacher_heads=2))
        path = tmp_path / "weights"
    found = publish(str(path), tmp_path / "out", teacher_heads=2)
    text = ModelCard.load(tmp_path / "out" / "README.md").text
    assert text.count("ot known") >= 4 and "without names and colours" in text
    assert "`grass_tiny.pth`, sha256 `" in text and "assumed as published: FMM heads (--fmm_heads) 8" in text
    assert str(golden.GOLDENS) not in text + (tmp_path / "out" / "model.json").read_text()
    given, again = (loading.read(place, teacher_heads=2).arrays for place in (path, tmp_path / "out"))
    # The teacher is its authors' to publish.
    assert again.keys() == found.arrays.keys() == {name for name in given if not name.startswith("teacher/")}
    assert all(value.tobytes() == given[name].tobytes() for name, value in again.items())


def test_bad_flags_are_said_before_anything_is_read(tmp_path):
    with pytest.raises(UserError, match="--license is 'Apache 2'; give the hub's word for it, such as apache-2.0"):
        publish("nothing", tmp_path / "out", licence="Apache 2")
    with pytest.raises(UserError, match="exists; choose another place"):
        publish("nothing", tmp_path)


# Back from the hub ------------------------------------------------------------------------------------------------


def test_the_hub_gives_it_back_to_the_bit(published, workdir, tiles, tmp_path, monkeypatch):
    scene = tiles / "img_dir" / "val" / "t0.png"
    with hub(published, "somebody/meadow") as (address, fetched):
        process = runs.start(
            "--checkpoint=hf://somebody/meadow", f"--input={scene}", f"--output={tmp_path / 'hub.png'}",
            verb="predict", HF_ENDPOINT=address, HF_HUB_CACHE=str(tmp_path / "cache"),
        )  # fmt: skip
        runs.finish(process)
    assert sorted(fetched) == ["model.json", "model.safetensors"]
    predict.run(str(workdir), str(scene), str(tmp_path / "own.png"))
    assert (tmp_path / "hub.png").read_bytes() == (tmp_path / "own.png").read_bytes()

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))  # read from the environment at import
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found, ours = (ktda_jax.load_pretrained(path) for path in ("hf://somebody/meadow", workdir))
    for name, arrays in (("params", ours.params), ("stats", ours.stats)):
        theirs = getattr(found, name)
        assert theirs.keys() == arrays.keys() and arrays
        assert all(np.array(theirs[k]).tobytes() == np.array(v).tobytes() for k, v in arrays.items())
    parts = ("config", "classes", "palette", "temperature", "data")
    assert [getattr(found, part) for part in parts] == [getattr(ours, part) for part in parts]
    assert found.source == {"workdir": "meadow", "step": 6, "hub": "hf://somebody/meadow", "revision": REVISION}
    settings = Settings.of(runs.config(tiles, SETTINGS | {"weights.model": "hf://somebody/meadow"}))
    assert settings.weights.model and loading.read(settings.weights.model).arrays.keys() >= found.params.keys()


def test_the_card_names_the_teacher_that_was_there(published, tiles):
    found = folder.read(published)

    def rendered(overrides, **teacher):
        settings = runs.settings(tiles, SETTINGS | overrides)
        model = dataclasses.replace(settings.model, teacher=dataclasses.replace(settings.model.teacher, **teacher))
        settings = dataclasses.replace(settings, model=model)
        config = dataclasses.replace(found.config, teacher=dataclasses.replace(found.config.teacher, **teacher))
        trained = card.Training(settings, {}, [], {})
        return card.render(dataclasses.replace(found, config=config), "m", trained, None)

    assert "teacher from random weights" in rendered({"weights.teacher": None})
    stored = {"weights.teacher": None, "teacher.mode": "precomputed"}
    assert "teacher by precomputed features" in rendered(stored)
    theirs = rendered(stored, foreign="prithvi")
    assert "teacher prithvi, by its features" in theirs and "oquab2024dinov2" not in theirs
    none = rendered({"distill": False})
    assert "teacher" not in none.partition("## Training")[2].partition("## Licence")[0] and "oquab" not in none
