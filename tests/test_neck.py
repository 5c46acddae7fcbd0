"""The neck against torch's own operations."""

import jax
import jax.numpy as jnp
import pytest
import torch
from flax import nnx
from torch_weights import adopt, compiled, error, nchw, nhwc, random, randomize

from ktda_jax.models.neck import MultiLevelNeck

CHANNELS, WIDTH = (3, 4, 5, 6), 8


def build(dtype=jnp.float64):
    return MultiLevelNeck(CHANNELS, WIDTH, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("grid", "sizes"), [(19, (76, 38, 19, 9)), (37, (148, 74, 37, 18))])
def test_pyramid_of_a_square_grid(grid, sizes):
    features = [jax.ShapeDtypeStruct((2, grid, grid, c), jnp.float32) for c in CHANNELS]
    neck = nnx.eval_shape(lambda: build(jnp.float32))
    outputs = nnx.eval_shape(lambda neck, x: neck(x), neck, features)
    assert [f.shape for f in outputs] == [(2, size, size, WIDTH) for size in sizes]


@pytest.mark.parametrize("grid", [(5, 7), (4, 9)], ids=str)
def test_equals_torch(grid):
    with jax.enable_x64(True):
        theirs = randomize(torch.nn.ModuleDict({
            "lateral_convs": torch.nn.ModuleList(torch.nn.Conv2d(c, WIDTH, 1) for c in CHANNELS),
            "convs": torch.nn.ModuleList(torch.nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for _ in CHANNELS),
        }))  # fmt: skip
        features = [random(2, *grid, c) for c in CHANNELS]
        outputs = compiled(*adopt(build, theirs.state_dict(), []))([jnp.asarray(f) for f in features])
        for k, factor in enumerate((4, 2, 1, 0.5)):
            x = theirs["lateral_convs"][k](nchw(features[k]))
            # by a factor, as mmsegmentation calls it: for 5 -> 2 that is not the resize to size 2
            x = torch.nn.functional.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
            assert error(outputs[k], nhwc(theirs["convs"][k](x))) < 1e-12
