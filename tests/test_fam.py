"""Feature alignment against torch's own operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_weights import adopt, error, nchw, nhwc, random, randomize

from ktda_jax.models import flat
from ktda_jax.models.fam import FAM

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
