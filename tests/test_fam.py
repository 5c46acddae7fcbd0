"""Feature alignment against torch's own operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_weights import adopt, error, nchw, nhwc, random, randomize

from ktda_jax.models import flat
from ktda_jax.models.fam import FAM, on_grid

CHANNELS, WIDTH = (3, 4, 5, 6), 8


def build(width=WIDTH, dtype=jnp.float64):
    return FAM(CHANNELS, width, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("grid", [(5, 7), (19, 19), (1, 1)], ids=str)
def test_equals_torch(grid):
    """Levels larger and smaller than the grid all come out at the grid's size."""
    with jax.enable_x64(True):
        theirs = randomize(torch.nn.ModuleDict({
            "convert": torch.nn.ModuleList(torch.nn.Conv2d(c, WIDTH, 1) for c in CHANNELS),
        }))  # fmt: skip
        sizes = [(24, 32), (12, 16), (6, 8), (3, 4)]
        features = [random(2, *size, c) for size, c in zip(sizes, CHANNELS, strict=True)]
        module = flat.merge(*adopt(build, theirs.state_dict(), []))
        outputs = module([jnp.asarray(f) for f in features], grid)
        for out, x, convert in zip(outputs, features, theirs["convert"], strict=True):
            x = torch.nn.functional.interpolate(convert(nchw(x)), size=grid, mode="bilinear", align_corners=False)
            assert error(out, nhwc(x)) < 1e-12


def test_initial_weights_are_small_normal_and_biases_zero():
    _, params, _ = flat.split(build(1024, jnp.float32))
    for level in range(4):
        assert not params[f"convert/{level}/bias"].any()
        kernel = np.asarray(params[f"convert/{level}/kernel"])
        assert kernel.std() == pytest.approx(0.02, rel=0.1) and abs(kernel.mean()) < 1e-3


def test_the_aligned_form_reads_all_cells_of_a_token():
    """A token's output depends on every pixel of its patch and, but for the depthwise convolutions, on no other."""
    fam = FAM((2, 3, 4, 5), 6, aligned=True, dtype=np.float32, param_dtype=np.float32, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(1, 12 * n // 4, 8 * n // 4, c)).astype(np.float32) for n, c in ((4, 2), (2, 3), (1, 4))]
    maps.append(rng.normal(size=(1, 1, 1, 5)).astype(np.float32))
    outputs = fam(maps, (3, 2))
    assert [y.shape for y in outputs] == [(1, 3, 2, 6)] * 4
    for level, cells in ((0, 4), (1, 2), (2, 1)):
        kernel, bias = fam.convert[level].kernel[...], fam.convert[level].bias[...]
        token = maps[level][0, 2 * cells : 3 * cells, cells : 2 * cells]  # row 2, column 1
        np.testing.assert_allclose(outputs[level][0, 2, 1], token.reshape(-1) @ kernel + bias, atol=1e-6)


def test_images_get_16_px_a_token():
    """Enlarged by 16 / 14, so that the third level has a cell a token; never padded, so that maps lie in place."""
    assert (on_grid(np.ones((1, 28, 40, 3), np.float32), (2, 3)) > 0.999).all()
    rows = np.arange(28.0, dtype=np.float32)[None, :, None, None] * np.ones((1, 28, 28, 1), np.float32)
    np.testing.assert_allclose(on_grid(rows, (2, 2))[0, 1:-1, 0, 0], (np.arange(32) + 0.5)[1:-1] * 14 / 16 - 0.5)
