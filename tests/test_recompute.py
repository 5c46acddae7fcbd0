"""Recomputation changes the memory of the backward pass, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ktda_jax.models import flat, recompute
from ktda_jax.models.layers import gelu
from ktda_jax.models.recompute import activation_linear, norm_linear

pytestmark = pytest.mark.usefixtures("all_recomputed")


def parts():
    rngs = nnx.Rngs(0)
    return nnx.LayerNorm(8, rngs=rngs), nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)


def test_outputs_and_gradients_are_those_of_the_plain_computation():
    graphdef, params, _ = flat.split(nnx.List(parts()))
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))

    def plain(params, x):
        norm, first, second = flat.merge(graphdef, params, {})
        return second(gelu(first(norm(x))))

    def thrifty(params, x):
        norm, first, second = flat.merge(graphdef, params, {})
        return activation_linear(gelu, second, norm_linear(norm, first, x))

    def values(function):
        return jax.jit(jax.value_and_grad(lambda p, x: jnp.sin(function(p, x)).sum(), argnums=(0, 1)))(params, x)

    for a, b in zip(jax.tree.leaves(values(plain)), jax.tree.leaves(values(thrifty)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_chain_of_blocks_needs_less_memory():
    graphdef, params, _ = flat.split(nnx.List(parts()))

    def temporary(thrifty):
        def block(params, x):
            norm, first, second = flat.merge(graphdef, params, {})
            if thrifty:
                return x + activation_linear(gelu, second, norm_linear(norm, first, x))
            return x + second(gelu(first(norm(x))))

        def loss(params, x):
            for _ in range(6):
                x = block(params, x)
            return jnp.square(x).sum()

        x = jax.ShapeDtypeStruct((4, 1000, 8), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(params, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(True) < 0.7 * temporary(False)


def test_small_arrays_are_kept(monkeypatch):
    """Nothing is gained with them, and each recomputation is to be compiled too."""
    monkeypatch.setattr(recompute, "SMALL", 4 * 2 * 5 * 8)
    first = parts()[1]
    for tokens, recomputed in ((4, False), (5, True)):
        x = jax.ShapeDtypeStruct((2, tokens, 8), jnp.float32)
        program = jax.make_jaxpr(lambda x: activation_linear(jnp.sin, first, x))(x)
        assert ("custom_vjp" in str(program)) == recomputed
