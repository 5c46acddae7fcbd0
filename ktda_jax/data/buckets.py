"""Places in a bucket, gs://BUCKET/FOLDER: how their objects are read, and written whole.

The path is `etils.epath`'s and gcsfs is beneath it, whether TensorFlow is installed or not: with it epath would go
through tf.io.gfile, another client with other errors, and import it into every training. Orbax's arrays go through
TensorStore, by the same credentials. An object appears whole or not at all, so nothing needs a temporary name there;
it cannot be appended to, and there are no folders, only names.
"""

import contextlib
import dataclasses
import errno
import functools
import logging
import os
import pathlib
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator

from ktda_jax import UserError

# Before epath has looked at any path, also a local one: it asks only once whether TensorFlow is installed.
os.environ["EPATH_USE_TF"] = "false"

SCHEME = "gs://"
COMMITTED = "commit_success.txt"  # Orbax's last object of a checkpoint; where there are folders it renames them
SLOW = 5  # seconds, after which a bucket is said to keep one waiting: gcsfs tries again by itself, for over a minute
ROLES = (
    "log in with `gcloud auth application-default login`, or give this machine's service account the roles Storage "
    "Object User and Storage Legacy Bucket Reader there"
)


class Unreachable(OSError, UserError):
    """A bucket that does not answer, or refuses: no sign that anything in it is missing or damaged."""

    def __str__(self) -> str:
        return f"cannot get at {self.filename}: {self.strerror}; the same command goes on once that is possible"


def is_remote(path: str | os.PathLike) -> bool:
    return os.fspath(path).startswith(SCHEME)


def place(path: str | os.PathLike) -> pathlib.PurePath:
    """The epath.Path of gs://...; UserError in a line if the bucket cannot be looked into, asked once in a process."""
    if isinstance(path, str):  # else it is from here
        _check(path)
    from etils import epath

    return epath.Path(path)


@functools.cache
def _check(path: str) -> None:
    """Before anything else is done there: what may not be read is not there for most of gcsfs."""
    name = path.removeprefix(SCHEME).strip("/")
    bucket = name.partition("/")[0]
    if not bucket:
        raise UserError(f"{path} names no bucket; give gs://BUCKET/FOLDER")
    _check_bucket(bucket)
    try:
        files().info(name)
    except FileNotFoundError:
        pass
    except Exception as error:
        raise UserError(f"cannot look into {path}: {_reason(error)}; {ROLES}") from error


@functools.cache
def _check_bucket(bucket: str) -> None:
    fs = files()
    waiting = threading.Timer(SLOW, _tell_waiting, [bucket])
    waiting.start()
    try:
        fs.info(bucket)
    except FileNotFoundError as error:
        raise UserError(f"there is no bucket gs://{bucket}; make it, or correct the name") from error
    except Exception as error:  # gcsfs raises of all kinds
        raise UserError(f"cannot look into gs://{bucket}: {_reason(error)}; {ROLES}") from error
    finally:
        waiting.cancel()


def _tell_waiting(bucket: str) -> None:
    print(f"gs://{bucket} has not answered for {SLOW} s; it is still tried", file=sys.stderr, flush=True)


@functools.cache
def files():
    """gcsfs's file system, as epath gets it too."""
    # Without this gcsfs asks another service of Google what kind of bucket it is, with a warning at every access where
    # that does not answer. Rapid (zonal) buckets need it.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    logging.getLogger("google.auth").setLevel(logging.ERROR)  # three lines on a metadata server that is not there
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # tracebacks of what it raises as well; GCSFS_DEBUG has them
    import fsspec
    from fsspec.config import conf

    conf["gcs"] = {**conf.get("gcs", {}), "use_listings_cache": False}  # Orbax and other hosts write there as well
    try:
        return fsspec.filesystem("gcs", finalize_on_close=True)
    except ImportError as error:
        raise UserError("gs:// needs gcsfs: pip install -e '.[gcs]'") from error


def _reason(error: BaseException) -> str:
    """In a line; gcsfs's own begin with an address."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


@contextlib.contextmanager
def _told(path) -> Iterator[None]:
    """What gcsfs raises, of many kinds, as an OSError that names the object: FileNotFoundError, or Unreachable."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except FileExistsError:
        raise
    except Exception as error:
        raise Unreachable(errno.EIO, _reason(error), str(path)) from error


