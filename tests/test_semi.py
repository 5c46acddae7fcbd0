"""Learning from the average's own labels: which pixels count, what is mixed, and what it touches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import scene_files

from ktda_jax import sharding
from ktda_jax.config.settings import Settings
from ktda_jax.training import semi
from ktda_jax.training.inputs import open_inputs
from ktda_jax.training.program import build


def test_only_confident_pixels_are_labelled():
    probabilities = np.array([[0.97, 0.03], [0.04, 0.96], [0.5, 0.5], [0.94, 0.06]], np.float32).reshape(1, 2, 2, 2)
    labels, share = semi.pseudo_labels(lambda x: jnp.log(probabilities), np.zeros((1, 2, 2, 3)), 0.95)
    assert labels.tolist() == [[[0, 1], [255, 255]]] and float(share) == 0.5


def test_cutmix_takes_image_and_label_from_the_same_places():
    """One rectangle per row, of the next row; neither empty nor everything."""
    images = jnp.arange(6.0)[:, None, None, None] * jnp.ones((6, 40, 30, 3))
    labels = jnp.arange(6, dtype=jnp.uint8)[:, None, None] * jnp.ones((6, 40, 30), jnp.uint8)
    mixed, classes = semi.cutmix(images, labels, jax.random.key(0))
    np.testing.assert_array_equal(mixed[..., 0], classes)
    shares = []
    for row in range(6):
        other = np.asarray(classes[row] == (row - 1) % 6)
        assert (other | np.asarray(classes[row] == row)).all()
        rows, columns = other.any(1), other.any(0)
        assert (other == rows[:, None] & columns[None]).all() and (np.abs(np.diff(rows * 1)).sum() <= 2)
        shares.append(other.mean())
    assert 0.15 < min(shares) and max(shares) < 0.95


def test_colours_are_distorted_per_image_and_stay_in_range():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
    found = np.asarray(semi.distorted(images, jax.random.key(1)))
    assert found.shape == images.shape and found.min() >= 0 and found.max() <= 255
    changes = (found - images).mean((1, 2, 3))
    assert len(set(changes.round(3).tolist())) == 4
    np.testing.assert_array_equal(found, semi.distorted(images, jax.random.key(1)))


def test_a_step_learns_from_labels_and_from_itself(tmp_path):
    """The ramp begins at 0; BatchNorm's running statistics are those of a training on the labelled rows alone."""
    tiles = runs.make_tiles(tmp_path / "tiles")
    rng = np.random.default_rng(0)
    scene_files.write(tmp_path / "scene.tif", rng.integers(0, 256, (200, 200, 3)).astype(np.uint8))
    given = {
        "data.unlabelled": str(tmp_path / "scene.tif"), "distill": False, "ema": 0.9, "semi.weight": 0.5,
        "semi.threshold": 0.0, "semi.ramp": 2, "batch_size": 16, "eval_batch_size": 8, "model.dropout": 0.0,
        "model.student.drop_path": 0.0, "mesh.data": 2, "mesh.fsdp": 4,
    }  # fmt: skip
    settings = Settings.of(runs.config(tiles, given))
    program = build(settings)
    batch = next(open_inputs(settings, program.mixture).batches)
    rows = sharding.to_global(program.mesh, {k: batch[k] for k in ("image", "label")})
    current = jax.device_put(runs.random_state(program), program.shardings)
    terms, states = [], []
    for _ in range(2):
        current, found = program.train_step(current, rows, {})
        terms.append(jax.device_get(found))
        states.append(jax.device_get(current.batch_stats))
    assert terms[0]["pseudo"] == 0 < terms[1]["pseudo"] and terms[0]["confident"] == 100
    assert terms[1]["loss"] == pytest.approx(sum(float(terms[1][k]) for k in ("decode", "aux", "pseudo")), rel=1e-5)

    few = {**given, "data.unlabelled": None, "semi.weight": 0.0, "batch_size": 8}
    alone = build(Settings.of(runs.config(tiles, few)))
    labelled = [row for row in range(16) if program.mixture.place(row)[0]]
    rows = sharding.to_global(alone.mesh, {k: batch[k][labelled] for k in ("image", "label")})
    state, _ = alone.train_step(jax.device_put(runs.random_state(alone), alone.shardings), rows, {})
    for path, value in jax.device_get(state.batch_stats).items():
        np.testing.assert_allclose(states[0][path], value, rtol=1e-4, atol=1e-5, err_msg=path)
