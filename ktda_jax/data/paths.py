"""Paths as users write them."""

import glob
import os
import pathlib
from collections.abc import Sequence

from ktda_jax import UserError
from ktda_jax.data import buckets

BESIDE = (".aux.xml", ".msk", ".ovr")  # what GDAL keeps beside an image; two of them are TIFFs of their own


def expand(path: str | os.PathLike) -> pathlib.Path:
    """The path with its ~ replaced: for every flag and setting that is one, where it is used.

    Not where settings are read: a workdir's record says ~, and holds wherever the home is. UserError for one in a
    bucket: `place` is for what may be there.
    """
    if buckets.is_remote(path):  # pathlib would make a local folder of that name
        raise UserError(f"{path} is in a bucket, and this must be a local path; copy it (gcloud storage cp)")
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:  # ~somebody who is not there
        raise UserError(f"{path}: {error}") from error


def place(path: str | os.PathLike) -> pathlib.PurePath:
    """The same for what may be in a bucket: then an epath.Path, which has pathlib's methods."""
    return buckets.place(path) if buckets.is_remote(path) else expand(path)


def absolute(path: pathlib.PurePath) -> pathlib.PurePath:
    """A place's only name: two that are equal are one."""
    return path if buckets.is_remote(path) else path.resolve()


def found(text: str, suffixes: Sequence[str], *, what: str, called: str) -> list[pathlib.Path]:
    """One file, the files of a glob pattern, or those right in a folder that end in `suffixes`; UserError if none.

    `what` they should be, and how `text` is `called`, for messages. Of a folder hidden files are left out.
    """
    path = expand(text)
    if path.is_dir():
        try:
            inside = [p for p in sorted(path.iterdir()) if not p.name.startswith(".")]
        except OSError as error:
            raise UserError(f"cannot look into the folder {called}: {error.strerror}") from error
        files = [p for p in inside if p.suffix.lower() in suffixes and not p.is_dir()]
        if not files:
            deeper = "; folders in it are not searched: name them" if any(p.is_dir() for p in inside) else ""
            raise UserError(f"no {what} in the folder {called}; its files must end in {', '.join(suffixes)}{deeper}")
        return files
    if path.exists():
        return [path]
    if not glob.has_magic(text):
        raise UserError(f"there is no file {called}")
    files = [p for p in map(pathlib.Path, sorted(glob.glob(str(path), recursive=True))) if p.is_file()]
    if not (files := [p for p in files if not p.name.lower().endswith(BESIDE)]):
        raise UserError(f"no file matches {called}")
    return files
