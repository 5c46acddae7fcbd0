"""Weights of any form, and those that a config names: checked against its model, and made to fit its bands."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from absl import logging

from ktda_jax import UserError
from ktda_jax.data import buckets, staging
from ktda_jax.data.paths import expand, place
from ktda_jax.models import convnext, vit
from ktda_jax.models.flat import Arrays, check_shapes
from ktda_jax.models.ktda import KTDAConfig
from ktda_jax.models.layers import resize
from ktda_jax.models.vit import ViTConfig
from ktda_jax.weights import files, folder, sources
from ktda_jax.weights.architecture import HEADS
from ktda_jax.weights.convnext import new_norms
from ktda_jax.weights.folder import ASSUMED, Weights

# Settings of training and of one input size; all others decide what the weights compute.
_FREE = ("image_size", "taps", "drop_path", "layer_scale", "remat", "teacher_bands")


def read(path: str | pathlib.Path, *, teacher_heads: int | None = None, fmm_heads: int | None = None) -> Weights:
    """Weights of our folder, or converted from any source that `ktda_jax.convert` knows; UserError names the path.

    The numbers of heads are for sources alone, whose tensors do not tell them.
    """
    if folder.is_folder(found := local(path)):
        return of_folder(path, found)
    return sources.load(str(path), teacher_heads=teacher_heads, fmm_heads=fmm_heads)


def of_folder(path: str | pathlib.Path, found: pathlib.Path) -> Weights:
    """Those of our folder `found`, which `path` has brought here; of the hub's their origin says which revision."""
    weights = folder.read(found)
    if not str(path).startswith(files.HUB):
        return weights
    return dataclasses.replace(weights, source={**weights.source, "hub": str(path), "revision": found.name})


def local(path: str | pathlib.Path) -> pathlib.Path:
    """Where weights are that are no workdir's; those of a bucket or of Hugging Face's hub are brought here."""
    if str(path).startswith(files.HUB):
        return files.locate(str(path))[0]
    return staging.staged(place(path)) if buckets.is_remote(path) else expand(path)


def check_heads(path, found: Weights, *, teacher_heads: int | None = None, fmm_heads: int | None = None) -> None:
    """UserError for other heads than those that weights which say theirs have."""
    teacher = found.config if found.kind == "teacher" else getattr(found.config, "teacher", None)
    fmm = getattr(found.config, "fmm", None)
    for name, asked, part in (("teacher_heads", teacher_heads, teacher), ("fmm_heads", fmm_heads, fmm)):
        if asked and part is not None and asked != part.heads:
            raise UserError(f"--{name}={asked}, but {path} is of a model with {part.heads}; leave --{name} out")


def assumptions(path, found: Weights) -> str | None:
    """A line on what was assumed of weights that do not say it; None where all is known."""
    if not found.assumed:
        return None
    listed = ", ".join(f"{name} {value}" for name, value in found.assumed.items())
    return f"{path} does not say all of its model; assumed as published: {listed}"


