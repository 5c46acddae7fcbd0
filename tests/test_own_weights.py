"""What was trained or converted here goes on: as another training's weights, as a folder, as a .pth, and back."""

import dataclasses
import json
import os
import subprocess
import sys

import golden
import jax
import numpy as np
import pytest
import runs
import torch
from PIL import Image

import ktda_jax
from ktda_jax import UserError
from ktda_jax.config import workdir as records
from ktda_jax.config.model import model_of, teacher_identity
from ktda_jax.config.settings import Settings
from ktda_jax.models.convnext import ConvNeXtConfig
from ktda_jax.models.fmm import FMMConfig
from ktda_jax.models.ktda import KTDAConfig
from ktda_jax.models.vit import ViTConfig
from ktda_jax.prediction import segmenter
from ktda_jax.training import trained
from ktda_jax.training.checkpoint import Checkpoints
from ktda_jax.training.program import build
from ktda_jax.weights import folder, loading, sources

# Nothing here is a default, and what no tensor tells is the most of it.
TEACHER = ViTConfig(
    width=24, depth=4, heads=3, image_size=(64, 96), patch=16, antialias=True, mean=(1.0, 2.0, 3.0),
    std=(4.0, 5.0, 6.0), taps=(4, None, 3, 1),
)  # fmt: skip
WHOLE = KTDAConfig(
    num_classes=3, student=ConvNeXtConfig((1, 1, 1, 1), (8, 8, 16, 16), drop_path=0.1, layer_scale=0.5, bands=4),
    teacher=TEACHER, fmm=FMMConfig(blocks=1, heads=12, mlp_ratio=2.0), grid=(5, 6), tap_scales=(1.0, 2.0, 3.0, 4.0),
    neck_channels=48, head_channels=8, aux_channels=8, dropout=0.2, rgb=(2, 1, 0),
)  # fmt: skip
SCALE = ((0, 9), (1, 8), (0, 7), (0, 6))
DATA = {"name": "mine", "bands": (4, 3, 2, 8), "rgb": (2, 3, 4), "scale": SCALE, "nodata": -1.0, "crop": (64, 96)}


def random(config: KTDAConfig, *, teacher: bool = True) -> dict[str, np.ndarray]:
    params, stats = sources.expected("ktda", config)
    names = [k for k in {**params, **stats} if teacher or not k.startswith("teacher/")]
    rng = np.random.default_rng(0)
    shapes = {**params, **stats}
    return {k: (0.1 * rng.normal(size=shapes[k].shape) + k.endswith(("var", "scale"))).astype("f4") for k in names}


@pytest.mark.parametrize("teacher", [True, False])
def test_nothing_is_lost_on_the_way_to_pytorch_and_back(tmp_path, teacher):
    given = folder.Weights(
        "ktda", WHOLE, random(WHOLE, teacher=teacher), {}, ("a", "b", "c"), ((1, 2, 3),) * 3, data=DATA
    )
    folder.save(tmp_path / "w", given)
    sources.to_upstream(loading.read(tmp_path / "w"), tmp_path / "w.pth")
    assert torch.load(tmp_path / "w.pth", weights_only=True)["state_dict"]
    folder.save(tmp_path / "back", loading.read(tmp_path / "w.pth", fmm_heads=8, teacher_heads=1))
    said = []
    for path in ("w", "w.pth", "back"):
        found = segmenter.find(tmp_path / path, say=said.append)
        for name in ("kind", "config", "classes", "palette", "data"):
            assert getattr(found, name) == getattr(given, name), (path, name)
        assert found.arrays.keys() == given.arrays.keys()
        assert all(np.array_equal(found.arrays[k], v) for k, v in given.arrays.items())
        with pytest.raises(UserError, match=r"--fmm_heads=8, but .* is of a model with 12; leave --fmm_heads out"):
            segmenter.find(tmp_path / path, fmm_heads=8)
    assert not said


