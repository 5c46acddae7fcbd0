"""Initial weights: the distributions of the published code, drawn by JAX where a module is traced, else by numpy.

Hundreds of random draws take XLA's CPU compiler many seconds; numpy needs no compiler. So a training builds its model
on the host, with `HostRngs` in the place of `nnx.Rngs`.
"""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import nnx


class HostRngs:
    """Gives a module what it asks `nnx.Rngs` for, but numpy generators instead of keys, each a stream of its own."""

    def __init__(self, seed: int):
        self._seeds = np.random.SeedSequence(seed)

    def params(self) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(self._seeds.spawn(1)[0]))


def _either(traced: Callable, host: Callable) -> Callable:
    def init(key, shape, dtype=jnp.float32):
        """`key`: JAX's, or a numpy generator, which draws float32 or float64."""
        if isinstance(key, np.random.Generator):
            return host(key, shape, np.dtype(dtype))
        return traced(key, shape, dtype)

    return init


def normal(stddev: float) -> Callable:
    """init(key, shape, dtype): mean 0, standard deviation `stddev`."""

    def host(rng, shape, dtype):
        values = rng.standard_normal(shape, dtype)
        values *= stddev  # in place: a base model's arrays are large
        return values

    return _either(nnx.initializers.normal(stddev), host)


def _fans(shape) -> tuple[int, int]:
    """Inputs and outputs that a kernel (..., in, out) connects."""
    area = math.prod(shape[:-2])
    return area * shape[-2], area * shape[-1]


def _kaiming(rng, shape, dtype):
    return normal(math.sqrt(2 / _fans(shape)[1]))(rng, shape, dtype)


def _xavier(rng, shape, dtype):
    bound = math.sqrt(6 / sum(_fans(shape)))
    values = rng.random(shape, dtype)
    values *= 2 * bound
    values -= bound
    return values


trunc_normal = normal(0.02)  # torch's trunc_normal_(std=0.02) cuts at +-2, a hundred standard deviations
# Of mmcv's ConvModule, and of mmseg's MultiLevelNeck.
kaiming_normal_fan_out = _either(nnx.initializers.variance_scaling(2.0, "fan_out", "normal"), _kaiming)
xavier_uniform = _either(nnx.initializers.xavier_uniform(), _xavier)
