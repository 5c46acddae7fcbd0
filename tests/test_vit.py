"""The teacher against transformers' DINOv2, in float64 with random weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from torch_weights import adopt, compiled, error, nchw, nhwc, random, randomize

from ktda_jax import UserError
from ktda_jax.models import flat, vit
from ktda_jax.models.vit import ViT, ViTConfig

pytestmark = pytest.mark.usefixtures("all_recomputed")

RENAMES = [
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed"),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "layers."),
    (r"^layernorm\.", "norm."),
    (r"attention\.(qkv|proj)", r"attn.\1"),
    (r"layer_scale(\d)\.lambda1", r"scale\1"),
]


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def torch_model(config: ViTConfig) -> torch.nn.Module:
    settings = dict(
        hidden_size=config.width, num_hidden_layers=config.depth, num_attention_heads=config.heads,
        image_size=config.grid[0] * config.patch, patch_size=config.patch, use_swiglu_ffn=config.swiglu,
        mlp_ratio=int(config.mlp_ratio), num_channels=config.bands,
    )  # fmt: skip
    if config.registers:
        settings = transformers.Dinov2WithRegistersConfig(num_register_tokens=config.registers, **settings)
        return transformers.Dinov2WithRegistersModel(settings).eval()
    return transformers.Dinov2Model(transformers.Dinov2Config(**settings)).eval()


def fused(tensors, config: ViTConfig):
    """Query, key and value as one tensor, SwiGLU's gate and value as one, the position embedding as a map."""
    tensors = dict(tensors)
    tensors.pop("embeddings.mask_token", None)  # of pre-training
    for index in range(config.depth):
        layer = f"encoder.layer.{index}"
        for leaf in ("weight", "bias"):
            parts = [tensors.pop(f"{layer}.attention.{p}_proj.{leaf}") for p in "qkv"]
            tensors[f"{layer}.attention.qkv.{leaf}"] = torch.cat(parts)
            tensors[f"{layer}.attention.proj.{leaf}"] = tensors.pop(f"{layer}.attention.o_proj.{leaf}")
            if config.swiglu:
                parts = [tensors.pop(f"{layer}.mlp.{p}_proj.{leaf}") for p in ("gate", "up")]
                tensors[f"{layer}.mlp.fc1.{leaf}"] = torch.cat(parts)
                tensors[f"{layer}.mlp.fc2.{leaf}"] = tensors.pop(f"{layer}.mlp.down_proj.{leaf}")
    position = tensors.pop("embeddings.position_embeddings")
    tensors["embeddings.pos_embed_cls"] = position[:, :1]
    tensors["embeddings.pos_embed"] = position[:, 1:].reshape(1, *config.grid, config.width)
    return tensors


def split_ours(config: ViTConfig, theirs: torch.nn.Module, dtype=jnp.float64):
    def build():
        return ViT(config, dtype=dtype, rngs=nnx.Rngs(0))

    return adopt(build, fused(theirs.state_dict(), config), RENAMES)


def models(config: ViTConfig, dtype=jnp.float64):
    """Ours, computing in `dtype`, and torch's with the same weights."""
    theirs = randomize(torch_model(config))
    return compiled(*split_ours(config, theirs, dtype)), theirs


