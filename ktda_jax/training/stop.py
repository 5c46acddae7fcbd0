"""When a training ends before its last step: on SIGTERM (preemption) and SIGINT, or for want of better scores."""

import pathlib
import signal
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from ktda_jax.config.settings import Settings
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
    """Early stopping: whether so many evaluations have passed since the best score. None: never."""

    def __init__(self, evaluations: int | None, every: int, checkpoints: pathlib.Path):
        """every: steps between evaluations; `checkpoints`: whose best one counts, so that a resumed run stops alike."""
        self._steps = None if evaluations is None else evaluations * every
        scores = {step: whole.score(checkpoints / str(step)) for step in whole.steps(checkpoints)}
        self._scores = {step: score for step, score in scores.items() if score is not None}

    @classmethod
    def of(cls, settings: Settings, workdir: pathlib.Path) -> "Patience":
        return cls(settings.patience, settings.eval_every, workdir / "checkpoints")

    def add(self, step: int, score: Mapping[str, float] | None) -> None:
        if score is not None:
            self._scores[step] = whole.only(score)

    def exhausted(self, step: int) -> bool:
        if self._steps is None or not self._scores:
            return False
        return step - whole.best(self._scores) >= self._steps
