"""Modules as flat dicts and back; one message for all that does not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ktda_jax.models import flat
from ktda_jax.models.layers import BatchNorm


class Block(nnx.Module):
    """A parameter at a list index, and BatchNorm statistics."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs)])
        self.bn = BatchNorm(4, dtype=jnp.float32, param_dtype=jnp.float32)

    def __call__(self, x):
        return self.bn(self.layers[0](x), train=True)


def test_paths_are_flat_and_statistics_apart():
    _, params, stats = flat.split(Block(nnx.Rngs(0)))
    assert set(params) == {"layers/0/kernel", "layers/0/bias", "bn/scale", "bn/bias"}
    assert set(stats) == {"bn/mean", "bn/var"}
    assert flat.count(params) == 3 * 4 + 4 + 4 + 4


def test_merge_is_the_inverse_of_split():
    module = Block(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 3))
    merged = flat.merge(*flat.split(module))
    np.testing.assert_array_equal(merged(x), module(x))


def test_statistics_come_out_of_a_traced_call_and_leave_the_input_alone():
    graphdef, params, stats = flat.split(Block(nnx.Rngs(0)))

    @jax.jit
    def call(params, stats, x):
        module = flat.merge(graphdef, params, stats)
        module(x)
        return flat.batch_stats(module)

    x = jax.random.normal(jax.random.key(1), (2, 5, 5, 3)) + 7
    new = call(params, stats, x)
    assert new.keys() == stats.keys()
    assert not np.allclose(new["bn/mean"], 0) and np.allclose(stats["bn/mean"], 0)


def test_abstract_allocates_nothing():
    _, params, _ = flat.abstract(lambda: Block(nnx.Rngs(0)))
    assert all(isinstance(p, jax.ShapeDtypeStruct) for p in params.values())


def test_all_misfits_are_named_at_once():
    found = {"same": np.zeros(2), "shape": np.zeros(3), "extra": np.zeros(1)}
    expected = {"same": np.zeros(2), "shape": np.zeros(4), **{f"gone{k}": np.zeros(1) for k in range(6)}}
    with pytest.raises(ValueError) as error:
        flat.check_shapes(found, expected, "w.safetensors")
    assert str(error.value) == (
        "w.safetensors does not fit the model: missing gone0, gone1, gone2, gone3 and 2 more; "
        "unexpected extra; shapes differ: shape (3,) instead of (4,)"
    )
    flat.check_shapes(expected, expected, "itself")