def test_a_frozen_encoder_goes_to_pytorch_and_back(tmp_path):
    """A model without student and FAM, which no names tell from others."""
    config = dataclasses.replace(
        WHOLE, encoder="teacher", fam=False, teacher=dataclasses.replace(TEACHER, taps=None), fmm=None, tap_scales=None
    )
    sources.to_upstream(folder.Weights("ktda", config, random(config), {}), tmp_path / "w.pth")
    assert loading.read(tmp_path / "w.pth").config == config


def test_a_description_that_does_not_fit_is_one_line(tmp_path):
    sources.to_upstream(folder.Weights("ktda", WHOLE, random(WHOLE), {}), tmp_path / "w.pth")
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    for change in ({"num_classes": 4}, {"student": None}, {"depth": 3}):
        description = content["meta"]["ktda_jax"]
        meta = {"ktda_jax": description | {"architecture": description["architecture"] | change}}
        torch.save({**content, "meta": meta}, tmp_path / "x.pth")
        with pytest.raises(UserError, match=r"x.pth is not as its description says: ") as error:
            loading.read(tmp_path / "x.pth")
        assert "\n" not in str(error.value)


def test_what_a_published_file_does_not_say_is_said_to_be_assumed_once(tmp_path):
    said, path = [], golden.GOLDENS / "grass_tiny.pth"
    found = segmenter.find(path, teacher_heads=2, say=said.append)
    assert said == [
        f"{path} does not say all of its model; assumed as published: FMM heads (--fmm_heads) {found.config.fmm.heads}"
    ]
    segmenter.find(path, teacher_heads=2, fmm_heads=4, say=said.append)
    folder.save(tmp_path / "w", found)
    segmenter.find(tmp_path / "w", say=said.append)
    assert len(said) == 1
    tensors = torch.load(path, weights_only=True)["state_dict"]
    torch.save({k: v for k, v in tensors.items() if not k.startswith("teach_")}, tmp_path / "x.pth")
    segmenter.find(tmp_path / "x.pth", fmm_heads=4, say=said.append)
    assert said[1].endswith("assumed as published: teacher's patch 14")


