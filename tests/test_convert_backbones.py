"""Every published layout of teacher and student, converted, against transformers' torch classes on random weights."""

import dataclasses
import json
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import save_file
from torch_weights import error, nchw, random, randomize

from ktda_jax.data.images import read_image
from ktda_jax.models import flat
from ktda_jax.models.convnext import ConvNeXt
from ktda_jax.models.ktda import normalize
from ktda_jax.models.vit import MEAN, PRESETS, STD, ViT, ViTConfig
from ktda_jax.weights import loading, sources

VIT = dict(
    hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=56, patch_size=14, mlp_ratio=2,
    intermediate_size=64, num_register_tokens=4, use_swiglu_ffn=False, use_gated_mlp=False,
)  # fmt: skip
CONVNEXT = dict(depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32])


def dinov2(**options):
    return transformers.Dinov2Model(transformers.Dinov2Config(**{**VIT, **options}))


def with_registers(**options):
    return transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**{**VIT, **options}))


def dinov3(**options):
    return transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**{**VIT, "patch_size": 16, **options}))


def convnext():
    return transformers.ConvNextModel(transformers.ConvNextConfig(**CONVNEXT))


def convnext_v2():
    return transformers.ConvNextV2Model(transformers.ConvNextV2Config(**CONVNEXT))


def random_model(build) -> torch.nn.Module:
    torch.manual_seed(0)
    return randomize(build().eval()).float()


