"""Whether the files of a checkpoint are those that were written, and what is said when they are not.

Orbax's index has checksums; the arrays themselves, the data position and the score have none. So each checkpoint holds
`state/sums.json`, written before the checkpoint counts as complete: size and sum of all files of the state, and the
data position and the score once more. Checkpoints of former versions lack it; of them only what cannot be read shows.
In a bucket the sum is the one that the bucket keeps of each object: a listing tells it, and nothing is read.
A checkpoint itself tells which version wrote it: Orbax names in `_CHECKPOINT_METADATA` who handled the state, and that
has been a class of ours for as long as there are sums. So old checkpoints may lie beside new ones, in any order.
"""

import base64
import errno
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ktda_jax import UserError
from ktda_jax.data import buckets

SUMS, WRITTEN_LATER = "sums.json", buckets.COMMITTED
OBJECT = "crc32c:"  # how the sum of an object begins
DATA, SCORE, WRITER = "data/metadata", "metrics/metrics", "_CHECKPOINT_METADATA"
PAGE, BLOCK = 4096, 1 << 20  # bytes


def write(state: pathlib.Path, data: Mapping[str, Any], metrics: Mapping[str, float] | None) -> None:
    """The sums of all files in `state`, a checkpoint's folder of that name that is about to be complete."""
    if listed := _listed(state):
        names = sorted(listed)
    else:
        names = [path.relative_to(state).as_posix() for path in sorted(state.rglob("*")) if path.is_file()]
    files = {}
    for name in names:
        if name.split("/")[-1] not in (SUMS, WRITTEN_LATER):
            sum_ = OBJECT + listed[name].crc32c if listed else _sum(state / name)
            files[name] = [_size(state, name, listed), sum_]
    buckets.write_text(state / SUMS, json.dumps({"files": files, "data": data, "metrics": metrics}) + "\n")


def _listed(folder: pathlib.PurePath) -> Mapping[str, buckets.Object] | None:
    """What a bucket tells of all objects there at once; None on a disk."""
    return buckets.listing(folder) if buckets.is_remote(folder) else None


def _size(folder: pathlib.PurePath, name: str, listed: Mapping[str, buckets.Object] | None) -> int:
    if listed is None:
        return (folder / name).stat().st_size
    if name not in listed:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder / name))
    return listed[name].size


def _sum_like(written: str, path: pathlib.PurePath, found: buckets.Object | None) -> str:
    """The sum of a file as that which was written: checkpoints are copied from buckets to disks and back."""
    if not written.startswith(OBJECT):
        return _sum(path)
    if found is not None:
        return OBJECT + found.crc32c
    try:
        import google_crc32c  # comes with gcsfs
    except ImportError:
        return written
    with path.open("rb") as file:
        crc = google_crc32c.Checksum()
        while block := file.read(BLOCK):
            crc.update(block)
    return OBJECT + base64.b64encode(crc.digest()).decode()


