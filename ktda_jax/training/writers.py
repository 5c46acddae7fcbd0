"""What a run tells: `metrics.jsonl` and TensorBoard events in the workdir, progress on a stream."""

import collections
import contextlib
import json
import math
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from typing import Self, TextIO

from ktda_jax.config.workdir import writing
from ktda_jax.data import buckets
from ktda_jax.data.paths import place
from ktda_jax.training.trackers import Tracker
from ktda_jax.training.uploads import Uploads

REDRAW_SECONDS = 0.1  # a terminal is redrawn at most this often
PLAIN_SECONDS = 10.0  # elsewhere a line is printed at most this often
SPEED_CALLS = 50  # steps per second is the mean over this many calls of `progress`


class Writer:
    """Records scalars and shows progress; with `enabled=False` (processes other than 0) it does nothing.

    A row of `metrics.jsonl` is one JSON object with `step` and the scalars; values that are not finite are
    null. It is flushed line by line, so that a killed run loses nothing that it reported; in a bucket see uploads.py.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        total_steps: int,
        enabled: bool = True,
        stream: TextIO | None = None,
        tracker: Tracker | None = None,
    ):
        self.enabled, self._tracker = enabled, tracker
        self._uploads = Uploads(place(workdir)) if enabled and buckets.is_remote(workdir) else None
        self._workdir = pathlib.Path(workdir) if self._uploads is None else self._uploads.folder
        self._rows_path = self._workdir / "metrics.jsonl"
        self._rows: TextIO | None = None
        self._events = None
        self._broken: BaseException | None = None  # what ended TensorBoard's thread
        self._hook = None
        self._resumed_at: int | None = None
        self._bar = _Bar(sys.stdout if stream is None else stream, total_steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        try:
            self.close()
        except Exception:
            if kind is None:  # of two errors the first is told
                raise
        finally:
            if self._uploads is not None:
                self._uploads.close()

    def resume(self, step: int) -> int:
        """Drops rows beyond the checkpoint at `step`, before the first write; returns how many were dropped.

        A run that was killed has reported steps after its last checkpoint, which will be done again; its last
        line may be cut short. TensorBoard hides the events of those steps likewise.
        """
        if not self.enabled:
            return 0
        if self._rows is not None or self._events is not None:
            raise RuntimeError("Writer.resume must come before the first write")
        self._resumed_at = step
        if not self._rows_path.exists():
            return 0
        lines = self._rows_path.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = [line for line in lines if _is_row_until(line, step)]
        if len(kept) < len(lines):
            temporary = self._rows_path.with_name(".metrics.jsonl.tmp")
            with writing(self._rows_path), open(temporary, "w", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in kept)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, self._rows_path)
        return len(lines) - len(kept)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends one row and the same TensorBoard scalars; values are anything that `float` takes."""
        if not self.enabled:
            return
        if "step" in scalars:
            raise ValueError("`step` is the row's own key and cannot name a scalar")
        values = {name: float(value) for name, value in scalars.items()}
        row = {"step": int(step)} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        with writing(self._rows_path):
            if self._rows is None:
                self._open()
            self._rows.write(json.dumps(row, allow_nan=False) + "\n")
            self._rows.flush()
        with writing(self._workdir / "events.*"):
            if self._broken is not None:
                raise self._broken
        for name, value in values.items():
            if math.isfinite(value):  # tensorboardX logs a warning into the progress bar otherwise
                self._events.add_scalar(name, value, int(step))
        if self._tracker is not None:
            self._tracker.write(int(step), {k: v for k, v in values.items() if math.isfinite(v)})
            for line in self._tracker.news():
                self.message(f"warning: {line}")
        if self._uploads is not None and self._uploads.due():
            self.upload()

    def upload(self) -> None:
        """Brings to a bucket what is not there yet, and to a tracker the scalars of the last step."""
        if self._tracker is not None:
            self._tracker.complete()
        if self._uploads is not None:
            with writing(self._uploads.workdir):
                if self._events is not None:
                    self._events.flush()
                self._uploads.upload()

    def progress(self, step: int, scalars: Mapping[str, float] | None = None) -> None:
        """Shows that `step` steps are done: a bar on a terminal, a line now and then elsewhere.

        `scalars` are shown behind it, those that fit, and stay until the next ones.
        """
        if self.enabled:
            self._bar.update(int(step), scalars)

    def due(self, step: int) -> bool:
        """Whether `progress` would be seen now, so that it is worth to give it scalars."""
        return self.enabled and self._bar.due(int(step))

    def pause(self) -> None:
        """Keeps the time until the next `progress`, an evaluation say, out of the steps per second."""
        if self.enabled:
            self._bar.pause()

    def message(self, text: str) -> None:
        """Prints lines above the bar."""
        if self.enabled:
            self._bar.message(text)

    def close(self) -> None:
        """Ends the bar's line and closes the files; a later `write` would open them again."""
        self._bar.close()
        if self._rows is not None:
            (rows, events), (self._rows, self._events) = (self._rows, self._events), (None, None)
            try:
                with writing(self._rows_path), contextlib.closing(events):
                    rows.close()
            finally:
                threading.excepthook = self._hook
        self.upload()

    def _open(self) -> None:
        # Here, since most verbs never write; without torch, which tensorboardX imports where it is installed.
        absent = sys.modules.setdefault("torch", None) is None
        from tensorboardX import SummaryWriter

        if absent:
            del sys.modules["torch"]
        self._workdir.mkdir(parents=True, exist_ok=True)
        _drop_cut_line(self._rows_path)
        purge = None if self._resumed_at is None else self._resumed_at + 1
        self._events = SummaryWriter(str(self._workdir), purge_step=purge, flush_secs=15)
        self._rows = open(self._rows_path, "a", encoding="utf-8")
        self._hook, threading.excepthook = threading.excepthook, self._note

    def _note(self, failed) -> None:
        """Of TensorBoard's thread, an error that a later `write` raises; of others, what is done with them anyway."""
        if type(failed.thread).__module__.startswith("tensorboardX") and isinstance(failed.exc_value, OSError):
            self._broken = failed.exc_value
        else:
            self._hook(failed)


class _Bar:
    """One line that is rewritten on a terminal; plain lines, some seconds apart, on anything else."""

    def __init__(self, stream: TextIO, total: int):
        self._stream, self._total = stream, total
        self._live = stream.isatty()
        self._line = ""  # what stands on the terminal's last line
        self._latest: dict[str, float] = {}
        self._step = 0
        self._first: tuple[float, int] | None = None  # (seconds, step) of the first call, after compilation
        self._recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=SPEED_CALLS)
        self._rate = 0.0  # steps per second; the last known one right after a pause
        self._shown_at = -math.inf

    def update(self, step: int, scalars: Mapping[str, float] | None) -> None:
        now = time.monotonic()
        self._step = step
        self._first = self._first or (now, step)
        self._recent.append((now, step))
        if scalars is not None:
            self._latest = {name: float(value) for name, value in scalars.items()}
        if self.due(step):
            self._shown_at = now
            self._show()

    def due(self, step: int) -> bool:
        wait = REDRAW_SECONDS if self._live else PLAIN_SECONDS
        return time.monotonic() - self._shown_at >= wait or step >= self._total

    def pause(self) -> None:
        self._recent.clear()

    def message(self, text: str) -> None:
        self._clear()
        self._put(text + "\n")
        if self._live and self._first:
            self._show()

    def close(self) -> None:
        if self._line:
            self._show()  # the last state, which the redraw limit may have left out
            self._put("\n")
            self._line = ""

    def _show(self) -> None:
        if not self._live:
            self._put(self._text(None) + "\n")
            return
        columns = self._columns()
        text = self._text(columns)
        # One write over the old line and blanks over what it had more: clearing first would flicker.
        self._put("\r" + text.ljust(min(len(self._line), columns - 1)))
        self._line = text

    def _text(self, columns: int | None) -> str:
        """`120/2300 [==>   ] 5%  3.1 step/s  ETA 0:11:40  loss 0.52`, shorter than `columns` if given."""
        done = min(1.0, self._step / max(1, self._total))
        count = f"{self._step:{len(str(self._total))}}/{self._total}"
        parts = [f"{done:4.0%}", self._speed(), f"ETA {self._eta()}"]
        scalars = [f"{name} {value:.4g}" for name, value in self._latest.items()]
        if columns is None:
            return "  ".join((count, *parts, *scalars))
        # Scalars go first when it is narrow, then the bar; a full last column would wrap on some terminals.
        room = columns - 1 - len("  ".join((count, *parts)))
        shown = []
        for scalar in scalars:
            if room - 2 - len(scalar) < 14:  # leave a bar that deserves the name
                break
            shown.append(scalar)
            room -= 2 + len(scalar)
        width = min(30, room - 4)
        bar = []
        if width >= 5:
            cells = "=" * round(done * width)
            if 0 < len(cells) < width:
                cells = cells[:-1] + ">"
            bar = [f"[{cells:{width}}]"]
        return "  ".join((count, *bar, *parts, *shown))[: columns - 1]

    def _speed(self) -> str:
        if len(self._recent) > 1 and self._recent[-1][1] > self._recent[0][1]:
            (start, first), (end, last) = self._recent[0], self._recent[-1]
            self._rate = (last - first) / max(end - start, 1e-9)
        if not self._rate:
            return "- step/s"
        return f"{self._rate:.1f} step/s" if self._rate >= 1 else f"{1 / self._rate:.1f} s/step"

    def _eta(self) -> str:
        """Time left at the pace since the first call, with the evaluations and checkpoints in it."""
        start, first = self._first or (0.0, 0)
        if self._step <= first:
            return "-:--:--"
        left = (time.monotonic() - start) / (self._step - first) * max(0, self._total - self._step)
        minutes, seconds = divmod(round(left), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError, AttributeError):  # not a real terminal
            return shutil.get_terminal_size().columns

    def _clear(self) -> None:
        if self._line:
            self._put("\r" + " " * min(len(self._line), self._columns() - 1) + "\r")
            self._line = ""

    def _put(self, text: str) -> None:
        # A class name that the terminal's encoding lacks must not end a training run.
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._stream.write(text.encode(encoding, "replace").decode(encoding))
        self._stream.flush()


def _is_row_until(line: str, step: int) -> bool:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:  # cut short when the run was killed
        return False
    return isinstance(row, dict) and row.get("step", math.inf) <= step


def _drop_cut_line(path: pathlib.Path) -> None:
    """Shortens a file that does not end with a newline to its last complete line."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
