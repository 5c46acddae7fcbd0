"""Small layers shared by the models: resizing and pooling as torch does them, BatchNorm, drop path, dropout.

Resizing and adaptive pooling are linear and separable, so both are two matrix products with constant matrices:
exact, differentiable, and fast on every backend.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ktda_jax.models.initial import kaiming_normal_fan_out


def at_least_float32(x: jax.Array) -> jax.Array:
    """Promotes half precision to float32 and leaves float64 alone: for statistics, softmax, losses."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def gelu(x: jax.Array) -> jax.Array:
    """Exact GELU in torch's form. jax.nn.gelu's erfc branches: on CPU its gradient keeps twice as many arrays."""
    wide = at_least_float32(x)
    return (0.5 * wide * (1 + jax.lax.erf(wide * 0.5**0.5))).astype(x.dtype)


def layer_norm(features: int, eps: float, *, dtype, param_dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm over channels with two-pass float32 statistics (flax's fast variance loses digits)."""
    return nnx.LayerNorm(
        features, epsilon=eps, use_fast_variance=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs
    )


def _linear_taps(position: float, size: int) -> list[tuple[int, float]]:
    position = max(position, 0.0)
    low = min(int(position), size - 1)
    fraction = position - low
    return [(low, 1.0 - fraction), (min(low + 1, size - 1), fraction)]


def _cubic_taps(position: float, size: int, a: float = -0.75) -> list[tuple[int, float]]:
    low = math.floor(position)
    t = position - low

    def near(x):
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x):
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    weights = [far(t + 1), near(t), near(1 - t), far(2 - t)]
    return [(min(max(low - 1 + k, 0), size - 1), w) for k, w in enumerate(weights)]


def resize_matrix(source: int, target: int, *, method: str, scale: float | None = None) -> np.ndarray:
    """(target, source) float64 weights of `torch.nn.functional.interpolate(align_corners=False)`.

    `method`: bilinear, bicubic, or bicubic_antialias (antialias=True, whose cubic has another a). `scale` is source
    pixels per target pixel: torch takes source / target when called with a size and 1 / scale_factor when called
    with a factor; they differ where the factor does not divide (19 -> 9).
    """
    scale = source / target if scale is None else scale
    if method == "bicubic_antialias":
        return _antialias_matrix(source, target, scale)
    taps = {"bilinear": _linear_taps, "bicubic": _cubic_taps}[method]
    matrix = np.zeros((target, source))
    for row in range(target):
        for column, weight in taps((row + 0.5) * scale - 0.5, source):
            matrix[row, column] += weight
    return matrix


def _antialias_matrix(source: int, target: int, scale: float, a: float = -0.5) -> np.ndarray:
    """A cubic filter as wide as a target pixel where that covers several source pixels, as Pillow's."""
    wide = max(scale, 1.0)
    centres = scale * (np.arange(target) + 0.5)
    x = np.abs((np.arange(source) + 0.5 - centres[:, None]) / wide)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    matrix = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    return matrix / matrix.sum(1, keepdims=True)


def pool_matrix(source: int, target: int) -> np.ndarray:
    """(target, source) float64 weights of torch's adaptive average pooling (overlapping bins)."""
    matrix = np.zeros((target, source))
    for row in range(target):
        start, stop = row * source // target, -(-(row + 1) * source // target)
        matrix[row, start:stop] = 1.0 / (stop - start)
    return matrix


def _separable(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    """x: (B, H, W, C) -> (B, len(rows), len(columns), C)."""
    x = jnp.einsum("oh,bhwc->bowc", jnp.asarray(rows, x.dtype), x)
    return jnp.einsum("ow,bhwc->bhoc", jnp.asarray(columns, x.dtype), x)


def resize(x: jax.Array, size: tuple[int, int], *, method: str = "bilinear", scale: float | None = None) -> jax.Array:
    """x: (B, H, W, C) -> (B, *size, C), as torch's interpolate without align_corners; see `resize_matrix`."""
    height, width = x.shape[1:3]
    if (height, width) == tuple(size) and scale in (None, 1.0):
        return x
    return _separable(
        x,
        resize_matrix(height, size[0], method=method, scale=scale),
        resize_matrix(width, size[1], method=method, scale=scale),
    )


def adaptive_avg_pool(x: jax.Array, bins: int) -> jax.Array:
    """x: (B, H, W, C) -> (B, bins, bins, C)."""
    return _separable(x, pool_matrix(x.shape[1], bins), pool_matrix(x.shape[2], bins))


def drop_path(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Stochastic depth: zeroes whole samples of x: (B, ...) with probability `rate`. `key` None: evaluation."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0],) + (1,) * (x.ndim - 1))
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


def dropout2d(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes whole channels of x: (B, H, W, C), as torch's Dropout2d. `key` None: evaluation."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, (x.shape[0], 1, 1, x.shape[3]))
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))


class BatchNorm(nnx.Module):
    """torch's BatchNorm2d on NHWC: the running variance is the unbiased one, which flax's is not.

    Under jit the batch axis is global, so statistics span all devices (SyncBN).
    """

    def __init__(self, features: int, *, eps: float = 1e-5, momentum: float = 0.1, dtype, param_dtype):
        self.scale = nnx.Param(jnp.ones(features, param_dtype))
        self.bias = nnx.Param(jnp.zeros(features, param_dtype))
        wide = jnp.promote_types(param_dtype, jnp.float32)
        self.mean = nnx.BatchStat(jnp.zeros(features, wide))
        self.var = nnx.BatchStat(jnp.ones(features, wide))
        self.eps, self.momentum, self.dtype = eps, momentum, dtype

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """x: (B, H, W, C). In training uses and accumulates the statistics of the global batch."""
        x = at_least_float32(x)
        if train:
            mean = x.mean((0, 1, 2))
            var = jnp.square(x - mean).mean((0, 1, 2))
            count = math.prod(x.shape[:3])
            unbiased = var * (count / max(count - 1, 1))
            self.mean[...] = (1 - self.momentum) * self.mean[...] + self.momentum * mean
            self.var[...] = (1 - self.momentum) * self.var[...] + self.momentum * unbiased
        else:
            mean, var = self.mean[...], self.var[...]
        scale = self.scale[...] * jax.lax.rsqrt(var + self.eps)
        return ((x - mean) * scale + self.bias[...]).astype(self.dtype)


class ConvBNReLU(nnx.Module):
    """Convolution without bias, BatchNorm, ReLU (mmcv's ConvModule as UPerHead and FCNHead use it)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.conv = conv(
            inputs, outputs, kernel, use_bias=False, kernel_init=kaiming_normal_fan_out,
            dtype=dtype, param_dtype=param_dtype, rngs=rngs,
        )  # fmt: skip
        self.bn = BatchNorm(outputs, dtype=dtype, param_dtype=param_dtype)

    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        return jax.nn.relu(self.bn(self.conv(x), train=train))


def conv(
    inputs: int, outputs: int, kernel: int, *, use_bias: bool = True, kernel_init: Callable, dtype, param_dtype,
    rngs: nnx.Rngs,
) -> nnx.Linear | nnx.Conv:  # fmt: skip
    """A stride-1 'same' convolution; a 1x1 one is a Linear, which XLA turns into one matrix product."""
    common = dict(use_bias=use_bias, kernel_init=kernel_init, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    if kernel == 1:
        return nnx.Linear(inputs, outputs, **common)
    return nnx.Conv(inputs, outputs, (kernel, kernel), padding="SAME", **common)
