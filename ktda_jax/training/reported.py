"""What a training tells of its steps: their losses, fetched from the devices where somebody sees them, and its pace."""

import collections
import contextlib
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np

from ktda_jax import UserError
from ktda_jax.training.writers import Writer

AHEAD = 2  # steps on their way while the next batch is drawn and put on the devices: more would take memory for nothing
HELD = 100  # steps at most whose losses are left on the devices
TIMES = ("train/images_per_s", "train/data_wait")  # of a row, what no two runs have alike


class Losses:
    """The steps that are on their way, and the losses of those done, until somebody sees them.

    That is at log_every, when the display changes, and before anything is saved. Then all of them are looked at.
    """

    def __init__(self, log_every: int, batch_size: int, writer: Writer, saved: Callable[[], int | None]):
        """saved: the step of the last checkpoint, if there is one, for messages."""
        self._log_every, self._writer, self._saved = log_every, writer, saved
        self._running, self._done = collections.deque(), []
        self._alone = jax.process_count() == 1  # several processes look at the same steps, so that all stop alike
        self.pace = Pace(batch_size)

    def push(self, step: int, terms: dict[str, jax.Array], skipped: int) -> None:
        """A step that was begun; waits for the one `AHEAD` steps before it."""
        self._running.append((step, terms, skipped))
        self._finish(AHEAD if self.pace.started else 0)  # the first one is a sign of life

    def flush(self) -> None:
        """Waits for all steps; UserError if the losses of one are not finite."""
        self._finish(0)
        self._fetch()

    def _finish(self, left: int) -> None:
        while len(self._running) > left:
            step, terms, skipped = self._running.popleft()
            jax.block_until_ready(terms)
            self._done.append((step, terms))
            shown, logged = None, step % self._log_every == 0 or step == 1
            if logged or len(self._done) >= HELD or (self._alone and self._writer.due(step)):
                shown = self._fetch()
            if logged:
                row = {**shown, "skipped_tiles": skipped} if skipped else shown
                row = {f"train/{k}": v for k, v in row.items()}
                self._writer.write(step, row | self.pace.since(step))
            self.pace.start(step)
            self._writer.progress(step, shown and {k: shown[k] for k in ("loss", "acc", "explained") if k in shown})

    def _fetch(self) -> dict[str, float] | None:
        """The losses of the last step that is done; UserError names the first one with any that are not finite."""
        done, self._done = self._done, []
        terms = None
        for (step, _), found in zip(done, jax.device_get([arrays for _, arrays in done]), strict=True):
            # The loss first in the file, so first in the figure.
            terms = {k: float(v) for k, v in {"loss": found["loss"], **found}.items()}
            self._check(step, terms)
        return terms

    def _check(self, step: int, terms: dict[str, float]) -> None:
        wrong = [f"{k} is {v}" for k, v in terms.items() if not np.isfinite(v)]
        if wrong:
            saved = self._saved()
            where = f"the last checkpoint is step {saved}" if saved else "no checkpoint was written yet"
            raise UserError(
                f"not finite at step {step}: {', '.join(wrong)}; {where}. "
                "Lower config.optimizer.lr or set config.clip_norm"
            )


class Pace:
    """Images per second, and the share of the time in which this process waited for data, from row to row.

    What is no training is left out, and so is the first step: it may be the one that compiles.
    """

    def __init__(self, batch_size: int):
        self._batch_size, self._since, self._waited = batch_size, None, 0.0

    @property
    def started(self) -> bool:
        return self._since is not None

    def start(self, step: int) -> None:
        """`step` is done: the clock starts with the first one."""
        if not self.started:
            self._since, self._waited = (time.monotonic(), step), 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While batches are drawn. With `AHEAD` steps on their way it takes long only if data come too slowly."""
        begun = time.monotonic()
        yield
        self._waited += time.monotonic() - begun

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        begun = time.monotonic()
        yield
        if self.started:
            self._since = self._since[0] + time.monotonic() - begun, self._since[1]

    def since(self, step: int) -> dict[str, float]:
        """`TIMES` of the steps since the last call up to `step`, which is done."""
        if not self.started:
            return {}
        now, (begun, first), waited = time.monotonic(), self._since, self._waited
        self._since, self._waited, seconds = (now, step), 0.0, max(now - begun, 1e-9)
        return dict(zip(TIMES, (self._batch_size * (step - first) / seconds, waited / seconds), strict=True))
