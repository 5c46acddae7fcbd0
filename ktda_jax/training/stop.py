"""When a training ends before its last step: on SIGTERM (preemption) and SIGINT, or for want of better scores."""

import contextlib
import json
import pathlib
import signal
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from ktda_jax.config.settings import Settings
from ktda_jax.data import buckets
from ktda_jax.training import whole


class StopSignal:
    """Notes SIGTERM and SIGINT; `agreed` is true in every process at the same step, and then `number` says which.

    A process alone that has nothing to save yet, or any more, leaves signals to whoever heard them before. Several
    agree before the first step, too: one that ended by itself would leave the others waiting for it.
    """

    EVERY = 10  # steps between agreements of several processes, which cost a round trip

    def __init__(self):
        self.number: int | None = None
        self._received: int | None = None

    def __enter__(self):
        self._previous = {}
        self._alone = jax.process_count() == 1
        if not self._alone:
            self._listen()
        return self

    def begin(self) -> None:
        """From now on there is something to save."""
        if self._alone:
            self._listen()

    def _listen(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: whoever owns it handles signals
                break

    def _note(self, number, frame):
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt(number)  # a second ctrl-c means now
        self._received = self._received or number

    def agreed(self, step: int, *, now: bool = False) -> bool:
        if self._alone:
            self.number = self._received
        elif now or step % self.EVERY == 0:
            received = multihost_utils.process_allgather(np.array(self._received or 0))
            self.number = int(np.max(received)) or None
        return self.number is not None

    def end(self) -> None:
        """All is saved. A signal since the last agreement is left to whoever heard them before, too."""
        self.__exit__()
        if self._alone and self._received and self.number is None:
            handler = signal.getsignal(self._received)
            if callable(handler):
                handler(self._received, None)
            else:
                signal.raise_signal(self._received)

    def __exit__(self, *exception):
        while self._previous:
            signal.signal(*self._previous.popitem())


class Patience:
    """Early stopping: whether so many evaluations have passed since a score was first as good as the best. None: never.

    It goes by `metrics.jsonl`, so that a resumed run stops alike; without that, by the checkpoints that are left.
    """

    def __init__(self, evaluations: int | None, scores: Mapping[int, float]):
        """scores: by step, of all evaluations so far."""
        self._evaluations, self._scores = evaluations, dict(scores)

    @classmethod
    def of(cls, settings: Settings, workdir: pathlib.Path) -> "Patience":
        folder = workdir / "checkpoints"
        steps = whole.steps(folder)
        scores = {step: score for step in steps if (score := whole.score(folder / str(step))) is not None}
        return cls(settings.patience, {**_reported(workdir, steps[-1] if steps else 0), **scores})

    def add(self, step: int, score: Mapping[str, float] | None) -> None:
        if score is not None:
            self._scores[step] = whole.only(score)

    def exhausted(self) -> bool:
        if self._evaluations is None or not self._scores:
            return False
        best = max(self._scores.values())
        first = min(step for step, score in self._scores.items() if score == best)
        return sum(step > first for step in self._scores) >= self._evaluations


def _reported(workdir: pathlib.Path, last: int) -> dict[int, float]:
    """The scores in a workdir's metrics up to a step: what was reported beyond the last checkpoint is done again."""
    try:
        lines = buckets.read_text(workdir / "metrics.jsonl", errors="replace").splitlines()
    except buckets.Unreachable:
        raise
    except OSError:
        return {}
    found = {}
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            row = json.loads(line)
            score = row.get("val/mIoU", row.get("val/explained"))
            if score is not None and row["step"] <= last:
                found[int(row["step"])] = float(score)
    return found
