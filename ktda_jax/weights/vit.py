"""DINOv2 and DINOv3 vision transformers in the layouts of mmpretrain, Hugging Face, timm and Meta."""

import math
import re
from collections.abc import Mapping

import numpy as np

from ktda_jax.weights.table import LAYER, NORM, Row, convert

MMPRETRAIN = [
    Row("", "", {"cls_token": "cls_token", "pos_embed": "position"}),
    Row("patch_embed.projection", "patch_embed", LAYER),
    Row("layers.{}.ln1", "layers/{}/norm1", NORM),
    Row("layers.{}.ln2", "layers/{}/norm2", NORM),
    Row("layers.{}.attn.qkv", "layers/{}/attn/qkv", LAYER),
    Row("layers.{}.attn.proj", "layers/{}/attn/proj", LAYER),
    Row("layers.{}.attn.gamma1", "layers/{}", {"weight": "scale1"}),
    Row("layers.{}.ffn.layers.0.0", "layers/{}/mlp/fc1", LAYER),
    Row("layers.{}.ffn.layers.1", "layers/{}/mlp/fc2", LAYER),
    Row("layers.{}.ffn.w12", "layers/{}/mlp/fc1", LAYER),
    Row("layers.{}.ffn.w3", "layers/{}/mlp/fc2", LAYER),
    Row("layers.{}.ffn.gamma2", "layers/{}", {"weight": "scale2"}),
    Row("ln1", "norm", NORM),
]
META = [  # and timm, which took the names over; DINOv3's registers are storage tokens
    Row("", "", {"cls_token": "cls_token", "pos_embed": "position", "register_tokens": "register_tokens",
                 "reg_token": "register_tokens", "storage_tokens": "register_tokens"}),
    Row("patch_embed.proj", "patch_embed", LAYER),
    Row("blocks.{}.norm1", "layers/{}/norm1", NORM),
    Row("blocks.{}.norm2", "layers/{}/norm2", NORM),
    Row("blocks.{}.attn.qkv", "layers/{}/attn/qkv", LAYER),
    Row("blocks.{}.attn.proj", "layers/{}/attn/proj", LAYER),
    Row("blocks.{}.ls1", "layers/{}", {"gamma": "scale1"}),
    Row("blocks.{}.ls2", "layers/{}", {"gamma": "scale2"}),
    Row("blocks.{}.mlp.fc1", "layers/{}/mlp/fc1", LAYER),
    Row("blocks.{}.mlp.fc2", "layers/{}/mlp/fc2", LAYER),
    Row("blocks.{}.mlp.w12", "layers/{}/mlp/fc1", LAYER),
    Row("blocks.{}.mlp.w1", "layers/{}/mlp/fc1", LAYER, part=(0, 2)),
    Row("blocks.{}.mlp.w2", "layers/{}/mlp/fc1", LAYER, part=(1, 2)),
    Row("blocks.{}.mlp.w3", "layers/{}/mlp/fc2", LAYER),
    Row("norm", "norm", NORM),
]  # fmt: skip
TIMM_DINOV3 = [
    Row("blocks.{}", "layers/{}", {"gamma_1": "scale1", "gamma_2": "scale2"}),
    Row("blocks.{}.attn", "layers/{}/attn/qkv", {"q_bias": "bias"}, part=(0, 3)),
    Row("blocks.{}.attn", "layers/{}/attn/qkv", {"v_bias": "bias"}, part=(2, 3)),
    Row("blocks.{}.mlp.fc1_g", "layers/{}/mlp/fc1", LAYER, part=(0, 2)),
    Row("blocks.{}.mlp.fc1_x", "layers/{}/mlp/fc1", LAYER, part=(1, 2)),
    *META,
]


