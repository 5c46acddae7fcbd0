"""MultiLevelNeck (mmsegmentation): turns four maps of one size into a pyramid."""

import math
from collections.abc import Sequence

import jax
from flax import nnx

from ktda_jax.models.initial import xavier_uniform
from ktda_jax.models.layers import conv, resize

SCALES = (4.0, 2.0, 1.0, 0.5)


class MultiLevelNeck(nnx.Module):
    """Per level a 1x1 convolution, a bilinear resize by 4, 2, 1, 0.5, a 3x3 convolution; bias, no norm."""

    def __init__(self, channels: Sequence[int], width: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        common = dict(kernel_init=xavier_uniform, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.lateral_convs = nnx.List(conv(c, width, 1, **common) for c in channels)
        self.convs = nnx.List(conv(width, width, 3, **common) for _ in channels)

    def __call__(self, features: Sequence[jax.Array]) -> list[jax.Array]:
        """features: four (B, h, w, C) -> (B, 4h, 4w, width), (B, 2h, ...), (B, h, ...), (B, h // 2, ...)."""
        outputs = []
        for lateral, convolution, x, scale in zip(self.lateral_convs, self.convs, features, SCALES, strict=True):
            x = lateral(x)
            size = (math.floor(x.shape[1] * scale), math.floor(x.shape[2] * scale))
            # torch was called with a factor, so the step between samples is 1 / factor also for 19 -> 9.
            outputs.append(convolution(resize(x, size, scale=1 / scale)))
        return outputs
