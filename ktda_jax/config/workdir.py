"""A workdir's record of its training, `config.json` and `run.json`: written, read again, and compared with settings."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from ktda_jax import UserError
from ktda_jax.config import extension
from ktda_jax.config.fields import flat
from ktda_jax.config.settings import VERSION, Settings
from ktda_jax.data import addresses, buckets
from ktda_jax.data.paths import place

CONFIG, RUN = "config.json", "run.json"
READING = 2  # how tiles are read: since 2, alpha bands with soft edges count, and masks beside config.data.nodata


# Settings that configs of ours have set since they exist: the same command then asks an older workdir for another
# training than the one that it began.
SET_SINCE = ("data.eval_scale", "data.rotate")


def write(workdir: pathlib.Path, settings: Settings, *, without: Sequence[str] = ()) -> None:
    """The settings by section, as a config has them; `read` gives them back. `without`: what as_begun has named."""
    nested: dict[str, Any] = {"version": VERSION}
    for key, value in flat(settings).items():
        if key in without:
            continue
        *sections, name = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    write_json(workdir / CONFIG, nested)


def read(workdir: pathlib.Path) -> Settings:
    """The settings that a training was begun with, by any version; UserError names the file."""
    path = workdir / CONFIG
    try:
        saved = json.loads(buckets.read_text(path))
    except OSError as error:
        raise UserError(f"{path} does not describe a training of ours: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); use another --workdir") from error
    try:
        return Settings.of(saved, strict=False)  # whatever else a user wrote into a config
    except UserError as error:
        raise UserError(f"{path} does not describe a training of ours: {error}") from error


def as_begun(workdir: pathlib.Path, settings: Settings) -> tuple[Settings, list[str]]:
    """The settings, and of SET_SINCE those that a training of the workdir lacks and that are therefore as before."""
    if not (workdir / CONFIG).exists() or not steps(workdir):
        return settings, []
    saved = read(workdir)
    held, before, ours = flatten(json.loads(buckets.read_text(workdir / CONFIG))), flat(saved), flat(settings)
    newer = [key for key in SET_SINCE if key not in held and before[key] != ours[key]]
    values = {(name := key.removeprefix("data.")): getattr(saved.data, name) for key in newer}
    return dataclasses.replace(settings, data=dataclasses.replace(settings.data, **values)), newer


def workdir_at(path: str | os.PathLike) -> pathlib.PurePath | None:
    """The workdir that a path is, in a bucket too; None where no training has saved anything, or for hf://ORG/NAME."""
    if addresses.is_address(path) and not buckets.is_remote(path):
        return None
    folder = place(path)
    return folder if (folder / "checkpoints").is_dir() else None


def teacher_of(path: str) -> str:
    """config.weights.teacher, or, where that is a workdir, the teacher that was frozen in its training."""
    seen = []
    while (folder := workdir_at(path)) is not None:
        saved = read(folder)
        chosen = saved.weights.teacher
        if chosen is None and saved.model.teacher.foreign is not None:
            raise UserError(
                f"config.weights.teacher: {path} is a training with features of {saved.model.teacher.foreign}, whose "
                "weights are not known; give those of another teacher"
            )
        if chosen is None or folder in seen:
            raise UserError(
                f"config.weights.teacher: {path} is a training with a random teacher (its config.weights.teacher is "
                "unset), of which nothing is kept; give the teacher's weights themselves"
            )
        seen.append(folder)
        path = chosen
    return path


