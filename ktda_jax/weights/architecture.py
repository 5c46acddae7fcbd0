"""What tensors say about the model they belong to: configurations inferred from names and shapes."""

from collections.abc import Mapping

import numpy as np

from ktda_jax import UserError
from ktda_jax.models.convnext import ConvNeXtConfig
from ktda_jax.models.fmm import FMMConfig
from ktda_jax.models.ktda import KTDAConfig
from ktda_jax.models.vit import MEAN, PRESETS, STD, ViTConfig

Arrays = Mapping[str, np.ndarray]
HEADS = {384: 6, 768: 12, 1024: 16, 1280: 20, 1536: 24, 4096: 32}  # published widths; no tensor tells
FMM_HEADS = 8  # published
DINOV3_IMAGES = {"sat493m": "dinov3_large_sat", "lvd1689m": "dinov3_large"}  # of which statistics


def under(arrays: Arrays, prefix: str) -> dict[str, np.ndarray]:
    """The part of `arrays` below `prefix`, without it."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def _shape(arrays: Arrays, path: str) -> tuple[int, ...]:
    if path not in arrays:
        raise UserError(f"no tensor for {path}, without which the model's size is unknown")
    return arrays[path].shape


def _count(arrays: Arrays, prefix: str) -> int:
    """How many numbers follow `prefix`: 'layers/' of 'layers/0/...', 'layers/1/...' gives 2."""
    return len({k.removeprefix(prefix).split("/")[0] for k in arrays if k.startswith(prefix)})


def convnext(arrays: Arrays, *, beside: Mapping | None = None) -> ConvNeXtConfig:
    """`beside`: Hugging Face's settings."""
    beside = beside or {}
    if (activation := beside.get("hidden_act", "gelu")) != "gelu":
        raise UserError(f"hidden_act {activation!r} is not what ConvNeXt was published with")
    eps = beside.get("layer_norm_eps", 1e-6)
    if beside.get("model_type") == "dinov3_convnext" and eps != 1e-6:  # of other ConvNeXts it is not used
        raise UserError(f"layer_norm_eps {eps} is not what DINOv3's ConvNeXts were published with (1e-06)")
    return ConvNeXtConfig(
        depths=tuple(_count(arrays, f"stages/{k}/") for k in range(4)),
        channels=tuple(_shape(arrays, f"downsample/{k}/conv/kernel")[-1] for k in range(4)),
        v2=any("/grn/" in path for path in arrays),
        bands=_shape(arrays, "downsample/0/conv/kernel")[2],
        first_norms="norms/0/scale" in arrays,
    )


def vit(
    arrays: Arrays,
    *,
    rope: bool,
    heads: int | None = None,
    beside: Mapping | None = None,
    images: Mapping | None = None,
) -> ViTConfig:
    """`rope`: DINOv3. `beside`: Hugging Face's settings. `images`: mean and standard deviation of its images."""
    beside = beside or {}
    patch, _, bands, width = _shape(arrays, "patch_embed/kernel")
    hidden = _shape(arrays, "layers/0/mlp/fc2/kernel")[0]
    swiglu = _shape(arrays, "layers/0/mlp/fc1/kernel")[1] == 2 * hidden
    registers = arrays["register_tokens"].shape[1] if "register_tokens" in arrays else 0
    said = beside.get("num_attention_heads")
    if heads and said and heads != said:
        raise UserError(f"{heads} heads were asked for, but the weights are of a model with {said}")
    heads = heads or said or HEADS.get(width)
    if heads is None or heads < 1 or width % heads:
        raise UserError(
            f"a transformer of width {width}: give --teacher_heads of ktda_jax.convert, a divisor of it (got {heads})"
        )
    activation = beside.get("hidden_act", "silu" if swiglu else "gelu")
    if activation != ("silu" if swiglu else "gelu") and not (swiglu and not rope):  # DINOv2's SwiGLU ignores it
        raise UserError(f"hidden_act {activation!r} is not what DINOv2 and DINOv3 were published with")
    published = {"layer_norm_eps": 1e-5 if rope else 1e-6} | ({"rope_theta": 100.0} if rope else {})
    for name, value in published.items():
        if beside.get(name, value) != value:
            raise UserError(f"{name} {beside[name]} is not what DINOv2 and DINOv3 were published with ({value})")
    options = dict(images or {})
    if images is None and bands != 3:  # to be given by the config
        options = {"mean": (sum(MEAN) / 3,) * bands, "std": (sum(STD) / 3,) * bands}
    if not rope:
        options["image_size"] = tuple(side * patch for side in _shape(arrays, "pos_embed")[1:3])
    return ViTConfig(
        width=width, depth=_count(arrays, "layers/"), heads=heads, patch=patch, registers=registers, swiglu=swiglu,
        mlp_ratio=_mlp_ratio(width, hidden, swiglu and not rope), rope=rope, antialias=registers > 0 and not rope,
        bands=bands,
        **options,
    )  # fmt: skip