def read_text(path: pathlib.PurePath, errors: str = "strict") -> str:
    """UTF-8 of a file, wherever it is. OSError, or UnicodeDecodeError."""
    return read_bytes(path).decode(errors=errors)


def read_bytes(path: pathlib.PurePath) -> bytes:
    if not is_remote(path):
        return path.read_bytes()
    with _told(path):
        return files().cat_file(str(path))


def write_text(path: pathlib.PurePath, text: str) -> None:
    """The file, wherever it is; an object is whole at once."""
    if not is_remote(path):
        path.write_text(text)
        return
    with _told(path):
        files().pipe_file(str(path), text.encode())


def create(path: pathlib.PurePath, text: str) -> bool:
    """The same; False if there is one, which two that come at once cannot both miss."""
    try:
        with _told(path):
            files().pipe_file(str(path), text.encode(), mode="create")
    except FileExistsError:
        return False
    return True


def remove(path: pathlib.PurePath) -> None:
    with _told(path):
        files().rm_file(str(path))


def upload(local: pathlib.Path, path: pathlib.PurePath) -> None:
    with _told(path):
        files().put_file(str(local), str(path))


def download(path: pathlib.PurePath, local: pathlib.Path) -> None:
    with _told(path):
        files().get_file(str(path), str(local))


def move(local: pathlib.Path, path: pathlib.PurePath) -> None:
    """A finished file becomes `path`, over what is there: renamed, which stays on one disk, or as a whole object."""
    if is_remote(path):
        upload(local, path)
        local.unlink()
    else:
        os.replace(local, path)


def discard(path: pathlib.PurePath) -> None:
    """Removes a file, wherever it is, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        remove(path) if is_remote(path) else path.unlink()


def probe(folder: pathlib.PurePath) -> None:
    """OSError if no file can be written into a folder that is there, or into a bucket."""
    if not is_remote(folder):
        tempfile.TemporaryFile(dir=folder).close()
        return
    path = folder / f".{uuid.uuid4().hex}.tmp"
    write_text(path, "")
    remove(path)


@contextlib.contextmanager
def aside(path: pathlib.PurePath) -> Iterator[pathlib.Path]:
    """A local file to write, which becomes `path` at the end: renamed, or as a whole object. Else nothing is left."""
    if is_remote(path):
        with tempfile.TemporaryDirectory() as scratch:
            yield pathlib.Path(scratch) / path.name
            upload(pathlib.Path(scratch) / path.name, path)
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


@dataclasses.dataclass(frozen=True)
class Object:
    size: int  # bytes
    crc32c: str  # of its content, as the bucket has it
    made: int  # microseconds since 1970; another content is a new object


def listing(folder: pathlib.PurePath) -> dict[str, Object]:
    """All objects below a folder of a bucket, by their names from there on; one that is itself an object by ''."""
    with _told(folder):
        found = files().find(str(folder), detail=True)
    prefix = str(folder).removeprefix(SCHEME)
    return {
        name.removeprefix(prefix).lstrip("/"): Object(
            int(entry["size"]), entry.get("crc32c", ""), round(entry["ctime"].timestamp() * 1e6)
        )
        for name, entry in found.items()
        if entry["type"] == "file" and not name.endswith("/")  # which web consoles make for an empty folder
    }


def inside(folder: pathlib.PurePath) -> list[str]:
    """BUCKET/NAME of the objects right in a folder of a bucket; of one that is an object its own; none of nothing."""
    try:
        with _told(folder):
            entries = files().ls(str(folder), detail=True)
    except FileNotFoundError:
        return []
    return [entry["name"] for entry in entries if entry["type"] == "file" and not entry["name"].endswith("/")]


def matching(pattern: pathlib.PurePath) -> list[str]:
    """BUCKET/NAME of the objects of a glob pattern."""
    with _told(pattern):
        found = files().glob(str(pattern), detail=True)
    return [name for name, entry in found.items() if entry["type"] == "file"]


def size(path: pathlib.PurePath) -> int:
    """Bytes of a file, wherever it is."""
    if not is_remote(path):
        return path.stat().st_size
    with _told(path):
        return int(files().info(str(path))["size"])
