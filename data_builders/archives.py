"""Downloaded archives (.zip, .tar, .tar.gz, .tgz), listed and unpacked. TFDS's own extractor needs TensorFlow.

Only regular files count. Links, the junk of macOS (`__MACOSX`, `._NAME`) and other hidden files are left out.
"""

import contextlib
import functools
import pathlib
import shutil
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO

from ktda_jax import UserError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")
# OSError: damaged gzip data and full disks; RuntimeError: zip files with a password or an unknown compression.
_BROKEN = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, OSError, RuntimeError)


def is_archive(path: pathlib.Path) -> bool:
    """Whether `path` is a visible file with one of SUFFIXES, in any case."""
    return path.name.lower().endswith(SUFFIXES) and not is_junk(path.name) and path.is_file()


def stem(path: pathlib.Path) -> str:
    """File name without the suffix: `scene.tar.gz` -> `scene`."""
    suffix = max((end for end in SUFFIXES if path.name.lower().endswith(end)), key=len)
    return path.name[: -len(suffix)]


def is_junk(name: str) -> bool:
    """Whether a file or folder name is hidden or belongs to macOS."""
    return name.startswith(".") or name == "__MACOSX"


def sizes(archive: pathlib.Path) -> dict[pathlib.PurePosixPath, int]:
    """{path inside the archive: bytes}; UserError for a damaged archive."""
    return {path: size for path, size, _ in _files(archive)}


def unpack(archive: pathlib.Path, place: Callable[[pathlib.PurePosixPath], pathlib.Path | None]) -> None:
    """Writes each file to `place(path inside the archive)`, which is a new path, or None to leave it out.

    UserError for a damaged archive; what was written before stays, so unpack into a temporary folder.
    """
    for path, _, opened in _files(archive):
        target = place(path)
        if target is None:
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        with _one_line(archive), opened() as source, open(target, "xb") as file:
            shutil.copyfileobj(source, file, 1 << 20)


def _files(archive) -> Iterator[tuple[pathlib.PurePosixPath, int, Callable[[], IO[bytes]]]]:
    with _one_line(archive):
        if archive.name.lower().endswith(".zip"):
            with zipfile.ZipFile(archive) as file:
                for info in file.infolist():
                    if not info.is_dir() and (path := _inside(archive, info.filename)):
                        yield path, info.file_size, functools.partial(file.open, info)
        else:
            with tarfile.open(archive) as file:
                for info in file:
                    if info.isreg() and (path := _inside(archive, info.name)):
                        yield path, info.size, functools.partial(file.extractfile, info)
                # tarfile takes an archive that was cut off between two files for a whole one.
                file.fileobj.seek(file.offset)
                if len(file.fileobj.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("it ends too early")


def _inside(archive, name) -> pathlib.PurePosixPath | None:
    path = pathlib.PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{archive} holds {name!r}, a path that leads out of the archive: do not trust it")
    return None if any(is_junk(part) for part in path.parts) else path


@contextlib.contextmanager
def _one_line(archive):
    try:
        yield
    except _BROKEN as error:
        text = (str(error) or type(error).__name__).splitlines()[0].rstrip(":")
        advice = "" if getattr(error, "errno", None) else "; it is damaged or no archive: download it again"
        raise UserError(f"cannot unpack {archive}: {text}{advice}") from error
