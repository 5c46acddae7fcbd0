"""Every setting: its meaning, unit, range and source. `Settings.of` makes them, once, from what a config file says.

The values themselves stand in base.py and configs/. What `absent` says is what a config or a workdir without the key
means: the behaviour before the setting existed.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from ktda_jax import UserError
from ktda_jax.config.data import PUBLISHED, Data
from ktda_jax.config.fields import NOT_NEGATIVE, POSITIVE, SHARE, SIZE, SIZES, build, plain, section, setting

VERSION = 1  # of config.json; raised when an old one needs more than `absent` to be understood
DISTANCES = ("published", "mse", "cosine")  # of the FAM's outputs from the teacher's taps
TRACKERS = ("wandb", "mlflow")
KL_AXES = ("width", "channel", "position")  # that the softmax of the distillation may run along


@dataclasses.dataclass(frozen=True)
class Mesh:
    """How devices share the work: data x fsdp of them."""

    data: int = setting("devices that each take other images; -1: all that are left")
    fsdp: int = setting("devices that parameters are split over, too")


@dataclasses.dataclass(frozen=True)
class Student:
    """The ConvNeXt; what is None here is the preset's (models/convnext.py)."""

    preset: str | None = setting("laptop, tiny, base, v2_atto, dinov3_base, ...", source=PUBLISHED, absent=None)
    depths: tuple[int, ...] | None = setting(
        "blocks by stage", fits=(lambda x: min(x, default=0) >= 0, "numbers of blocks"), absent=None
    )
    channels: tuple[int, ...] | None = setting("channels by stage", fits=SIZES, absent=None)
    drop_path: float = setting(
        "stochastic depth of the last block; rises from 0", source=PUBLISHED, fits=SHARE, absent=0.0
    )
    layer_scale: float | None = setting("initial layer scale of V1 blocks; None: 1", absent=None)
    v2: bool | None = setting("ConvNeXt-V2 blocks", absent=None)
    first_norms: bool | None = setting(
        "a LayerNorm on each of the first three maps too, as on the last (dinov3_*: none)", absent=None
    )
    remat: bool = setting("recompute blocks in the backward pass: less memory, more time", absent=False)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The ViT, which sets the FAM's width and grid; what is None here is the preset's (models/vit.py)."""

    preset: str | None = setting("laptop, small, base, base_reg, dinov3_base, ...", source=PUBLISHED, absent=None)
    width: int | None = setting("channels", fits=SIZE, absent=None)
    depth: int | None = setting("layers, at least 4; of a foreign one its taps", fits=SIZE, absent=None)
    heads: int | None = setting("attention heads", fits=SIZE, absent=None)
    image_size: tuple[int, int] | None = setting(
        "for which the position embedding is stored", unit="px", fits=SIZES, absent=None
    )
    taps: tuple[int | None, ...] | None = setting(
        "layers whose outputs are distilled, from 1, one per student level; None in it: that level is not; None: the "
        "last of each quarter, as published", absent=None,
    )  # fmt: skip
    patch: int | None = setting("side of a patch", unit="px", fits=SIZE, absent=None)
    registers: int | None = setting("register tokens", fits=NOT_NEGATIVE, absent=None)
    swiglu: bool | None = setting("gated feed-forward", absent=None)
    mlp_ratio: float | None = setting("hidden width of the feed-forward over the width", fits=POSITIVE, absent=None)
    rope: bool | None = setting("rotary positions (DINOv3)", absent=None)
    antialias: bool | None = setting("resize the position embedding antialiased", absent=None)
    mean: tuple[float, ...] | None = setting(
        "of the images it was trained on, by band; None: the preset's, for other bands than red, green and blue the "
        "average of these", unit="0 to 255", absent=None,
    )  # fmt: skip
    std: tuple[float, ...] | None = setting(
        "their standard deviation",
        unit="0 to 255",
        fits=(lambda x: bool(x) and min(x) > 0, "numbers above 0"),
        absent=None,
    )
    foreign: str | None = setting(
        "name of a teacher that is not ours; training writes it with all of the above that its features say "
        "(config/foreign.py)", absent=None,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FMM:
    """The feature modulation module."""

    enabled: bool = setting("whether there is one", absent=True)
    form: str = setting("transformer, or mlp", source=PUBLISHED, absent="transformer")
    blocks: int = setting("on every level", source=PUBLISHED, fits=SIZE, absent=4)
    heads: int = setting("attention heads (transformer)", source=PUBLISHED, fits=SIZE, absent=8)
    mlp_ratio: float = setting("hidden width over the width (transformer)", source=PUBLISHED, fits=POSITIVE, absent=4.0)
    remat: bool = setting("recompute blocks in the backward pass: less memory, more time", absent=False)


@dataclasses.dataclass(frozen=True)
class Model:
    """Student, teacher and decoders."""

    student: Student = section("the network that is trained")
    teacher: Teacher = section("the frozen transformer it learns from")
    fmm: FMM = section("the feature modulation module", optional=True)
    encoder: str | None = setting("None: the student; teacher: the frozen one under the same decoder", absent=None)
    tap_scales: tuple[float, ...] | None = setting(
        "what the teacher's taps are multiplied by; None: 1, as published", absent=None
    )
    standardize_taps: bool = setting(
        "each channel of the teacher's taps to mean 0 and variance 1 over the training images", absent=False
    )
    fam: bool = setting("whether there is a feature alignment module", source=PUBLISHED, absent=True)
    align_grid: bool = setting(
        "the student sees images enlarged to 16 px a token of the teacher, the FAM all cells of a token", absent=False
    )
    grid: tuple[int, int] | None = setting(
        "rows and columns of the FAM's output; None: the teacher's", fits=SIZES, absent=None
    )
    head: str = setting("uper, or linear: a classifier on the FAM's maps, without the neck", absent="uper")
    neck_channels: int | None = setting("of all behind the FAM; None: the teacher's width", fits=SIZE, absent=None)
    head_channels: int = setting("of the UPerNet decoder", source=PUBLISHED, fits=SIZE, absent=512)
    aux_channels: int = setting(
        "of the auxiliary head; 0: none", source=PUBLISHED, absent=256,
        fits=(lambda x: x >= 0, "at least 0; 0 leaves the auxiliary head out"),
    )  # fmt: skip
    dropout: float = setting("of channels before the classifiers", source=PUBLISHED, fits=SHARE, absent=0.1)


@dataclasses.dataclass(frozen=True)
class StoredTaps:
    """Where the teacher's outputs come from (config.teacher)."""

    mode: str = setting("computed in every training step, or precomputed by ktda_jax.extract", absent="computed")
    features: str | None = setting("folder of precomputed ones; None: features/<data.name>", absent=None, runtime=True)
    dtype: str = setting("in which ours are stored: bfloat16 or float16", absent="bfloat16", runtime=True)
    bands: tuple[int, ...] | None = setting(
        "which of config.data.bands the teacher sees, in the order of its own; None: red, green and blue", absent=None,
        fits=(lambda x: len(x) > 0, "some of config.data.bands, or None"),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Weights:
    """What does not start at random: folders of ktda_jax.convert, published files, hf://ORG/NAME, or workdirs."""

    student: str | None = setting("pretrained student")
    teacher: str | None = setting("pretrained teacher; of a workdir the one that was frozen in it")
    model: str | None = setting("a whole KTDA model, to go on from or to evaluate", absent=None)
    new_classifier: bool = setting("of `model`: leave its classifiers out, for other classes", absent=False)


@dataclasses.dataclass(frozen=True)
class Loss:
    """What both heads learn from labels, and distillation."""

    alpha: float = setting(
        "share of KL against MSE", source=PUBLISHED, fits=(lambda x: 0 <= x <= 1, "a share from 0 to 1")
    )
    temperature: float = setting("of the KL", source=PUBLISHED, fits=POSITIVE)
    kl_axis: str = setting("along which the KL's softmax runs: width, channel or position", source=PUBLISHED)
    aux_weight: float = setting("of the auxiliary head's loss", source=PUBLISHED, fits=NOT_NEGATIVE)
    class_weights: tuple[float, ...] | None = setting(
        "of the classes in the cross entropy; None: 1",
        fits=(lambda x: min(x, default=-1) >= 0 and max(x) > 0, "numbers from 0, not all 0"),
    )
    avg_non_ignore: bool = setting("mean over labelled pixels instead of all", source=PUBLISHED)
    distance: str = setting(
        "of student and teacher: published (KL and MSE by alpha), mse or cosine", absent="published"
    )
    tap_weights: tuple[float, ...] | None = setting(
        "of the four levels in the distillation; None: 1", absent=None,
        fits=(lambda x: len(x) == 4 and min(x) >= 0 and max(x) > 0, "four numbers from 0, not all 0"),
    )  # fmt: skip
    cross_entropy: float = setting("weight of the cross entropy in both heads' loss", fits=NOT_NEGATIVE, absent=1.0)
    dice: float = setting("weight of the Dice loss (training/region_losses.py)", fits=NOT_NEGATIVE, absent=0.0)
    focal: float = setting("weight of the focal loss, one class against all others", fits=NOT_NEGATIVE, absent=0.0)
    focal_gamma: float = setting("power by which easy pixels fade in it", fits=NOT_NEGATIVE, absent=2.0)
    lovasz: float = setting("weight of the Lovász-softmax loss", fits=NOT_NEGATIVE, absent=0.0)
    hard_share: float | None = setting(
        "of the labelled pixels, those of the highest cross entropy, over which its mean is; None: all pixels",
        absent=None, fits=(lambda x: 0 < x < 1, "a share between 0 and 1"),
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Semi:
    """Learning from what the parameters' average says of images without labels (training/semi.py)."""

    weight: float = setting("of that cross entropy; 0: none", fits=NOT_NEGATIVE, absent=0.0)
    threshold: float = setting("probability from which a pixel's class counts", fits=SHARE, absent=0.95)
    ramp: int = setting("in which the weight rises from 0", unit="steps", fits=NOT_NEGATIVE, absent=0)


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW."""

    lr: float = setting("learning rate after the warm-up", source=PUBLISHED, fits=POSITIVE)
    b1: float = setting("decay of the first moment", source=PUBLISHED, fits=SHARE)
    b2: float = setting("decay of the second moment", source=PUBLISHED, fits=SHARE)
    weight_decay: float = setting("of all but norms", source=PUBLISHED, fits=NOT_NEGATIVE)
    student_lr_mult: float = setting(
        "times lr, for student and FAM; 0: they stay as they came", absent=1.0, fits=NOT_NEGATIVE
    )


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Of the learning rate: linear warm-up times polynomial decay to 0."""

    warmup: int = setting("length of the warm-up", unit="steps", source=PUBLISHED, fits=NOT_NEGATIVE)
    poly_begin: int | None = setting("where the decay begins; None: where the warm-up ends", unit="steps")
    power: float = setting("of the decay", source=PUBLISHED, fits=NOT_NEGATIVE)


@dataclasses.dataclass(frozen=True)
class Settings:
    """All of them, checked one by one; `checks.check` holds them against each other."""

    seed: int = setting(
        "from which everything random comes", fits=(lambda x: 0 <= x < 2**31, "a number from 0 to 2147483647")
    )
    total_steps: int = setting("optimiser steps", source=PUBLISHED, fits=SIZE)
    batch_size: int = setting("images of a step, over all devices", source=PUBLISHED, fits=SIZE)
    eval_batch_size: int = setting("images evaluated at once, over all devices", fits=SIZE)
    grad_accum: int = setting("micro-batches of a step: less memory, the same batch", fits=SIZE)
    dtype: str = setting("of the computation: auto (bfloat16 on accelerators), float32 or bfloat16")
    clip_norm: float | None = setting(
        "largest norm of the gradient; None: any", fits=(lambda x: x > 0, "a number above 0")
    )
    ema: float | None = setting(
        "decay of averaged parameters for evaluation; None: none",
        fits=(lambda x: 0 < x < 1, "a decay between 0 and 1, such as 0.999"),
    )
    log_every: int = setting("between logged losses", unit="steps", fits=SIZE, runtime=True)
    eval_every: int = setting("between evaluations", unit="steps", source=PUBLISHED, fits=SIZE)
    patience: int | None = setting(
        "evaluations without a better score after which training stops; None: to the end", fits=SIZE, absent=None,
        runtime=True,
    )  # fmt: skip
    checkpoint_every: int | None = setting(
        "between further checkpoints; None or 0: none", unit="steps", fits=NOT_NEGATIVE, runtime=True
    )
    keep_checkpoints: int = setting(
        "how many of the latest checkpoints stay, besides the best", fits=SIZE, absent=1, runtime=True
    )
    tracker: str | None = setting(
        "wandb or mlflow, where the run is reported too; None: in the workdir alone", absent=None, runtime=True
    )
    distill: bool = setting("whether the student learns from the teacher", source=PUBLISHED)
    supervised: bool = setting("False: student and FAM learn from the teacher alone, without labels", absent=True)
    mesh: Mesh = section("how devices share the work", runtime=True)
    data: Data = section("the tiles")
    model: Model = section("the networks")
    teacher: StoredTaps = section("where the teacher's outputs come from", optional=True)
    weights: Weights = section("what does not start at random")
    loss: Loss = section("what is minimised")
    semi: Semi = section("learning from the model's own labels", optional=True)
    optimizer: Optimizer = section("by what")
    schedule: Schedule = section("at which rate")

    @classmethod
    def of(cls, config: Mapping[str, Any], *, strict: bool = True) -> "Settings":
        """From a ConfigDict or what config.json holds; UserError names what is missing, no such value or out of range.

        `strict`: also what is unknown.
        """
        if not isinstance(config, Mapping | ConfigDict):
            raise UserError(f"the config is {config!r}; give its settings by name")
        config = plain(config.to_dict() if isinstance(config, ConfigDict) else config)
        version = config.pop("version", 0)
        if not isinstance(version, int) or version > VERSION:
            raise UserError(f"settings of version {version}, but this program knows {VERSION}; take a newer one")
        return build(cls, config, "config", strict)

    @property
    def encodes(self) -> bool:
        """Whether the frozen teacher is the model's encoder."""
        return self.model.encoder == "teacher"
