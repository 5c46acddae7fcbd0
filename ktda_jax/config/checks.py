"""Settings held against each other: what no later check would name clearly, before anything is compiled."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ktda_jax import UserError
from ktda_jax.config import foreign
from ktda_jax.config.settings import DISTANCES, KL_AXES, TRACKERS, Settings
from ktda_jax.data import reading
from ktda_jax.data.paths import expand


def resolve(config: Mapping[str, Any]) -> Settings:
    """The settings of a config, which fit together; UserError names the one that does not."""
    settings = foreign.resolved(Settings.of(config))
    check(settings)
    return settings


def check(settings: Settings) -> None:
    data, loss, model = settings.data, settings.loss, settings.model
    if len(data.crop) != 2 or min(data.crop) < 32:
        raise UserError(f"config.data.crop is {tuple(data.crop)}; give (height, width) of at least 32 pixels")
    classes = data.info.classes
    if loss.class_weights is not None and len(loss.class_weights) != len(classes):
        raise UserError(f"config.loss.class_weights has {len(loss.class_weights)} values for {len(classes)} classes")
    _choose("dtype", settings.dtype, ("auto", "float32", "bfloat16"), also=("float64",))
    _choose("loss.kl_axis", loss.kl_axis, KL_AXES)
    _choose("loss.distance", loss.distance, DISTANCES)
    if settings.supervised and not any((loss.cross_entropy, loss.dice, loss.focal, loss.lovasz)):
        raise UserError(
            "config.loss.cross_entropy, dice, focal and lovasz are all 0, which leaves nothing to learn from labels; "
            "give one of them weight, or set config.supervised=False"
        )
    if settings.tracker is not None:
        _choose("tracker", settings.tracker, TRACKERS)
    _choose("data.source", data.source, ("tfds", "folder"))
    _choose("data.on_corrupt", data.on_corrupt, ("stop", "skip"))
    if data.rotate and data.crop[0] != data.crop[1]:
        raise UserError(
            f"config.data.rotate turns crops, and config.data.crop is {tuple(data.crop)}; give a square one, or leave "
            "config.data.rotate out"
        )
    if data.zoom and settings.distill and settings.teacher.mode == "precomputed":
        raise UserError(
            "config.data.zoom changes what the teacher sees, and with config.teacher.mode='precomputed' it saw the "
            "tiles as they are; set one of them otherwise"
        )
    if not settings.supervised:
        for name in ("zoom", "cutmix", "rare_crops", "folds"):
            if getattr(data, name):
                raise UserError(
                    f"config.data.{name} is for tiles with labels, and config.supervised=False has none; leave it out"
                )
    if loss.hard_share is not None and not loss.cross_entropy:
        raise UserError(
            "config.loss.hard_share is of the cross entropy, and config.loss.cross_entropy is 0; leave one of them out"
        )
    _choose("data.eval_scale", data.eval_scale, ("native", "crop"))
    reading.check(data, len(classes))
    if data.folds is not None or data.fold:
        from ktda_jax.data import folds  # only here: benchmarks run where OpenCV is not installed

        folds.check(data.folds, data.fold, records=data.source == "tfds")
    _choose("teacher.mode", settings.teacher.mode, ("computed", "precomputed"))
    others = () if model.teacher.foreign is None else ("float32",)
    _choose("teacher.dtype", settings.teacher.dtype, ("bfloat16", "float16"), also=others)
    if model.teacher.foreign is None and (model.teacher.depth or 4) < 4:
        raise UserError(
            f"config.model.teacher.depth is {model.teacher.depth}; give at least 4, one for each level of the student"
        )
    foreign.check(settings)
    reading.positions_of(data, settings.teacher.bands or (), "config.teacher.bands")
    if settings.encodes and settings.distill:
        raise UserError("config.model.encoder='teacher' leaves nothing to distil; set config.distill=False")
    if settings.encodes and settings.weights.student is not None:
        raise UserError("config.model.encoder='teacher' has no student; leave config.weights.student out")
    if settings.distill and not model.fam:
        raise UserError("config.distill needs the FAM; set config.model.fam=True or config.distill=False")
    if settings.distill and settings.optimizer.student_lr_mult == 0:
        raise UserError(
            "config.optimizer.student_lr_mult=0 keeps the student as it is, and config.distill trains it; take one"
        )
    _check_distillation(settings)


TEACHERS = (  # how one gets a teacher
    "give a pretrained one, such as --config.weights.teacher=hf://facebook/dinov2-small with "
    "--config.model.teacher.preset=small"
)


def _check_distillation(settings: Settings) -> None:
    """Of what learns from the teacher alone: images without labels, and students without a decoder."""
    data, stored = settings.data, settings.teacher.mode == "precomputed"
    taps, weights = settings.model.teacher.taps or (1,) * 4, settings.loss.tap_weights
    if weights and settings.distill and not any(w for tap, w in zip(taps, weights, strict=False) if tap is not None):
        raise UserError(
            f"config.loss.tap_weights is {weights}, 0 for all levels that have a tap ({taps}); give one of them weight"
        )
    images = "config.data.unlabelled"
    if not settings.supervised and not data.unlabelled:
        raise UserError(f"config.supervised=False trains on images alone; name them by {images}=DIR,SCENE.tif")
    what = "config.supervised=False" if not settings.supervised else images if data.unlabelled else None
    if settings.semi.weight and not (data.unlabelled and settings.supervised):
        raise UserError(
            f"config.semi.weight is {settings.semi.weight}, for {images}; name images there, or set it to 0"
        )
    if settings.semi.weight and settings.ema is None:
        raise UserError("config.semi.weight needs the parameters' average; set config.ema=0.99, say")
    if settings.semi.weight and settings.encodes:
        raise UserError(
            "config.semi.weight teaches a student, and config.model.encoder='teacher' leaves none; set it to 0"
        )
    if what is not None and settings.encodes:
        raise UserError(f"{what} teaches a student, and config.model.encoder='teacher' leaves none; take one of them")
    if what is not None and not settings.distill:
        if settings.semi.weight:
            return
        raise UserError(f"{what} serves the distillation and config.semi; set config.distill=True")
    if what is not None and settings.weights.teacher is None and not (stored and settings.supervised):
        raise UserError(f"{what} would teach what a random teacher says; {TEACHERS}")
    if data.unlabelled_val and settings.supervised:
        raise UserError(f"{images}_val scores a training with config.supervised=False; leave it out")
    if not settings.supervised and settings.weights.model is not None:
        raise UserError("config.supervised=False trains no decoder; give config.weights.student, not .model")


def _choose(name: str, value: str, known: tuple[str, ...], *, also: tuple[str, ...] = ()) -> None:
    if value not in (*known, *also):
        listed = f"one of {', '.join(known)}" if name == "loss.kl_axis" else _or(known)
        raise UserError(f"config.{name} is {value!r}; choose {listed}")


def _or(known: tuple[str, ...]) -> str:
    shown = [k if len(known) > 2 else repr(k) for k in known]
    return f"{', '.join(shown[:-1])} or {shown[-1]}"


def check_output(path: str | None, flag: str, *, folder: bool = False) -> pathlib.Path | None:
    """The place where a result will go, made before the work; UserError if it cannot be written to."""
    if path is None:
        return None
    target = expand(path)
    place = target if folder else target.parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not folder and target.is_dir():
            raise UserError(f"--{flag}={path} is a folder; give a file")
        if not os.access(place, os.W_OK):
            raise UserError(f"cannot write to --{flag}={path}: no permission for {place}")
    except OSError as error:
        raise UserError(f"cannot write to --{flag}={path}: {error.strerror}") from error
    return target
