"""Rows without labels in the same training: what they touch, and that meshes, stops and processes change nothing."""

import shutil

import distilling
import jax
import numpy as np
import optax
import pytest
import runs
from distilling import ALONE, STANDARD

from ktda_jax import UserError, extract, inspect, sharding
from ktda_jax.config.settings import Settings
from ktda_jax.data.mixture import Mixture
from ktda_jax.models import flat
from ktda_jax.models.ktda import normalize
from ktda_jax.training import loop, tap_statistics
from ktda_jax.training.inputs import open_inputs
from ktda_jax.training.program import build


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return runs.make_tiles(tmp_path_factory.mktemp("tiles"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return distilling.write_scenes(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def teacher(tiles, tmp_path_factory):
    return distilling.save_teacher(tmp_path_factory.mktemp("weights") / "teacher", tiles)


@pytest.fixture
def given(images, teacher, monkeypatch):
    monkeypatch.setattr(tap_statistics, "IMAGES", 16)
    return distilling.giving(images, teacher)


def _step(settings, batch, state=None):
    program = build(settings)
    arguments = jax.device_put(state or runs.random_state(program), program.shardings)
    rows = sharding.to_global(program.mesh, {k: batch[k] for k in ("image", "label", "taps") if k in batch})
    return jax.device_get(program.train_step(arguments, rows, program.teacher()))


def test_rows_without_labels_touch_the_distillation_and_nothing_else(given, tiles):
    """Cross entropy, accuracy, BatchNorm and the decoders' parameters are those of the labelled rows alone."""
    options = {"model.dropout": 0.0, "batch_size": 8, "optimizer.weight_decay": 0.0}
    mixed = runs.settings(tiles, given({**STANDARD, **options}))
    batch = next(open_inputs(mixed, Mixture.of(0.5, 8)).batches)
    assert [bool((label == 255).all()) for label in batch["label"]] == [False, True] * 4
    few = {k: batch[k][::2] for k in ("image", "label")}
    alone = runs.settings(tiles, given({**STANDARD, **options}, data__unlabelled=None, batch_size=4))
    (both, terms), (labelled, expected) = _step(mixed, batch), _step(alone, few)
    for term in ("decode", "aux", "acc"):
        np.testing.assert_allclose(terms[term], expected[term], rtol=1e-5)
    assert terms["distill"] != pytest.approx(float(expected["distill"]), rel=1e-4)
    for path, value in both.batch_stats.items():
        np.testing.assert_allclose(value, labelled.batch_stats[path], rtol=1e-5, atol=1e-6, err_msg=path)
    # Adam's first moments are a tenth of the gradients.
    ours, theirs = (optax.tree.get(state.opt_state, "mu") for state in (both, labelled))
    for path in ours:
        same = np.allclose(ours[path], theirs[path], rtol=1e-4, atol=1e-6)
        assert same == path.startswith(("neck", "fmm", "decode_head", "auxiliary_head")), path


def test_a_mesh_computes_what_one_device_does(given, tiles):
    """With micro-batches, whose rows are divided among devices and kinds."""
    accumulate = 2
    options = {**STANDARD, "model.dropout": 0.0, "batch_size": 32, "eval_batch_size": 8, "grad_accum": accumulate}
    found = []
    for data, fsdp in ((1, 1), (2, 4)):
        settings = runs.settings(tiles, given(options, mesh__data=data, mesh__fsdp=fsdp))
        batch = next(open_inputs(settings, Mixture.of(0.5, 4 // accumulate, accumulate)).batches)
        found.append(_step(settings, batch)[1])
    for term, value in found[0].items():
        np.testing.assert_allclose(value, found[1][term], rtol=2e-4, err_msg=term)


def test_resumed_it_is_the_same_bit_for_bit(given, tiles, images, tmp_path):
    """With labelled and unlabelled rows, statistics of the taps, and a stop between two evaluations; the images may lie
    elsewhere by then, but not be gone."""
    overrides = given({**STANDARD, "total_steps": 4, "eval_every": 4, "checkpoint_every": 2})
    loop.train_and_evaluate(runs.config(tiles, overrides), tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "validate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            loop.train_and_evaluate(runs.config(tiles, overrides), tmp_path / "parts")
    assert runs.steps(tmp_path / "parts", "train/explained")
    with pytest.raises(UserError, match="the unlabelled data are not those that .* was begun with"):
        loop.train_and_evaluate(runs.config(tiles, {**overrides, "data.unlabelled": None}), tmp_path / "parts")
    elsewhere = {"data.unlabelled": str(shutil.copytree(images, tmp_path / "elsewhere"))}
    loop.train_and_evaluate(runs.config(tiles, {**overrides, **elsewhere}), tmp_path / "parts")
    whole, parts = (runs.saved_state(tmp_path / name, tiles, overrides) for name in ("whole", "parts"))
    assert whole[0] == parts[0] == 4 and whole[2] == parts[2]
    for path, value in whole[1].items():
        assert value.tobytes() == parts[1][path].tobytes(), path


@pytest.mark.slow
def test_two_processes_are_one(given, tiles, tmp_path):
    overrides = {**given(STANDARD), "mesh.data": -1, "total_steps": 3}
    runs.finish(runs.start(*runs.arguments(tiles, tmp_path / "one", overrides), devices=2))
    both = runs.start_two(*runs.arguments(tiles, tmp_path / "two", overrides))
    for process in both:
        runs.finish(process)
    for one, two in zip(runs.rows(tmp_path / "one"), runs.rows(tmp_path / "two"), strict=True):
        assert one.keys() == two.keys()
        for name, value in one.items():
            assert two[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=1e-4)), name


def test_stored_features_of_windows_are_the_teachers(given, tiles, tmp_path):
    """Of a fixed grid of windows, mirrored ones too; and a distillation runs on them."""
    options = {**ALONE, "total_steps": 3, "teacher.mode": "precomputed", "teacher.features": str(tmp_path / "features")}
    config = runs.config(tiles, given(options, teacher__dtype="float16"))
    extract.run(config)
    assert [path.name for path in tmp_path.iterdir()] == ["features_unlabelled"]
    program, batch = build(Settings.of(config)), next(open_inputs(Settings.of(config), None).batches)
    vit = flat.merge(program.teacher_graphdef, jax.device_get(program.teacher()), {})
    for stored, tap in zip(batch["taps"], vit(normalize(batch["image"], np.float32)), strict=True):
        np.testing.assert_allclose(stored.astype(np.float32), tap, atol=0.01)
    loop.train_and_evaluate(config, tmp_path / "run")
    assert np.isfinite(runs.rows(tmp_path / "run")[-1]["final/explained"])
    other = runs.config(tiles, given({**options, "data.crop": (72, 72), "model.teacher.image_size": (72, 72)}))
    with pytest.raises(UserError, match="features_unlabelled are of (another teacher|other tiles|a teacher set)"):
        open_inputs(Settings.of(other), None)


def test_inspect_shows_windows(given, tiles, tmp_path, capsys):
    assert inspect.run(runs.config(tiles, given(STANDARD)), tmp_path / "out", 3) == []
    assert "unlabelled: 27 windows of 2 images, 0 left out without data" in capsys.readouterr().out
    assert (tmp_path / "out" / "unlabelled.png").stat().st_size > 10_000
    wrong = runs.config(tiles, given(STANDARD, data__unlabelled=str(tmp_path / "nothing")))
    assert "nothing" in inspect.run(wrong, tmp_path / "out", 3)[0]
