"""A clean stop on SIGTERM (preemption) and SIGINT, at the same step in every process."""

import signal

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopSignal:
    """Notes SIGTERM and SIGINT; `agreed` is true in every process at the same step."""

    EVERY = 10  # steps between agreements of several processes, which cost a round trip

    def __enter__(self):
        self.received = False
        self._previous = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: whoever owns it handles signals
                break
        return self

    def _note(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second ctrl-c means now
        self.received = True

    def agreed(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self.received
        if step % self.EVERY:
            return False
        return bool(np.any(multihost_utils.process_allgather(np.array(self.received))))

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
