"""The only file that knows Orbax: the latest train state and the best one by validation mIoU."""

import contextlib
import functools
import logging as standard_logging
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from ktda_jax import UserError, sharding
from ktda_jax.data import buckets
from ktda_jax.data.paths import place
from ktda_jax.models.flat import Arrays, check_finite, check_shapes
from ktda_jax.training import whole
from ktda_jax.training.state import TrainState


@functools.cache
def _quiet() -> None:
    """Leaves the word to the one error that Orbax raises: it logs it as well, and Python the others of its threads.

    Its warnings are about ordinary things, such as a checkpoint without a score.
    """
    ours = f"{os.sep}orbax{os.sep}"
    logging.get_absl_logger().addFilter(lambda record: ours not in record.pathname)
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)
    hook = sys.unraisablehook

    def elsewhere(failed) -> None:
        code = getattr(failed.object, "cr_code", None)
        late = str(failed.exc_value) == "Event loop is closed"  # TensorStore's answers after the first error
        if not late and (code is None or ours not in code.co_filename):
            hook(failed)

    sys.unraisablehook = elsewhere
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)


class _StateHandler(ocp.StandardCheckpointHandler):
    """Writes the sums of the files, too, before Orbax gives the checkpoint its name."""

    def __init__(self):
        super().__init__()
        self.beside: tuple[dict, dict | None] = {}, None  # data position and metrics of the checkpoint being saved

    def finalize(self, directory) -> None:
        """In process 0, when all of them have written."""
        super().finalize(directory)
        whole.write(place(directory), *self.beside)


@ocp.args.register_with_handler(_StateHandler, for_save=True)
class _StateSave(ocp.args.StandardSave):
    """Orbax finds a handler by its arguments' class."""


@ocp.args.register_with_handler(_StateHandler, for_restore=True)
class _StateRestore(ocp.args.StandardRestore):
    """See `_StateSave`."""


class _Best:
    """The preservation policy for the best one, by scores that we have read: Orbax stops at one that it cannot read."""

    def __init__(self, scores: dict[int, float | None]):
        self._scores = scores

    def should_preserve(self, checkpoints: Sequence, *, context: Any) -> list[bool]:
        best = whole.best({c.step: self._scores.get(c.step) for c in checkpoints})
        return [c.step == best for c in checkpoints]