def vit_outputs(model, x, prefix) -> list[np.ndarray]:
    """Outputs after layers 0, 1, 2, 3 of four, the final LayerNorm on the last only, as maps."""
    with torch.no_grad():
        outputs = model(nchw(x).float(), output_hidden_states=True)
    patch = model.config.patch_size
    shape = (len(x), x.shape[1] // patch, x.shape[2] // patch, -1)
    tokens = [*outputs.hidden_states[1:-1], outputs.last_hidden_state]
    return [t[:, prefix:].reshape(shape).numpy() for t in tokens]


def run(found, x) -> list[np.ndarray]:
    build = {"teacher": ViT, "student": ConvNeXt}[found.kind]
    graphdef, _, _ = flat.abstract(lambda: build(found.config, rngs=nnx.Rngs(0)))
    arrays = {k: jnp.asarray(v) for k, v in found.arrays.items()}
    return jax.jit(lambda arrays, x: flat.merge(graphdef, arrays, {})(x))(arrays, jnp.asarray(x, jnp.float32))


def renamed(tensors, pairs) -> dict[str, torch.Tensor]:
    """Tensors with names changed by (pattern, replacement), in order; an empty name drops the tensor."""
    found = {}
    for name, tensor in tensors.items():
        for pattern, replacement in pairs:
            name = re.sub(pattern, replacement, name)
        found[name] = tensor
    return found


def fused(tensors, qkv: str, gated: str | None = None) -> dict[str, torch.Tensor]:
    """Query, key and value as one tensor, and SwiGLU's gate and value, as all but Hugging Face have them."""
    tensors = dict(tensors)
    for name in [n for n in tensors if ".attention.q_proj." in n]:
        stem, leaf = name.split(".attention.q_proj.")
        parts = [tensors.pop(f"{stem}.attention.{p}_proj.{leaf}") for p in "qkv"]
        tensors[f"{stem}.{qkv}.{leaf}"] = torch.cat(parts)
    for name in [n for n in tensors if ".mlp.gate_proj." in n]:
        stem, leaf = name.split(".mlp.gate_proj.")
        parts = [tensors.pop(f"{stem}.mlp.{p}_proj.{leaf}") for p in ("gate", "up")]
        tensors[f"{stem}.{gated}.{leaf}"] = torch.cat(parts)
    return tensors


def to_meta(tensors, *, w12="mlp.w12", w3="mlp.w3"):
    return renamed(
        fused(tensors, "attn.qkv", w12),
        [
            (r"^embeddings\.position_embeddings", "pos_embed"),
            (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
            (r"^embeddings\.", ""),
            (r"^encoder\.layer", "blocks"),
            (r"attention\.o_proj", "attn.proj"),
            (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
            (r"mlp\.down_proj", w3),
            (r"^layernorm", "norm"),
        ],
    )


def to_timm(tensors):
    tensors = to_meta(tensors, w12="mlp.fc1", w3="mlp.fc2")
    del tensors["mask_token"]
    if "register_tokens" in tensors:  # timm's file has the class token's position in the token
        tensors["reg_token"] = tensors.pop("register_tokens")
        position = tensors["pos_embed"]
        tensors["cls_token"], tensors["pos_embed"] = tensors["cls_token"] + position[:, :1], position[:, 1:]
    return tensors


def to_mmpretrain(tensors):
    tensors = renamed(
        fused(tensors, "attn.qkv", "ffn.w12"),
        [
            (r"^embeddings\.position_embeddings", "pos_embed"),
            (r"^embeddings\.patch_embeddings", "patch_embed"),
            (r"^embeddings\.", ""),
            (r"^encoder\.layer", "layers"),
            (r"\.norm(\d)\.", r".ln\1."),
            (r"attention\.o_proj", "attn.proj"),
            (r"layer_scale1\.lambda1", "attn.gamma1.weight"),
            (r"layer_scale2\.lambda1", "ffn.gamma2.weight"),
            (r"mlp\.fc1", "ffn.layers.0.0"),
            (r"mlp\.fc2", "ffn.layers.1"),
            (r"mlp\.down_proj", "ffn.w3"),
            (r"^layernorm", "ln1"),
        ],
    )
    del tensors["mask_token"]
    return {f"backbone.{k}": v for k, v in tensors.items()} | {"head.fc.weight": torch.zeros(10, 32)}


def to_published_names(tensors):
    """The names of the files on the hub, which transformers 5 renames while it loads."""
    names = ("query", "key", "value")
    pairs = [(rf"attention\.{n}_proj", f"attention.attention.{o}") for n, o in zip("qkv", names, strict=True)]
    tensors = renamed(tensors, [*pairs, (r"attention\.o_proj", "attention.output.dense")])
    for name in [n for n in tensors if ".mlp.gate_proj." in n]:
        up = tensors.pop(name.replace("gate_proj", "up_proj"))
        tensors[name.replace("gate_proj", "weights_in")] = torch.cat([tensors.pop(name), up])
    return renamed(tensors, [(r"mlp\.down_proj", "mlp.weights_out")])


SWIGLU = dict(use_swiglu_ffn=True, mlp_ratio=3)
VITS = {
    "hf": (dinov2, lambda t: t, "hf"),
    "hf, published names": (dinov2, to_published_names, "hf"),
    "hf, swiglu": (lambda: dinov2(**SWIGLU), lambda t: t, "hf"),
    "hf, swiglu, published names": (lambda: dinov2(**SWIGLU), to_published_names, "hf"),
    "hf, registers": (with_registers, lambda t: t, "hf"),
    "meta": (dinov2, to_meta, "meta"),
    "meta, swiglu": (lambda: dinov2(**SWIGLU), to_meta, "meta"),
    "meta, registers": (with_registers, to_meta, "meta"),
    "timm": (dinov2, to_timm, "timm"),
    "timm, registers": (with_registers, to_timm, "timm"),
    "timm, swiglu": (lambda: dinov2(**SWIGLU), to_timm, "timm"),
    "mmpretrain": (dinov2, to_mmpretrain, "mmpretrain"),
    "mmpretrain, swiglu": (lambda: dinov2(**SWIGLU), to_mmpretrain, "mmpretrain"),
    "dinov3, published names": (dinov3, lambda t: renamed(t, [(r"^model\.", "")]), "hf"),
    "dinov3, no biases": (lambda: dinov3(query_bias=False, value_bias=False), lambda t: t, "hf"),
}


@pytest.mark.parametrize("case", VITS)
def test_teacher(case, tmp_path):
    build, rename, source = VITS[case]
    model = random_model(build)
    tensors = {k: v.contiguous() for k, v in rename(model.state_dict()).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    found = sources.load(str(tmp_path / "model.safetensors"), source, teacher_heads=4)
    prefix = 1 + found.config.registers
    assert found.kind == "teacher" and found.config.tapped == (0, 1, 2, 3)
    patch = model.config.patch_size
    for height, width in ((4 * patch, 4 * patch), (3 * patch, 7 * patch)):  # its own size and another
        x = random(2, height, width, 3).astype(np.float32)
        for ours, theirs in zip(run(found, x), vit_outputs(model, x, prefix), strict=True):
            assert error(ours, theirs) < 1e-4


def test_image_statistics_are_never_guessed_against_the_config(tmp_path):
    """A lone file says nothing of them, so the preset's count; a folder's own must agree."""
    model = random_model(dinov3)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    found = sources.load(str(tmp_path / "model.safetensors"), teacher_heads=4)
    assert "assumed" in found.source["statistics"]
    satellite = {k: PRESETS["dinov3_large_sat"][k] for k in ("mean", "std")}
    config = dataclasses.replace(found.config, **satellite)
    shapes = flat.abstract(lambda: ViT(config, rngs=nnx.Rngs(0)))[1]
    assert loading.load(str(tmp_path / "model.safetensors"), shapes, "teacher", config)
    settings = {"image_mean": [0.43, 0.411, 0.296], "image_std": [0.213, 0.156, 0.143]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    assert loading.load(str(tmp_path), shapes, "teacher", config)
    with pytest.raises(ValueError, match=r"has mean \(109.65, 104.805, 75.48\) \(config: \(123.675"):
        loading.load(str(tmp_path), shapes, "teacher", dataclasses.replace(config, mean=MEAN, std=STD))


def to_mmpretrain_convnext(tensors, names=("depthwise_conv", "pointwise_conv1", "pointwise_conv2", "norm3")):
    depthwise, first, second, last = names
    tensors = renamed(
        tensors,
        [
            (r"^embeddings\.patch_embeddings", "downsample_layers.0.0"),
            (r"^embeddings\.layernorm", "downsample_layers.0.1"),
            (r"^encoder\.stages\.(\d)\.downsampling_layer", r"downsample_layers.\1"),
            (r"^encoder\.stages\.(\d)\.layers", r"stages.\1"),
            (r"layer_scale_parameter", "gamma"),
            (r"\.layernorm\.", ".norm."),
            (r"dwconv", depthwise),
            (r"pwconv1", first),
            (r"pwconv2", second),
            (r"grn\.weight", "grn.gamma"),
            (r"grn\.bias", "grn.beta"),
            (r"^layernorm", last),
        ],
    )
    return {k: v.reshape(-1) if "grn" in k and last == "norm3" else v for k, v in tensors.items()}


def to_meta_convnext(tensors):
    tensors = to_mmpretrain_convnext(tensors, ("dwconv", "pwconv1", "pwconv2", "norm"))
    return {"model": {**tensors, "head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)}}


def to_timm_convnext(tensors):
    tensors = renamed(
        tensors,
        [
            (r"^embeddings\.patch_embeddings", "stem.0"),
            (r"^embeddings\.layernorm", "stem.1"),
            (r"^encoder\.stages\.(\d)\.downsampling_layer", r"stages.\1.downsample"),
            (r"^encoder\.stages\.(\d)\.layers", r"stages.\1.blocks"),
            (r"layer_scale_parameter", "gamma"),
            (r"\.layernorm\.", ".norm."),
            (r"dwconv", "conv_dw"),
            (r"pwconv(\d)", r"mlp.fc\1"),
            (r"\.grn\.", ".mlp.grn."),
            (r"^layernorm", "head.norm"),
        ],
    )
    tensors = {k: v.reshape(-1) if "grn" in k else v for k, v in tensors.items()}
    return {**tensors, "head.fc.weight": torch.zeros(10, 32), "head.fc.bias": torch.zeros(10)}


CONVNEXTS = {
    "hf": lambda t: {**{f"convnext.{k}": v for k, v in t.items()}, "classifier.weight": torch.zeros(10, 32)},
    "mmpretrain": lambda t: {"state_dict": {f"backbone.{k}": v for k, v in to_mmpretrain_convnext(t).items()}},
    "timm": to_timm_convnext,
    "meta": to_meta_convnext,
}


@pytest.mark.parametrize("source", CONVNEXTS)
@pytest.mark.parametrize("build", [convnext, convnext_v2])
def test_student(source, build, tmp_path):
    model = random_model(build)
    torch.save(CONVNEXTS[source](model.state_dict()), tmp_path / "model.pth")
    found = sources.load(str(tmp_path / "model.pth"), source)
    assert found.kind == "student" and found.config.v2 == (build is convnext_v2)
    assert found.source["initialised"] == [f"norms/{k}/{leaf}" for k in range(3) for leaf in ("scale", "bias")]
    for size in ((64, 64), (96, 160)):
        x = random(2, *size, 3).astype(np.float32)
        with torch.no_grad():
            outputs = model(nchw(x).float(), output_hidden_states=True).hidden_states[1:]
        ours = run(found, x)
        for k, (a, b) in enumerate(zip(ours, outputs, strict=True)):
            scale, bias = (found.arrays[f"norms/{k}/{leaf}"] for leaf in ("scale", "bias"))
            b = np.moveaxis(b.numpy(), 1, -1)
            b = (b - b.mean(-1, keepdims=True)) / np.sqrt(b.var(-1, keepdims=True) + 1e-6) * scale + bias
            assert error(a, b) < 1e-4, k


SHARED = pathlib.Path(__file__).parents[2] / "shared"
SMALL = os.environ.get("KTDA_DINOV2_SMALL", "")  # what shared/tools/dinov2_small_from_wheel.py wrote


@pytest.mark.skipif(not (SHARED.is_dir() and SMALL), reason="needs ../shared and $KTDA_DINOV2_SMALL")
@pytest.mark.parametrize("tile", ["grass", "cloud"])
def test_really_pretrained_dinov2(tile):
    """The taps of the published teacher code on a real tile; both resizes of the position embedding are in it."""
    config = ViTConfig(**PRESETS["small"], image_size=(256, 256))
    graphdef, expected, _ = flat.abstract(lambda: ViT(config, rngs=nnx.Rngs(0)))
    arrays = {k: jnp.asarray(v) for k, v in loading.load(SMALL, expected, "teacher", config).items()}
    with np.load(SHARED / "golden" / "dinov2_small_teacher.npz") as golden:
        image = normalize(read_image(str(SHARED / "real_samples" / str(golden[f"{tile}/file"])))[None], jnp.float32)
        every = 4 if tile == "cloud" else 1
        for k, tap in enumerate(jax.jit(lambda a, x: flat.merge(graphdef, a, {})(x))(arrays, image)):
            assert error(tap[0, ::every, ::every], np.moveaxis(golden[f"{tile}/{k}"], 0, -1)) < 1e-4
