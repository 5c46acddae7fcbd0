"""Raster files through GDAL: opened with our settings, upright, and what fails in one line that names the file."""

import contextlib
import logging
import mmap
import os
import threading
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from ktda_jax import UserError
from ktda_jax.data import remote
from ktda_jax.data.addresses import Address, located

SETTINGS = {
    "GDAL_CACHEMAX": "256",  # MB, instead of a share of the machine's memory
    "GDAL_ERROR_ON_LIBJPEG_WARNING": "TRUE",  # half a JPEG is an error
    "GDAL_DISABLE_READDIR_ON_OPEN": "TRUE",  # what lies beside is looked for by name: no list of 20,000 for each tile
    "GDAL_PAM_ENABLED": "YES",
    **remote.SETTINGS,
}
ORIENTATION = 274  # tag of TIFF and EXIF
_thread = threading.local()


class FileError(UserError):
    """What is wrong with one file of many, in parts, so that a check of all can say each remedy once."""

    def __init__(self, kind: str, path: str | os.PathLike, found: str, remedy: str, message: str | None = None):
        super().__init__(message or f"{kind} {path} {found}; {remedy}")
        self.kind, self.path, self.found, self.remedy = kind, str(path), found, remedy

    @property
    def fault(self) -> str:
        """Of several such files: '3 of 20 tiles ...'."""
        return f"have {self.kind}s that cannot be used" if self.kind else "cannot be read"

    def __reduce__(self):
        return FileError, (self.kind, self.path, self.found, self.remedy, str(self))


def unreadable(path: str | os.PathLike, error: BaseException) -> FileError:
    path, text = located(path), " ".join(str(error).split()) or type(error).__name__
    if isinstance(path, Address):
        if path.remote:
            found, remedy = remote.fault(path, text)
            return FileError("", path, f"({found})", remedy, f"cannot read {path}: {found}; {remedy}")
        text = path.without_secret(text)
    return FileError("", path, f"({text})", "repair or remove them", f"cannot read {path}: {text}")


