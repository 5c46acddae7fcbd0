"""Finds the published folders below a manual directory: unpacked, or in the archives as they were downloaded."""

import contextlib
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

from data_builders import archives
from ktda_jax import UserError

_PARTS = ("img_dir", "ann_dir")
_DEPTH = 2  # how many folders deep we look
# How paths name a data set. The KTDA page calls l8_biome "cloud", too.
_NAMES = {"grass": "grass", "l8_biome": "l8[-_ ]?biome|cloud"}


@contextlib.contextmanager
def published_folder(manual_dir, name: str, scratch) -> Iterator[pathlib.Path]:
    """The folder with img_dir/ and ann_dir/ of data set `name` in `manual_dir`, valid inside the `with`.

    It may lie at the top or up to two folders deeper, or in archives there, which are unpacked into a temporary
    folder in `scratch`. Of several data sets side by side the one called `name` is taken. UserError if there is
    none or more than one, if an archive is damaged or the disk too small.
    """
    root = pathlib.Path(manual_dir)
    if folder := _unpacked(root, name):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="unpacked.", dir=scratch) as folder:
        _unpack(root, name, pathlib.Path(folder))
        yield pathlib.Path(folder)


def _unpacked(root, name) -> pathlib.Path | None:
    if _has_parts(root):
        return root
    found = [path for path in _below(root, _DEPTH - 1) if path.is_dir() and _has_parts(path)]
    found = _called(name, found, root)
    if len(found) > 1:
        raise UserError(
            f"{root} holds several folders that may be {name}: {', '.join(map(str, found))}; give the right one "
            "as manual_dir"
        )
    return found[0] if found else None


def _has_parts(folder):
    return any((folder / part).is_dir() for part in _PARTS)


def _below(root, depth=_DEPTH) -> Iterator[pathlib.Path]:
    """Visible files and folders in `root` and in folders up to `depth` levels below it."""
    for path in sorted(root.iterdir()):
        if not archives.is_junk(path.name):
            yield path
            if depth and path.is_dir() and not _has_parts(path):
                yield from _below(path, depth - 1)


def _called(name, paths, root) -> list:
    """The `paths` that name the data set below `root`; without any, those that name no data set at all."""
    names = {
        path: [key for key, pattern in _NAMES.items() if re.search(pattern, str(path.relative_to(root)).lower())]
        for path in paths
    }
    return [path for path in paths if name in names[path]] or [path for path in paths if not names[path]]


def _unpack(root, name, target):
    found = [path for path in _below(root) if archives.is_archive(path)]
    chosen = _called(name, found, root)
    plan = _plan(chosen, name)
    missing = [part for part in _PARTS if not any(place.parts[0] == part for _, place in plan.values())]
    if missing:
        held = ", ".join(sorted(str(path.relative_to(root)) for path in root.iterdir())[:5]) or "nothing"
        where = f"archives ({', '.join(map(str, chosen))})" if chosen else "archives of it"
        raise UserError(
            f"no {' and no '.join(missing)} of {name} in {root}, up to {_DEPTH} folders deep or in {where}: it holds "
            f"{held}; give the folder with the download as manual_dir"
        )
    needed, free = sum(size for size, _ in plan.values()), shutil.disk_usage(target).free
    if needed > free:
        raise UserError(
            f"unpacking {name} takes {needed / 1e9:.1f} GB, but {target.parent} has {free / 1e9:.1f} GB free: make "
            "room or give a data_dir on another disk"
        )
    for archive in chosen:
        archives.unpack(
            archive,
            lambda path, archive=archive: target / plan[archive, path][1] if (archive, path) in plan else None,
        )


def _plan(chosen, name) -> dict:
    """{(archive, path inside): (bytes, path from img_dir or ann_dir on)}: what is to be unpacked, and to where."""
    plan, owners = {}, {}
    for archive in chosen:
        files = {path: (size, *_split(archive, path)) for path, size in archives.sizes(archive).items()}
        files = {path: found for path, found in files.items() if found[2]}
        prefixes = _called(name, {prefix: None for _, prefix, _ in files.values()}, pathlib.PurePosixPath())
        for path, (size, prefix, place) in files.items():
            if prefix in prefixes:
                if place in owners:
                    raise UserError(
                        f"two candidates for {name}: {owners[place]} and {archive}/{prefix} both hold {place}; leave "
                        "only one"
                    )
                owners[place] = f"{archive}/{prefix}"
                plan[archive, path] = size, place
    return plan


def _split(archive, path) -> tuple:
    """(what comes before img_dir or ann_dir, the path from there on), or (None, None) for other files."""
    parts = path.parts[:-1]
    if at := [index for index, part in enumerate(parts) if part in _PARTS]:
        return pathlib.PurePosixPath(*parts[: at[0]]), pathlib.PurePosixPath(*path.parts[at[0] :])
    if archives.stem(archive) in _PARTS:  # img_dir.zip that begins with train/
        return pathlib.PurePosixPath(), pathlib.PurePosixPath(archives.stem(archive), path)
    return None, None
