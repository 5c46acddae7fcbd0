"""What lies in a bucket as local files: fetched once by each host, into a cache that its later starts use again.

The cache is $XDG_CACHE_HOME/ktda_jax, by default ~/.cache/ktda_jax, and holds gs://BUCKET/FOLDER as BUCKET/FOLDER. A
file is written aside and renamed, with the time at which its object was made: what is there with that time and size
is not fetched again. What is no longer in the bucket is removed.
"""

import concurrent.futures
import contextlib
import fcntl
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterator

from ktda_jax import UserError
from ktda_jax.data import buckets

THREADS = 16
SECONDS = 10.0  # between two lines on how far it is


def staged(path: pathlib.PurePath, say: Callable[[str], None] = print) -> pathlib.Path:
    """The local folder, or file, that is as the one in the bucket. UserError if there is none, or no room for it."""
    target = cache() / str(path).removeprefix(buckets.SCHEME)
    try:
        wanted = buckets.listing(path)
        if not wanted:
            raise UserError(f"there is nothing at {path}; correct the name")
        if odd := next((name for name in wanted if {"..", ".", ""} & set(name.split("/")) and name), None):
            raise UserError(f"{path} holds {odd}, which is no name of a file here; rename it")
        target.parent.mkdir(parents=True, exist_ok=True)
        with _alone(target):
            _remove_others(target, wanted)
            missing = {name: found for name, found in wanted.items() if not _is(target / name, found)}
            if missing:
                _fetch(path, target, missing, say)
    except OSError as error:
        raise UserError(f"cannot copy {path} to {target}: {error.strerror or error}") from error
    return target


def cache() -> pathlib.Path:
    try:
        return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "ktda_jax"
    except RuntimeError as error:
        raise UserError("this user has no home folder to keep copies in; set XDG_CACHE_HOME to a folder") from error


@contextlib.contextmanager
def _alone(target: pathlib.Path) -> Iterator[None]:
    """Of several processes of this host one fetches; the others wait, and find all there."""
    with open(target.with_name(f".{target.name}.lock"), "w") as lock:
        with contextlib.suppress(OSError):  # a file system without it: then each fetches
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _is(local: pathlib.Path, found: buckets.Object) -> bool:
    try:
        there = local.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return (there.st_size, there.st_mtime_ns // 1000) == (found.size, found.made)


def _remove_others(target: pathlib.Path, wanted: dict) -> None:
    for folder, _, names in os.walk(target):
        for name in names:
            local = pathlib.Path(folder, name)
            if local.relative_to(target).as_posix() not in wanted:
                local.unlink()


def _fetch(path: pathlib.PurePath, target: pathlib.Path, missing: dict, say: Callable[[str], None]) -> None:
    total, free = sum(found.size for found in missing.values()), shutil.disk_usage(target.parent).free
    if total > free:
        raise UserError(
            f"{path} takes {total / 1e9:.2f} GB more, and {target.parent} has {free / 1e9:.2f} GB free; make room, or "
            "set XDG_CACHE_HOME to a folder on a larger disk"
        )
    say(f"fetching {len(missing):,} files, {total / 1e6:,.1f} MB, from {path} to {target}")
    files, done, shown = 0, 0, time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        pending = {pool.submit(_fetch_one, path / name, target / name, found): found for name, found in missing.items()}
        try:
            for future in concurrent.futures.as_completed(pending):
                future.result()
                files, done = files + 1, done + pending[future].size
                if time.monotonic() - shown > SECONDS:
                    shown = time.monotonic()
                    say(f"{files:,} of {len(missing):,} files, {done / 1e6:,.1f} of {total / 1e6:,.1f} MB")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch_one(path: pathlib.PurePath, local: pathlib.Path, found: buckets.Object) -> None:
    local.parent.mkdir(parents=True, exist_ok=True)
    temporary = local.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        buckets.download(path, temporary)
        os.utime(temporary, ns=(found.made * 1000, found.made * 1000))
        os.replace(temporary, local)
    finally:
        temporary.unlink(missing_ok=True)
