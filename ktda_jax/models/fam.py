"""Feature Alignment Module (paper section III-B): student maps into the teacher's channels and grid.

The published one samples the student's maps at the teacher's tokens. A token of 14 px and cells of 4 to 32 px meet at
another phase in every token, and a point sees a small part of one; yet the first half of a ViT's layers tells where in
a token things lie. So the aligned form sees images with `CELL` px a token and reads all cells of a token (NOTES.md).
"""

from collections.abc import Sequence

import jax
from flax import nnx

from ktda_jax.models.initial import trunc_normal
from ktda_jax.models.layers import resize

CELL = 16  # px of the student's image a token, where it is aligned: the third level's stride


def on_grid(images: jax.Array, grid: tuple[int, int]) -> jax.Array:
    """Normalised images (B, H, W, bands) -> (B, CELL * grid, bands), resized.

    Not padded: what is made of them covers the image and nothing else. Crops of training are whole patches, for which
    that is the same; an image of another size is stretched by less than a token.
    """
    return resize(images, (CELL * grid[0], CELL * grid[1]))


class FAM(nnx.Module):
    """Per level a 1x1 convolution to the teacher's width, then a bilinear resize to its grid.

    `aligned`: a convolution over all cells of a token, of which there are 4x4, 2x2, 1 and a quarter.
    """

    def __init__(
        self, channels: Sequence[int], width: int, *, aligned: bool = False, dtype, param_dtype, rngs: nnx.Rngs
    ):
        self.cells = [max(CELL // (4 << level), 1) if aligned else 1 for level in range(len(channels))]
        self.convert = nnx.List(
            nnx.Linear(n * n * c, width, kernel_init=trunc_normal, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
            for n, c in zip(self.cells, channels, strict=True)
        )

    def __call__(self, features: Sequence[jax.Array], grid: tuple[int, int]) -> list[jax.Array]:
        """features: (B, H_i, W_i, C_i) per level -> (B, *grid, width) per level."""
        gathered = map(_gather, features, self.cells)
        return [resize(convert(x), grid) for convert, x in zip(self.convert, gathered, strict=True)]


def _gather(x: jax.Array, cells: int) -> jax.Array:
    """(B, n * h, n * w, C) -> (B, h, w, n * n * C)."""
    if cells == 1:
        return x
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // cells, cells, width // cells, cells, channels)
    return x.swapaxes(2, 3).reshape(batch, height // cells, width // cells, cells * cells * channels)
