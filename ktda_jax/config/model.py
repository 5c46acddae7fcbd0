"""From settings to the model they ask for, and to what identifies its frozen teacher."""

import dataclasses
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ktda_jax import UserError
from ktda_jax.config.settings import Settings
from ktda_jax.config.workdir import teacher_of
from ktda_jax.data import reading
from ktda_jax.models import flat, vit
from ktda_jax.models.ktda import KTDAConfig
from ktda_jax.models.vit import ViT
from ktda_jax.weights import loading


def compute_dtype(name: str) -> np.dtype:
    """Of `config.dtype`: float32, bfloat16 or auto (bfloat16 on accelerators)."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name == "float64" and not jax.config.jax_enable_x64:
        raise UserError("config.dtype is 'float64', which JAX computes only with JAX_ENABLE_X64=1 in the environment")
    return jnp.dtype(name)


def model_of(settings: Settings) -> KTDAConfig:
    """The model, with classes and bands, which config.data says; UserError for parts that do not fit."""
    data, parts = settings.data, dataclasses.asdict(settings.model)
    student = {**parts["student"], "bands": data.num_bands}
    values = {**parts, "student": student, "num_classes": len(data.info.classes), "rgb": data.rgb_positions}
    values["decoder"] = settings.supervised
    if settings.teacher.bands is not None:
        seen = reading.positions_of(data, settings.teacher.bands, "config.teacher.bands")
        values["teacher_bands"] = seen
        values["teacher"] = {**_statistics(parts["teacher"], seen, data.rgb_positions), "bands": len(seen)}
    model = KTDAConfig.from_dict(values)
    _check_grid(settings, model)
    return model


def _statistics(teacher: dict[str, Any], seen: tuple[int, ...], rgb: tuple[int, int, int]) -> dict[str, Any]:
    """The teacher's settings with a mean and a deviation for each of the bands that it sees.

    Where they are not given: those of its preset for red, green and blue, and for other bands their average.
    """
    preset = {"mean": vit.MEAN, "std": vit.STD} | vit.PRESETS.get(teacher["preset"], {})
    found, colours = dict(teacher), rgb if len(set(rgb)) == 3 else ()
    for name in ("mean", "std"):
        if teacher[name] is None:
            of_colour, other = dict(zip(colours, preset[name], strict=False)), sum(preset[name]) / 3
            found[name] = tuple(of_colour.get(band, other) for band in seen)
    return found


def _check_grid(settings: Settings, model: KTDAConfig) -> None:
    """The FAM's output must have the teacher's grid to be compared with it."""
    crop = settings.data.crop
    teacher_grid = model.teacher.grid_of(*crop)
    of_tile = model.teacher.foreign is not None and settings.model.teacher.patch is None  # the grid itself
    if settings.distill and not of_tile and model.grid is not None and model.grid != teacher_grid:
        raise UserError(
            f"config.model.grid is {model.grid}, but the teacher sees a {crop[0]}x{crop[1]} crop as "
            f"{teacher_grid[0]}x{teacher_grid[1]} patches; set it to {teacher_grid}, or to None"
        )
    patch = model.teacher.patch
    if model.align_grid and (crop[0] % patch or crop[1] % patch):
        whole = tuple(max(side // patch, 3) * patch for side in crop)
        raise UserError(
            f"config.data.crop is {tuple(crop)}, but config.model.align_grid wants whole patches of {patch} px; "
            f"set it to {whole}, say"
        )
    if model.fmm is not None and model.fmm.form == "transformer":
        for width in model.channels:
            if width % model.fmm.heads:
                raise UserError(f"config.model.fmm.heads is {model.fmm.heads}, which does not divide {width}")
    if model.teacher.width % model.teacher.heads:
        raise UserError(
            f"config.model.teacher.heads is {model.teacher.heads}, which does not divide {model.teacher.width}"
        )


def teacher_arrays(path: str, expected: flat.Arrays, model: KTDAConfig) -> flat.Arrays:
    """What config.weights.teacher, `path`, gives. Of a workdir it is the teacher of that training: it holds no copy."""
    return loading.load(teacher_of(path), expected, "teacher", model.teacher, rgb=model.teacher_rgb)


def teacher_identity(path: str | None, seed: int, model: KTDAConfig) -> dict[str, Any]:
    """What decides the frozen teacher's features of an image, in JSON's terms: what `ktda_jax.extract` writes down.

    path: config.weights.teacher. Without it the teacher is random, or, for features that exist, whatever made them.
    """
    digest, arrays = None, {}
    if path is not None:
        _, expected, _ = flat.abstract(lambda: ViT(model.teacher, rngs=nnx.Rngs(0)))
        arrays = teacher_arrays(path, expected, model)
        digest = hashlib.sha256()
        for name in sorted(arrays):
            digest.update(f"{name} {arrays[name].shape}".encode())
            digest.update(np.ascontiguousarray(arrays[name]))
    identity = {
        "teacher": path,
        "sha256": digest and digest.hexdigest(),
        "seed": None if arrays else seed,
        "rgb": model.seen,
        **dataclasses.asdict(model.teacher),
        "taps": model.teacher.tapped,
    }
    return json.loads(json.dumps(identity))