def _sum(path: pathlib.Path) -> str:
    """The sha256 of the sums of a file's pages: as quick as reading; that of the file takes as long as restoring it.

    A page's sum is that of its 64-bit words, so that whatever overwrites one of them, or moves a page, shows.
    """
    words, pages = np.empty(BLOCK // 8, np.uint64), hashlib.sha256()
    block = memoryview(words).cast("B")
    with path.open("rb") as file:
        while size := file.readinto(block):
            end = size + -size % PAGE
            block[size:end] = bytes(end - size)
            pages.update(words[: end // 8].reshape(-1, PAGE // 8).sum(1))
    return pages.hexdigest()


def steps(directory: pathlib.Path) -> list[int]:
    """Of the checkpoints in a folder, by their names."""
    try:
        found = [path for path in directory.iterdir() if path.name.isdigit()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    if buckets.is_remote(directory):  # where the name is there as soon as writing begins
        found = [path for path in found if (path / WRITTEN_LATER).exists()]
    return sorted(int(path.name) for path in found)


def score(folder: pathlib.Path) -> float | None:
    """The validation score of a checkpoint; None if it has none, or none that can be read."""
    for read in (lambda: _json(folder / SCORE), lambda: _json(folder / "state" / SUMS)["metrics"]):
        try:
            return only(read())
        except buckets.Unreachable:
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
    return None


def only(metrics: Mapping[str, float]) -> float:
    """The score among a checkpoint's metrics: mIoU, or of a distillation the variance explained."""
    (value,) = metrics.values()
    return float(value)


def best(scores: Mapping[int, float | None]) -> int | None:
    """The step with the highest score, of equal ones the last; the last of all where none has one."""
    scored = {step: value for step, value in scores.items() if value is not None}
    return max(scored, key=lambda step: (scored[step], step)) if scored else max(scores, default=None)


def fault(folder: pathlib.Path, *, content: bool = False, share: slice = slice(None)) -> str | None:
    """What is wrong with a checkpoint, in words; None if nothing is. `content`: compares the sums of a share of the
    files too, which reads them."""
    return _state_fault(folder, content, share) or _score_fault(folder)


def _state_fault(folder: pathlib.Path, content: bool = False, share: slice = slice(None)) -> str | None:
    try:
        listed = _listed(folder)
        if not (any(folder.iterdir()) if listed is None else listed):
            return "it is empty"
        for name in ("state/manifest.ocdbt", "state/_METADATA", DATA):
            if not _size(folder, name, listed):
                return f"{name} is empty"
        _json(folder / "state" / "_METADATA")
        position, sums = _json(folder / DATA), _sums(folder)
        if sums is None:
            return None
        if position != sums["data"]:
            return f"{DATA} is not what was written"
        for name, (size, _) in sums["files"].items():
            found = _size(folder, f"state/{name}", listed)
            if found != size:
                return f"state/{name} has {found} of {size} bytes"
        if content:
            files = sorted(sums["files"].items())[share]
            paths, written = [f"state/{name}" for name, _ in files], [sum_ for _, (_, sum_) in files]
            with ThreadPoolExecutor(4) as pool:
                objects = [listed and listed[path] for path in paths]
                found = pool.map(_sum_like, written, (folder / path for path in paths), objects)
                for (name, (_, was)), now in zip(files, found, strict=True):
                    if now != was:
                        return f"state/{name} is not what was written, by its sum"
    except FileNotFoundError as error:
        return f"it lacks {_below(folder, error.filename)}"
    except buckets.Unreachable:
        raise
    except OSError as error:
        return f"{_below(folder, error.filename)}: {error.strerror}"
    except _NotJson as error:
        return f"{_below(folder, error)} is not JSON"
    except (KeyError, TypeError, AttributeError):  # JSON, but other than ours
        return f"state/{SUMS} is not what was written"
    return None


def _score_fault(folder: pathlib.Path) -> str | None:
    if not (folder / "metrics").exists() and not _has_score(folder):
        return None
    try:
        found, sums = _json(folder / SCORE), _sums(folder)
        return f"{SCORE} is not what was written" if sums and sums["metrics"] != found else None
    except FileNotFoundError:
        return f"it lacks {SCORE}"
    except buckets.Unreachable:
        raise
    except (OSError, _NotJson, KeyError):
        return f"{SCORE} is not JSON"


def _has_score(folder: pathlib.Path) -> bool:
    """Whether the checkpoint says that it was validated."""
    try:
        return bool((_sums(folder) or {}).get("metrics")) or "metrics" in _json(folder / WRITER)["item_handlers"]
    except buckets.Unreachable:
        raise
    except (OSError, _NotJson, KeyError, TypeError, AttributeError):
        return False


class _NotJson(ValueError):
    """Its text is the file."""


def _json(path: pathlib.Path) -> Any:
    try:
        return json.loads(buckets.read_text(path))
    except buckets.Unreachable:
        raise
    except ValueError as error:
        raise _NotJson(str(path)) from error


def _sums(folder: pathlib.Path) -> dict | None:
    """None where a former version wrote the checkpoint; FileNotFoundError where they are lost."""
    path = folder / "state" / SUMS
    if path.exists():
        return _json(path)
    try:
        writes_sums = _json(folder / WRITER)["item_handlers"]["state"].startswith("ktda_jax.")
    except (KeyError, TypeError, AttributeError):
        return None
    if writes_sums:
        raise FileNotFoundError(errno.ENOENT, "", str(path))
    return None


def _below(folder: pathlib.Path, path: object) -> str:
    return str(path).removeprefix(f"{folder}/")


def refusal(directory: pathlib.Path, step: int, what: str) -> UserError:
    """One line: which checkpoint is damaged, which is the newest whole one, and what to do."""
    others = [other for other in steps(directory) if other != step]
    newest = next((o for o in reversed(others) if fault(directory / str(o), content=True) is None), None)
    todo = (
        f"remove this folder, and the same command goes on with step {newest}, the newest whole one"
        if newest is not None
        else "no other one here is whole; remove this folder to begin anew, or bring a copy of it back"
    )
    return UserError(f"checkpoint {directory / str(step)} is damaged: {what}; {todo}")


def check(directory: pathlib.Path, *, latest: bool = True) -> None:
    """Refuses, after a look at names and sizes, to use a folder whose best, or latest, checkpoint is damaged.

    Others may be: a training that is killed while it removes one leaves half of it, and the next save removes the rest.
    """
    if buckets.is_remote(directory):
        _check_copied(directory)
    found = steps(directory)
    if latest and found and (what := fault(directory / str(found[-1]))):
        raise refusal(directory, found[-1], what)
    chosen = best_step(directory)
    if chosen is not None and (what := fault(directory / str(chosen))):
        raise refusal(directory, chosen, what)


def _check_copied(directory: pathlib.PurePath) -> None:
    """UserError for checkpoints that came from a disk, where the folder's name is what says that one is whole."""
    try:
        found = [path for path in directory.iterdir() if path.name.isdigit()]
    except FileNotFoundError:
        return
    for folder in found:
        if (folder / WRITTEN_LATER).exists():
            continue
        try:
            sums = _sums(folder)["files"].values()
        except buckets.Unreachable:
            raise
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if not all(sum_.startswith(OBJECT) for _, sum_ in sums):
            raise UserError(
                f"{folder} was copied from a disk and lacks the object {WRITTEN_LATER}, by which a checkpoint in a "
                f"bucket is complete; make one of any content, as by `gcloud storage cp FILE {folder}/{WRITTEN_LATER}`"
            )


def best_step(directory: pathlib.Path) -> int | None:
    """The best checkpoint; refuses where a score that is lost leaves it open which one that is."""
    scores = {step: score(directory / str(step)) for step in steps(directory)}
    for step, value in scores.items():
        folder = directory / str(step)
        if value is None and _state_fault(folder) is None and (what := _score_fault(folder)):
            raise refusal(directory, step, what)
    return best(scores)