def load(
    path: str,
    expected: Arrays,
    what: str,
    config,
    *,
    new_classifier: bool = False,
    rgb: tuple[int, int, int] = (0, 1, 2),
    read: Callable[..., Weights] = read,
) -> dict[str, np.ndarray]:
    """What config.weights.`what` gives for `config`: arrays of `expected`'s names and shapes.

    `what` is student, teacher or model. A whole KTDA model also serves as student or as teacher, and weights for RGB
    serve any number of bands. `read` may know of more than this module's does: of workdirs. UserError names the path,
    and the settings that disagree.
    """
    where = f"config.weights.{what}"
    # No tensor tells the number of heads. Published widths have one of their own, which the config must then match.
    teacher = config.teacher if isinstance(config, KTDAConfig) else config
    options = {}
    if isinstance(teacher, ViTConfig) and teacher.width not in HEADS:
        options["teacher_heads"] = teacher.heads
    if isinstance(config, KTDAConfig) and config.fmm is not None:
        options["fmm_heads"] = config.fmm.heads
    try:
        weights = read(path, **options)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    kind = "ktda" if what == "model" else what
    if what == "model" and weights.kind == "ktda" and not weights.config.decoder:
        raise UserError(
            f"{where}: {path} holds a student that was distilled without labels; give it as config.weights.student"
        )
    arrays, found = weights.arrays, weights.config
    if weights.kind != kind:
        if weights.kind != "ktda":
            raise UserError(f"{where}: {path} holds a {weights.kind}, not a {kind}")
        arrays = {k.removeprefix(f"{what}/"): v for k, v in arrays.items() if k.startswith(f"{what}/")}
        found = getattr(found, what)
        if not arrays:
            raise UserError(f"{where}: the model in {path} came without its {what}")
    if new_classifier:
        arrays = {k: v for k, v in arrays.items() if "/conv_seg/" not in k}
        found = dataclasses.replace(found, num_classes=config.num_classes)
    if weights.kind == "student":
        arrays, found = _first_norms(arrays, found, config, weights.source)
    if what == "teacher":
        arrays, found = _other_teacher_bands(path, arrays, found, config, rgb)
    else:
        theirs = weights.config.rgb if weights.kind == "ktda" else (0, 1, 2)
        arrays, found = _other_bands(arrays, found, config, theirs, rgb)
    if weights.source.get("statistics") == ASSUMED and isinstance(found, ViTConfig) and found.bands == config.bands:
        found = dataclasses.replace(found, mean=config.mean, std=config.std)
    _compare(where, path, found, config)
    arrays = {k: v for k, v in arrays.items() if not k.endswith("num_batches_tracked")}
    if what == "model":
        arrays = {k: v for k, v in arrays.items() if not k.startswith("teacher/")}
    if isinstance(found, ViTConfig) and "pos_embed" in arrays:
        arrays["pos_embed"] = _fit_positions(arrays["pos_embed"], config)
    check_shapes(arrays, expected, f"{where}: {path}")
    logging.info("%s: %d tensors from %s", what, len(arrays), path)
    return {k: np.asarray(v).astype(expected[k].dtype) for k, v in arrays.items()}


def _fit_positions(array: np.ndarray, config: ViTConfig) -> np.ndarray:
    """The embedding at the configured grid, resized in float32, as the published code does when it loads weights."""
    method = "bicubic_antialias" if config.antialias else "bicubic"
    return np.asarray(resize(jnp.asarray(array, jnp.float32), config.grid, method=method)).astype(array.dtype)


def inflate(kernel: np.ndarray, bands: int, rgb: tuple[int, int, int]) -> np.ndarray:
    """The stem's kernel for RGB (h, w, 3, C) -> (h, w, bands, C).

    Red, green and blue keep their weights and every other band gets the average of the three, all times 3 / bands: so
    an image whose bands are all the same gives what it gave as RGB.
    """
    kernel = np.asarray(kernel)
    inflated = np.repeat(kernel.mean(2, keepdims=True), bands, axis=2)
    if len(set(rgb)) == 3:
        inflated[:, :, list(rgb)] = kernel
    return inflated * np.asarray(3 / bands, kernel.dtype)


def _first_norms(arrays: Arrays, found, wanted, source: dict[str, Any]):
    """LayerNorms behind the first three stages or none, as configured, if those in `arrays` were not in the source."""
    first = {k for k in arrays if k.startswith("norms/") and not k.startswith("norms/3/")}
    if not first <= set(source.get("initialised", ())):
        return arrays, found
    arrays = {k: v for k, v in arrays.items() if k not in first}
    if wanted.first_norms:
        arrays |= new_norms(arrays, (0, 1, 2))
    return arrays, dataclasses.replace(found, first_norms=wanted.first_norms)


def _other_bands(arrays: Arrays, found, wanted, theirs: tuple[int, int, int], rgb: tuple[int, int, int]):
    """Weights for three bands, of which `theirs` are red, green and blue, made to fit another number or order of bands;
    all others as they are."""
    whole = isinstance(found, KTDAConfig)
    student, bands = (found.student if whole else found), (wanted.student if whole else wanted).bands
    if student.bands != 3 or len(set(theirs)) < 3 or (bands, rgb) == (3, theirs):
        return arrays, found
    stem = "student/downsample/0/conv/kernel" if whole else "downsample/0/conv/kernel"
    student = dataclasses.replace(student, bands=bands)
    found = dataclasses.replace(found, student=student, rgb=wanted.rgb) if whole else student
    logging.info("%s: from RGB to %d bands, of which %s are red, green, blue", stem, bands, rgb)
    return {**arrays, stem: inflate(arrays[stem][:, :, list(theirs)], bands, rgb)}, found


