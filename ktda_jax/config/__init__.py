"""What a config means: derived values, checks before anything is compiled, agreement with a workdir.

JAX is imported only where it is asked something, so that a setting that cannot work is named at once.
"""

import json
import os
import pathlib
import sys
from importlib import metadata
from typing import Any

import ml_collections
import numpy as np

from ktda_jax import UserError
from ktda_jax.data import reading
from ktda_jax.data.datasets import DatasetInfo, dataset_info

# Settings that may differ between two runs of one workdir: they change how it runs, not what it computes.
RUNTIME = (
    "log_every", "checkpoint_every", "mesh", "data.root", "data.manual_dir", "data.num_threads", "data.on_corrupt",
    "data.test_split", "teacher.features", "teacher.dtype",
)  # fmt: skip

KL_AXES = ("width", "channel", "position")  # that the softmax of the distillation may run along

_SHARE = (lambda x: 0 <= x < 1, "a number from 0 to below 1")
_POSITIVE = (lambda x: x > 0, "a number above 0")
_SIZE = (lambda x: x >= 1, "at least 1")
RANGES = {  # absurd values that would train, and be silently wrong
    "clip_norm": _POSITIVE,
    "seed": (lambda x: 0 <= x < 2**31, "a number from 0 to 2147483647"),
    "optimizer.lr": _POSITIVE,
    "optimizer.b1": _SHARE,
    "optimizer.b2": _SHARE,
    "optimizer.weight_decay": (lambda x: x >= 0, "at least 0"),
    "data.flip": (lambda x: 0 <= x <= 1, "a probability"),
    "data.num_threads": (lambda x: x >= 0, "at least 0"),
    "loss.alpha": (lambda x: 0 <= x <= 1, "a share from 0 to 1"),
    "loss.temperature": _POSITIVE,
    "loss.aux_weight": (lambda x: x >= 0, "at least 0"),
    "loss.class_weights": (lambda x: min(x) >= 0 and max(x) > 0, "numbers from 0, not all 0"),
    "model.dropout": _SHARE,
    "model.student.drop_path": _SHARE,
    "model.neck_channels": _SIZE,
    "model.head_channels": _SIZE,
    "model.aux_channels": (lambda x: x >= 0, "at least 0; 0 leaves the auxiliary head out"),
    "model.fmm.blocks": _SIZE,
    "model.fmm.heads": _SIZE,
    "model.fmm.mlp_ratio": _POSITIVE,
    "model.teacher.heads": _SIZE,
    "model.teacher.width": _SIZE,
    "model.teacher.depth": (lambda x: x >= 4, "at least 4: four of its layers are taken"),
    "schedule.warmup": (lambda x: x >= 0, "at least 0"),
}


def compute_dtype(config) -> np.dtype:
    """`config.dtype`: float32, bfloat16 or auto (bfloat16 on accelerators)."""
    import jax

    name = config.dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16", "float64"):
        raise UserError(f"config.dtype is {config.dtype!r}; choose auto, float32 or bfloat16")
    if name == "float64" and not jax.config.jax_enable_x64:
        raise UserError("config.dtype is 'float64', which JAX computes only with JAX_ENABLE_X64=1 in the environment")
    return jax.numpy.dtype(name)


def classes_of(config) -> DatasetInfo:
    """Class names and palette: the config's own, or those of the data set it names."""
    data = config.data
    try:
        if not data.get("classes"):
            return dataset_info(data.name)
        palette = tuple(tuple(c) for c in data.palette or ())
        return DatasetInfo(data.name, tuple(data.classes), palette, tile_size=max(data.crop), splits=())
    except UserError as error:
        raise UserError(f"config.data: {error}") from error


