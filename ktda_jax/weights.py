"""Weights for a start: safetensors files that hold our flat paths ('stages/0/0/norm/scale')."""

import pathlib

import numpy as np
from absl import logging

from ktda_jax.state import Arrays, check_shapes


def load(path: str, expected: Arrays, what: str) -> dict[str, np.ndarray]:
    """Tensors of `expected`'s names and shapes; ValueError names the file and all that does not fit."""
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"config.weights.{what}: no file {file}; give a .safetensors file, or None to start anew")
    if file.suffix != ".safetensors":
        raise ValueError(f"config.weights.{what}: {file} is not a .safetensors file in ktda_jax's own layout")
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"config.weights.{what}: cannot read {file} ({error})") from error
    check_shapes(tensors, expected, str(file))
    logging.info("%s: %d tensors from %s", what, len(tensors), file)
    return {k: v.astype(expected[k].dtype) for k, v in tensors.items()}


def save(path: str | pathlib.Path, arrays: Arrays) -> None:
    """Writes flat arrays for `load`; aside first, then renamed."""
    from safetensors.numpy import save_file

    file = pathlib.Path(path)
    temporary = file.with_suffix(".tmp")
    save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, temporary)
    temporary.replace(file)
