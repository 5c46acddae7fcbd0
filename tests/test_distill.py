"""Learning from a frozen teacher alone: images without labels, the variance explained, and training from there."""

import dataclasses
import json
import shutil

import distilling
import jax
import numpy as np
import pytest
import runs
import scene_files
from distilling import ALONE, STANDARD
from PIL import Image

from ktda_jax import UserError, load_pretrained, sharding
from ktda_jax.config import checks
from ktda_jax.config.model import model_of
from ktda_jax.config.settings import Settings
from ktda_jax.models.initial import HostRngs
from ktda_jax.models.ktda import KTDA
from ktda_jax.training import distilled, explained, inputs, loop, scoring, tap_statistics, trained
from ktda_jax.training.inputs import open_inputs
from ktda_jax.training.program import build
from ktda_jax.weights import folder
from ktda_jax.weights.folder import Weights


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


@pytest.fixture(scope="module")
def student(tiles, images, teacher, tmp_path_factory):
    """The workdir of a distilled student, and what it explained at last."""
    workdir = tmp_path_factory.mktemp("distilled") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tap_statistics, "IMAGES", 16)
        config = runs.config(
            tiles, {**ALONE, "data.unlabelled": str(images), "weights.teacher": str(teacher), "data.root": None}
        )
        return workdir, loop.train_and_evaluate(config, workdir), config


# Distilled alone --------------------------------------------------------------------------------------------------


def test_a_distilled_student_explains_what_it_has_not_seen(student, tiles):
    """More than at its start, and more than a constant; the best checkpoint is known by it."""
    workdir, result, config = student
    program = build(Settings.of(config))
    data = open_inputs(Settings.of(config), None)
    start = scoring.explain(Settings.of(config), program, data.val_batches, program.init(), program.teacher())
    assert start.mean < 0.01 < 0.06 < result.mean and all(
        s < r for s, r in zip(start.shares, result.shares, strict=True)
    )
    scores = {row["step"]: row["val/explained"] for row in runs.rows(workdir) if "val/explained" in row}
    assert list(scores) == [100, 200] and max(scores.values()) == pytest.approx(result.mean)
    assert runs.rows(workdir)[-1]["final/explained"] == pytest.approx(result.mean)
    report = json.loads((workdir / "figures" / "held_out.json").read_text())
    assert report["explained"] == pytest.approx(result.mean) and "explained_level4_layer4" in report
    assert {path.split("/")[0] for path in program.abstract.params} == {"student", "fam"}  # and no decoder


def test_explained_is_the_share_of_variance(student):
    """Against numpy, over two batches with a padded row; a mean alone explains nothing, the teacher all."""
    rng = np.random.default_rng(0)
    t = rng.normal(2, 3, (7, 2, 2, 5))
    s = t + rng.normal(size=t.shape)
    sums = {"tokens": 28, "t": t.sum((0, 1, 2)), "st": (s * t).sum(), "ss": (s * s).sum(), "tt": (t * t).sum()}
    expected = 1 - np.square(s - t).sum() / np.square(t - t.mean((0, 1, 2))).sum()
    assert explained._share(sums, "mse") == pytest.approx(expected)
    assert float(explained.of_batch([s, s], [t, None])) == pytest.approx(expected, rel=1e-5)
    scaled = {**sums, "st": 10 * sums["st"], "ss": 100 * sums["ss"]}
    assert explained._share(scaled, "cosine") == pytest.approx(explained._share(sums, "cosine"))  # has no scale
    constant = np.broadcast_to(t.mean((0, 1, 2)), t.shape)
    assert float(explained.of_batch([constant], [t])) == pytest.approx(0, abs=1e-5)
    assert float(explained.of_batch([t], [t])) == pytest.approx(1)


def test_a_student_alone_makes_no_map(student):
    workdir, _, config = student
    with pytest.raises(UserError, match="distilled without labels, so it has no decoder; train one.*weights.student="):
        load_pretrained(workdir)
    again = scoring.evaluate_workdir(config, workdir)
    assert again.shares == student[1].shares