def check(config) -> None:
    """Values that no later check would name clearly."""
    positive = ("total_steps", "batch_size", "eval_batch_size", "log_every", "eval_every", "grad_accum")
    for name in positive:
        if config[name] < 1:
            raise UserError(f"config.{name} is {config[name]}; give at least 1")
    values = flat(config)
    for name, (fits, what) in RANGES.items():
        value = values.get(name)
        if value is not None and not fits(value):
            raise UserError(f"config.{name} is {value}; give {what}")
    crop = config.data.crop
    if len(crop) != 2 or min(crop) < 32:
        raise UserError(f"config.data.crop is {tuple(crop)}; give (height, width) of at least 32 pixels")
    weights, classes = config.loss.class_weights, classes_of(config).classes
    if weights is not None and len(weights) != len(classes):
        raise UserError(f"config.loss.class_weights has {len(weights)} values for {len(classes)} classes")
    if config.loss.kl_axis not in KL_AXES:
        raise UserError(f"config.loss.kl_axis is {config.loss.kl_axis!r}; choose one of {', '.join(KL_AXES)}")
    if config.data.source not in ("tfds", "folder"):
        raise UserError(f"config.data.source is {config.data.source!r}; choose 'tfds' or 'folder'")
    reading.check(config.data, len(classes))
    if config.teacher.mode not in ("computed", "precomputed"):
        raise UserError(f"config.teacher.mode is {config.teacher.mode!r}; choose 'computed' or 'precomputed'")
    if config.teacher.dtype not in ("bfloat16", "float16"):
        raise UserError(f"config.teacher.dtype is {config.teacher.dtype!r}; choose 'bfloat16' or 'float16'")
    if config.ema is not None and not 0 < config.ema < 1:
        raise UserError(f"config.ema is {config.ema}; give a decay between 0 and 1, such as 0.999")
    if config.model.get("encoder") == "teacher" and config.distill:
        raise UserError("config.model.encoder='teacher' leaves nothing to distil; set config.distill=False")
    if config.model.get("encoder") == "teacher" and config.weights.student is not None:
        raise UserError("config.model.encoder='teacher' has no student; leave config.weights.student out")
    if config.distill and not config.model.fam:
        raise UserError("config.distill needs the FAM; set config.model.fam=True or config.distill=False")


def flat(config: ml_collections.ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """{'data.crop': [256, 256], ...}, as JSON would give it back."""
    values = {}
    for key, value in config.items():
        if isinstance(value, (dict, ml_collections.ConfigDict)):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = list(value) if isinstance(value, tuple) else value
    return json.loads(json.dumps(values)) if not prefix else values


def compare(workdir: pathlib.Path, config: ml_collections.ConfigDict, only: tuple[str, ...] = ("",)) -> None:
    """Refuses a workdir that another computation has begun: one with a checkpoint and other settings.

    `only`: beginnings of the settings that count.
    """
    path, ours = workdir / "config.json", flat(config)
    if path.exists() and any(p.name.isdigit() for p in workdir.glob("checkpoints/*")):
        try:
            saved = flat(json.loads(path.read_text()))
        except ValueError as error:
            raise UserError(f"{path} is not JSON ({error}); use another --workdir") from error
        different = [
            f"{key} (saved {saved.get(key)!r}, now {ours.get(key)!r})"
            for key in sorted(saved.keys() | ours.keys())
            if saved.get(key) != ours.get(key) and key.startswith(only) and not _is_under(key, RUNTIME)
        ]
        if different:
            more = f" and {len(different) - 4} more" if len(different) > 4 else ""
            raise UserError(
                f"workdir {workdir} was begun with another config: {', '.join(different[:4])}{more}; "
                "use another --workdir, or the saved settings"
            )


def _is_under(key: str, settings: tuple[str, ...]) -> bool:
    return any(key == setting or key.startswith(setting + ".") for setting in settings)


def compare_data(workdir: pathlib.Path, fingerprints: dict[str, str]) -> None:
    """Refuses to go on with other tiles than those a run has begun with."""
    try:
        saved = json.loads((workdir / "run.json").read_text())["data"]
    except (OSError, ValueError, KeyError):
        return  # nothing to compare with
    changed = [split for split in fingerprints if saved.get(split, fingerprints[split]) != fingerprints[split]]
    if changed:
        raise UserError(
            f"the {' and '.join(changed)} data are not those that {workdir} was begun with; use another --workdir, "
            "or the former data"
        )


def write(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    write_json(workdir / "config.json", json.loads(config.to_json_best_effort()))


def check_output(path: str | None, flag: str, *, folder: bool = False) -> None:
    """Makes the place where a result will go, before the work; UserError if it cannot be written to."""
    if path is None:
        return
    place = pathlib.Path(path) if folder else pathlib.Path(path).parent
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not folder and pathlib.Path(path).is_dir():
            raise UserError(f"--{flag}={path} is a folder; give a file")
        if not os.access(place, os.W_OK):
            raise UserError(f"cannot write to --{flag}={path}: no permission for {place}")
    except OSError as error:
        raise UserError(f"cannot write to --{flag}={path}: {error.strerror}") from error


def write_json(path: pathlib.Path, values: dict) -> None:
    """Writes aside and renames, so that a reader never sees half a file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, path)


def write_run(workdir: pathlib.Path, config, fingerprints: dict[str, str]) -> None:
    """What a later reader needs to know about how the numbers came about."""
    import jax

    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ktda-jax")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    write_json(
        workdir / "run.json",
        {
            "versions": versions,
            "python": sys.version.split()[0],
            "devices": [str(d) for d in jax.devices()],
            "processes": jax.process_count(),
            "seed": config.seed,
            "weights": dict(config.weights),
            "data": fingerprints,
        },
    )
