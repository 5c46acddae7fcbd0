"""What glibc's malloc is told; nothing where the C library is another one."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt, from malloc.h


def keep_tile_sized_blocks() -> None:
    """Lets malloc keep blocks up to 4 MB, 64 MB in all for each arena.

    By default it hands tiles and batches back to the system at once, and the next one is paid for page by page
    (benchmarks/NOTES.md).
    """
    if mallopt := _function("mallopt"):
        mallopt(_M_MMAP_THRESHOLD, 4 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def trim() -> None:
    """Gives what was freed back to the system."""
    if malloc_trim := _function("malloc_trim"):
        malloc_trim(0)


def _function(name: str):
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None  # musl has neither