class Checkpoints:
    """Checkpoints under `directory`: the `keep` latest and the best.

    Orbax writes aside and renames when complete; in a bucket it writes a last object, without which there is none.
    """

    def __init__(self, directory: str | pathlib.Path, *, keep: int = 1):
        _quiet()
        self._directory = place(directory)
        self._failures = (Exception,)  # gcsfs and Google's libraries have theirs
        if not buckets.is_remote(directory):
            self._directory = self._directory.absolute()
            self._failures = OSError, ValueError, RuntimeError  # of C++ the second, of threads the last
        self._scores = {step: whole.score(self._directory / str(step)) for step in whole.steps(self._directory)}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(keep), _Best(self._scores)]),
            best_fn=whole.only,  # without it no metrics are written
            lightweight_initialize=True,
        )
        self._state = _StateHandler()
        handlers = {"state": self._state, "data": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

    def save(self, step: int, state: TrainState, data: dict, metrics: dict[str, float] | None) -> None:
        """Starts writing `state` and the data position; returns once the arrays are copied."""
        self.wait()  # for the former one, as Orbax would
        self._state.beside, self._scores[step] = (data, metrics), metrics and whole.only(metrics)
        with self._written():
            self._manager.save(
                step,
                args=ocp.args.Composite(state=_StateSave(state), data=ocp.args.JsonSave(data)),
                metrics=metrics,
                force=True,
            )

    def look(self) -> None:
        """UserError if what is being written could not be; waits for nothing."""
        with self._written():
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """A full disk or the like as one line."""
        try:
            yield
        except self._failures as error:
            code = re.search(r"os_error_code='(\d+)'", str(error))
            reason = os.strerror(int(code[1])) if code else getattr(error, "strerror", None)
            reason = reason or " ".join(str(error).split())[:200]
            found = whole.steps(self._directory)
            goes = f"goes on from step {found[-1]}" if found else "begins anew, since there is none yet"
            raise UserError(
                f"cannot write a checkpoint to {self._directory}: {reason}; mend that (make room, say), "
                f"and the same command {goes}"
            ) from error

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the highest validation mIoU, or the latest one if none was validated."""
        return whole.best_step(self._directory)

    def restore(self, step: int, abstract: TrainState, shardings: Any) -> tuple[TrainState, dict]:
        """State and data position at `step`, placed by `shardings`; UserError where it is damaged or shapes differ."""
        with self._checked(step):
            self._check(step, abstract)
            target = sharding.abstract(abstract, shardings)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(state=_StateRestore(target), data=ocp.args.JsonRestore()),
            )
        return restored["state"], restored["data"]

    @contextlib.contextmanager
    def _checked(self, step: int) -> Iterator[None]:
        """Compares the sums of the files before they are read, each process a share; one line if they are damaged.

        What Orbax finds then is about a checkpoint of a former version, which has no sums.
        """
        share = slice(jax.process_index(), None, jax.process_count())
        what = whole.fault(self._directory / str(step), content=True, share=share)
        if jax.process_count() > 1:  # what one finds stops all
            found = multihost_utils.process_allgather(np.array(bool(what))).any()
            what = what or ("another process found a file that is not what was written" if found else None)
        try:
            if not what:
                yield
                return
        except UserError:
            raise
        except Exception as error:  # Orbax raises of all kinds, a plain Exception for one
            what = " ".join(str(error.__cause__ or error).split())[:200]
            if buckets.is_remote(self._directory):  # whose sums are right: it is the way there
                raise UserError(f"cannot read checkpoint {self._directory / str(step)}: {what}; try again") from error
        raise whole.refusal(self._directory, step, what)

    def restore_model(self, step: int, params: Arrays, stats: Arrays) -> tuple[Arrays, Arrays]:
        """What prediction needs: parameters (their average, where one was kept) and statistics, on one device.

        params, stats: the model's abstract arrays. The optimiser's moments, two thirds of a checkpoint, are not read.
        """
        where = f"checkpoint {self._directory / str(step)}"
        with self._checked(step):
            saved = self._manager.item_metadata(step)["state"]
            chosen = "params" if saved["ema"] is None else "ema"
            check_shapes(dict(saved[chosen]), params, where)
            check_shapes(dict(saved["batch_stats"]), stats, where)
            device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            wanted = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
                {chosen: params, "batch_stats": stats},
            )
            arguments = ocp.args.PyTreeRestore(
                item=wanted,
                restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
                partial_restore=True,
            )
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                found = reader.restore(self._directory / str(step) / "state", args=arguments)
        check_finite({**found[chosen], **found["batch_stats"]}, where)
        return found[chosen], found["batch_stats"]

    def _check(self, step: int, abstract: TrainState) -> None:
        saved = self._manager.item_metadata(step)["state"]
        where = f"checkpoint {self._directory / str(step)}"
        check_shapes(dict(saved["params"]), abstract.params, where)
        if (saved["ema"] is None) != (abstract.ema is None):
            raise UserError(f"{where} was trained {'with' if saved['ema'] else 'without'} EMA; keep config.ema")

    def wait(self) -> None:
        """Until all writes are complete."""
        with self._written():
            self._manager.wait_until_finished()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        # After an error too: what was saved before it is good. Of two errors the first is told.
        with contextlib.suppress(Exception) if kind else self._written():
            self._manager.wait_until_finished()
        with contextlib.suppress(Exception) if kind else self._written():
            self._manager.close()
