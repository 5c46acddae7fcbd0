"""`python -m ktda_jax.extract`: the features are the teacher's, training with them is training with the teacher."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
import runs
from PIL import Image

from ktda_jax import UserError, extract, sharding
from ktda_jax.config.model import model_of, teacher_identity
from ktda_jax.config.settings import Settings
from ktda_jax.data import pipeline
from ktda_jax.data.check import check_split
from ktda_jax.training.inputs import augmentation, features_folder, open_features, open_source
from ktda_jax.training.program import build
from ktda_jax.weights import folder
from ktda_jax.weights.folder import Weights

# Three patches of 14 and a part of one on each side; tiles as large as the crop.
SETTINGS = {"data.crop": (48, 48), "model.teacher.image_size": (48, 48), "data.photometric": False, "loss.alpha": 0.5}


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return runs.make_tiles(tmp_path_factory.mktemp("tiles"), train=5, size=48)


@pytest.fixture(scope="module")
def teacher(tiles, tmp_path_factory):
    """A folder with a teacher's weights."""
    path, config = tmp_path_factory.mktemp("weights") / "teacher", runs.config(tiles, SETTINGS)
    folder.save(path, Weights("teacher", model_of(Settings.of(config)).teacher, runs.random_teacher(config), {}))
    return path


@pytest.fixture
def config(tiles, teacher, tmp_path):
    """config(**overrides) with the teacher's weights, and features below tmp_path."""

    def make(**overrides):
        given = {"weights.teacher": str(teacher), "teacher.features": str(tmp_path / "features")}
        return runs.config(tiles, {**SETTINGS, **given, **{k.replace("__", "."): v for k, v in overrides.items()}})

    return make


def open_if_precomputed(config, source):
    settings = Settings.of(config)
    if settings.teacher.mode == "computed":
        return None
    identity = teacher_identity(settings.weights.teacher, settings.seed, model_of(settings))
    folder = features_folder(settings.teacher, settings.data)
    return open_features(folder, identity, settings.data.train_split, check_split(source).fingerprint)


def first_terms(config):
    """The terms of the first training step."""
    program, source = build(Settings.of(config)), open_source(Settings.of(config).data, "train")
    features = open_if_precomputed(config, source)
    batch = next(
        pipeline.train_iterator(
            source,
            augmentation=augmentation(Settings.of(config).data),
            batch_size=config.batch_size,
            seed=0,
            features=features,
        )
    )
    batch = sharding.to_global(program.mesh, {k: batch[k] for k in ("image", "label", "taps") if k in batch})
    arguments = jax.device_put(runs.random_state(program), program.shardings), batch, program.teacher()
    _, terms = program.train_step(*arguments)
    return jax.device_get(terms)


def test_precomputed_distillation_is_the_computed_one(config, tmp_path):
    """With flips, and with turns too, as the only augmentation, to the stored type's precision (bfloat16: 1e-3)."""
    model = dict(model__student__depths=(0, 0, 0, 0), model__aux_channels=0)
    for dtype, limit, rotate in (("bfloat16", 1e-3, False), ("float16", 1e-4, True)):
        computed = first_terms(config(**model, data__rotate=rotate))
        assert computed["distill"] > 0.1
        settings = dict(teacher__mode="precomputed", teacher__dtype=dtype, teacher__features=str(tmp_path / dtype))
        settings["data__rotate"] = rotate
        extract.run(config(**settings))
        assert opened(config(**settings)).views == (8 if rotate else 2)
        precomputed = first_terms(config(**settings, **model))
        assert precomputed["distill"] == pytest.approx(computed["distill"], rel=limit)
        assert precomputed["decode"] == pytest.approx(computed["decode"], rel=1e-6)
        assert precomputed["grad_norm"] == pytest.approx(computed["grad_norm"], rel=10 * limit)


def test_chosen_layers_are_stored_once(config, tmp_path):
    """A level without a layer, and one layer for two levels; other choices are refused."""
    chosen = dict(model__teacher__taps=(2, 2, None, 4), model__student__depths=(0, 0, 0, 0), model__aux_channels=0)
    computed = first_terms(config(**chosen))
    extract.run(stored := config(**chosen, teacher__mode="precomputed", teacher__dtype="float16"))
    precomputed = first_terms(stored)
    assert precomputed["distill"] == pytest.approx(computed["distill"], rel=1e-4)
    features = opened(stored)
    assert features.levels == [0, 0, None, 1] and len(features.read(0, False)) == 2
    with pytest.raises(
        UserError, match="there, but of 2 views of each tile, and config.data.rotate needs 8; choose ano"
    ):
        extract.run(config(**chosen, teacher__mode="precomputed", teacher__dtype="float16", data__rotate=True))
    with pytest.raises(UserError, match=r"are of other layers \(\[1, 1, None, 3\], wanted \[0, 1, 2, 3\]\)"):
        opened(config(teacher__mode="precomputed"))


