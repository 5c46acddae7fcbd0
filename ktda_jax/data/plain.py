"""Plain 8-bit tiles through OpenCV, which decodes in one call without Python's lock: several threads gain from it.

GDAL asks for a file's parts one by one, so that two threads read as much as one (benchmarks/NOTES.md). What a file
means is GDAL's to say all the same: only files are decoded here about which there is nothing to be said (no palette,
alpha, orientation, other tags or files beside), and a test compares a zoo of them. All others are None here.
"""

import os
import struct
from typing import BinaryIO

import cv2
import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from ktda_jax.data.gdal import whole_png

# Of TIFF: kind of copy, size, bits, compression, meaning, texts, strips, samples, resolution, order, program, date, ...
_TAGS = {254, 256, 257, 258, 259, 262, 269, 270, 271, 272, 273, 277, 278, 279, 282, 283, 284, 296, 305, 306, 315, 339}
_GREY_OR_RGB = (b"\x08\0", b"\x08\2")  # of a PNG, 8 bits each
_PNG = b"\x89PNG\r\n\x1a\n"
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _MEANING, _OFFSETS, _SAMPLES, _COUNTS, _PLANES, _FORMAT = (
    256, 257, 258, 259, 262, 273, 277, 279, 284, 339,
)  # fmt: skip

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # of a damaged file GDAL tells, once


def decode(path: str) -> np.ndarray | None:
    """uint8 (H, W) of grey, (H, W, 3) of RGB; None if the file is anything else, or damaged."""
    try:
        with open(path, "rb") as opened:
            head = opened.read(26)
            if _is_tiff(opened, head) and not _described(path):
                return _rgb(cv2.imread(path, cv2.IMREAD_UNCHANGED))
            if (
                head[:8] == _PNG and head[24:26] in (b"\x08\0", b"\x08\2") and not _described(path)
            ):  # 8 bits, grey or RGB
                data = head + opened.read()
                # Nothing that turns it or makes colours transparent, or of which libpng has something to say.
                if not any(kind in data for kind in (b"eXIf", b"tRNS", b"iCCP")) and whole_png(data):
                    return _rgb(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED))
    except OSError:
        pass
    return None


def _described(path: str) -> bool:
    """Whether GDAL has written something down about the file."""
    return os.path.exists(f"{path}.aux.xml")


def _rgb(array: np.ndarray | None) -> np.ndarray | None:
    return cv2.cvtColor(array, cv2.COLOR_BGR2RGB) if array is not None and array.ndim == 3 else array


def _is_tiff(file: BinaryIO, head: bytes) -> bool:
    """8-bit grey or RGB in strips that are stored, uncompressed and whole."""
    if head[:4] not in (b"II*\0", b"MM\0*"):
        return False
    try:
        tags, size = ImageFileDirectory_v2(head[:8]), os.fstat(file.fileno()).st_size
        file.seek(tags.next)
        tags.load(file)
        samples, offsets, counts = tags.get(_SAMPLES, 1), tags[_OFFSETS], tags[_COUNTS]
        expected = samples * tags[_WIDTH] * tags[_HEIGHT]
        return (
            set(tags) <= _TAGS
            and (samples, tags[_MEANING]) in ((1, 1), (3, 2))
            and set(tags.get(_BITS, ())) == {8}
            and set(tags.get(_FORMAT, (1,))) == {1}
            and tags.get(_COMPRESSION, 1) == tags.get(_PLANES, 1) == 1
            and sum(counts) == expected
            and all(0 < offset <= size - count for offset, count in zip(offsets, counts, strict=True))
        )
    except (KeyError, ValueError, TypeError, SyntaxError, OSError, struct.error):  # whatever Pillow finds wrong
        return False
