"""KTDA (Zhang et al., ICME 2025): student, FAM, neck, FMM and decoders put together.

    student -> FAM -> neck -> FMM -> UPerHead (and FCNHead on level 2)
                 \\-> distillation against the frozen teacher's taps (losses.py)

Without the FAM the student's own pyramid goes to the FMM and the decoders; the neck, which turns maps of one
size into a pyramid, goes with it. With `encoder='teacher'` there is no student, and the frozen
teacher's taps go to the neck. A model that is only distilled has no `decoder`: it ends at the FAM.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ktda_jax import UserError
from ktda_jax.models import convnext, vit
from ktda_jax.models.convnext import ConvNeXt, ConvNeXtConfig
from ktda_jax.models.fam import FAM, on_grid
from ktda_jax.models.fmm import FMM, FMMConfig
from ktda_jax.models.heads import FCNHead, LinearHead, UPerHead
from ktda_jax.models.layers import at_least_float32, resize
from ktda_jax.models.neck import MultiLevelNeck
from ktda_jax.models.taps import TapStatistics
from ktda_jax.models.vit import MEAN, STD, ViT, ViTConfig

AUX_LEVEL = 2


@dataclasses.dataclass(frozen=True)
class KTDAConfig:
    num_classes: int
    student: ConvNeXtConfig
    teacher: ViTConfig  # sets the FAM's width and grid, also where no teacher is run
    encoder: str = "student"  # or "teacher": the frozen one, whose taps take the place of the FAM's outputs
    fam: bool = True
    align_grid: bool = False  # the student's grid on the teacher's: see fam.py
    head: str = "uper"  # or "linear": a classifier on what the FAM gives, without the neck
    decoder: bool = True  # neck, FMM and heads; without them there is only something to distil
    fmm: FMMConfig | None = FMMConfig()
    grid: tuple[int, int] | None = None  # of the FAM's output; None: the teacher's for the input at hand
    tap_scales: tuple[float, ...] | None = None  # what the teacher's four taps are multiplied by; None: 1, as published
    standardize_taps: bool = False  # their channels, by statistics that the model holds
    neck_channels: int | None = None  # of the neck and all behind it; None: the teacher's width, as published
    head_channels: int = 512
    aux_channels: int = 256  # 0: no auxiliary head
    dropout: float = 0.1
    rgb: tuple[int, int, int] = (0, 1, 2)  # which of the image's bands are red, green and blue
    teacher_bands: tuple[int, ...] | None = None  # which the teacher sees, in its order; None: `rgb`

    def __post_init__(self):
        if self.encoder not in ("student", "teacher"):
            raise UserError(f"config.model.encoder is {self.encoder!r}; choose 'student' or 'teacher'")
        if self.head not in ("uper", "linear"):
            raise UserError(f"config.model.head is {self.head!r}; choose 'uper' or 'linear'")
        if self.encoder == "teacher" and self.fam:
            raise UserError("config.model.encoder='teacher' leaves nothing to align; set config.model.fam=False")
        if self.align_grid and not (self.fam and self.grid is None):
            raise UserError("config.model.align_grid is the FAM's on the teacher's grid; set fam=True and grid=None")
        if self.encoder == "teacher" and None in self.teacher.tapped:
            raise UserError(
                f"config.model.teacher.taps is {self.teacher.taps}; with config.model.encoder='teacher' every level "
                "needs a layer"
            )
        for name in ("depths", "channels"):
            values = getattr(self.student, name)
            if len(values) != 4:
                raise UserError(f"config.model.student.{name} is {values}; give four numbers, one per stage")
        scales = self.tap_scales
        if scales is not None and not (len(scales) == 4 and all(isinstance(s, int | float) and s > 0 for s in scales)):
            raise UserError(f"config.model.tap_scales is {scales}; give four numbers above 0")
        if len(self.rgb) != 3 or not 0 <= min(self.rgb) <= max(self.rgb) < self.student.bands:
            raise UserError(f"rgb is {self.rgb}; give three positions among the {self.student.bands} bands")
        if not all(0 <= band < self.student.bands for band in self.seen):
            raise UserError(f"teacher_bands is {self.seen}; give positions among the {self.student.bands} bands")
        if len(self.seen) != self.teacher.bands:
            raise UserError(
                f"the teacher takes {self.teacher.bands} band(s), and {len(self.seen)} are chosen for it; set "
                "config.teacher.bands"
            )

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the FAM's output for an image."""
        return self.grid or self.teacher.grid_of(height, width)

    @property
    def seen(self) -> tuple[int, ...]:
        """Which of the image's bands the teacher sees, in its order."""
        return self.rgb if self.teacher_bands is None else self.teacher_bands

    @property
    def teacher_rgb(self) -> tuple[int, int, int]:
        """Where red, green and blue stand among the bands that it sees; all 0 where it does not see all three."""
        there = set(self.rgb) <= set(self.seen)
        return tuple(self.seen.index(band) for band in self.rgb) if there else (0, 0, 0)

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the four maps that go to the FMM and the decoders."""
        if self.fam or self.encoder == "teacher":
            narrowed = self.neck_channels if self.head == "uper" else None
            return (narrowed or self.teacher.width,) * 4
        return tuple(self.student.channels)

    @classmethod
    def from_dict(cls, config) -> "KTDAConfig":
        """From the nested mapping of a config file, where `preset` names a size and `None` means unset."""
        config = {k: v for k, v in dict(config).items() if v is not None}
        fmm = dict(config.pop("fmm", {}))
        enabled = fmm.pop("enabled", True)
        config["fmm"] = _build(FMMConfig, "fmm", fmm, {})
        config["student"] = _build(ConvNeXtConfig, "student", config["student"], convnext.PRESETS)
        config["teacher"] = _build(ViTConfig, "teacher", config["teacher"], vit.PRESETS)
        built = _build(cls, "", config, {})
        return built if enabled else dataclasses.replace(built, fmm=None)


def _build(cls, name: str, values, presets: dict):
    """Builds dataclass `cls`, preset first; an unknown preset or field is named together with the known ones."""
    values = {k: v for k, v in dict(values).items() if v is not None}
    preset = values.pop("preset", None)
    if preset is not None and preset not in presets:
        raise UserError(f"config.model.{name}.preset is {preset!r}; known: {', '.join(presets)}")
    values = {**presets.get(preset, {}), **values}
    known = {f.name: f for f in dataclasses.fields(cls)}
    where = ".".join(filter(None, ("config.model", name)))
    for key in values:
        if key not in known:
            raise UserError(f"{where}.{key} is not a setting; known: {', '.join(known)}")
    missing = [k for k, f in known.items() if f.default is dataclasses.MISSING and k not in values]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}; give a preset ({', '.join(presets)}) or the values")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class Outputs(NamedTuple):
    logits: jax.Array | None  # (B, h, w, classes) at head resolution; None without a decoder
    aux_logits: jax.Array | None  # (B, h / 4, w / 4, classes)
    student: list[jax.Array] | None  # FAM outputs, four of (B, gh, gw, C)
    taps: list[jax.Array | None] | None  # the teacher's, of the same shapes, when one was given


def normalize(images: jax.Array, dtype, mean=MEAN, std=STD) -> jax.Array:
    """images: uint8 or float 0..255 (B, H, W, bands) -> zero mean, unit variance, by default ImageNet's, in `dtype`."""
    wide = jnp.promote_types(dtype, jnp.float32)
    return ((images.astype(wide) - jnp.asarray(mean, wide)) / jnp.asarray(std, wide)).astype(dtype)