def steps(workdir: pathlib.Path) -> list[int]:
    """Of the checkpoints, by the folders' names; an empty folder, or one whose writing was cut short, is none."""
    try:
        found = [path for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    if buckets.is_remote(workdir):
        return sorted(int(path.name) for path in found if (path / buckets.COMMITTED).exists())
    return sorted(int(path.name) for path in found if path.is_dir() and any(path.iterdir()))


def compare(
    workdir: pathlib.Path, settings: Settings, only: tuple[str, ...] = ("",), *, extend: bool = False
) -> dict[str, list]:
    """Refuses a workdir that another computation has begun: one with a checkpoint and other settings.

    `only`: beginnings of the settings that count. With `extend` those that it may change are returned: {key: [saved,
    now]}.
    """
    if not (workdir / CONFIG).exists() or not (saved_steps := steps(workdir)):
        return {}
    saved, ours = flat(read(workdir), runtime=False), flat(settings, runtime=False)
    changed = {key: [saved[key], ours[key]] for key in sorted(ours) if saved[key] != ours[key] and key.startswith(only)}
    extends, latest = set(changed) <= set(extension.MAY_CHANGE), saved_steps[-1]
    if changed and extends and extend:
        extension.check(workdir, settings.total_steps, latest)
        return changed
    if changed:
        different = [f"{key} (saved {old!r}, now {new!r})" for key, (old, new) in changed.items()]
        more = f" and {len(different) - 4} more" if len(different) > 4 else ""
        hint = f", or --extend to go on from step {latest} with these"
        raise UserError(
            f"workdir {workdir} was begun with another config: {', '.join(different[:4])}{more}; "
            "use another --workdir, or the saved settings" + (hint if extends and settings.total_steps > latest else "")
        )
    return {}


def compare_data(
    workdir: pathlib.Path, fingerprints: Mapping[str, str], *, jpeg: bool, may_hide: Callable[[], bool] = lambda: False
) -> str | None:
    """Refuses to go on with other tiles than those a run has begun with; or says in a line what is to be doubted.

    jpeg: whether there are JPEG tiles, of which another version of GDAL gives other pixels. may_hide: whether there are
    tiles with alpha bands or masks, of which a former version of ours (see READING) gave others.
    """
    try:
        run = json.loads(buckets.read_text(workdir / RUN))
        saved, reader, ours = dict(run["data"]), dict(run["versions"]).get("rasterio"), run.get("reading", 1)
    except buckets.Unreachable:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return None  # nothing to compare with
    changed = [split for split in fingerprints if saved.get(split, fingerprints[split]) != fingerprints[split]]
    if ("unlabelled" in saved) != ("unlabelled" in fingerprints):  # where they are may change, not whether they are
        changed.append("unlabelled")
    if not changed:
        return None
    which = f"the {' and '.join(changed)} data are not those that {workdir} was begun with"
    if jpeg and reader != _version("rasterio"):
        return f"{which}, or its JPEGs were decoded otherwise (rasterio was {reader or 'not used'} then); going on"
    if ours < READING and may_hide():
        return f"{which}, or an alpha band or a mask of theirs was not heeded then; going on"
    raise UserError(f"{which}; use another --workdir, or the former data")


def fingerprint(workdir: pathlib.Path, what: str) -> str | None:
    """Of the data that a run was begun with, where that is known: `train`, `val`, `held out`, ..."""
    try:
        return dict(json.loads(buckets.read_text(workdir / RUN))["data"]).get(what)
    except buckets.Unreachable:
        raise
    except (OSError, ValueError, KeyError, TypeError):
        return None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'data.crop': ...} of nested mappings."""
    found = {}
    for key, value in values.items():
        found |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return found


def write_json(path: pathlib.Path, values: Mapping[str, Any]) -> None:
    """Writes aside and renames, so that a reader never sees half a file; UserError if it cannot be."""
    with writing(path), buckets.aside(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """A full disk, or a folder that cannot be written to, as one line: the command can be repeated."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; {'make room' if full else 'make that possible'}, "
            "and the same command goes on from the last checkpoint"
        ) from error


def obstacle(workdir: pathlib.Path) -> str | None:
    """In a line, why scores cannot be written to a workdir, somebody else's for one, and what follows; else None."""
    places = [workdir]
    if not buckets.is_remote(workdir):
        there = next(path for path in (workdir, *workdir.parents) if path.exists())
        places = filter(pathlib.Path.exists, (there, workdir / "figures", workdir / "metrics.jsonl"))
    for path in places:
        try:
            if path.is_file():
                path.open("a").close()
            else:
                buckets.probe(path)
        except OSError as error:
            return f"cannot write to {path}: {error.strerror}; the scores are printed, and nothing is written"
    return None


def write_run(
    workdir: pathlib.Path, settings: Settings, fingerprints: Mapping[str, str], extended: Sequence[Mapping] = (),
    tiles: Mapping[str, int] | None = None,
) -> None:  # fmt: skip
    """What a later reader needs to know about how the numbers came about. `extended`: see extension.py.

    tiles: how many there are, by the names of `fingerprints`.
    """
    import jax

    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "rasterio", "ktda-jax")
    versions = {package: _version(package) for package in packages}
    weights = settings.weights
    write_json(
        workdir / RUN,
        {
            "versions": versions,
            "python": sys.version.split()[0],
            "devices": [str(d) for d in jax.devices()],
            "processes": jax.process_count(),
            "seed": settings.seed,
            "weights": {name: getattr(weights, name) for name in ("student", "teacher", "model", "new_classifier")},
            "reading": READING,
            "data": dict(fingerprints),
            "tiles": dict(tiles or {}),
            **({"extended": list(extended)} if extended else {}),
        },
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
