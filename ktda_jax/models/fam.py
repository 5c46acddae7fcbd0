"""Feature Alignment Module (paper section III-B): student maps into the teacher's channels and grid."""

from collections.abc import Sequence

import jax
from flax import nnx

from ktda_jax.models.initial import trunc_normal
from ktda_jax.models.layers import resize


class FAM(nnx.Module):
    """Per level a 1x1 convolution to the teacher's width, then a bilinear resize to its grid."""

    def __init__(self, channels: Sequence[int], width: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.convert = nnx.List(
            nnx.Linear(c, width, kernel_init=trunc_normal, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            for c in channels
        )

    def __call__(self, features: Sequence[jax.Array], grid: tuple[int, int]) -> list[jax.Array]:
        """features: (B, H_i, W_i, C_i) per level -> (B, *grid, width) per level."""
        return [resize(convert(x), grid) for convert, x in zip(self.convert, features, strict=True)]