def teacher_images(images: jax.Array, bands: tuple[int, ...], teacher: ViTConfig, dtype) -> jax.Array:
    """What a teacher sees of images (B, H, W, all bands) 0..255: `bands` of them, normalised as in its training."""
    seen = images if bands == tuple(range(images.shape[-1])) else images[..., np.array(bands)]
    return normalize(seen, dtype, teacher.mean, teacher.std)


def full_size(logits: jax.Array, size: tuple[int, int]) -> jax.Array:
    """The head's logits (B, h, w, C) resized to an image's or label's size, float32 or wider."""
    return resize(at_least_float32(logits), size)


def band_statistics(bands: int, rgb: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation, float64 (bands,): ImageNet's for red, green and blue, and for other bands their average."""
    statistics = []
    for values in (MEAN, STD):
        of_bands = np.full(bands, np.mean(values))
        if len(set(rgb)) == 3:
            of_bands[list(rgb)] = values
        statistics.append(of_bands)
    return tuple(statistics)


class KTDA(nnx.Module):
    """The trainable network. The teacher is a `ViT` of its own, passed to the call; but see `own_encoder`."""

    def __init__(
        self, config: KTDAConfig, *, own_encoder: bool = False, dtype=jnp.float32, param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        """`own_encoder`: a frozen encoder is part of the model, as prediction wants it, instead of an argument."""
        common = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        channels, width, frozen = config.channels, config.teacher.width, config.encoder == "teacher"
        self.taps = TapStatistics(4, width, param_dtype=param_dtype) if config.standardize_taps else None
        self.teacher = ViT(config.teacher, **common) if frozen and own_encoder else None
        self.student = None if frozen else ConvNeXt(config.student, **common)
        self.fam = FAM(config.student.channels, width, aligned=config.align_grid, **common) if config.fam else None
        decoder, heads = config.decoder, dict(dropout=config.dropout, **common)
        fits = decoder and config.head == "uper" and (config.fam or frozen)
        self.neck = MultiLevelNeck((width,) * 4, channels[0], **common) if fits else None
        self.fmm = FMM(channels, config.fmm, **common) if decoder and config.fmm else None
        if config.head == "linear":
            head = functools.partial(LinearHead, channels, config.num_classes)
        else:
            head = functools.partial(UPerHead, channels, config.head_channels, config.num_classes)
        self.decode_head = head(**heads) if decoder else None
        aux = (channels[AUX_LEVEL], config.aux_channels, config.num_classes)
        self.auxiliary_head = FCNHead(*aux, **heads) if decoder and config.aux_channels else None
        self.config, self.dtype = config, dtype

    def scaled(self, taps: Sequence[jax.Array | None]) -> list[jax.Array | None]:
        """The teacher's taps as they are to be matched: standardised, where it is so configured, times `tap_scales`.

        As published they are neither, and the last one, alone normalised by the teacher, outweighs the others.
        """
        taps = list(taps) if self.taps is None else self.taps(taps)
        if self.config.tap_scales is None:
            return taps
        return [None if tap is None else scale * tap for scale, tap in zip(self.config.tap_scales, taps, strict=True)]

    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        key: jax.Array | None = None,
        teacher: ViT | None = None,
        decoded: Callable[[jax.Array], jax.Array] | None = None,
    ) -> Outputs:
        """images: (B, H, W, bands) 0..255. `key` draws drop path and dropout; None leaves both out.

        Of a model whose encoder is the teacher, `teacher` is that encoder. `decoded` takes the rows that go on to the
        decoders, and so into BatchNorm's statistics, from an array of all; None: all do.
        """
        rgb, bands = self.config.rgb, self.config.student.bands
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        taps, aligned, teacher = None, None, teacher or self.teacher
        if teacher is not None:
            seen = teacher_images(images, self.config.seen, teacher.config, self.dtype)
            taps = self.scaled(jax.lax.stop_gradient(teacher(seen)))
        if self.student is not None:
            x = normalize(images, self.dtype, *band_statistics(bands, rgb))
            if self.config.align_grid:
                x = on_grid(x, self.config.teacher.grid_of(*images.shape[1:3]))
            features = self.student(x, key=keys[0])
        elif taps is None:
            raise UserError("this model's encoder is the frozen teacher (config.model.encoder), which it came without")
        else:
            features, taps = taps, None
        if self.fam is not None:
            features = aligned = self.fam(features, self.config.grid_of(*images.shape[1:3]))
        if self.decode_head is None:
            return Outputs(None, None, aligned, taps)
        if decoded is not None:
            features = [decoded(x) for x in features]
        if self.neck is not None:
            features = self.neck(features)
        if self.fmm is not None:
            features = self.fmm(features)
        logits = self.decode_head(features, train=train, key=keys[1])
        aux_logits = None
        # The auxiliary head only shapes the loss; evaluation does not pay for it.
        if self.auxiliary_head is not None and train:
            aux_logits = self.auxiliary_head(features[AUX_LEVEL], train=train, key=keys[2])
        return Outputs(logits, aux_logits, aligned, taps)
