"""Learning rates, weight decay and AdamW against the reference implementation and torch."""

import json

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ktda_jax.training import optim
from ktda_jax.weights import mmseg

PUBLISHED = {
    "grass": dict(total_steps=23_000, warmup=1150),
    "cloud": dict(total_steps=80_000, warmup=2000, poly_begin=1000),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_learning_rates_equal_the_reference_traces(name):
    steps, rates = np.loadtxt(golden.GOLDENS / f"lr_{name}.csv", delimiter=",", skiprows=1).T
    with jax.enable_x64(True):
        ours = np.asarray(optim.warmup_poly(6e-4, **PUBLISHED[name])(steps))
    np.testing.assert_allclose(ours, rates, rtol=1e-9, atol=0)
    single = np.asarray(optim.warmup_poly(6e-4, **PUBLISHED[name])(steps.astype(np.int32)))  # as training computes it
    np.testing.assert_allclose(single, rates, rtol=0, atol=1e-9)


def test_no_decay_set_is_the_published_one():
    rows = json.loads((golden.GOLDENS / "parameters_base.json").read_text())
    assert len(rows) == 607
    for row in rows:
        assert row["trainable"]
        assert optim.decays(mmseg.our_path(row["name"])) == (row["weight_decay"] > 0), row["name"]


def test_adamw_is_torchs():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    start = {k: rng.normal(size=(4, 3)).astype(np.float32) for k in ("a/kernel", "a/norm/scale")}
    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
    groups = [
        {"params": [theirs["a/kernel"]], "weight_decay": 0.01},
        {"params": [theirs["a/norm/scale"]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2)
    optimizer = optim.adamw(lambda step: 1e-2)
    params = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(params)
    for _ in range(5):
        grads = {k: rng.normal(size=(4, 3)).astype(np.float32) for k in start}
        for k, g in grads.items():
            theirs[k].grad = torch.tensor(g)
        reference.step()
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for k in start:
        np.testing.assert_allclose(params[k], theirs[k].detach(), rtol=1e-5, atol=1e-6)


def test_clipping_bounds_the_global_norm():
    params = {"a": jnp.zeros(3), "b": jnp.zeros(2)}
    grads = {"a": jnp.full(3, 10.0), "b": jnp.full(2, 10.0)}
    clip = optax.clip_by_global_norm(1.0)
    clipped, _ = clip.update(grads, clip.init(params))
    optimizer = optim.adamw(lambda step: 1.0, b1=0.0, b2=0.0, weight_decay=0.0, clip_norm=1.0)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    moments = optax.tree_utils.tree_get(state, "mu")
    np.testing.assert_allclose(moments["a"], clipped["a"], rtol=1e-6)


@pytest.mark.parametrize("mult", [0.0, 0.1])
def test_student_and_fam_take_other_steps(mult):
    params = {
        k: jnp.ones((2, 2)) for k in ("student/a/kernel", "fam/b/kernel", "neck/fam/kernel", "decode_head/kernel")
    }
    grads = {k: jnp.full((2, 2), 3.0) for k in params}
    whole, part = (optim.adamw(lambda step: 1e-2, student_lr_mult=m) for m in (1.0, mult))
    (all_, state), (some, _) = (o.update(grads, o.init(params), params) for o in (whole, part))
    for path in params:
        times = mult if path.startswith(("student/", "fam/")) else 1.0
        np.testing.assert_allclose(some[path], times * all_[path], rtol=1e-6)
    before = optim.adamw(lambda step: 1e-2)  # as workdirs from before the setting have it
    assert jax.tree.structure(before.init(params)) == jax.tree.structure(state)


def test_all_that_the_optimiser_keeps_begins_at_zero():
    """A training makes it so on the host, without asking the optimiser (program.py)."""
    kept = optim.adamw(lambda step: 1.0, clip_norm=1.0).init({"a/norm": jnp.ones(3), "b": jnp.ones((2, 2))})
    assert len(jax.tree.leaves(kept)) == 6 and not any(np.any(leaf) for leaf in jax.tree.leaves(kept))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(total_steps=0, warmup=0), "total_steps is 0"),
        (dict(total_steps=100, warmup=200), "warmup 200, poly_begin 200 do not fit into total_steps 100"),
    ],
)
def test_impossible_schedules_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        optim.warmup_poly(1e-3, **arguments)


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert float(optim.warmup_poly(1e-3, 10, warmup=0)(0)) == pytest.approx(1e-3)
    assert float(optim.warmup_poly(1e-3, 10, warmup=0)(9)) == pytest.approx(0.0)
