"""KTDA checkpoints of the published code (mmsegmentation 1.2.2), both ways."""

from collections.abc import Mapping

import numpy as np

from ktda_jax.weights import convnext, vit
from ktda_jax.weights.table import BN, LAYER, NORM, POINT, Row, convert, convert_back, find

HEADS = [
    Row("teacher_taps", "taps", {"mean": "mean", "var": "var"}),  # ours alone; the published code leaves it out
    Row("fam.convert.{}", "fam/convert/{}", POINT),
    Row("neck.lateral_convs.{}.conv", "neck/lateral_convs/{}", POINT),
    Row("neck.convs.{}.conv", "neck/convs/{}", LAYER),
    Row("fmm.adapters.{}.{}.norm1", "fmm/adapters/{}/{}/norm1", NORM),
    Row("fmm.adapters.{}.{}.norm2", "fmm/adapters/{}/{}/norm2", NORM),
    Row("fmm.adapters.{}.{}.attn.{}", "fmm/adapters/{}/{}/attn/{}", LAYER),
    Row("fmm.adapters.{}.{}.mlp.{}", "fmm/adapters/{}/{}/mlp/{}", LAYER),
    Row("{}.conv_seg", "{}/conv_seg", POINT),
    Row("decode_head.psp_modules.{}.1.conv", "decode_head/psp/{}/conv", POINT),
    Row("decode_head.psp_modules.{}.1.bn", "decode_head/psp/{}/bn", BN),
    Row("decode_head.bottleneck.conv", "decode_head/bottleneck/conv", LAYER),
    Row("decode_head.bottleneck.bn", "decode_head/bottleneck/bn", BN),
    Row("decode_head.fpn_bottleneck.conv", "decode_head/fpn_bottleneck/conv", LAYER),
    Row("decode_head.fpn_bottleneck.bn", "decode_head/fpn_bottleneck/bn", BN),
    Row("decode_head.lateral_convs.{}.conv", "decode_head/lateral_convs/{}/conv", POINT),
    Row("decode_head.lateral_convs.{}.bn", "decode_head/lateral_convs/{}/bn", BN),
    Row("decode_head.fpn_convs.{}.conv", "decode_head/fpn_convs/{}/conv", LAYER),
    Row("decode_head.fpn_convs.{}.bn", "decode_head/fpn_convs/{}/bn", BN),
    Row("auxiliary_head.convs.{}.conv", "auxiliary_head/convs/{}/conv", LAYER),
    Row("auxiliary_head.convs.{}.bn", "auxiliary_head/convs/{}/bn", BN),
]


def _under(prefix: str, path: str, table: list[Row]) -> list[Row]:
    return [
        Row(f"{prefix}.{r.theirs}".removesuffix("."), f"{path}/{r.ours}".removesuffix("/"), r.leaves) for r in table
    ]


TABLE = [*_under("backbone", "student", convnext.MMPRETRAIN), *HEADS]
TEACHER = _under("teach_backbone", "teacher", vit.MMPRETRAIN)


def our_path(name: str) -> str | None:
    """The path of a trainable upstream parameter, 'student/stages/0/0/norm/scale', or None."""
    hit = find(name, TABLE)
    return hit and hit[1]


def from_upstream(
    tensors: Mapping[str, np.ndarray], grid: tuple[int, int] | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """A whole checkpoint by our paths, the teacher under 'teacher/'; and the names that nothing knows.

    grid: of the teacher's position embedding, where it is known.
    """
    found, unknown = convert(tensors, [*TABLE, *TEACHER], lambda name: name.startswith("data_preprocessor."))
    teacher = {k.removeprefix("teacher/"): v for k, v in found.items() if k.startswith("teacher/")}
    found = {k: v for k, v in found.items() if not k.startswith("teacher/")}
    return found | {f"teacher/{k}": v for k, v in vit.split_position(teacher, grid).items()}, unknown


def to_upstream(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of `from_upstream`, bit for bit."""
    arrays = dict(arrays)
    if "teacher/pos_embed" in arrays:
        position = arrays.pop("teacher/pos_embed")
        position = position.reshape(1, -1, position.shape[-1])
        arrays["teacher/position"] = np.concatenate([arrays.pop("teacher/pos_embed_cls"), position], axis=1)
    return convert_back(arrays, [*TABLE, *TEACHER])
