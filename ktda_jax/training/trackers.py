"""`config.tracker`: the rows of TensorBoard in Weights & Biases or MLflow too, with the settings and the final scores.

Where a run goes, and who may write there, is the tracker's own environment: WANDB_PROJECT, WANDB_MODE=offline,
MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME and so on. The workdir's tracker.json keeps the run's id, by which a
training that goes on from a checkpoint goes on in its run.

Process 0 tracks. A tracker that cannot be had at the start is an error; later it stops no training: a thread sends,
tries again what did not arrive, and is waited for only at the end, for some seconds. A row is sent once its step is
complete. What the run holds already is not sent again, and what it lacks of the workdir's rows is.
"""

import collections
import json
import pathlib
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Self

from ktda_jax.config import workdir as records
from ktda_jax.config.settings import Settings
from ktda_jax.data import buckets
from ktda_jax.training.tracker_runs import MLflowRun, Row, Table, WandbRun

RECORD = "tracker.json"  # in the workdir: {"mlflow": id, "wandb": id}, of those that were used
RETRY, ENDING, STOPPING = 60.0, 60.0, 10.0  # seconds: to the next try, and that an end or a stop may take
AT_ONCE = 100  # rows in a request
KEPT = 10_000  # rows that wait for a tracker which is down; what comes later the next start sends
RUNS = {"wandb": WandbRun, "mlflow": MLflowRun}


class Tracker:
    """One training's run there; without config.tracker, or with `enabled=False` (processes other than 0), nothing."""

    def __init__(self, settings: Settings, workdir: pathlib.PurePath, *, enabled: bool = True):
        self._kind = settings.tracker if enabled else None
        self._settings, self._workdir = settings, workdir
        self._run: WandbRun | MLflowRun | None = None
        self._pending: Row | None = None
        self._queue, self._waiting = queue.SimpleQueue(), collections.deque()  # the thread's: what has not arrived
        self._news: collections.deque[str] = collections.deque()
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._finished = self._failing = False

    def __enter__(self) -> Self:
        return self

    def begin(self, start: int) -> str | None:
        """Connects, once, before minutes are spent; a line on where the run is. UserError in a line if it cannot be.

        start: the step of the checkpoint from which training goes on; 0 begins a new run.
        """
        if self._kind is None or self._run is not None:
            return None
        known = _recorded(self._workdir)
        self._run = RUNS[self._kind](self._workdir, self._settings, known.get(self._kind) if start else None, start)
        records.write_json(self._workdir / RECORD, {**known, self._kind: self._run.id})
        for step, values in _reported(self._workdir, start):
            self.write(step, values)
        self._thread.start()
        return f"tracked by {self._kind}: {self._run.where}"

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Finite scalars of a step, which may come in several parts."""
        if self._run is None or step <= self._run.held or len(self._waiting) > KEPT:
            return
        if self._pending is not None and self._pending.step != step:
            self.complete()
        before = {} if self._pending is None else self._pending.values
        self._pending = Row(int(step), {**before, **values}, time.time())

    def complete(self) -> None:
        """No more scalars come of the last step."""
        if self._pending is not None:
            self._queue.put(self._pending)
            self._pending = None

    def final(self, step: int, split: str, summary: Mapping[str, float]) -> None:
        """The scores of the checkpoint of a step, and the workdir's figures and tables, which are there."""
        if self._run is not None:
            self.complete()
            self._queue.put(Table(int(step), split, dict(summary), self._workdir))
            self._finished = True

    def news(self) -> Iterator[str]:
        """Lines to show."""
        while self._news:
            yield self._news.popleft()

    def __exit__(self, kind: type | None, *exception: object) -> None:
        if self._run is None:
            return
        self.complete()
        stopped = kind is None or issubclass(kind, KeyboardInterrupt)
        self._queue.put("finished" if self._finished and kind is None else "stopped" if stopped else "failed")
        if self._thread.is_alive():
            self._thread.join(ENDING if self._finished else STOPPING)
        for line in self.news():
            print(f"warning: {line}", flush=True)
        if self._thread.is_alive() or self._waiting or self._queue.qsize():
            print(f"warning: {self._kind} did not take all there was to send; {self._run.remedy}", flush=True)

    def _work(self) -> None:
        """The thread: sends in order until it gets a word, with which the run ends."""
        status, again = None, 0.0
        while status is None:
            try:
                found = [self._queue.get(timeout=RETRY if self._waiting else None)]
            except queue.Empty:
                found = []
            while not self._queue.empty():
                found.append(self._queue.get())
            self._waiting.extend(item for item in found if not isinstance(item, str))
            status = next((item for item in found if isinstance(item, str)), None)
            if status is None and time.monotonic() < again:
                continue
            if not self._try(self._send_all):
                again = time.monotonic() + RETRY
        self._try(lambda: self._run.end(status))

    def _try(self, send) -> bool:
        try:
            send()
        except Exception as error:  # clients raise of all kinds, and none is worth a training
            if not self._failing:
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                self._news.append(
                    f"cannot send to {self._kind}, and training goes on ({reason}); it is tried every {RETRY:.0f} s, "
                    "and metrics.jsonl has all"
                )
            self._failing = True
            return False
        self._failing = False
        return True

    def _send_all(self) -> None:
        while self._waiting:
            rows = []
            for item in self._waiting:
                if len(rows) == AT_ONCE or not isinstance(item, Row):
                    break
                rows.append(item)
            if rows:
                self._run.rows(rows)
            else:
                self._run.final(self._waiting[0])
            for _ in range(max(len(rows), 1)):
                self._waiting.popleft()


def _recorded(workdir: pathlib.PurePath) -> dict[str, str]:
    try:
        found = json.loads(buckets.read_text(workdir / RECORD))
        return {kind: run for kind, run in found.items() if isinstance(run, str)}
    except buckets.Unreachable:
        raise
    except (OSError, ValueError, AttributeError):  # none, or not as we wrote it
        return {}


def _reported(workdir: pathlib.PurePath, last: int) -> Iterator[tuple[int, dict[str, float]]]:
    """The scalars of a workdir's metrics up to a step, by step; not those of evaluations that came after training."""
    if not last:
        return
    try:
        lines = buckets.read_text(workdir / "metrics.jsonl", errors="replace").splitlines()
    except buckets.Unreachable:
        raise
    except OSError:
        return
    for line in lines:
        try:
            row = json.loads(line)
            step = int(row.pop("step"))
        except (ValueError, TypeError, KeyError, AttributeError):  # cut short when the run was killed
            continue
        if step <= last and "split" not in row:
            yield step, {name: value for name, value in row.items() if isinstance(value, int | float)}
