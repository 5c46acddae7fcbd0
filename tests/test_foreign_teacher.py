"""Training by the features of a teacher that is not ours: of any grid, width and taps; and without them afterwards."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest
import runs
import scene_files

import ktda_jax
from ktda_jax import UserError, extract, sharding
from ktda_jax.config import checks, workdir
from ktda_jax.config import foreign as followed
from ktda_jax.config.model import model_of
from ktda_jax.config.settings import Settings
from ktda_jax.data import foreign_features
from ktda_jax.data.foreign_writer import ForeignWriter, view
from ktda_jax.models import flat
from ktda_jax.models.ktda import teacher_images
from ktda_jax.training import foreign, inputs
from ktda_jax.training.program import batch_shapes, build
from ktda_jax.weights import folder
from ktda_jax.weights.folder import Weights

# As in test_extract.py: three patches of 14 and a part of one on each side; tiles as large as the crop.
WHOLE = {"data.crop": (48, 48), "model.teacher.image_size": (48, 48), "data.photometric": False}
SMALL = {"model.student.depths": (0, 0, 0, 0), "model.aux_channels": 0}


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return runs.make_tiles(tmp_path_factory.mktemp("tiles"), train=5, size=48)


def write(path, *, names=tuple(f"t{k}" for k in range(5)), shape=(4, 4, 24), taps=2, **options):
    """Noise."""
    rng, told = np.random.default_rng(0), {"patch": 12, "views": 1, **options}
    with ForeignWriter(path, name="other", taps=[f"tap {k}" for k in range(1, taps + 1)], **told) as writer:
        for name in names:
            writer.write(name, *(rng.normal(size=(taps, *shape)) for _ in range(told["views"])))
    return path


@pytest.fixture
def config(tiles, tmp_path):
    """config(**overrides) with features of another teacher at tmp_path/features."""

    def make(**overrides):
        given = {"teacher.mode": "precomputed", "teacher.features": str(tmp_path / "features")}
        return runs.config(
            tiles, {**WHOLE, **SMALL, **given, **{k.replace("__", "."): v for k, v in overrides.items()}}
        )

    return make


def first_terms(config):
    """The terms of the first training step, and the settings."""
    settings = checks.resolve(config)
    program, data = build(settings), inputs.open_inputs(settings, None)
    batch = next(data.batches)
    batch = sharding.to_global(program.mesh, {k: batch[k] for k in ("image", "label", "taps") if k in batch})
    arguments = jax.device_put(runs.random_state(program), program.shardings), batch, program.teacher()
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), program.arguments[1])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == shapes  # else the step is compiled twice
    _, terms = program.train_step(*arguments)
    return jax.device_get(terms), settings


def test_our_own_features_by_this_way_are_the_same_loss(config, tiles, tmp_path):
    """Computed in the step, and written by anyone: the same distillation, and the same gradient."""
    computed = config(teacher__mode="computed", weights__teacher=str(tmp_path / "w"))
    model = model_of(Settings.of(computed))
    folder.save(tmp_path / "w", Weights("teacher", model.teacher, runs.random_teacher(computed), {}))
    expected, _ = first_terms(computed)
    program = build(checks.resolve(computed))
    arrays = program.teacher()
    vit = jax.jit(
        lambda arrays, image: flat.merge(program.teacher_graphdef, arrays, {})(
            teacher_images(image[None], model.seen, model.teacher, np.float32)
        )
    )
    with ForeignWriter(tmp_path / "features", name="ours", taps="1234", patch=14, views=2) as writer:
        for tile in inputs.open_source(Settings.of(computed).data, "train"):
            seen = (np.ascontiguousarray(view(tile["image"], number)) for number in range(2))
            writer.write(tile["name"], *([tap[0] for tap in vit(arrays, image)] for image in seen))
    found, settings = first_terms(config())
    assert settings.model.teacher.foreign == "ours" and model_of(settings).teacher.tapped == (0, 1, 2, 3)
    assert expected["distill"] > 0.1
    assert found["distill"] == pytest.approx(expected["distill"], rel=1e-3)
    assert found["decode"] == pytest.approx(expected["decode"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)


def test_the_settings_follow_the_features(config, tmp_path):
    """Width, grid and levels, of a config that says something else; and they are kept in config.json."""
    write(tmp_path / "features")
    settings = checks.resolve(config())
    model = model_of(settings)
    assert (model.teacher.width, model.teacher.patch, model.teacher.tapped) == (24, 12, (0, 0, 1, 1))
    assert model.grid_of(48, 48) == (4, 4) and settings.teacher.dtype == "float16"
    assert [tap.shape for tap in batch_shapes(settings, model)["taps"]] == [(4, 4, 4, 24)] * 4
    chosen = config(model__teacher__taps=(None, 2, 2, 1))
    assert model_of(checks.resolve(chosen)).teacher.tapped == (None, 1, 1, 0)
    (tmp_path / "run").mkdir()
    workdir.write(tmp_path / "run", settings)
    assert workdir.read(tmp_path / "run") == settings
    assert checks.resolve(json.loads((tmp_path / "run" / "config.json").read_text())) == settings
    assert checks.resolve(config(distill=False)).model.teacher.foreign is None
    (tmp_path / "features").rename(tmp_path / "gone")  # evaluated without them, but not trained
    unknown = checks.resolve(config())
    assert unknown.model.teacher.foreign is None and followed.as_begun(tmp_path / "other", unknown) == unknown
    assert followed.as_begun(tmp_path / "run", unknown) == settings
    with pytest.raises(UserError, match=r"no teacher features in .*features \(no manifest.json\): write them again"):
        inputs.open_inputs(settings, None)
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(UserError, match="a training with features of other, whose weights are not known"):
        workdir.teacher_of(str(tmp_path / "run"))


@pytest.mark.parametrize("count, taps", [(1, (1, 1, 1, 1)), (2, (1, 1, 2, 2)), (3, (1, 2, 3, 3)), (12, (3, 6, 9, 12))])
def test_taps_are_spread_evenly(config, tmp_path, count, taps):
    write(tmp_path / "features", taps=count)
    assert checks.resolve(config()).model.teacher.taps == taps


def test_tokens_of_whole_tiles_without_a_patch(config, tmp_path):
    write(tmp_path / "features", patch=None, shape=(7, 7, 24), dtype="float32", views=8)
    settings = checks.resolve(config(data__rotate=True, model__standardize_taps=True))
    assert model_of(settings).grid_of(48, 48) == (7, 7) and settings.teacher.dtype == "float32"
    program, batch = build(settings), next(inputs.open_inputs(settings, None).batches)
    assert [tap.shape for tap in batch["taps"]] == [tap.shape for tap in program.arguments[1]["taps"]]
    _, terms = jax.eval_shape(program.train_step, *program.arguments)  # student and teacher are of one shape
    assert {"distill", "explained"} <= terms.keys()
    for overrides, message in (
        (dict(data__cutmix=0.5), "config.data.cutmix pastes whole patches; set it to 0"),
        (dict(model__align_grid=True), "config.model.align_grid cannot put the student's; set it to False"),
        (dict(model__grid=(4, 4)), r"config.model.grid is \(4, 4\); leave it None"),
    ):
        with pytest.raises(UserError, match=f"features are of 7x7 tokens for a whole tile.*{message}"):
            checks.resolve(config(**overrides))
    with pytest.raises(UserError, match=r"features have no patch, .*; set config.data.crop=\(48, 48\), if that is the"):
        settings = checks.resolve(config(data__crop=(32, 32)))
        inputs.open_inputs(settings, None)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            dict(model__teacher__taps=(3, 3, 6, 9)),
            r"taps is \(3, 3, 6, 9\), and the .* of 2 tap\(s\), tap 1, tap 2; give",
        ),
        (dict(weights__teacher="w"), "the teacher is other, of which .* alone; leave config.weights.teacher out"),
        (dict(data__unlabelled="x"), "of tiles with labels; images without labels .* take a teacher of ours"),
        (dict(supervised=False, data__unlabelled="x"), "of tiles with labels; images without labels"),
        (dict(teacher__bands=(1, 2)), "leave config.teacher.bands out, which chooses what a teacher of ours sees"),
        (dict(data__zoom=(0.5, 2.0)), "config.data.zoom changes what the teacher sees"),
    ],
)
def test_what_it_cannot_serve_is_one_line(config, tmp_path, overrides, message):
    write(tmp_path / "features")
    with pytest.raises(UserError, match=message) as error:
        checks.resolve(config(**overrides))
    assert "\n" not in str(error.value)


def opened(config):
    settings = checks.resolve(config)
    return inputs.open_inputs(settings, None)


def test_features_that_are_not_of_these_tiles(config, tmp_path):
    write(tmp_path / "features", names=("t0", "t1", "t2", "t3", "else"))
    with pytest.raises(UserError, match="lack 1 of 5 tiles: t4; they hold else, t0, t1 and 2 more: write one file for"):
        opened(config())
    shutil.rmtree(tmp_path / "features")
    write(tmp_path / "features", shape=(3, 3, 24))
    with pytest.raises(UserError, match="5 of 5 files: t0.npz: view0 has 3x3 tokens, and a tile of 48x48 px.* crops"):
        opened(config())
    shutil.rmtree(tmp_path / "features")
    write(tmp_path / "features", views=2)
    with pytest.raises(UserError, match=r"of 2 views of each tile, and config.data.rotate needs 8 \(or 1, which is"):
        opened(config(data__rotate=True))
    with pytest.raises(UserError, match="features holds features of a teacher that is not ours; choose another"):
        extract.run(config(teacher__mode="computed"))
    settings = checks.resolve(config())
    other = dataclasses.replace(settings.model.teacher, width=32)
    settings = dataclasses.replace(settings, model=dataclasses.replace(settings.model, teacher=other))
    with pytest.raises(UserError, match="features are of width 24, wanted 32; give those"):
        inputs.open_inputs(settings, None)


def test_all_are_read_before_the_first_step_and_one_view_is_doubted(config, tmp_path, monkeypatch):
    write(tmp_path / "features", shape=(4, 4, 600))  # of small files the header's reading is the whole's
    data = opened(config())
    assert any("one view of each tile, and mirrored with it: of a mirrored image" in line for line in data.doubtful)
    assert not any("one view" in line for line in opened(config(data__flip=0.0)).doubtful)
    assert set(data.fingerprints) == {"train", "val", "teacher features"}
    path = tmp_path / "features" / "t3.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"1 of 5 files: t3.npz cannot be read \(Bad CRC"):
        opened(config())
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # this process has 0, 2, 4, and the other one tells
    monkeypatch.setattr(foreign.sharding, "any_process", lambda failed: not failed)
    settings = checks.resolve(config())
    source = inputs.open_source(settings.data, "train")
    summary = inputs.Checks().split(source)
    with pytest.raises(UserError, match="another process cannot use the teacher's features"):
        foreign.open_features(settings, source, summary, inputs.Checks())


def test_tiles_that_are_skipped_need_no_features(tiles, tmp_path, config):
    root = shutil.copytree(tiles, tmp_path / "tiles")
    (root / "img_dir/train/t2.png").write_bytes(b"no picture")
    write(tmp_path / "features", names=("t0", "t1", "t3", "t4"))
    data = opened(config(data__root=str(root), data__on_corrupt="skip"))
    assert any(next(data.batches)["skipped"] for _ in range(3))


# On real tiles, by the commands -----------------------------------------------------------------------------------

REAL = "/work/shared/real_samples/l8_biome_256"
real = pytest.mark.skipif(not os.path.isdir(REAL), reason="needs the real samples")
SETTINGS = {
    "data.name": "l8_biome", "loss.class_weights": (1.0,) * 4, "data.crop": (128, 128), "batch_size": 2,
    "total_steps": 2, "eval_every": 2, "schedule.warmup": 1, "model.student.depths": (0, 0, 0, 1),
    "teacher.mode": "precomputed", "model.teacher.width": None, "model.teacher.depth": None,
    "model.teacher.heads": None, "mesh.data": None,
}  # fmt: skip


def example(*arguments) -> None:
    environment = {**os.environ, "PYTHONPATH": str(runs.REPOSITORY)}
    command = [sys.executable, runs.REPOSITORY / "examples/foreign_teacher.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=runs.REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@real
def test_a_teacher_in_torch_teaches_on_real_tiles(tmp_path):
    """One of six bands, of which the student has three; then the features are gone, and the model predicts."""
    images = f"{REAL}/img_dir/train"
    (tmp_path / "wide").mkdir()
    for name in os.listdir(images):
        rgb = cv2.imread(f"{images}/{name}")[..., ::-1]
        scene_files.write(tmp_path / "wide" / f"{name[:-4]}.tif", np.concatenate([rgb, 255 - rgb], -1))
    example(tmp_path / "wide", tmp_path / "features")
    told = foreign_features.read_manifest(tmp_path / "features")
    assert (told.width, told.grid, told.patch, len(told.files)) == (96, (16, 16), 16, 16)
    flags = runs.arguments(REAL, tmp_path / "run", {**SETTINGS, "teacher.features": tmp_path / "features"})
    out, err = runs.finish(runs.start(*flags))
    assert (
        "made by ViT of random weights (96 channels; the levels learn from layer 2, layer 2, layer 4, layer 4)" in out
    )
    assert "warning: the features in" in out and "the teacher starts from random" not in out + err
    assert all(np.isfinite(row["train/distill"]) for row in runs.rows(tmp_path / "run")[:2])
    (tmp_path / "features").rename(tmp_path / "gone")
    found = ktda_jax.load_pretrained(tmp_path / "run").predict(
        f"{REAL}/img_dir/val/{os.listdir(REAL + '/img_dir/val')[0]}"
    )
    assert found.labels.shape == (256, 256)


@real
@pytest.mark.slow
def test_a_killed_training_goes_on_the_same(tmp_path):
    """An RGB teacher with both views of 256 px tiles; a training of four steps, and one that begins again at step 2."""
    example(f"{REAL}/img_dir/train", tmp_path / "features", "--views=2")
    settings = {
        **SETTINGS,
        "total_steps": 4,
        "eval_every": 2,
        "keep_checkpoints": 2,
        "ema": 0.9,
        "teacher.features": str(tmp_path / "features"),
    }
    runs.finish(runs.start(*runs.arguments(REAL, tmp_path / "whole", settings)))
    other = shutil.copytree(tmp_path / "whole", tmp_path / "other")
    shutil.rmtree(other / "checkpoints" / "4")
    rows = (other / "metrics.jsonl").read_text().splitlines(True)[:3]  # two steps and their score
    (other / "metrics.jsonl").write_text("".join(rows))
    out, _ = runs.finish(runs.start(*runs.arguments(REAL, other, settings)))
    assert "resuming at step 2" in out
    plain = {k: v for k, v in settings.items() if v is not None}
    runs.assert_same_run(tmp_path / "whole", other, REAL, plain)
    out, _ = runs.finish(runs.start(f"--workdir={other}", "--tiles=2", verb="report"))
    assert "cannot" not in out
    page = (other / "report.html").read_text()
    assert "precomputed, made by ViT of random weights" in page
    assert "cannot read" not in page
    (tmp_path / "features").rename(tmp_path / "gone")
    flags = runs.arguments(REAL, other, settings)
    out, _ = runs.finish(runs.start(*flags, "--mode=eval"))
    assert "val split, step" in out
    _, err = runs.finish(runs.start(*flags), status=1)
    assert err.startswith(f"error: no teacher features in {tmp_path / 'features'} (no manifest.json)")