def statistics(beside: Mapping) -> dict[str, tuple[float, ...]] | None:
    """Mean and standard deviation of uint8 images, by band, if a preprocessor's settings or timm's give them."""
    inner = beside.get("pretrained_cfg")
    timm = inner if isinstance(inner, Mapping) else {}
    found = {}
    for name in ("mean", "std"):
        values = beside.get(f"image_{name}", timm.get(name))
        if not (isinstance(values, list) and values and all(isinstance(x, int | float) for x in values)):
            return None
        found[name] = tuple(round(255 * x, 3) for x in values)
    return found


def statistics_by_name(*names: str) -> tuple[dict[str, tuple[float, ...]], str] | None:
    """Mean and standard deviation of DINOv3's images, and the name that tells which: the first that names one kind.

    No tensor does. Meta, Hugging Face and timm call satellite images sat493m and those of the web lvd1689m:
    'dinov3_vitl16_pretrain_sat493m-eadcf0ff.pth', 'dinov3-vitl16-pretrain-lvd1689m'.
    """
    for name in names:
        named = [preset for images, preset in DINOV3_IMAGES.items() if images in name.lower()]
        if len(named) == 1:
            config = ViTConfig(**PRESETS[named[0]])
            return {"mean": config.mean, "std": config.std}, name
    return None


def _mlp_ratio(width: int, hidden: int, reduced: bool) -> float:
    """DINOv2's SwiGLU has two thirds of the hidden width that the ratio says (rounded up to 8)."""
    return round(1.5 * hidden / width) if reduced else hidden / width


def assumed(arrays: Arrays, config: KTDAConfig, teacher_heads: int | None, fmm_heads: int | None) -> dict[str, int]:
    """What neither the tensors nor the caller have said of `ktda`'s answer, and what it changes."""
    found = {}
    if config.fmm is not None and not fmm_heads:
        found["FMM heads (--fmm_heads)"] = config.fmm.heads
    if not under(arrays, "teacher/"):
        found["teacher's patch"] = config.teacher.patch
    elif not teacher_heads:
        found["teacher heads (--teacher_heads)"] = config.teacher.heads
    return found


def ktda(arrays: Arrays, *, teacher_heads: int | None = None, fmm_heads: int | None = None) -> KTDAConfig:
    """`arrays`: a whole checkpoint by our paths, the teacher's under 'teacher/'."""
    if under(arrays, "teacher/"):
        teacher = vit(under(arrays, "teacher/"), rope=False, heads=teacher_heads)
    else:  # stripped for prediction, which needs to know its width and patch alone; the rest as published
        width = _shape(arrays, "fam/convert/0/kernel")[-1]
        teacher = ViTConfig(width=width, depth=12, heads=teacher_heads or HEADS.get(width) or 1)
    fmm = None
    if any(path.startswith("fmm/") for path in arrays):
        width, hidden = _shape(arrays, "fmm/adapters/0/0/mlp/fc1/kernel")
        heads = fmm_heads or FMM_HEADS
        if heads < 1 or width % heads:
            raise UserError(f"an FMM of width {width} with {heads} heads: give --fmm_heads, a divisor of it")
        fmm = FMMConfig(blocks=_count(arrays, "fmm/adapters/0/"), heads=heads, mlp_ratio=hidden / width)
    aux = arrays.get("auxiliary_head/conv_seg/kernel")
    return KTDAConfig(
        num_classes=_shape(arrays, "decode_head/conv_seg/kernel")[-1],
        student=convnext(under(arrays, "student/")),
        teacher=teacher,
        fmm=fmm,
        head_channels=_shape(arrays, "decode_head/conv_seg/kernel")[0],
        aux_channels=0 if aux is None else aux.shape[0],
    )
