"""Paths as users write them."""

import collections
import glob
import os
import pathlib
from collections.abc import Sequence

from ktda_jax import UserError
from ktda_jax.data import addresses, buckets
from ktda_jax.data.addresses import BESIDE, Image

LIST = ".txt"  # of a file that names images, one a line


def expand(path: str | os.PathLike) -> pathlib.Path:
    """The path with its ~ replaced: for every flag and setting that is one, where it is used.

    Not where settings are read: a workdir's record says ~, and holds wherever the home is. UserError for one in a
    bucket: `place` is for what may be there.
    """
    if buckets.is_remote(path):  # pathlib would make a local folder of that name
        named = addresses.masked(os.fspath(path))
        raise UserError(f"{named} is in a bucket, and this must be a local path; copy it (gcloud storage cp)")
    if addresses.is_address(path):
        raise UserError(f"{addresses.parse(os.fspath(path))} is an address, and this must be a local path; download it")
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:  # ~somebody who is not there
        raise UserError(f"{path}: {error}") from error


def place(path: str | os.PathLike) -> pathlib.PurePath:
    """The same for what may be in a bucket: then an epath.Path, which has pathlib's methods."""
    return buckets.place(path) if buckets.is_remote(path) else expand(path)


def absolute(path: pathlib.PurePath | addresses.Address) -> pathlib.PurePath | addresses.Address:
    """A place's only name: two that are equal, also as text, are one."""
    return path if buckets.is_remote(path) else path.resolve()


def image(text: str) -> Image:
    """One image as it is named, wherever it is."""
    return addresses.parse(text) if addresses.is_address(text) else expand(text)


def names(images: Sequence[Image]) -> list[str]:
    """Of each its name; of those of the same name from the folder on that tells them apart, if one does."""
    same = collections.defaultdict(list)
    for one in images:
        same[one.name].append(str(one.absolute()).split("/"))
    above = {
        name: next((k for k, each in enumerate(zip(*parts, strict=False)) if len(set(each)) > 1), -1)
        for name, parts in same.items()
    }
    return [
        one.name if above[one.name] < 0 else "/".join(str(one.absolute()).split("/")[above[one.name] :])
        for one in images
    ]


def found(text: str, suffixes: Sequence[str], *, what: str, called: str) -> list[Image]:
    """One file, the files of a glob pattern, or those right in a folder that end in `suffixes`; UserError if none.

    Also what is at an address (see `addresses`), and all that the lines of a file.txt name. `what` they should be, and
    how `text` is `called`, for messages. Of a folder hidden files are left out.
    """
    if addresses.is_address(text):
        return addresses.found(text, suffixes, what=what)
    path = expand(text)
    if path.suffix.lower() == LIST and path.is_file():
        return _of_list(path, suffixes, what)
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


def _of_list(path: pathlib.Path, suffixes: Sequence[str], what: str) -> list[Image]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path} as text: {error}") from error
    named = [line for line in lines if line and not line.startswith("#")]
    if not named:
        raise UserError(f"{path} names nothing; give it a {what} or an address a line")
    if deeper := next((line for line in named if line.lower().endswith(LIST)), None):
        raise UserError(f"{path} names {addresses.masked(deeper)}, another list; write its lines there")
    files = [each for line in named for each in found(line, suffixes, what=what, called=f"{line} of {path}")]
    return list(dict.fromkeys(files))