def rasterio_for(path: str | os.PathLike):
    """rasterio with our settings of GDAL, which the environment may overrule. It is imported where a file is opened."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import rasterio
    except ImportError as error:
        raise UserError(f"{located(path)}: reading images takes rasterio ({error}); pip install rasterio") from error
    if not hasattr(_thread, "environment"):
        # rasterio sets one up and takes it down around every call, unless the thread has one.
        _thread.environment = rasterio.Env()
        _thread.environment.__enter__()
        # A tile without a place on Earth is as good as any, and what goes wrong is raised anyway.
        warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
        logging.getLogger("rasterio").setLevel(logging.CRITICAL)
    return rasterio


@contextlib.contextmanager
def one_line(path: str | os.PathLike) -> Iterator[None]:
    """Turns whatever GDAL raises into a UserError that names `path`, also where GDAL has another name for it."""
    try:
        yield
    except FileError as error:
        if error.kind and error.path != str(located(path)):
            raise FileError(error.kind, located(path), error.found, error.remedy) from error
        raise
    except (UserError, MemoryError):
        raise
    except Exception as error:  # GDAL's are many, not all of them rasterio's, and of different bases
        # GDAL's own words are in the cause; rasterio's are "Read failed. See previous exception for details."
        raise unreadable(path, error.__cause__ or error) from error


@contextlib.contextmanager
def opened(path: str | os.PathLike, **options) -> Iterator[Any]:
    """An open rasterio dataset, whole and of some bands; UserError names the file, also for what is read within."""
    with one_line(path), open_file(path, **options) as file:
        yield file


def open_file(path: str | os.PathLike, **options) -> Any:
    """The same, to be kept and closed by the caller, who reads within `one_line`."""
    with one_line(path):
        file = dataset(path, **options)
        try:
            _check(file, path)
        except BaseException:
            file.close()
            raise
    return file


def dataset(path: str | os.PathLike, **options) -> Any:
    """The same without a look at what it holds."""
    rasterio, path = rasterio_for(path), located(path)
    with one_line(path):
        if not isinstance(path, Address):
            return rasterio.open(path, sharing=False, **options)
        if path.remote:  # threads of GDAL take what did not arrive for zeros, and say nothing
            options.pop("NUM_THREADS", None)
        with rasterio.Env(**remote.options(path)):
            file = rasterio.open(os.fspath(path), sharing=False, **options)
            if not _wanted_whole(file):
                return file
            file.close()
            return remote.fetched(path, **options)


def _wanted_whole(file) -> bool:
    """Whether what GDAL does not tell of a file must be read from its own bytes.

    Of a PNG that broke off on its way GDAL says nothing at all.
    """
    if file.driver == "GTiff":  # see `orientation_of`
        return file.height * file.width <= remote.SMALL and not is_located(place_of(file))
    return file.driver == "PNG"


def _check(file, path: str | os.PathLike) -> None:
    if not file.count:
        raise FileError("image", path, "holds several rasters and none of its own", "name the one that is meant")
    if file.driver == "PNG":
        with _mapped(file.name) as data:
            if data and not whole_png(data):  # GDAL takes whatever lies in memory for what is missing
                raise EOFError("the file is damaged or cut short")


def place_of(file) -> dict[str, Any]:
    """crs, transform, gcps, rpcs: what rasterio.open takes for a new file in the same place."""
    place = {"transform": file.transform, "crs": file.crs}
    points, points_crs = file.gcps
    if points and file.transform.is_identity:
        place = {"gcps": points, "crs": points_crs}
    if file.rpcs:
        place["rpcs"] = file.rpcs
    return place


def is_located(place: dict[str, Any]) -> bool:
    """Whether anything says where on Earth, or at least in some plane, it lies."""
    return any(place.get(name) for name in ("crs", "gcps", "rpcs")) or not place["transform"].is_identity


def orientation_of(file) -> int:
    """How the stored pixels lie, 1 to 8 as EXIF and TIFF number it; 1 is upright.

    Viewers, annotation tools and OpenCV turn images by it, GDAL does not. Where a file says where it lies on Earth,
    that is meant for the pixels as they are stored, hence 1.
    """
    if file.driver == "JPEG":
        number = file.tags().get("EXIF_Orientation", 1)
    elif file.driver == "GTiff":
        number = _tiff_tag(file.name)
    elif file.driver == "PNG":
        number = _png_tag(file.name)
    else:
        return 1
    number = int(number) if str(number) in tuple("12345678") else 1
    return 1 if number == 1 or is_located(place_of(file)) else number


def _tiff_tag(path: str) -> int:
    """The tag of the first image of a TIFF, of which GDAL says nothing."""
    if not os.path.isfile(path):  # in an archive, or behind a URL
        return 1
    with open(path, "rb") as opened:
        header = opened.read(8)
        header += opened.read(8) if 43 in header[2:4] else b""  # BigTIFF
        tags = ImageFileDirectory_v2(header)
        opened.seek(tags.next)
        tags.load(opened)
        return tags.get(ORIENTATION, 1)


def _png_tag(path: str) -> int:
    """The tag of a PNG, of which GDAL says nothing, before its pixels or behind them."""
    with _mapped(path) as data:
        place = data.find(b"eXIf")
        while place >= 0:
            end = place + 4 + int.from_bytes(data[place - 4 : place], "big")
            if zlib.crc32(data[place:end]) == int.from_bytes(data[end : end + 4], "big"):  # no accident in the pixels
                exif = Image.Exif()
                exif.load(data[place + 4 : end])
                return exif.get(ORIENTATION, 1)
            place = data.find(b"eXIf", place + 4)
    return 1


def whole_png(data: bytes | mmap.mmap) -> bool:
    """Whether all its chunks, to the last one, are what their checksums say."""
    place, size = 8, len(data)
    while place + 12 <= size:
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        kind = data[place + 4 : place + 8]
        if zlib.crc32(data[place + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            return False
        if kind == b"IEND":
            return True
        place = end + 4
    return False


@contextlib.contextmanager
def _mapped(path: str) -> Iterator[Any]:
    """The bytes of a file; none of what lies in an archive or behind a URL."""
    if not os.path.isfile(path):
        yield b""
        return
    with open(path, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """array: (..., H, W) as stored -> a view of it as it is meant, with H and W exchanged from 5 on."""
    if orientation >= 5:
        array = np.swapaxes(array, -1, -2)
    if orientation in (3, 4, 7, 8):
        array = array[..., ::-1, :]
    if orientation in (2, 3, 6, 7):
        array = array[..., ::-1]
    return array