def read_all(features):
    return np.stack([features.read(k, m).astype(np.float32) for k in range(len(features)) for m in (False, True)])


def opened(config):
    return open_if_precomputed(config, open_source(Settings.of(config).data, "train"))


def test_devices_and_batches_do_not_matter(config, tmp_path):
    """Five tiles on four devices: the last batch is padded."""
    one = config(teacher__mode="precomputed", eval_batch_size=5)
    extract.run(one)
    four = dict(mesh__data=4, eval_batch_size=4, teacher__features=str(tmp_path / "four"))
    four = config(teacher__mode="precomputed", **four)
    extract.run(four)
    ours, theirs = read_all(opened(four)), read_all(opened(one))
    assert len(ours) == 10 and (ours[0] != ours[1]).any()
    np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=1e-3)  # one step of bfloat16


def test_two_processes_are_one(config, tiles, teacher, tmp_path):
    settings = {**SETTINGS, "weights.teacher": teacher, "teacher.features": tmp_path / "two", "eval_batch_size": 2}
    for out, _ in map(runs.finish, runs.start_two(*runs.arguments(tiles, None, settings), verb="extract")):
        spoken = [line for line in out.splitlines() if "Gloo" not in line]
        assert not spoken or "5 tiles and their mirror images" in spoken[0]
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        "manifest.json", "records.npy", "features-00000-of-00002.array_record", "features-00001-of-00002.array_record",
    }  # fmt: skip
    extract.run(one := config(teacher__mode="precomputed"))
    two = config(teacher__mode="precomputed", teacher__features=str(tmp_path / "two"))
    np.testing.assert_allclose(read_all(opened(two)), read_all(opened(one)), rtol=1e-2, atol=1e-3)
    assert not list(tmp_path.glob(".*"))


def test_what_is_there_is_kept_and_what_differs_is_refused(config, tmp_path, capsys, tiles):
    settings = config(teacher__mode="precomputed")
    extract.run(settings)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()}
    extract.run(settings)
    assert "already" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "features").iterdir()} == before
    with pytest.raises(UserError, match="are of another split"):
        extract.run(config(data__train_split="val"))

    other = tmp_path / "tiles"
    shutil.copytree(tiles, other)
    path = other / "img_dir/train/t0.png"
    Image.fromarray(255 - np.array(Image.open(path))).save(path)
    with pytest.raises(UserError, match="features are of other tiles"):
        opened(config(teacher__mode="precomputed", data__root=str(other)))
    with pytest.raises(UserError, match="features are of a teacher of another antialias"):
        opened(config(teacher__mode="precomputed", model__teacher__antialias=True, weights__teacher=None))


