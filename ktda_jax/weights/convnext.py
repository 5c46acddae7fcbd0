"""ConvNeXt, ConvNeXt-V2 and DINOv3's ConvNeXt in the layouts of mmpretrain, Hugging Face, timm and Meta."""

import re
from collections.abc import Mapping

import numpy as np

from ktda_jax.weights.table import LAYER, NORM, Row, convert

MMPRETRAIN = [
    Row("downsample_layers.0.0", "downsample/0/conv", LAYER),
    Row("downsample_layers.0.1", "downsample/0/ln", NORM),
    Row("downsample_layers.{}.0", "downsample/{}/ln", NORM),
    Row("downsample_layers.{}.1", "downsample/{}/conv", LAYER),
    Row("stages.{}.{}", "stages/{}/{}", {"gamma": "gamma"}),
    Row("stages.{}.{}.norm", "stages/{}/{}/norm", NORM),
    Row("stages.{}.{}.depthwise_conv", "stages/{}/{}/depthwise_conv", LAYER),
    Row("stages.{}.{}.pointwise_conv1", "stages/{}/{}/pointwise_conv1", LAYER),
    Row("stages.{}.{}.pointwise_conv2", "stages/{}/{}/pointwise_conv2", LAYER),
    Row("stages.{}.{}.grn", "stages/{}/{}/grn", {"gamma": "gamma", "beta": "beta"}),
    *(Row(f"norm{k}", f"norms/{k}", NORM) for k in range(4)),
]
HF = [
    Row("embeddings.patch_embeddings", "downsample/0/conv", LAYER),
    Row("embeddings.layernorm", "downsample/0/ln", NORM),
    Row("encoder.stages.{}.downsampling_layer.0", "downsample/{}/ln", NORM),
    Row("encoder.stages.{}.downsampling_layer.1", "downsample/{}/conv", LAYER),
    Row("encoder.stages.{}.layers.{}", "stages/{}/{}", {"layer_scale_parameter": "gamma"}),
    Row("encoder.stages.{}.layers.{}.layernorm", "stages/{}/{}/norm", NORM),
    Row("encoder.stages.{}.layers.{}.dwconv", "stages/{}/{}/depthwise_conv", LAYER),
    Row("encoder.stages.{}.layers.{}.pwconv1", "stages/{}/{}/pointwise_conv1", LAYER),
    Row("encoder.stages.{}.layers.{}.pwconv2", "stages/{}/{}/pointwise_conv2", LAYER),
    Row("encoder.stages.{}.layers.{}.grn", "stages/{}/{}/grn", {"weight": "gamma", "bias": "beta"}),
    *(Row(f"hidden_states_norms.stage{k + 1}", f"norms/{k}", NORM) for k in range(4)),
    Row("layernorm", "norms/3", NORM),
]
TIMM = [
    Row("stem.0", "downsample/0/conv", LAYER),
    Row("stem.1", "downsample/0/ln", NORM),
    Row("stages.{}.downsample.0", "downsample/{}/ln", NORM),
    Row("stages.{}.downsample.1", "downsample/{}/conv", LAYER),
    Row("stages.{}.blocks.{}", "stages/{}/{}", {"gamma": "gamma"}),
    Row("stages.{}.blocks.{}.norm", "stages/{}/{}/norm", NORM),
    Row("stages.{}.blocks.{}.conv_dw", "stages/{}/{}/depthwise_conv", LAYER),
    Row("stages.{}.blocks.{}.mlp.fc1", "stages/{}/{}/pointwise_conv1", LAYER),
    Row("stages.{}.blocks.{}.mlp.fc2", "stages/{}/{}/pointwise_conv2", LAYER),
    Row("stages.{}.blocks.{}.mlp.grn", "stages/{}/{}/grn", {"weight": "gamma", "bias": "beta"}),
    Row("head.norm", "norms/3", NORM),
    Row("norm_pre", "norms/3", NORM),
]
META = [
    *MMPRETRAIN[:5],
    Row("stages.{}.{}.norm", "stages/{}/{}/norm", NORM),
    Row("stages.{}.{}.dwconv", "stages/{}/{}/depthwise_conv", LAYER),
    Row("stages.{}.{}.pwconv1", "stages/{}/{}/pointwise_conv1", LAYER),
    Row("stages.{}.{}.pwconv2", "stages/{}/{}/pointwise_conv2", LAYER),
    Row("stages.{}.{}.grn", "stages/{}/{}/grn", {"gamma": "gamma", "beta": "beta"}),
    Row("norm", "norms/3", NORM),
    *MMPRETRAIN[-4:],
]