# A training here, four bands wide, with heads that are not published ones.
SETTINGS = {"model.fmm.form": "transformer", "model.fmm.heads": 4, "ema": 0.9, "data.bands": (4, 1, 2, 3)}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two checkpoints, of which the first is the best; the average differs from the parameters."""
    path = tmp_path_factory.mktemp("run")
    config = runs.config(path, SETTINGS)
    state = runs.random_state(build(Settings.of(config)))
    state = dataclasses.replace(state, ema={k: v + 1 for k, v in state.params.items()})
    records.write(path, Settings.of(config))
    with Checkpoints(path / "checkpoints") as checkpoints:
        checkpoints.save(3, state, {}, {"mIoU": 60.0})
        checkpoints.save(6, jax.tree.map(np.zeros_like, state), {}, {"mIoU": 50.0})
    return path


@pytest.mark.parametrize("what", ["model", "student"])
def test_a_training_goes_on_from_the_best_of_another(workdir, tmp_path, what):
    expected = trained.read(workdir).arrays
    current = build(runs.settings(tmp_path, {**SETTINGS, f"weights.{what}": str(workdir)}), teacher=False).init()
    start = {**current.params, **current.batch_stats}
    names = [k for k in start if what == "model" or k.startswith("student/")]
    assert names and all(np.array_equal(start[k], expected[k]) for k in names)
    assert float(np.mean(expected["neck/lateral_convs/0/kernel"])) > 0.9  # the average, of step 3


def test_other_classes_and_other_models_than_the_workdirs_are_named(workdir, tmp_path):
    classes = {"data.classes": ("a", "b"), "data.palette": ((1, 2, 3), (4, 5, 6))}
    chosen = {**SETTINGS, **classes, "weights.model": str(workdir)}
    with pytest.raises(UserError, match=r"num_classes 5 \(config: 2\); set --config.weights.new_classifier=True"):
        build(runs.settings(tmp_path, chosen), teacher=False)
    current = build(runs.settings(tmp_path, {**chosen, "weights.new_classifier": True}), teacher=False).init()
    expected = trained.read(workdir).arrays
    assert np.array_equal(current.params["neck/lateral_convs/0/kernel"], expected["neck/lateral_convs/0/kernel"])
    with pytest.raises(
        UserError, match=r"config.weights.model: the model in .* has config.model.fmm.heads 4 \(config: 2"
    ):
        build(runs.settings(tmp_path, {**SETTINGS, "model.fmm.heads": 2, "weights.model": str(workdir)}), teacher=False)


def test_the_teacher_of_a_training_is_the_one_frozen_in_it(workdir, tmp_path):
    chosen = {**SETTINGS, "weights.teacher": str(workdir)}
    with pytest.raises(
        UserError, match=r"config.weights.teacher: .* is a training with a random teacher .* nothing is"
    ):
        build(runs.settings(tmp_path, chosen))
    model = model_of(runs.settings(tmp_path, SETTINGS))
    arrays = {k.removeprefix("teacher/"): v for k, v in random(model).items() if k.startswith("teacher/")}
    folder.save(tmp_path / "teacher", folder.Weights("teacher", model.teacher, arrays, {}))
    (tmp_path / "checkpoints").mkdir()
    records.write(tmp_path, runs.settings(tmp_path, {**SETTINGS, "weights.teacher": str(tmp_path / "teacher")}))
    started = build(runs.settings(tmp_path, {**SETTINGS, "weights.teacher": str(tmp_path)})).teacher()
    assert all(np.array_equal(started[k], v) for k, v in arrays.items())
    ours, theirs = (teacher_identity(str(path), 0, model) for path in (tmp_path, tmp_path / "teacher"))
    assert ours["sha256"] == theirs["sha256"]  # features of the one serve the other


def convert(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "ktda_jax.convert", *map(str, arguments)],
        cwd=runs.REPOSITORY, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout


def test_a_workdir_is_converted_and_predicts_the_same(workdir, tmp_path):
    said = convert(f"--input={workdir}", f"--output={tmp_path / 'w'}")
    assert (
        said.startswith("the checkpoint of step 3, without its teacher") and "ktda, " in said and "warning" not in said
    )
    convert("--to=upstream", f"--input={workdir}", f"--output={tmp_path / 'w.pth'}")
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)
    expected = ktda_jax.load_pretrained(workdir)
    for path in ("w", "w.pth"):
        found = ktda_jax.load_pretrained(tmp_path / path)
        for name in ("config", "classes", "palette", "data"):
            assert getattr(found, name) == getattr(expected, name)
        np.testing.assert_array_equal(found.predict(image).probabilities, expected.predict(image).probabilities)
    assert json.loads((tmp_path / "w" / "model.json").read_text())["source"]["step"] == 3


def test_a_folder_of_checkpoints_is_told_from_its_workdir(workdir):
    for path in (workdir / "checkpoints", workdir / "checkpoints" / "3"):
        with pytest.raises(UserError, match=f"holds no .safetensors.*; give the training's workdir, {workdir}"):
            loading.read(path)


def test_the_commands_take_heads(workdir, tmp_path):
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "x.png")
    flags = (f"--checkpoint={workdir}", f"--output={tmp_path / 'y.png'}", "--fmm_heads=8")
    started = [
        runs.start(*flags, f"--input={tmp_path / 'x.png'}", verb="predict"),
        runs.start(*flags, "--format=stablehlo", "--teacher_heads=2", verb="export"),
    ]
    for process in started:
        _, said = process.communicate(timeout=120)
        assert said == f"error: --fmm_heads=8, but {workdir} is of a model with 4; leave --fmm_heads out\n"