def test_other_images_may_score_a_distillation(student, images, tmp_path, capsys):
    """Where they lie now, or others altogether, which is said."""
    workdir, result, config = shutil.copytree(student[0], tmp_path / "run"), *student[1:]
    changed = config.copy_and_resolve_references()
    changed.data.unlabelled = str(shutil.copytree(images, tmp_path / "elsewhere"))
    assert scoring.evaluate_workdir(changed, workdir).shares == result.shares
    assert "not those held out" not in capsys.readouterr().out
    pixels = np.random.default_rng(5).integers(0, 256, (216, 216, 3), np.uint8)
    scene_files.write(tmp_path / "elsewhere" / "c.tif", pixels)
    assert scoring.evaluate_workdir(changed, workdir).shares != result.shares
    assert "warning: the images that score are not those held out in training, which may" in capsys.readouterr().out


# Training from there ----------------------------------------------------------------------------------------------


def test_training_starts_from_student_fam_and_statistics(student, given, tiles):
    workdir, _, _ = student
    settings = runs.settings(tiles, given(STANDARD, weights__student=str(workdir)))
    program = build(settings)
    params, found = program.init(), trained.from_workdir(workdir).arrays
    for path, value in found.items():
        ours = params.batch_stats if path.startswith("taps/") else params.params
        np.testing.assert_array_equal(ours[path], value)
    assert {path.split("/")[0] for path in program.loaded} == {"student", "fam", "taps"}
    assert program.notes == [f"student and FAM with the taps' statistics come from {workdir}"]
    begun = loop._initial(settings, program, None, None)  # does not measure again
    np.testing.assert_array_equal(begun.batch_stats["taps/mean"], found["taps/mean"])


def test_a_student_may_stay_as_it_came(student, tiles):
    """Under a linear head, as configs/few_labels.py:10 has it: the head alone learns."""
    changed = {"weights.student": str(student[0]), "distill": False, "optimizer.student_lr_mult": 0.0, "mesh.data": 1}
    changed |= {"model.head": "linear", "model.aux_channels": 0, "model.fmm.enabled": False, "schedule.warmup": 0}
    settings = runs.settings(tiles, {**STANDARD, **changed})
    program = build(settings)
    assert {path.split("/")[0] for path in program.abstract.params} == {"student", "fam", "decode_head"}
    before, data = program.init(), open_inputs(settings, None)
    kept, batch = jax.device_get(before.params), next(iter(data.batches))
    rows = sharding.to_global(program.mesh, {k: batch[k] for k in ("image", "label")})
    after, terms = program.train_step(before, rows, {})
    with pytest.raises(UserError, match="keeps a student that starts at random; give one, as config.weights.student=W"):
        build(dataclasses.replace(settings, weights=dataclasses.replace(settings.weights, student=None)))
    for path, value in jax.device_get(after.params).items():
        assert np.array_equal(value, kept[path]) == (not path.startswith("decode_head/")), path
    assert float(terms["grad_norm"]) > 0


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"model.teacher.taps": (1, 2, 3, 3)}, r"with config.model.teacher.taps=\(1, 2, 3, 4\), now it is \(1, 2, 3"),
        ({"model.standardize_taps": False}, "config.model.standardize_taps=True, now it is False; set it as it was"),
        ({"model.student.channels": (8, 8, 16, 24)}, r"config.weights.student: the student in .* has channels"),
        ({"weights.teacher": "other"}, "from the teacher .*teacher, now config.weights.teacher is .*which is another"),
    ],
)
def test_another_student_or_teacher_is_named(student, given, tiles, tmp_path, changed, message):
    if "weights.teacher" in changed:
        config = runs.config(tiles)
        arrays = {k: v + 1 for k, v in runs.random_teacher(config).items()}
        folder.save(tmp_path / "other", Weights("teacher", model_of(Settings.of(config)).teacher, arrays, {}))
        changed = {"weights.teacher": str(tmp_path / "other")}
    overrides = {**given(STANDARD, weights__student=str(student[0])), **changed}
    with pytest.raises(UserError, match=message):
        build(runs.settings(tiles, overrides))
    if "model.student.channels" not in changed:  # what the teacher's features do not matter for goes on
        assert build(runs.settings(tiles, {**overrides, "distill": False, "data.unlabelled": None})).notes


