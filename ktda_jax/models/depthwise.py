"""Depthwise convolution: XLA's grouped convolution, except on CPU, where that is twenty times too slow.

The CPU form is a sum of kh * kw shifted products, which XLA fuses into one pass over the image.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

IMPLEMENTATIONS = ("conv", "shifts")


def depthwise_conv(x, kernel, *, implementation=None):
    """x (B, H, W, C), kernel (kh, kw, 1, C) with odd kh and kw -> (B, H, W, C), in x's dtype.

    Stride 1, zero padding to the same size, cross-correlation. `implementation` is 'conv' or 'shifts';
    None takes 'shifts' where the program is compiled for CPU and 'conv' elsewhere.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(f"depthwise_conv implementation {implementation!r} is none of {IMPLEMENTATIONS}")
    if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(f"depthwise_conv needs odd kernel sizes, got {kernel.shape[:2]}")
    return _depthwise(implementation, x, kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _depthwise(implementation, x, kernel):
    return _dispatch(implementation, _shifted_sum, _conv, x, kernel)


def _forward(implementation, x, kernel):
    return _dispatch(implementation, _shifts, _conv, x, kernel), (x, kernel)


def _backward(implementation, residuals, dy):
    return _dispatch(implementation, _shifts_grad, _conv_grad, *residuals, dy)


_depthwise.defvjp(_forward, _backward)


def _dispatch(implementation, shifts, conv, *args):
    # The platform of the lowering decides, not that of this process: a CPU host may compile for TPU.
    if implementation is None:
        return lax.platform_dependent(*args, cpu=shifts, default=conv)
    return {"shifts": shifts, "conv": conv}[implementation](*args)


# The inner jits are for tracing: a model calls this in 36 blocks of four shapes.
@jax.jit
def _conv(x, kernel):
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


@jax.jit
def _conv_grad(x, kernel, dy):
    return jax.vjp(_conv, x, kernel)[1](dy)


def _pad(x, kernel, extra=0):
    """Zero border of half a kernel, plus `extra` columns on the right; at least float32."""
    half_h, half_w = kernel.shape[0] // 2, kernel.shape[1] // 2
    return jnp.pad(
        x.astype(jnp.promote_types(x.dtype, jnp.float32)),
        ((0, 0), (half_h, half_h), (half_w, half_w + extra), (0, 0)),
    )


@jax.jit
def _shifts(x, kernel):
    # For training, behind a condition that always holds, which XLA does not know: else it fuses all these products into
    # each of several readers, such as a norm's gradients, which takes longer to compile and to run.
    first = kernel[0, 0, 0, 0]
    return lax.cond(first == first, _shifted_sum, lambda x, kernel: jnp.full_like(x, jnp.nan), x, kernel)


@jax.jit
def _shifted_sum(x, kernel):
    height, width = x.shape[1:3]
    kh, kw = kernel.shape[:2]
    padded = _pad(x, kernel)
    kernel = kernel.astype(padded.dtype)
    terms = (padded[:, i : i + height, j : j + width] * kernel[i, j, 0] for i in range(kh) for j in range(kw))
    return functools.reduce(lax.add, terms).astype(x.dtype)


@jax.jit
def _shifts_grad(x, kernel, dy):
    dx = _shifts(dy, kernel[::-1, ::-1])
    return dx.astype(x.dtype), _shifts_kernel_grad(x, kernel, dy).astype(kernel.dtype)


def _shifts_kernel_grad(x, kernel, dy):
    """dkernel[i, j] = sum over pixels of dy[h, w] * padded[h + i, w + j]: (kh, kw, 1, C).

    A reduction per (i, j) is not vectorised by XLA CPU. Instead a loop visits tiles of one row by 8
    columns; within a tile the sum is written out, so that the vectors run over channels and the kh rows
    that a tile needs stay in cache.
    """
    batch, height, width, channels = x.shape
    kh, kw = kernel.shape[:2]
    tile = min(width, 8)
    tiles = -(-width // tile)
    extra = tiles * tile - width
    padded = _pad(x, kernel, extra)
    dy = jnp.pad(dy.astype(padded.dtype), ((0, 0), (0, 0), (0, extra), (0, 0)))

    def add_tile(step, total):
        row, column = step // tiles, step % tiles * tile
        rows = lax.dynamic_slice(padded, (0, row, column, 0), (batch, kh, tile + kw - 1, channels))
        d = lax.dynamic_slice(dy, (0, row, column, 0), (batch, 1, tile, channels))
        columns = [functools.reduce(lax.add, (rows[:, :, j + w] * d[:, :, w] for w in range(tile))) for j in range(kw)]
        return total + jnp.stack(columns, axis=2)

    total = jnp.zeros((batch, kh, kw, channels), padded.dtype)  # the batch axis, perhaps sharded, stays
    return lax.fori_loop(0, height * tiles, add_tile, total).sum(0)[:, :, None]
