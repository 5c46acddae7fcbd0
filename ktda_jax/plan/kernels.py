"""Bytes that the kernels of splash attention read and write: XLA counts none, and looks at no kernel's inside.

A kernel goes through its grid in order and reads a block again only where that is another one than the step before.
Arrays lie in memory in tiles of 128 lanes, so that 97 channels are as many bytes as 128.
"""

import math

from ktda_jax.models.splash import LANES
from ktda_jax.plan import flops


def touched(jaxpr) -> int:
    """Bytes of all kernels in a program, on one chip of those that it is for."""
    total = 0
    for equation in flops.used(jaxpr):
        name = equation.primitive.name
        if name == "pallas_call":
            total += _of_attention(equation)
        else:
            again = 1 if name == "shard_map" else flops.times(equation)
            total += again * sum(map(touched, flops.inside(equation)))
    return total


def _of_attention(equation) -> int:
    """The grid ends with heads, blocks of queries, of keys; backward with blocks of keys, heads, blocks of queries."""
    name, grid = equation.params["name"], equation.params["grid_mapping"].grid
    given = [v.aval for v in equation.invars if v.aval.dtype.kind != "i"]  # integers say what is masked
    arrays = list(map(_size, given))
    # Some versions of JAX list what stays in the chip's own memory too, without heads.
    results = sum(_size(v.aval) for v in equation.outvars if v.aval.ndim >= given[0].ndim)
    if name.startswith("splash_mha_fwd"):
        query, *keys = arrays
        return query + sum(keys) * (grid[-2] if grid[-1] > 1 else 1) + results
    if name.startswith("splash_mha_dkv"):
        query, key, value, *others = arrays  # logarithms of sums, the gradient of the result, its products with it
        return key + value + (query + sum(others)) * grid[-3] + results
    raise ValueError(f"the kernel {name} is not known here")


def _size(array) -> int:
    *shape, channels = array.shape
    return math.prod(shape) * -(-channels // LANES) * LANES * array.dtype.itemsize