def test_a_fam_for_another_width_begins_anew_and_says_so(student, tiles):
    overrides = {**STANDARD, "weights.student": str(student[0]), "model.teacher.width": 24}
    program = build(runs.settings(tiles, overrides))
    assert {path.split("/")[0] for path in program.loaded} == {"student"}
    assert "width 16 with align_grid=False, does not: this model's is for width 24 with align_grid" in program.notes[0]
    with pytest.raises(UserError, match="student_lr_mult=0 keeps .* as they came, and .*run brings no fam"):
        build(runs.settings(tiles, {**overrides, "distill": False, "optimizer.student_lr_mult": 0.0}))


def test_images_of_another_range_are_told(student, tiles):
    """Not refused: another product of the same sensor may well have one."""
    changed = {**STANDARD, "weights.student": str(student[0]), "distill": False, "data.bands": (1, 2, 3)}
    (_, line) = build(runs.settings(tiles, {**changed, "data.scale": (0, 3000)})).notes
    assert line == f"warning: {student[0]} was trained with config.data.scale=None, now it is (0, 3000)"
    assert len(build(runs.settings(tiles, changed)).notes) == 1


def test_a_student_of_another_order_of_bands_is_put_in_order(student, tiles):
    """Also one that comes out of a training, whose arrays are JAX's."""
    stem, changed = "student/downsample/0/conv/kernel", {**STANDARD, "distill": False, "data.bands": (1, 2, 3)}
    theirs = trained.from_workdir(student[0]).arrays[stem]
    settings = runs.settings(tiles, {**changed, "weights.student": str(student[0]), "data.rgb": (3, 2, 1)})
    np.testing.assert_array_equal(build(settings).init().params[stem], theirs[:, :, ::-1])


def test_going_on_distilling_needs_the_same_teacher(student, given, tiles, tmp_path):
    """A random one would follow under the former one's statistics; without distillation no teacher is asked."""
    overrides = {**STANDARD, "weights.student": str(student[0])}
    with pytest.raises(UserError, match="was distilled from a teacher .*; give it as config.weights.teacher"):
        build(runs.settings(tiles, overrides))
    folder.save(tmp_path / "moved", trained.from_workdir(student[0]))
    notes = build(runs.settings(tiles, given(STANDARD, weights__student=str(tmp_path / "moved")))).notes
    assert "warning: nothing tells whether" in notes[1]
    with pytest.raises(UserError, match="distilled without labels; give it as config.weights.student"):
        build(runs.settings(tiles, {"weights.model": str(student[0])}))


def test_without_a_teacher_there_is_nothing_to_measure(tiles):
    """The recipe of few labels from a student of elsewhere, or from scratch."""
    settings = runs.settings(tiles, {**STANDARD, "distill": False})
    assert not np.any(loop._initial(settings, build(settings), None, None).batch_stats["taps/mean"])


def test_what_validates_does_not_train(given, tiles, images):
    config = runs.config(tiles, given(ALONE, data__unlabelled_val=str(images / "a.tif")))
    data = open_inputs(Settings.of(config), None)
    assert "12 windows of 1 unlabelled images, 15 windows held out" in data.what
    everything = runs.config(tiles, given(ALONE, data__unlabelled_val=str(images)))
    with pytest.raises(UserError, match="all of its images are held out by config.data.unlabelled_val"):
        open_inputs(Settings.of(everything), None)


def test_not_more_windows_score_than_take_a_while(given, tiles, images, monkeypatch):
    monkeypatch.setattr(inputs, "HELD_OUT", 3)
    settings = runs.settings(tiles, given(ALONE, data__unlabelled_val=str(images / "a.tif")))
    batches, summary = inputs.held_out_batches(settings.data, 2)
    assert summary.windows == 3 == sum(int(batch["mask"].sum()) for batch in batches)


def test_evaluation_by_another_teacher_is_refused(student):
    config = student[2].copy_and_resolve_references()
    config.unlock()
    config.weights.teacher = "other"
    with pytest.raises(UserError, match="was begun with another config: weights.teacher"):
        scoring.evaluate_workdir(config, student[0])


