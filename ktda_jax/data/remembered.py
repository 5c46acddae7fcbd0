"""Checks of splits that need not be made again, since the files are those that were looked at.

As git goes about its index: a file is the same if its size and its times are, unless it was so young when it was read
that a later change may bear the same times.
"""

import concurrent.futures
import contextlib
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np

from ktda_jax.data import buckets, gdal
from ktda_jax.data.check import SplitSummary, check_split
from ktda_jax.data.sources import Source, cpu_threads

FORMAT = 1  # of the file, and of what a check looks at: another number reads all tiles again
YOUNG = 3 * 10**9  # ns; file systems have times of 2 s at worst
KEPT = 8  # checks in a file
READERS = ("rasterio", "opencv-python-headless", "pillow", "numpy", "array_record", "tensorflow-datasets")


class Checks:
    """What `check_split` has found, by everything that it depends on; kept in a file between two commands.

    Not remembered is a split with tiles that could not be read (the next time they may be), one whose files are younger
    than some seconds or changed meanwhile, and one whose files cannot be listed here.
    """

    def __init__(self, path: pathlib.PurePath | None = None, **reading: Any):
        """path: of the file, which may be missing or damaged. reading: what else the pixels depend on."""
        self._path, self._reading, self._new = path, reading, False
        self._found: dict[str, dict] = {}
        with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):
            saved = json.loads(buckets.read_text(path)) if path else {}
            if saved.get("format") == FORMAT:
                self._found = dict(saved["checks"])

    def split(self, source: Source, *, num_threads: int | None = None, **options: Any) -> SplitSummary:
        """As `check_split`, of what is remembered or of the tiles."""
        begun, key = time.time_ns(), self._key(source, options, num_threads)
        if key and (summary := _summary(self._found.get(key[0]), len(source))):
            self._found[key[0]] = self._found.pop(key[0])  # the last to be forgotten
            return summary
        summary = check_split(source, num_threads=num_threads, **options)
        if key and not summary.unreadable and key[1] < begun - YOUNG and key == self._key(source, options, num_threads):
            self._found[key[0]], self._new = _entry(summary), True
        return summary

    def features(
        self, folder: pathlib.Path, of: str, examine: Callable[[], None], num_threads: int | None = None
    ) -> None:
        """`examine`s the files of a folder, unless that was done. of: what else decides on the outcome."""
        begun = time.time_ns()
        stamps = _stamps((folder,), num_threads or cpu_threads())
        key = hashlib.sha256(repr((FORMAT, "features", of, stamps)).encode("utf-8", "surrogateescape")).hexdigest()
        if key in self._found:
            self._found[key] = self._found.pop(key)
            return
        examine()
        if max((max(stamp[2:]) for _, stamp in stamps if stamp), default=0) < begun - YOUNG:
            self._found[key], self._new = {"features": of}, True

    def save(self, *, enabled: bool = True) -> None:
        """What is new, to the file; where that cannot be written, the next command reads the tiles again."""
        if self._path is None or not (self._new and enabled):
            return
        content = {"format": FORMAT, "checks": dict(list(self._found.items())[-KEPT:])}
        with contextlib.suppress(OSError), buckets.aside(self._path) as temporary:
            temporary.write_text(json.dumps(content))
            self._new = False

    def _key(self, source: Source, options: Mapping, num_threads: int | None) -> tuple[str, int] | None:
        """Of all that the outcome depends on, and the youngest time (ns) of the files; None where that is not known."""
        if (origin := getattr(source, "origin", None)) is None:
            return None
        try:
            files = _stamps(origin.folders, num_threads or cpu_threads())
        except OSError:
            return None
        settings = [(name, os.environ.get(name, value)) for name, value in sorted(gdal.SETTINGS.items())]
        versions = {name: _version(name) for name in READERS}
        reading = sorted(self._reading.items()), sorted(options.items()), settings, sorted(versions.items())
        parts = FORMAT, reading, origin.what, files
        youngest = max((max(stamp[2:]) for _, stamp in files if stamp), default=0)
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest(), youngest


def _stamps(folders: Sequence[pathlib.Path], threads: int) -> list[tuple[str, tuple[int, ...] | None]]:
    """(path, (size, inode, its time of change, its content's)) of all files right in the folders; None: a broken link.

    The inode's time tells of a file that was put in place with an old time of its content. Links are followed.
    """
    paths = [os.path.join(folder, name) for folder in folders for name in os.listdir(folder)]

    def stamp(path: str) -> tuple[str, tuple[int, ...] | None]:
        try:
            found = os.stat(path)
        except FileNotFoundError:
            return path, None
        return path, (found.st_size, found.st_ino, found.st_ctime_ns, found.st_mtime_ns)

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:  # for the sake of network drives
        parts = pool.map(lambda part: [stamp(path) for path in part], (paths[k::threads] for k in range(threads)))
        return sorted(found for part in parts for found in part)


def _entry(summary: SplitSummary) -> dict:
    return {
        "sizes": sorted(map(list, summary.sizes)),
        "pixels": summary.pixels.tolist(),
        "ignored": summary.ignored,
        "fingerprint": summary.fingerprint,
        "labels": summary.labels,
        "by_tile": summary.by_tile.tolist(),
    }


def _summary(entry: dict | None, tiles: int) -> SplitSummary | None:
    """None for what was not written by `_entry`."""
    with contextlib.suppress(KeyError, TypeError, ValueError):
        sizes = frozenset((int(height), int(width)) for height, width in entry["sizes"])
        pixels, by_tile = (np.array(entry[name], np.int64) for name in ("pixels", "by_tile"))
        if by_tile.shape == (tiles, len(pixels)) and (by_tile.sum(0) == pixels).all():
            texts = str(entry["fingerprint"]), str(entry["labels"])
            return SplitSummary(tiles, sizes, pixels, int(entry["ignored"]), *texts, by_tile)
    return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
