"""`metrics.jsonl` and TensorBoard's events of a workdir in a bucket, where no object can be appended to.

They are written to a local folder and uploaded whole: before every checkpoint, so that one never stands for rows which
are not there; at the end; and once a minute between. A host that dies takes with it what was reported since the last
upload. That belongs to steps after the checkpoint from which the next start goes on, and is reported again.
Of the events each start has a file of its own, as on a disk; only its own are uploaded.
"""

import pathlib
import tempfile
import time

from ktda_jax.data import buckets

SECONDS = 60.0  # between two uploads, checkpoints aside
ROWS = "metrics.jsonl"


class Uploads:
    """The local `folder` that stands for `workdir`, with the rows that are there already."""

    def __init__(self, workdir: pathlib.PurePath):
        self._scratch = tempfile.TemporaryDirectory(prefix="ktda_jax_", ignore_cleanup_errors=True)
        self.folder = pathlib.Path(self._scratch.name)
        self.workdir, self._sizes, self._stamps = workdir, {}, {}  # of each file when it was last uploaded
        self._last = time.monotonic()
        try:
            buckets.download(workdir / ROWS, self.folder / ROWS)
        except FileNotFoundError:
            return
        self._sizes[ROWS] = (self.folder / ROWS).stat().st_size
        self._stamps[ROWS] = _stamp(self.folder / ROWS)

    def due(self) -> bool:
        return time.monotonic() - self._last > SECONDS

    def upload(self) -> None:
        """All that is new or another. OSError."""
        self._last = time.monotonic()
        self._fetch_others_rows()
        for path in sorted(self.folder.iterdir()):
            stamp = _stamp(path)
            if stamp != self._stamps.get(path.name):
                buckets.upload(path, self.workdir / path.name)
                self._stamps[path.name], self._sizes[path.name] = stamp, stamp[0]

    def _fetch_others_rows(self) -> None:
        """What --mode=eval has added to the object meanwhile."""
        known = self._sizes.get(ROWS, 0)
        try:
            if buckets.size(self.workdir / ROWS) <= known:
                return
        except FileNotFoundError:
            return
        content = buckets.read_bytes(self.workdir / ROWS)
        added = content[known:]
        if known and content[known - 1 : known] != b"\n":  # it was written at the same moment: whole rows alone
            added = added.partition(b"\n")[2]
        with open(self.folder / ROWS, "ab") as file:
            file.write(added)

    def close(self) -> None:
        """Removes the local folder."""
        self._scratch.cleanup()


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    """Bytes, and when it was written."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns
