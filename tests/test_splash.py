"""The fused attention of TPUs: on CPU in Pallas's interpreter against the plain form, and compiled for real chips."""

import functools
import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from ktda_jax import sharding
from ktda_jax.models import splash
from ktda_jax.models.attention import attention
from ktda_jax.plan import flops, kernels


def value_and_grads(function, query, key, value, dout):
    out, pullback = jax.vjp(function, query, key, value)
    return out, *pullback(dout)


def arrays(*shape, dtype=jnp.float32):
    return [jax.random.normal(key, shape, dtype) for key in jax.random.split(jax.random.key(0), 4)]


def assert_equal_to(form, shape):
    given = arrays(*shape)
    found = value_and_grads(functools.partial(splash.splash, interpret=True), *given)
    expected = value_and_grads(functools.partial(attention, implementation=form), *given)
    for ours, theirs in zip(found, expected, strict=True):
        assert float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max()) < 1e-5


@pytest.mark.parametrize("tokens", [361, 384])
def test_forward_and_gradients_with_padding_and_without(tokens):
    assert_equal_to("plain", (1, tokens, 2, 24))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1, 1444, 2, 96), (1, 5776, 1, 96)])
def test_several_blocks(shape):
    assert_equal_to("chunked", shape)


def test_on_a_mesh_every_device_has_its_rows():
    mesh = sharding.make_mesh(data=2, fsdp=2, devices=jax.devices()[:4])
    given = arrays(4, 130, 2, 8)
    rows = [jax.device_put(x, sharding.batch_sharding(mesh)) for x in given]
    function = functools.partial(value_and_grads, functools.partial(splash.splash, interpret=True))
    step = jax.jit(sharding.on_mesh(mesh, function)).lower(*rows).compile()
    for collective in ("all-gather", "all-to-all", "all-reduce", "collective-permute"):
        assert collective not in step.as_text()
    expected = value_and_grads(functools.partial(attention, implementation="plain"), *given)
    for ours, theirs in zip(step(*rows), expected, strict=True):
        assert ours.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 4)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "shape, dtype, platform, chosen",
    [
        ((8, 5776, 8, 96), jnp.bfloat16, "tpu", True),  # the FMM's first level
        ((8, 362, 12, 64), jnp.bfloat16, "tpu", True),  # the teacher
        ((8, 5776, 8, 96), jnp.float32, "tpu", False),
        ((8, 81, 8, 96), jnp.bfloat16, "tpu", False),  # the plain form's scores are small
        ((6, 5776, 8, 96), jnp.bfloat16, "tpu", False),  # four devices cannot share six
        ((8, 1370, 32, 128), jnp.bfloat16, "tpu", False),  # no lane is left for the padding
        ((8, 5776, 8, 96), jnp.bfloat16, "cpu", False),
    ],
)
def test_where_it_is_chosen(shape, dtype, platform, chosen):
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    mesh = AbstractMesh((2, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, abstract_device=device)
    x = jax.ShapeDtypeStruct(shape, dtype)
    assert not splash.fits(x)  # no mesh
    with jax.sharding.use_abstract_mesh(mesh):
        assert splash.fits(x) == chosen
        assert ("pallas_call" in str(jax.make_jaxpr(attention)(x, x, x))) == chosen


@pytest.mark.parametrize("tokens", [324, 361, 362, 600, 1369, 1370, 1444, 5476, 5776, 21904])
def test_blocks_divide_the_padded_tokens(tokens):
    padded, sizes = splash.blocks(tokens)
    of_queries = sizes.block_q, sizes.block_q_dkv
    of_keys = sizes.block_kv, sizes.block_kv_compute, sizes.block_kv_dkv, sizes.block_kv_dkv_compute
    assert tokens <= padded < 1.3 * tokens
    assert all(padded % block == 0 and block % splash.LANES == 0 for block in (*of_queries, *of_keys))
    assert sizes.block_kv_dkv % sizes.block_kv_dkv_compute == 0 and min(of_queries) >= 256


def test_operations_and_bytes_by_hand():
    """3,000 tokens are 3,072; forward in 3 x 3 blocks of 1,024, backward in 2 x 6 of 1,536 keys and 512 queries."""
    x = jax.ShapeDtypeStruct((1, 3000, 2, 24), jnp.bfloat16)
    forward = jax.make_jaxpr(splash.splash)(x, x, x).jaxpr
    both = jax.make_jaxpr(functools.partial(value_and_grads, splash.splash))(x, x, x, x).jaxpr
    square, heads = 3072**2, 2
    assert flops.of_jaxpr(forward) == heads * square * 2 * (25 + 24)
    rows = heads * 3072 * 2 * 24  # the result times its gradient, outside of the kernels
    assert flops.of_jaxpr(both) == heads * square * 2 * ((25 + 24) + (3 * 25 + 2 * 24)) + rows
    array = heads * 3072 * 128 * 2  # of any of them: channels fill 128 lanes
    statistics = heads * 3072 * 128 * 4  # one number a query in every lane
    assert kernels.touched(forward) == array + 3 * 2 * array + array
    vectors = 2 * heads * 8 * 3072 * 4  # the logarithms and the products, in eight rows
    # Keys and values once, the rest for both blocks of keys, two partial gradients of the queries, and two whole ones.
    backward = 2 * array + 2 * (2 * array + vectors) + 2 * array + 2 * array
    assert kernels.touched(both) == array + 3 * 2 * array + array + statistics + backward


def test_kernels_count_for_every_device_and_every_turn():
    mesh = sharding.make_mesh(devices=jax.devices()[:4])
    x = jax.ShapeDtypeStruct((4, 300, 2, 24), jnp.bfloat16)
    one = jax.ShapeDtypeStruct((1, 300, 2, 24), jnp.bfloat16)
    alone = jax.make_jaxpr(splash.splash)(one, one, one).jaxpr
    split = jax.make_jaxpr(sharding.on_mesh(mesh, splash.splash))(x, x, x).jaxpr
    assert kernels.touched(split) == kernels.touched(alone) > 0  # of one chip
    assert flops.of_jaxpr(split) == 4 * flops.of_jaxpr(alone)  # of all
    turns = jax.make_jaxpr(lambda x: jax.lax.scan(lambda y, _: (splash.splash(y, y, y), None), x, None, 5)[0])(one)
    assert kernels.touched(turns.jaxpr) == 5 * kernels.touched(alone)


COMPILE = """
import sys
from ktda_jax.plan import compile  # first: it says how libtpu is to behave
import jax, jax.numpy as jnp
from ktda_jax import sharding
from ktda_jax.models.attention import attention
jax.config.update("jax_platforms", "cpu")
topology, *shape = sys.argv[1], *map(int, sys.argv[2:])
mesh = sharding.make_mesh(devices=compile._devices(topology))
shape[0] *= mesh.size
x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding.batch_sharding(mesh))

def gradients(query, key, value, dout):
    out, pullback = jax.vjp(attention, query, key, value)
    return out, pullback(dout)

text = jax.jit(sharding.on_mesh(mesh, gradients)).lower(x, x, x, x).compile().as_text()
print("splash_mha_fwd" in text and "splash_mha_dkv" in text, "all-gather" in text)
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'")
@pytest.mark.parametrize(
    "topology, shape",
    [
        ("v5e:2x2", (1, 362, 12, 64)),
        pytest.param("v5e:2x2", (4, 5776, 8, 96), marks=pytest.mark.slow),
        pytest.param("v6e:2x2", (1, 1370, 12, 64), marks=pytest.mark.slow),
    ],
)
def test_it_compiles_for_real_chips(topology, shape):
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, topology, *map(str, shape)], capture_output=True, text=True, timeout=900
    )
    assert done.stdout.split() == ["True", "False"], done.stderr[-2000:]
