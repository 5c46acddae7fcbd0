"""What a config means: derived values, checks before anything is compiled, agreement with a workdir."""

import json
import os
import pathlib
import sys
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from ktda_jax.data.datasets import DatasetInfo, dataset_info
from ktda_jax.losses import KL_AXES

# Settings that may differ between two runs of one workdir: they change how it runs, not what it computes.
RUNTIME = (
    "log_every", "checkpoint_every", "mesh", "data.root", "data.manual_dir", "data.num_threads", "data.on_corrupt",
    "data.test_split",
)  # fmt: skip


class ConfigError(ValueError):
    """Something the user can mend in the configuration; shown as one line."""


def compute_dtype(config) -> jnp.dtype:
    """`config.dtype`: float32, bfloat16 or auto (bfloat16 on accelerators)."""
    name = config.dtype
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if name not in ("float32", "bfloat16", "float64"):
        raise ConfigError(f"config.dtype is {config.dtype!r}; choose auto, float32 or bfloat16")
    return jnp.dtype(name)


def classes_of(config) -> DatasetInfo:
    """Class names and palette: the config's own, or those of the data set it names."""
    data = config.data
    try:
        if not data.get("classes"):
            return dataset_info(data.name)
        palette = tuple(tuple(c) for c in data.palette or ())
        return DatasetInfo(data.name, tuple(data.classes), palette, tile_size=max(data.crop), splits=())
    except ValueError as error:
        raise ConfigError(f"config.data: {error}") from error


def check(config) -> None:
    """Values that no later check would name clearly."""
    positive = ("total_steps", "batch_size", "eval_batch_size", "log_every", "eval_every", "grad_accum")
    for name in positive:
        if config[name] < 1:
            raise ConfigError(f"config.{name} is {config[name]}; give at least 1")
    crop = config.data.crop
    if len(crop) != 2 or min(crop) < 32:
        raise ConfigError(f"config.data.crop is {tuple(crop)}; give (height, width) of at least 32 pixels")
    weights, classes = config.loss.class_weights, classes_of(config).classes
    if weights is not None and len(weights) != len(classes):
        raise ConfigError(f"config.loss.class_weights has {len(weights)} values for {len(classes)} classes")
    if config.loss.kl_axis not in KL_AXES:
        raise ConfigError(f"config.loss.kl_axis is {config.loss.kl_axis!r}; choose one of {', '.join(KL_AXES)}")
    if config.data.source not in ("tfds", "folder"):
        raise ConfigError(f"config.data.source is {config.data.source!r}; choose 'tfds' or 'folder'")
    if config.ema is not None and not 0 < config.ema < 1:
        raise ConfigError(f"config.ema is {config.ema}; give a decay between 0 and 1, such as 0.999")
    if config.distill and not config.model.fam:
        raise ConfigError("config.distill needs the FAM; set config.model.fam=True or config.distill=False")


def flat(config: ml_collections.ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """{'data.crop': [256, 256], ...}, as JSON would give it back."""
    values = {}
    for key, value in config.items():
        if isinstance(value, (dict, ml_collections.ConfigDict)):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = list(value) if isinstance(value, tuple) else value
    return json.loads(json.dumps(values)) if not prefix else values


def compare(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    """Refuses a workdir that another computation has begun: one with a checkpoint and other settings."""
    path, ours = workdir / "config.json", flat(config)
    if path.exists() and any(p.name.isdigit() for p in workdir.glob("checkpoints/*")):
        try:
            saved = flat(json.loads(path.read_text()))
        except ValueError as error:
            raise ConfigError(f"{path} is not JSON ({error}); use another --workdir") from error
        different = [
            f"{key} (saved {saved.get(key)!r}, now {ours.get(key)!r})"
            for key in sorted(saved.keys() | ours.keys())
            if saved.get(key) != ours.get(key) and not any(key == r or key.startswith(r + ".") for r in RUNTIME)
        ]
        if different:
            more = f" and {len(different) - 4} more" if len(different) > 4 else ""
            raise ConfigError(
                f"workdir {workdir} was begun with another config: {', '.join(different[:4])}{more}; "
                "use another --workdir, or the saved settings"
            )


def write(workdir: pathlib.Path, config: ml_collections.ConfigDict) -> None:
    write_json(workdir / "config.json", json.loads(config.to_json_best_effort()))


def write_json(path: pathlib.Path, values: dict) -> None:
    """Writes aside and renames, so that a reader never sees half a file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")
    os.replace(temporary, path)


def write_run(workdir: pathlib.Path, config, fingerprints: dict[str, str]) -> None:
    """What a later reader needs to know about how the numbers came about."""
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
