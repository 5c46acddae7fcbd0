"""Weights outside of training: our folder, `model.safetensors` and `model.json`."""

import dataclasses
import hashlib
import json
import math
import pathlib
import shutil
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np

from ktda_jax import UserError
from ktda_jax.models.convnext import ConvNeXtConfig
from ktda_jax.models.flat import Arrays, check_finite
from ktda_jax.models.fmm import FMMConfig
from ktda_jax.models.ktda import KTDAConfig
from ktda_jax.models.vit import ViTConfig

TENSORS, DESCRIPTION = "model.safetensors", "model.json"
ASSUMED = "of ImageNet, assumed"  # image statistics, where a file came without them
READING = ("name", "bands", "rgb", "scale", "nodata", "crop")
KINDS = {"ktda": KTDAConfig, "student": ConvNeXtConfig, "teacher": ViTConfig}


@dataclasses.dataclass(frozen=True)
class Weights:
    """Arrays by our flat paths. A ktda's hold its statistics too, and its teacher, if any, under 'teacher/'."""

    kind: str  # ktda, student or teacher
    config: KTDAConfig | ConvNeXtConfig | ViTConfig
    arrays: Arrays
    source: dict[str, Any]
    classes: tuple[str, ...] | None = None
    palette: tuple[tuple[int, int, int], ...] | None = None
    assumed: dict[str, int | str] | None = None  # what neither tensors nor caller told when converted just now
    temperature: float = 1.0  # by which logits are divided for probabilities that can be believed
    data: dict[str, Any] | None = None  # how the training read its images (READING of its config.data), where known


def save(path: str | pathlib.Path, weights: Weights, beside: Mapping[str, str] | None = None) -> None:
    """Writes the folder `path` aside and renames it; UserError if there is something already.

    beside: further files, by name, of text.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    path = pathlib.Path(path)
    check_free(path)
    check_finite(weights.arrays, f"what {path} would hold")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.mkdir()
        # safetensors writes the buffer as it lies in memory, which for a transposed view is another array.
        save_file({k: np.asarray(v, order="C") for k, v in weights.arrays.items()}, temporary / TENSORS)
        description = describe(weights) | {"sha256": _sha256(temporary / TENSORS)}
        (temporary / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
        for name, text in (beside or {}).items():
            (temporary / name).write_text(text, encoding="utf-8")
        # safetensors writes for its owner alone, whatever the umask.
        (temporary / TENSORS).chmod((temporary / DESCRIPTION).stat().st_mode)
        temporary.replace(path)
    except SafetensorError as error:
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def describe(weights: Weights) -> dict[str, Any]:
    """All but the arrays, in JSON's terms: what no tensor tells, which must come with them wherever they go."""
    described = {
        "format": 1,
        "kind": weights.kind,
        "architecture": dataclasses.asdict(weights.config),
        "classes": weights.classes,
        "palette": weights.palette,
        "data": weights.data and {name: weights.data.get(name) for name in READING},
        "temperature": weights.temperature,
        "source": weights.source,
    }
    return json.loads(json.dumps(described))


def described(description: Mapping[str, Any], arrays: Arrays) -> Weights:
    """The inverse of `describe`; ValueError, KeyError, TypeError or AttributeError for what is none."""
    temperature = float(description.get("temperature", 1.0))
    if not 0 < temperature < math.inf:
        raise ValueError(f"a temperature of {temperature}")
    classes, palette, data = (description.get(name) for name in ("classes", "palette", "data"))
    return Weights(
        kind=description["kind"],
        config=_config(KINDS[description["kind"]], description["architecture"]),
        arrays=arrays,
        source=dict(description["source"]),
        classes=classes and tuple(classes),
        palette=palette and tuple(map(tuple, palette)),
        temperature=temperature,
        data=data and {name: _tuples(data.get(name)) for name in READING},
    )


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_free(path: pathlib.Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists; choose another place, or remove it")


def is_folder(path: pathlib.Path) -> bool:
    return (path / DESCRIPTION).is_file()


def read(folder: pathlib.Path) -> Weights:
    """The weights of our folder; UserError names it."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        description = json.loads((folder / DESCRIPTION).read_text())
        found = dataclasses.replace(described(description, {}), arrays=load_file(folder / TENSORS))
        if _sha256(folder / TENSORS) != description["sha256"]:
            raise UserError(f"{TENSORS} is not the file that was written, by its sha256")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"cannot read the weights in {folder}: {str(error).splitlines()[0]}; are they whole?"
        ) from error
    check_finite(found.arrays, str(folder / TENSORS))
    return found


def _config(cls, values: Mapping[str, Any]):
    """A dataclass from its JSON form."""
    nested = {"student": ConvNeXtConfig, "teacher": ViTConfig, "fmm": FMMConfig}
    built = {}
    for name, value in values.items():
        if isinstance(value, dict):
            value = _config(nested[name], value)
        built[name] = _tuples(value)
    return cls(**built)