def torch_taps(theirs, x, indices, prefix: int = 1) -> list[np.ndarray]:
    """Hidden states after the layers `indices` as maps; LayerNorm on the last one only."""
    with torch.no_grad():
        outputs = theirs(nchw(x), output_hidden_states=True)
    assert len(outputs.hidden_states) == theirs.config.num_hidden_layers + 1  # first the embeddings
    tokens = [outputs.hidden_states[index + 1] for index in indices[:-1]] + [outputs.last_hidden_state]
    patch = theirs.config.patch_size
    shape = (x.shape[0], x.shape[1] // patch, x.shape[2] // patch, -1)
    return [t[:, prefix:].reshape(shape).numpy() for t in tokens]


BASE = dict(width=32, depth=4, heads=4, image_size=(56, 56))


@pytest.mark.parametrize(
    "config",
    [
        ViTConfig(width=32, depth=12, heads=4, image_size=(56, 56)),
        ViTConfig(**BASE, registers=4),
        ViTConfig(**BASE, swiglu=True),
        ViTConfig(**BASE, mlp_ratio=3, patch=7),
        ViTConfig(**BASE, bands=6, mean=(0.0,) * 6, std=(1.0,) * 6),
    ],
    ids=["plain", "registers", "swiglu", "other patch and ratio", "six bands"],
)
def test_equals_transformers(config):
    ours, theirs = models(config)
    x = random(2, 56, 56, config.bands)
    expected = torch_taps(theirs, x, config.tapped, prefix=1 + config.registers)
    for a, b in zip(ours(jnp.asarray(x)), expected, strict=True):
        assert error(a, b) < 1e-10


@pytest.mark.parametrize(
    ("depth", "taps"), [(12, [2, 5, 8, 11]), (24, [5, 11, 17, 23]), (40, [9, 19, 29, 39])], ids=str
)
def test_taps_are_the_last_layers_of_each_quarter(depth, taps, monkeypatch):
    """With layers that do no more than count, and a final LayerNorm that adds 1000."""

    class Counter(nnx.Module):
        def __init__(self, *args, **kwargs): ...

        def __call__(self, x):
            return x + 1

    monkeypatch.setattr(vit, "Layer", Counter)
    config = ViTConfig(width=8, depth=depth, heads=2, image_size=(28, 28))
    graphdef, shapes, _ = flat.abstract(lambda: ViT(config, rngs=nnx.Rngs(0)))
    model = flat.merge(graphdef, {k: jnp.zeros(v.shape) for k, v in shapes.items()}, {})
    monkeypatch.setattr(model, "norm", lambda x: 1000 + x)
    outputs = model(jnp.zeros((1, 28, 28, 3)))
    assert [float(f.max()) for f in outputs] == [k + 1 for k in taps[:3]] + [1000 + depth]


def test_taps_may_be_chosen():
    """Repeated, left out, and the layers behind the last one not run; only the very last is normed."""
    every = ViTConfig(**BASE)
    ours = ViT(every, rngs=nnx.Rngs(0))
    x = jnp.asarray(random(1, 28, 28, 3), jnp.float32)
    usual = ours(x)  # of four layers, each
    assert every.depth == 4 and every.tapped == (0, 1, 2, 3)
    ours.config = dataclasses.replace(every, taps=(3, 1, None, 3))
    ours.layers.pop()
    third, first, none, again = ours(x)
    assert none is None and third is again
    np.testing.assert_array_equal(third, usual[2])
    np.testing.assert_array_equal(first, usual[0])


@pytest.mark.parametrize("taps", [(1, 2, 3), (0, 1, 2, 3), (1, 2, 3, 5), (None,) * 4, (1, 2, 3, "4")], ids=str)
def test_taps_that_are_no_layers(taps):
    with pytest.raises(UserError, match=r"config.model.teacher.taps is .*; give four layers from 1 to 4"):
        ViTConfig(**BASE, taps=taps)


@pytest.mark.parametrize("size", [(84, 84), (28, 70)], ids=str)
def test_other_image_sizes_resize_the_position_embedding(size):
    ours, theirs = models(ViTConfig(**BASE))
    x = random(1, *size, 3)
    for a, b in zip(ours(jnp.asarray(x)), torch_taps(theirs, x, (0, 1, 2, 3)), strict=True):
        assert error(a, b) < 1e-6  # transformers resizes in float32


@pytest.mark.parametrize(
    ("stored", "size"), [((518, 518), (266, 266)), ((266, 266), (518, 518)), ((28, 56), (42, 70))], ids=str
)
def test_resized_embedding_is_torchs_bicubic(stored, size):
    """37 -> 19 and 19 -> 37 as in KTDA, and from a grid that is not square."""

    def build(size):
        config = ViTConfig(width=4, depth=1, heads=1, image_size=size)
        return flat.abstract(lambda: ViT(config, dtype=jnp.float64, rngs=nnx.Rngs(0)))

    graphdef, shapes, _ = build(stored)
    params = {k: jnp.asarray(random(*v.shape)) for k, v in shapes.items()}
    graphdef_native, shapes_native, _ = build(size)
    resized = torch.nn.functional.interpolate(
        nchw(params["pos_embed"]),
        size=shapes_native["pos_embed"].shape[1:3],
        mode="bicubic",
        align_corners=False,
    )
    x = jnp.asarray(random(1, *size, 3))
    out = compiled(graphdef, params, {})(x)[-1]
    native = compiled(graphdef_native, {**params, "pos_embed": jnp.asarray(nhwc(resized))}, {})(x)[-1]
    assert error(out, native) < 1e-12


def test_images_are_padded_with_zeros_at_bottom_and_right():
    ours, theirs = models(ViTConfig(width=16, depth=4, heads=2, image_size=(50, 50)))  # a 4 x 4 grid
    x = random(1, 50, 45, 3)
    padded = np.pad(x, ((0, 0), (0, 6), (0, 11), (0, 0)))
    for a, b in zip(ours(jnp.asarray(x)), torch_taps(theirs, padded, (0, 1, 2, 3)), strict=True):
        assert a.shape == (1, 4, 4, 16)
        assert error(a, b) < 1e-10


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 3e-2)])
def test_precision_of_narrow_types(dtype, tolerance):
    config = ViTConfig(**BASE)
    ours, theirs = models(config, dtype)
    x = random(2, 56, 56, 3)
    for a, b in zip(ours(jnp.asarray(x, dtype)), torch_taps(theirs, x, config.tapped), strict=True):
        assert a.dtype == dtype
        assert error(a, b) < tolerance


@pytest.mark.parametrize(("preset", "millions"), [("small", 22), ("base", 87), ("giant", 1136)])
def test_presets_have_the_published_sizes(preset, millions):
    """Every tensor that transformers' model of the same settings has, counted without allocating any."""
    config = ViTConfig(**vit.PRESETS[preset], image_size=(518, 518))
    with torch.device("meta"):
        theirs = torch_model(config)
    expected = sum(p.numel() for p in theirs.parameters()) - config.width  # mask token
    _, params, _ = flat.abstract(lambda: ViT(config, rngs=nnx.Rngs(0)))
    assert flat.count(params) == expected
    assert round(expected / 1e6) == millions
