"""Paths as users write them."""

import os
import pathlib

from ktda_jax import UserError


def expand(path: str | os.PathLike) -> pathlib.Path:
    """The path with its ~ replaced: for every flag and setting that is one, where it is used.

    Not where settings are read: a workdir's record says ~, and holds wherever the home is.
    """
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:  # ~somebody who is not there
        raise UserError(f"{path}: {error}") from error
