"""The teacher's taps as the student is to match them: standardised by statistics of the training images."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from ktda_jax.models.layers import at_least_float32

EPS = 1e-12


class TapStatistics(nnx.Module):
    """Mean and variance of each tap's channels: measured once, before the first step, and constant from then on."""

    def __init__(self, levels: int, width: int, *, param_dtype):
        self.mean = nnx.BatchStat(jnp.zeros((levels, width), param_dtype))
        self.var = nnx.BatchStat(jnp.ones((levels, width), param_dtype))

    def __call__(self, taps: Sequence[jax.Array | None]) -> list[jax.Array | None]:
        """Four of (B, h, w, C) or None -> the same, of mean 0 and variance 1 over the training images' tokens."""
        mean, scale = self.mean[...], jax.lax.rsqrt(self.var[...] + EPS)
        return [
            None if tap is None else ((at_least_float32(tap) - mean[k]) * scale[k]).astype(tap.dtype)
            for k, tap in enumerate(taps)
        ]
