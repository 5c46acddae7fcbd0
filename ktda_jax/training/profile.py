"""A profiler trace of some steps, for TensorBoard's profile plugin, xprof or Perfetto."""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import Self

import jax

from ktda_jax import UserError
from ktda_jax.data import buckets


@contextlib.contextmanager
def trace(folder: str | os.PathLike) -> Iterator[None]:
    """What the devices and this process do meanwhile goes into `folder`; UserError if it cannot be written."""
    with contextlib.ExitStack() as stack:
        local = stack.enter_context(tempfile.TemporaryDirectory()) if buckets.is_remote(folder) else folder
        jax.profiler.start_trace(local)
        try:
            yield
        finally:
            _finish(local, folder)


def _finish(local: str | os.PathLike, folder: str | os.PathLike) -> None:
    try:
        jax.profiler.stop_trace()
        if local != folder:
            for path in filter(pathlib.Path.is_file, pathlib.Path(local).rglob("*")):
                buckets.upload(path, folder / path.relative_to(local))
    except Exception as error:  # of several kinds, most of them C++'s
        raise UserError(f"cannot write the trace to {folder}: {' '.join(str(error).split())[:200]}") from error


class Profile:
    """The trace of the steps from `first` to `last`, as far as a training comes to them. Leaving it ends a trace."""

    def __init__(
        self, steps: tuple[int, int] | None, folder: pathlib.Path, tell: Callable[[str], None], *, enabled: bool = True
    ):
        """steps: first and last; None traces nothing. tell: takes lines for the user. enabled: false in processes that
        only keep step with the one that traces."""
        self._steps, self._folder, self._tell, self._enabled = steps, folder, tell, enabled
        self._trace: contextlib.ExitStack | None = None  # which ends the one that runs
        self._done = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def resume(self, step: int) -> None:
        """Says so if a training that goes on from `step` has all of them behind it."""
        if self._steps and self._steps[1] <= step:
            first, last = self._steps
            self._tell(f"--profile={first}:{last} leaves no trace, since step {step} is done already")

    def begins(self, step: int) -> bool:
        return bool(self._steps) and not self._done and self._steps[0] <= step <= self._steps[1]

    def begin(self) -> None:
        self._done, self._trace = True, contextlib.ExitStack()
        if self._enabled:
            self._trace.enter_context(trace(self._folder))

    def ends(self, step: int) -> bool:
        return self._trace is not None and step == self._steps[1]

    def end(self) -> None:
        """Writes it, if there is one, which takes seconds. Training goes on where it cannot be written."""
        if self._trace is None:
            return
        running, self._trace = self._trace, None
        try:
            running.close()
        except UserError as error:
            self._tell(f"warning: {error}")
        else:
            self._tell(f"a trace is in {self._folder}, for TensorBoard's profile plugin or xprof")
