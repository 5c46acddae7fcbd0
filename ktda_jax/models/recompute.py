"""Memory for time: parts of the model that keep only their input for the backward pass.

`jax.checkpoint` says the same, and is not enough: XLA's CPU backend drops the barriers that hold the
recomputation back, schedules it right behind the forward pass, and saves nothing (measured: four FMM blocks at
76 x 76, batch 2, take 4.97 GB of temporaries without it, 5.47 GB with it, 3.05 GB with this).
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

SMALL = 2**20  # bytes of x, of the whole batch; a program of small arrays gains no memory and compiles longer


def recompute(function: Callable[[Any, jax.Array], jax.Array], modules: Any, x: jax.Array) -> jax.Array:
    """function(modules, x) without mutable state; its backward computes it again from the parameters and x.

    Around (norm, linear) or (activation, linear) that costs next to nothing, since the product itself is not
    needed again; around a whole block it costs the block's forward pass. Output and x must share all axes but
    the last. Where x is `SMALL`, or its size unknown (in an export, which has no backward pass), all is kept.
    """
    known = all(isinstance(size, int) for size in x.shape)
    if not known or x.size * x.dtype.itemsize < SMALL:
        return function(modules, x)
    graphdef, params = nnx.split(modules)

    def plain(params, x):
        return function(nnx.merge(graphdef, params), x)

    @jax.custom_vjp
    def call(params, x):
        return plain(params, x)

    def forward(params, x):
        return plain(params, x), (params, x)

    def backward(residuals, dy):
        params, x = residuals
        params, x, dy = jax.lax.optimization_barrier((params, x, dy))
        # A dependence on dy that no compiler may drop (0 * inf is not 0), so that nothing runs before dy is
        # there. One number per row of dy, so that it stays on the device that holds the row.
        x = x + (0 * dy[..., :1]).astype(x.dtype)
        params = jax.lax.platform_dependent(params, dy, cpu=_late_vectors, default=lambda params, dy: params)
        return jax.vjp(plain, params, x)[1](dy)

    call.defvjp(forward, backward)
    return call(params, x)


def _late_vectors(params: Any, dy: jax.Array) -> Any:
    """The same dependence for vectors such as a norm's scale.

    XLA's CPU backend stretches them to the shape of x as soon as it can, and keeps that: 35 MB for each of the base
    model's norms at 76 x 76.
    """
    tick = 0 * dy[(0,) * dy.ndim]
    return jax.tree.map(lambda p: p + tick.astype(p.dtype) if p.ndim == 1 else p, params)


def norm_linear(norm: nnx.LayerNorm, linear: nnx.Linear, x: jax.Array) -> jax.Array:
    """linear(norm(x)), keeping x."""
    return recompute(lambda m, x: m[1](m[0](x)), (norm, linear), x)


def activation_linear(activation: Callable, linear: nnx.Linear, x: jax.Array) -> jax.Array:
    """linear(activation(x)), keeping x."""
    return recompute(lambda m, x: m(activation(x)), linear, x)