def test_places_that_will_not_do(config, tmp_path):
    (tmp_path / "features").mkdir()  # made by hand: as good as none
    extract.run(config())
    with pytest.raises(UserError, match="features are there, but as bfloat16, not float16; choose another"):
        extract.run(config(teacher__dtype="float16"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="other exists and holds no teacher features; choose another"):
        extract.run(config(teacher__features=str(tmp_path / "other")))
    with pytest.raises(UserError, match="cannot write to config.teacher.features=/proc/x: "):
        extract.run(config(teacher__features="/proc/x"))
    with pytest.raises(UserError, match="images are smaller than the crop of 64 x 64"):
        extract.run(config(data__crop=(64, 64)))


def test_of_two_extractions_at_once_one_gives_way(config, tmp_path, monkeypatch):
    """And what a killed one left is no hindrance."""
    temporary = tmp_path / ".features.tmp"
    temporary.mkdir()
    (temporary / "features-00000-of-00001.array_record").write_bytes(b"half")
    write, refused = extract.FeatureWriter.write, []

    def during(*arguments):
        if not refused:
            by_us = f"features is being extracted by process {os.getpid()} on .* since .*; wait for it"
            with pytest.raises(UserError, match=by_us) as error:
                extract._claim(temporary, tmp_path / "features").__enter__()
            refused.append(error)
        return write(*arguments)

    monkeypatch.setattr(extract.FeatureWriter, "write", during)
    settings = config(teacher__mode="precomputed")
    extract.run(settings)
    assert refused and len(read_all(opened(settings))) == 10 and not list(tmp_path.glob(".features*"))
    with (
        pytest.raises(UserError, match="extracted by another process meanwhile"),
        extract._claim(temporary, tmp_path / "features"),
    ):
        pass
    assert len(read_all(opened(settings))) == 10


def test_another_teacher_is_refused(config, tmp_path, tiles):
    extract.run(settings := config(teacher__mode="precomputed"))
    arrays = {k: v + 1 for k, v in runs.random_teacher(settings).items()}
    folder.save(tmp_path / "other", Weights("teacher", model_of(Settings.of(settings)).teacher, arrays, {}))
    with pytest.raises(UserError, match="features are of another teacher's weights"):
        opened(config(teacher__mode="precomputed", weights__teacher=str(tmp_path / "other")))
    opened(config(teacher__mode="precomputed", weights__teacher=None))  # not named: the one that made them


def test_a_failure_leaves_nothing(config, tmp_path, monkeypatch):
    def fail(*_):
        raise UserError("no")

    monkeypatch.setattr(extract.FeatureWriter, "write", fail)
    with pytest.raises(UserError, match="no"):
        extract.run(config())
    assert not list(tmp_path.iterdir())


def test_what_was_stopped_goes_on_and_is_the_same(config, tmp_path, monkeypatch, capsys):
    """Three parts of two tiles at most; of another extraction's nothing is taken."""
    monkeypatch.setattr(extract, "PART", 2)
    settings = dict(teacher__mode="precomputed", eval_batch_size=1)
    write, written = extract.FeatureWriter.write, []

    def stop_at_the_fourth(writer, name, views):
        written.append(name)
        if len(written) == 4:
            raise KeyboardInterrupt
        write(writer, name, views)

    whole = config(**settings, teacher__features=str(tmp_path / "whole"))
    extract.run(whole)
    with monkeypatch.context() as patch:
        patch.setattr(extract.FeatureWriter, "write", stop_at_the_fourth)
        for dtype in ("float16", "bfloat16"):
            with pytest.raises(KeyboardInterrupt):
                extract.run(config(**settings, teacher__dtype=dtype))
            written.clear()
    assert "going on" not in capsys.readouterr().out and not (tmp_path / "features").exists()
    extract.run(stopped := config(**settings))
    assert "going on: 2 of 5 tiles are there\n" in capsys.readouterr().out
    ours, theirs = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("features", "whole")
    )
    assert ours == theirs and len([name for name in ours if name.endswith(".array_record")]) == 3
    assert len(read_all(opened(stopped))) == 10 and not list(tmp_path.glob(".*"))


def test_a_full_disk_is_said_first(config, tmp_path, monkeypatch):
    monkeypatch.setattr(extract.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(UserError, match=r"features needs up to 0.0 GB, but .* has only 0.0 GB free; choose another"):
        extract.run(config())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_training_from_features_through_the_command(tiles, teacher, tmp_path):
    settings = {**SETTINGS, "weights.teacher": teacher, "teacher.features": tmp_path / "features", "total_steps": 4}
    settings |= {"eval_every": 4, "teacher.mode": "precomputed", "model.student.depths": (0, 0, 0, 0)}
    flags = runs.arguments(tiles, tmp_path / "run", {**settings, "mesh.data": None})
    process = runs.start(*flags)
    assert process.communicate()[1].startswith(f"error: no teacher features in {tmp_path / 'features'} (no manifest")
    runs.finish(runs.start(*(flag for flag in flags if not flag.startswith("--workdir")), verb="extract"))
    out, err = runs.finish(runs.start(*flags))
    assert f"teacher: features in {tmp_path / 'features'}, made by {teacher}" in out
    assert "the teacher starts from random" not in out + err
    assert all(np.isfinite(row["train/distill"]) for row in runs.rows(tmp_path / "run")[:4])
    manifest = json.loads((tmp_path / "features" / "manifest.json").read_text())
    assert manifest["made_from"]["patch"] == 14 and len(manifest["made_from"]["sha256"]) == 64