def _hf(layer: str) -> list[Row]:
    """One transformer layer; transformers 5 names its parts anew, published files have the old names."""
    rows = [Row(f"{layer}.norm{k}", f"layers/{{}}/norm{k}", NORM) for k in (1, 2)]
    for k, (new, old) in enumerate((("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))):
        for name in (f"{layer}.attention.{new}", f"{layer}.attention.attention.{old}"):
            rows.append(Row(name, "layers/{}/attn/qkv", LAYER, part=(k, 3)))
    rows += [
        Row(f"{layer}.attention.o_proj", "layers/{}/attn/proj", LAYER),
        Row(f"{layer}.attention.output.dense", "layers/{}/attn/proj", LAYER),
        Row(f"{layer}.layer_scale1", "layers/{}", {"lambda1": "scale1"}),
        Row(f"{layer}.layer_scale2", "layers/{}", {"lambda1": "scale2"}),
        Row(f"{layer}.mlp.fc1", "layers/{}/mlp/fc1", LAYER),
        Row(f"{layer}.mlp.fc2", "layers/{}/mlp/fc2", LAYER),
        Row(f"{layer}.mlp.weights_in", "layers/{}/mlp/fc1", LAYER),
        Row(f"{layer}.mlp.weights_out", "layers/{}/mlp/fc2", LAYER),
        Row(f"{layer}.mlp.down_proj", "layers/{}/mlp/fc2", LAYER),
    ]
    return rows


_GATED = [("gate_proj", (0, 2)), ("up_proj", (1, 2))]
HF = [
    Row("embeddings", "", {"cls_token": "cls_token", "position_embeddings": "position",
                           "register_tokens": "register_tokens"}),
    Row("embeddings.patch_embeddings.projection", "patch_embed", LAYER),
    *_hf("encoder.layer.{}"),
    *(Row(f"encoder.layer.{{}}.mlp.{name}", "layers/{}/mlp/fc1", LAYER, part=part) for name, part in _GATED),
    Row("layernorm", "norm", NORM),
]  # fmt: skip


def _dinov3(gated: bool) -> list[Row]:
    rows = [
        Row("embeddings", "", {"cls_token": "cls_token", "register_tokens": "register_tokens"}),
        Row("embeddings.patch_embeddings", "patch_embed", LAYER),
        Row("norm", "norm", NORM),
    ]
    for layer in ("layer.{}", "model.layer.{}"):
        rows += _hf(layer)
        if gated:
            rows += [Row(f"{layer}.mlp.{name}", "layers/{}/mlp/fc1", LAYER, part=part) for name, part in _GATED]
        else:
            rows.append(Row(f"{layer}.mlp.up_proj", "layers/{}/mlp/fc1", LAYER))
    return rows


SIGNATURES = {  # a name that only this layout has, or of those that are left
    "mmpretrain": "layers.0.ln1.weight",
    "meta dinov3": "rope_embed.periods",
    "timm dinov3": "blocks.0.gamma_1",
    "meta": "blocks.0.norm1.weight",
    "hf": "encoder.layer.0.norm1.weight",
    "hf dinov3": "layer.0.norm1.weight",
    "hf dinov3 (transformers 5)": "model.layer.0.norm1.weight",
}
# Of training alone: masked patches, heads, and the LayerNorms of DINOv3's class tokens, which no map goes through.
_UNUSED = re.compile(r"(embeddings\.)?mask_token|rope_embeddings\..*|(head|classifier|fc_norm|(local_)?cls_norm)\..*")
PERIODS = "rope_embed.periods"


def from_source(tensors: Mapping[str, np.ndarray], source: str) -> tuple[dict[str, np.ndarray], list[str]]:
    """Our arrays and the names that nothing knows; ValueError for what our model does not compute."""
    if source.startswith("hf dinov3"):
        table = _dinov3(any(".mlp.gate_proj." in name for name in tensors))
    else:
        table = {"mmpretrain": MMPRETRAIN, "timm dinov3": TIMM_DINOV3, "hf": HF}.get(source, META)
    if source == "meta dinov3":
        tensors = _masked(_without_periods(tensors))
    found, unknown = convert(tensors, table, lambda name: bool(_UNUSED.fullmatch(name)))
    if "dinov3" in source:  # the largest have no biases on query, key and value: zeros do the same
        for path in [p for p in found if p.endswith("attn/qkv/kernel")]:
            kernel = found[path]
            found.setdefault(path.removesuffix("kernel") + "bias", np.zeros(kernel.shape[-1], kernel.dtype))
    return split_position(found), unknown


def heads(tensors: Mapping[str, np.ndarray]) -> int | None:
    """Which Meta's DINOv3 alone tells: a period turns one of the four numbers of each head's width."""
    periods, token = tensors.get(PERIODS), tensors.get("cls_token")
    return None if periods is None or token is None or not periods.size else token.shape[-1] // (4 * periods.size)


def _without_periods(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The rotary periods must be the published powers of 100, from which `models.vit.rotary_angles` computes.

    Meta trains in bfloat16, and its files hold the periods as rounded to it (up to 1 in 256); its code then computes
    with these in float32. We, like transformers and timm, compute with the powers themselves, the angles in float64.
    """
    tensors = dict(tensors)
    periods = np.asarray(tensors.pop(PERIODS), np.float64)
    expected = 100.0 ** (np.arange(periods.size) / max(periods.size, 1))
    if periods.ndim != 1 or not np.allclose(periods, expected, rtol=2**-8, atol=0):
        raise ValueError(
            f"{PERIODS} goes from {periods.min():.4g} to {periods.max():.4g}, not in powers of 100 as published; "
            "our model has no other"
        )
    return tensors


def _masked(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Biases times the masks that Meta keeps beside them, as its code uses them: in published models no key has one."""
    tensors = dict(tensors)
    for name in [n for n in tensors if n.endswith(".attn.qkv.bias_mask")]:
        mask, bias = tensors.pop(name), name.removesuffix("_mask")
        if bias in tensors:
            tensors[bias] = tensors[bias] * mask.astype(tensors[bias].dtype)
    return tensors


def split_position(arrays: Mapping[str, np.ndarray], grid: tuple[int, int] | None = None) -> dict[str, np.ndarray]:
    """`position`, (1, 1 + gh * gw, C), as our two parameters: the class token's, and a map, by default square."""
    arrays = dict(arrays)
    position = arrays.pop("position", None)
    if position is None or position.ndim != 3:
        return arrays
    tokens, width = position.shape[1:]
    if grid is not None:
        return arrays | {"pos_embed_cls": position[:, :1], "pos_embed": position[:, 1:].reshape(1, *grid, width)}
    side = math.isqrt(tokens)
    if side * side == tokens:  # timm's with registers, which adds the class token's position to the token itself
        cls = np.zeros((1, 1, width), position.dtype)
    elif math.isqrt(tokens - 1) ** 2 == tokens - 1:
        cls, position, side = position[:, :1], position[:, 1:], math.isqrt(tokens - 1)
    else:
        raise ValueError(f"a position embedding of {tokens} tokens is no square grid, with or without a class token")
    return arrays | {"pos_embed_cls": cls, "pos_embed": position.reshape(1, side, side, width)}
