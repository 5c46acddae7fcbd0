"""Names of the published mmsegmentation checkpoints, as a table onto our module paths."""

import re
from collections.abc import Mapping

import numpy as np

_NORM = {"weight": "scale", "bias": "bias"}
_LAYER = {"weight": "kernel", "bias": "bias"}
_BN = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
_LEAF = r"(weight|bias)$"
_BN_LEAF = r"(weight|bias|running_mean|running_var)$"

# (upstream name, our path with {} for the groups before the leaf, names of the leaf)
STUDENT_AND_HEADS = [
    (r"backbone\.downsample_layers\.(0)\.0\." + _LEAF, "student/downsample/{}/conv", _LAYER),
    (r"backbone\.downsample_layers\.(0)\.1\." + _LEAF, "student/downsample/{}/ln", _NORM),
    (r"backbone\.downsample_layers\.([1-3])\.0\." + _LEAF, "student/downsample/{}/ln", _NORM),
    (r"backbone\.downsample_layers\.([1-3])\.1\." + _LEAF, "student/downsample/{}/conv", _LAYER),
    (r"backbone\.stages\.(\d)\.(\d+)\.(gamma)$", "student/stages/{}/{}", {"gamma": "gamma"}),
    (r"backbone\.stages\.(\d)\.(\d+)\.norm\." + _LEAF, "student/stages/{}/{}/norm", _NORM),
    (r"backbone\.stages\.(\d)\.(\d+)\.(depthwise_conv|pointwise_conv[12])\." + _LEAF,
     "student/stages/{}/{}/{}", _LAYER),
    (r"backbone\.norm([0-3])\." + _LEAF, "student/norms/{}", _NORM),
    (r"fam\.convert\.(\d)\." + _LEAF, "fam/convert/{}", _LAYER),
    (r"neck\.(lateral_convs|convs)\.(\d)\.conv\." + _LEAF, "neck/{}/{}", _LAYER),
    (r"fmm\.adapters\.(\d)\.(\d+)\.(norm[12])\." + _LEAF, "fmm/adapters/{}/{}/{}", _NORM),
    (r"fmm\.adapters\.(\d)\.(\d+)\.(attn|mlp)\.(\w+)\." + _LEAF, "fmm/adapters/{}/{}/{}/{}", _LAYER),
    (r"(decode_head|auxiliary_head)\.conv_seg\." + _LEAF, "{}/conv_seg", _LAYER),
    (r"decode_head\.psp_modules\.(\d)\.1\.conv\." + _LEAF, "decode_head/psp/{}/conv", _LAYER),
    (r"decode_head\.psp_modules\.(\d)\.1\.bn\." + _BN_LEAF, "decode_head/psp/{}/bn", _BN),
    (r"decode_head\.(bottleneck|fpn_bottleneck)\.conv\." + _LEAF, "decode_head/{}/conv", _LAYER),
    (r"decode_head\.(bottleneck|fpn_bottleneck)\.bn\." + _BN_LEAF, "decode_head/{}/bn", _BN),
    (r"(decode_head|auxiliary_head)\.(\w*convs)\.(\d)\.conv\." + _LEAF, "{}/{}/{}/conv", _LAYER),
    (r"(decode_head|auxiliary_head)\.(\w*convs)\.(\d)\.bn\." + _BN_LEAF, "{}/{}/{}/bn", _BN),
]  # fmt: skip
TEACHER = [
    (r"teach_backbone\.(cls_token)$", "", {"cls_token": "cls_token"}),
    (r"teach_backbone\.patch_embed\.projection\." + _LEAF, "patch_embed", _LAYER),
    (r"teach_backbone\.layers\.(\d+)\.ln([12])\." + _LEAF, "layers/{}/norm{}", _NORM),
    (r"teach_backbone\.layers\.(\d+)\.attn\.(qkv|proj)\." + _LEAF, "layers/{}/attn/{}", _LAYER),
    (r"teach_backbone\.layers\.(\d+)\.attn\.gamma1\.(weight)$", "layers/{}", {"weight": "scale1"}),
    (r"teach_backbone\.layers\.(\d+)\.ffn\.layers\.0\.0\." + _LEAF, "layers/{}/mlp/fc1", _LAYER),
    (r"teach_backbone\.layers\.(\d+)\.ffn\.layers\.1\." + _LEAF, "layers/{}/mlp/fc2", _LAYER),
    (r"teach_backbone\.layers\.(\d+)\.ffn\.gamma2\.(weight)$", "layers/{}", {"weight": "scale2"}),
    (r"teach_backbone\.ln1\." + _LEAF, "norm", _NORM),
]
POSITION = "teach_backbone.pos_embed"


def our_path(name: str, table=STUDENT_AND_HEADS) -> str | None:
    """The path of an upstream name, 'student/stages/0/0/norm/scale', or None where the table has no row."""
    for pattern, template, leaves in table:
        match = re.match(pattern, name)
        if match:
            *groups, leaf = match.groups()
            return "/".join(filter(None, (template.format(*groups), leaves[leaf])))
    return None


def to_our_layout(array: np.ndarray, path: str, ndim: int) -> np.ndarray:
    """torch's (out, in, ...) to (..., in, out); a 1x1 convolution becomes a matrix where ours is one."""
    if not path.endswith("/kernel"):
        return array
    if array.ndim == 4 and ndim == 2:
        array = array[:, :, 0, 0]
    return np.moveaxis(array, (0, 1), (-1, -2))


def from_upstream(tensors: Mapping[str, np.ndarray], ndims: Mapping[str, int], table) -> dict[str, np.ndarray]:
    """Upstream tensors that `table` knows, by our path and in our layout; `ndims` gives ours by path."""
    found = {}
    for name, array in tensors.items():
        path = our_path(name, table)
        if path is not None:
            found[path] = to_our_layout(array, path, ndims.get(path, array.ndim))
    return found


def position_embedding(array: np.ndarray, grid: tuple[int, int]) -> dict[str, np.ndarray]:
    """(1, 1 + gh * gw, C) of a ViT with a class token -> our two parameters."""
    return {"pos_embed_cls": array[:, :1], "pos_embed": array[:, 1:].reshape(1, *grid, array.shape[-1])}