def _hf_dinov3(stages: str) -> list[Row]:
    return [
        Row(f"{stages}.0.downsample_layers.0", "downsample/0/conv", LAYER),
        Row(f"{stages}.0.downsample_layers.1", "downsample/0/ln", NORM),
        Row(f"{stages}.{{}}.downsample_layers.0", "downsample/{}/ln", NORM),
        Row(f"{stages}.{{}}.downsample_layers.1", "downsample/{}/conv", LAYER),
        Row(f"{stages}.{{}}.layers.{{}}", "stages/{}/{}", {"gamma": "gamma"}),
        Row(f"{stages}.{{}}.layers.{{}}.layer_norm", "stages/{}/{}/norm", NORM),
        *(
            Row(f"{stages}.{{}}.layers.{{}}.{name}", f"stages/{{}}/{{}}/{name}", LAYER)
            for name in ("depthwise_conv", "pointwise_conv1", "pointwise_conv2")
        ),
        Row("layer_norm", "norms/3", NORM),
    ]


TABLES = {
    "mmpretrain": MMPRETRAIN,
    "hf": HF,
    "hf dinov3": _hf_dinov3("stages"),
    "hf dinov3 (transformers 5)": _hf_dinov3("model.stages"),
    "timm": TIMM,
    "meta dinov3": META,
    "meta": META,
}
SIGNATURES = {  # a name that only this layout has, or of those that are left
    "mmpretrain": "stages.0.0.depthwise_conv.weight",
    "hf": "encoder.stages.0.layers.0.dwconv.weight",
    "hf dinov3": "stages.0.layers.0.depthwise_conv.weight",
    "hf dinov3 (transformers 5)": "model.stages.0.layers.0.depthwise_conv.weight",
    "timm": "stages.0.blocks.0.conv_dw.weight",
    "meta dinov3": "norms.3.weight",
    "meta": "stages.0.0.dwconv.weight",
}
_CLASSIFIER = re.compile(r"(head|classifier|head\.fc|fc)\.(weight|bias)|head\.(fc|layers)\..*")


def from_source(tensors: Mapping[str, np.ndarray], source: str) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Our arrays, unknown names, and the paths that are new.

    A classifier normalises its last map only, so `norms/0` to `norms/2` start as LayerNorms that scale nothing, as in
    the published training, which begins from such weights. DINOv3's dense features have no LayerNorm there: nor have we
    (`first_norms`). timm's files do not tell the two apart; `loading` makes either fit what a config asks for.
    """
    if source == "meta dinov3":
        tensors = _without_copies(tensors)
    found, unknown = convert(tensors, TABLES[source], lambda name: bool(_CLASSIFIER.fullmatch(name)))
    for path, array in found.items():
        if path.endswith(("grn/gamma", "grn/beta")):
            found[path] = array.reshape(-1)  # (1, 1, 1, C) in most
    new = new_norms(found, (3,) if "dinov3" in source else (0, 1, 2, 3))
    return found | new, unknown, list(new)


def new_norms(arrays: Mapping[str, np.ndarray], stages: tuple[int, ...]) -> dict[str, np.ndarray]:
    """LayerNorms of scale 1 and bias 0 behind those of `stages` that have none."""
    new = {}
    for k in stages:
        kernel = arrays.get(f"downsample/{k}/conv/kernel")
        for leaf, value in (("scale", 1.0), ("bias", 0.0)):
            if kernel is not None and f"norms/{k}/{leaf}" not in arrays:
                new[f"norms/{k}/{leaf}"] = np.full(kernel.shape[-1], value, kernel.dtype)
    return new


def _without_copies(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Meta's file of DINOv3 has its one LayerNorm twice, `norm` and, in the list by stages, `norms.3`."""
    tensors = dict(tensors)
    for leaf in ("weight", "bias"):
        copy = tensors.pop(f"norms.3.{leaf}", None)
        if copy is not None and not np.array_equal(copy, tensors.setdefault(f"norm.{leaf}", copy)):
            raise ValueError(f"norms.3.{leaf} is another than norm.{leaf}, which it repeats in Meta's files")
    return tensors