def _other_teacher_bands(path: str, arrays: Arrays, found: ViTConfig, wanted: ViTConfig, rgb: tuple[int, int, int]):
    """A teacher of RGB images, made to see another number of bands; one of as many bands sees them in its own order."""
    bands = wanted.bands
    if (found.bands, bands) == (3, 3) and len(set(rgb)) == 3 and rgb != (0, 1, 2):
        raise UserError(
            f"config.weights.teacher: {path} takes red, green and blue in this order, and config.teacher.bands names "
            "them in another; leave it out"
        )
    if found.bands != 3 or bands == 3:
        return arrays, found
    statistics = {}
    for name in ("mean", "std"):  # where it has seen a band, its own must agree
        values, colours = list(getattr(wanted, name)), rgb if len(set(rgb)) == 3 else ()
        for band, value in zip(colours, getattr(found, name), strict=False):
            values[band] = value
        statistics[name] = tuple(values)
    _say_inflated(path, bands, len(set(rgb)) == 3)
    kernel = inflate(arrays["patch_embed/kernel"], bands, rgb)
    return {**arrays, "patch_embed/kernel": kernel}, dataclasses.replace(found, bands=bands, **statistics)


@functools.cache  # once, though it is read for its identity, too
def _say_inflated(path: str, bands: int, with_rgb: bool) -> None:
    others = "the other bands start" if with_rgb else "every band starts"
    logging.warning(
        "the teacher %s has seen RGB alone; its patch embedding is made for %d bands: %s as the average of the three",
        path, bands, others,
    )  # fmt: skip


def _compare(where: str, path: str, found, wanted) -> None:
    """Raises one line that lists every setting in which a file and a config disagree."""
    differ = _differences(found, wanted, "config.model" if isinstance(wanted, KTDAConfig) else "")
    if not differ:
        return
    if isinstance(wanted, KTDAConfig):
        listed = ", ".join(f"{name} {theirs} (config: {ours})" for name, theirs, ours in differ)
        hint = "set these, or take other weights"
        if [name for name, *_ in differ] == ["config.model.num_classes"]:
            hint = "set --config.weights.new_classifier=True to start with classifiers of your own classes"
        raise UserError(f"{where}: the model in {path} has {listed}; {hint}")
    part = "teacher" if isinstance(wanted, ViTConfig) else "student"
    listed = ", ".join(f"{name} {theirs} (config: {ours})" for name, theirs, ours in differ)
    presets = (vit if part == "teacher" else convnext).PRESETS
    fits = [name for name, values in presets.items() if not _differences(found, type(found)(**values), "")]
    hint = f"set --config.model.{part}.preset={fits[0]}" if fits else f"set config.model.{part} to agree"
    raise UserError(f"{where}: the {part} in {path} has {listed}; {hint}, or take other weights")


_ELSEWHERE = {  # settings of the model that config.data decides
    "config.model.rgb": "positions of config.data.rgb",
    "config.model.student.bands": "number of config.data.bands",
    "bands": "number of config.data.bands",
}


def _differences(found, wanted, prefix: str) -> list[tuple[str, Any, Any]]:
    differ, free = [], (*_FREE, "grid", "dropout")
    if getattr(found, "encoder", None) == "student":
        free += ("tap_scales",)  # of the loss alone
    if isinstance(found, ViTConfig) and found.bands != wanted.bands:
        free += ("mean", "std")  # of as many numbers
    for field in dataclasses.fields(found):
        theirs, ours = getattr(found, field.name), getattr(wanted, field.name)
        name = ".".join(filter(None, (prefix, field.name)))
        if dataclasses.is_dataclass(theirs) and dataclasses.is_dataclass(ours):
            inner = _differences(theirs, ours, name)
            if field.name == "teacher":  # another setting; here it is what shapes the model
                inner = [each for each in inner if each[0].endswith((".width", ".patch"))]
            differ += inner
        elif field.name not in free and theirs != ours:
            of_teacher = isinstance(found, ViTConfig) and field.name == "bands"
            name = "number of config.teacher.bands" if of_teacher else _ELSEWHERE.get(name, name)
            differ.append((name, theirs, ours))
    return differ
