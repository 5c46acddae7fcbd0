"""What is kept, that it comes back bit for bit, on any mesh, and what is said when it does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ktda_jax import sharding
from ktda_jax.training.checkpoint import Checkpoints
from ktda_jax.training.state import TrainState


def make_state(step=0, *, width=4, ema=False) -> TrainState:
    params = {"head/kernel": jax.random.normal(jax.random.key(step), (64, 64 * width)), "head/bias": jnp.ones(width)}
    return TrainState(
        jnp.asarray(step, jnp.int32),
        params,
        {"bn/mean": jnp.full(3, 0.1)},
        optax.adamw(1e-3).init(params),
        jax.tree.map(jnp.copy, params) if ema else None,
    )


def shardings_of(state, data=1, fsdp=1):
    return sharding.tree_shardings(sharding.make_mesh(data, fsdp), state)


def saved(directory, scores: dict[int, float | None], **options) -> Checkpoints:
    with Checkpoints(directory) as checkpoints:
        for step, score in scores.items():
            metrics = None if score is None else {"mIoU": score}
            checkpoints.save(step, make_state(step, **options), {"at": step}, metrics)
    return Checkpoints(directory)


def kept(directory) -> set[int]:
    return {int(p.name) for p in directory.iterdir() if p.name.isdigit()}


@pytest.mark.parametrize("ema", [False, True])
def test_a_state_comes_back_bit_for_bit_with_the_data_position(tmp_path, ema):
    checkpoints = saved(tmp_path, {7: 50.0}, ema=ema)
    state = make_state(7, ema=ema)
    restored, position = checkpoints.restore(7, jax.eval_shape(lambda: state), shardings_of(state))
    assert position == {"at": 7} and jax.tree.structure(restored) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(restored), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_the_latest_and_the_best_are_kept(tmp_path):
    checkpoints = saved(tmp_path, {1: 10.0, 2: 30.0, 3: 20.0, 4: None, 5: 25.0, 6: None})
    assert kept(tmp_path) == {2, 6}
    assert checkpoints.best_step() == 2 and checkpoints.latest_step() == 6


def test_without_a_score_the_latest_is_the_best(tmp_path):
    assert Checkpoints(tmp_path).best_step() is None
    assert saved(tmp_path, {1: None, 2: None}).best_step() == 2
    assert kept(tmp_path) == {2}


def test_one_mesh_saves_and_another_restores(tmp_path):
    mesh, state = sharding.make_mesh(2, 4), make_state(3)
    state = jax.device_put(state, sharding.tree_shardings(mesh, state))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, state, {}, None)
    checkpoints.wait()
    restored, _ = checkpoints.restore(3, jax.eval_shape(lambda: state), shardings_of(state, 1, 2))
    assert len(restored.params["head/kernel"].sharding.device_set) == 2
    assert not restored.params["head/kernel"].is_fully_replicated
    np.testing.assert_array_equal(restored.params["head/kernel"], make_state(3).params["head/kernel"])


def test_the_checkpoint_of_another_model_is_named(tmp_path):
    other = make_state(width=5)
    with pytest.raises(ValueError, match=r"checkpoint .*/3 does not fit .* head/bias \(4,\) instead of \(5,\)"):
        saved(tmp_path, {3: 1.0}).restore(3, jax.eval_shape(lambda: other), shardings_of(other))


@pytest.mark.parametrize("ema", [False, True])
def test_ema_cannot_be_added_or_dropped_on_the_way(tmp_path, ema):
    other = make_state(ema=not ema)
    with pytest.raises(ValueError, match=f"trained {'with' if ema else 'without'} EMA; keep config.ema"):
        saved(tmp_path, {3: 1.0}, ema=ema).restore(3, jax.eval_shape(lambda: other), shardings_of(other))


def test_more_of_the_latest_are_kept_if_asked_for(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, score in {1: 10.0, 2: 30.0, 3: 20.0, 4: None, 5: 25.0}.items():
            checkpoints.save(step, make_state(step), {}, score and {"mIoU": score})
    assert kept(tmp_path) == {2, 4, 5}