def test_an_aligned_model_maps_tiles_of_any_size_in_place(tiles):
    """What the third level's cells see of an image that is no whole patches lies where it lies in the image."""
    settings = runs.settings(tiles, {"model.align_grid": True, "data.crop": (56, 56), "model.teacher.patch": 14})
    model, image = KTDA(model_of(settings), rngs=HostRngs(0)), np.full((1, 57, 57, 3), 90, np.uint8)
    changed = image.copy()
    changed[:, :, 48:52] = 200
    found = np.abs(np.asarray(model(changed).student[0]) - np.asarray(model(image).student[0])).sum((0, 1, 3))
    centre = (found * (np.arange(len(found)) + 0.5)).sum() / found.sum() * 57 / len(found)
    assert abs(centre - 50) < 7  # half a token


# What cannot be ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"supervised": False, "data.unlabelled": None}, "trains on images alone; name them by config.data.unlab"),
        ({"distill": False}, "config.data.unlabelled serves the distillation and config.semi; set config.distill=True"),
        ({"supervised": False, "distill": False}, "config.supervised=False serves the distillation"),
        (
            {"model.teacher.taps": (None, 2, 3, 4), "loss.tap_weights": (1.0, 0, 0, 0)},
            "0 for all levels that have a tap",
        ),
        ({"model.encoder": "teacher", "model.fam": False, "distill": False}, "leaves none; take one of them"),
        ({"semi.weight": 1.0}, "config.semi.weight needs the parameters' average; set config.ema=0.99, say"),
        ({"semi.weight": 1.0, "data.unlabelled": None}, "config.semi.weight is 1.0, for config.data.unlabelled"),
        ({"weights.teacher": None}, "config.data.unlabelled would teach what a random teacher says; give a pretrained"),
        ({"supervised": False, "weights.teacher": None}, "config.supervised=False would teach what a random teacher"),
        ({"data.unlabelled_val": "x"}, "config.data.unlabelled_val scores a training with config.supervised=False"),
        ({"supervised": False, "weights.model": "x"}, "trains no decoder; give config.weights.student, not .model"),
        ({"optimizer.student_lr_mult": 0.0}, "student_lr_mult=0 keeps the student as it is, and config.distill trains"),
        ({"data.unlabelled_share": 1.0}, "config.data.unlabelled_share is 1.0; give a share between 0 and 1"),
        ({"loss.distance": "l1"}, "config.loss.distance is 'l1'; choose published, mse or cosine"),
        ({"loss.tap_weights": (1.0, 1.0)}, r"config.loss.tap_weights is \(1.0, 1.0\); give four numbers from 0"),
    ],
)
def test_settings_that_do_not_fit(given, tiles, changed, message):
    with pytest.raises(UserError, match=message):
        checks.resolve(runs.config(tiles, {**given(STANDARD), **changed}))


def test_a_share_that_a_device_cannot_have(given, tiles):
    with pytest.raises(UserError, match="unlabelled_share is 0.3, but a device's 4 row"):
        build(runs.settings(tiles, given(STANDARD, data__unlabelled_share=0.3)))


def test_images_in_another_unit_are_refused_before_anything_is_compiled(given, tiles, tmp_path, monkeypatch):
    Image.fromarray(np.random.default_rng(0).integers(0, 2, (80, 80, 3)).astype(np.uint8)).save(tmp_path / "dark.png")
    monkeypatch.setattr(loop, "Compilation", lambda program: None)
    config = runs.config(tiles, given(STANDARD, data__unlabelled=str(tmp_path / "dark.png")))
    with pytest.raises(UserError, match="config.data.unlabelled: "):
        loop.train_and_evaluate(config, tmp_path / "run")


def test_unused_fam_parts_of_a_whole_model_are_left(student, tiles):
    """A whole model that is named as a student gives its student alone, as before."""
    settings = runs.settings(tiles, STANDARD)
    whole = Weights("ktda", model_of(settings), {}, {})
    assert distilled.fam_of(whole, settings, model_of(settings), {}) == ({}, [])
