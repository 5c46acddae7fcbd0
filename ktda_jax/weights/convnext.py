"""ConvNeXt and ConvNeXt-V2 in the layouts of mmpretrain, Hugging Face, timm and Meta."""

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
TABLES = {"mmpretrain": MMPRETRAIN, "hf": HF, "timm": TIMM, "meta": META}
SIGNATURES = {  # a name that only this layout has
    "mmpretrain": "stages.0.0.depthwise_conv.weight",
    "hf": "encoder.stages.0.layers.0.dwconv.weight",
    "timm": "stages.0.blocks.0.conv_dw.weight",
    "meta": "stages.0.0.dwconv.weight",
}
_CLASSIFIER = re.compile(r"(head|classifier|head\.fc|fc)\.(weight|bias)|head\.(fc|layers)\..*")


def from_source(tensors: Mapping[str, np.ndarray], source: str) -> tuple[dict[str, np.ndarray], list[str], list[str]]:
    """Our arrays, unknown names, and the paths that are new.

    A classifier normalises its last map only, so `norms/0` to `norms/2` start as identities, as in the published
    training, which begins from such weights.
    """
    found, unknown = convert(tensors, TABLES[source], lambda name: bool(_CLASSIFIER.fullmatch(name)))
    for path, array in found.items():
        if path.endswith(("grn/gamma", "grn/beta")):
            found[path] = array.reshape(-1)  # (1, 1, 1, C) in most
    new = []
    for k in range(4):
        kernel = found.get(f"downsample/{k}/conv/kernel")
        for leaf, value in (("scale", 1.0), ("bias", 0.0)):
            if kernel is not None and f"norms/{k}/{leaf}" not in found:
                found[f"norms/{k}/{leaf}"] = np.full(kernel.shape[-1], value, kernel.dtype)
                new.append(f"norms/{k}/{leaf}")
    return found, unknown, new
