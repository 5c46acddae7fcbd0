"""The teacher's taps, standardised: by what was measured on the training images, before the first step."""

import jax
import numpy as np
import pytest
import runs

from ktda_jax.config.model import model_of
from ktda_jax.data import pipeline
from ktda_jax.models import flat
from ktda_jax.models.initial import HostRngs
from ktda_jax.models.ktda import KTDA, normalize
from ktda_jax.models.taps import TapStatistics
from ktda_jax.training import losses, tap_statistics
from ktda_jax.training.inputs import augmentation, open_source
from ktda_jax.training.program import build


def test_channels_get_mean_0_and_variance_1():
    rng = np.random.default_rng(0)
    taps = [rng.normal(3, [1, 5, 0.1], (4, 5, 5, 3)).astype(np.float32) for _ in range(3)] + [None]
    module = TapStatistics(4, 3, param_dtype=np.float32)
    module.mean[...] = np.stack([*(t.mean((0, 1, 2)) for t in taps[:3]), np.zeros(3)])
    module.var[...] = np.stack([*(t.var((0, 1, 2)) for t in taps[:3]), np.ones(3)])
    *standard, none = module(taps)
    assert none is None
    for found, tap in zip(standard, taps, strict=False):
        np.testing.assert_allclose(found, (tap - tap.mean((0, 1, 2))) / tap.std((0, 1, 2)), atol=2e-5)


@pytest.mark.parametrize("mesh", [(1, 1), (2, 4)])
def test_statistics_are_those_of_the_first_batches_which_training_sees_again(tmp_path, monkeypatch, mesh):
    monkeypatch.setattr(tap_statistics, "IMAGES", 16)
    tiles = runs.make_tiles(tmp_path)
    given = {"model.standardize_taps": True, "mesh.data": mesh[0], "mesh.fsdp": mesh[1], "batch_size": 8}
    settings = runs.settings(tiles, {**given, "eval_batch_size": 8, "model.teacher.taps": (1, None, 3, 4)})
    program, source = build(settings), open_source(settings.data, "train")
    options = dict(augmentation=augmentation(settings.data), batch_size=8, seed=0, num_threads=0)
    batches, again = (pipeline.train_iterator(source, **options) for _ in range(2))
    found = tap_statistics.with_statistics(runs.random_state(program), program, settings, batches)
    np.testing.assert_array_equal(next(batches)["image"], next(again)["image"])

    again = pipeline.train_iterator(source, **options)
    images = np.concatenate([next(again)["image"] for _ in range(2)])
    teacher = flat.merge(program.teacher_graphdef, jax.device_get(program.teacher()), {})
    taps = teacher(normalize(images, np.float32))
    for level, tap in enumerate(taps):
        mean, var = (found.batch_stats[k][level] for k in (tap_statistics.MEAN, tap_statistics.VAR))
        if tap is None:
            assert not np.any(mean) and np.all(np.asarray(var) == 1)
            continue
        np.testing.assert_allclose(mean, np.asarray(tap).mean((0, 1, 2)), atol=2e-5)
        np.testing.assert_allclose(var, np.asarray(tap).var((0, 1, 2)), rtol=2e-4)


def test_a_student_that_gives_the_standardised_taps_has_no_loss(tmp_path):
    """And the published loss of the same is another: the model's `scaled` is what is compared."""
    settings = runs.settings(tmp_path, {"model.standardize_taps": True})
    model = KTDA(model_of(settings), rngs=HostRngs(0))
    rng = np.random.default_rng(0)
    model.taps.mean[...] = rng.normal(size=(4, 16)).astype(np.float32)
    model.taps.var[...] = rng.random((4, 16)).astype(np.float32) + 0.5
    taps = [rng.normal(size=(2, 5, 5, 16)).astype(np.float32) for _ in range(4)]
    scaled = model.scaled(taps)
    for distance in ("published", "mse", "cosine"):
        assert float(losses.distillation(scaled, scaled, distance=distance)) == pytest.approx(0, abs=1e-5)
        assert float(losses.distillation(taps, scaled, distance=distance)) > 0.01
