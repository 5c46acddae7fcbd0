"""The only file that knows Orbax: the latest train state and the best one by validation mIoU."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from ktda_jax import UserError, sharding
from ktda_jax.models.flat import Arrays, check_finite, check_shapes
from ktda_jax.training.state import TrainState

METRIC = "mIoU"


@contextlib.contextmanager
def _readable(where: str) -> Iterator[None]:
    """What Orbax raises for a checkpoint that is cut short or lacks a file, as one UserError."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"cannot read {where}: {text}; is it whole? Remove it to use an earlier one") from error


class Checkpoints:
    """Checkpoints under `directory`: the latest and the best. Orbax writes aside and renames when complete."""

    def __init__(self, directory: str | pathlib.Path):
        self._directory = pathlib.Path(directory).absolute()
        keep = policies.AnyPreservationPolicy(
            [
                policies.LatestN(1),
                policies.BestN(
                    get_metric_fn=lambda metrics: metrics[METRIC], n=1, keep_checkpoints_without_metrics=False
                ),
            ]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=keep,
            best_fn=lambda metrics: metrics[METRIC],
            best_mode="max",
        )
        handlers = {"state": ocp.StandardCheckpointHandler(), "data": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

    def save(self, step: int, state: TrainState, data: dict, metrics: dict[str, float] | None) -> None:
        """Starts writing `state` and the data position; returns once the arrays are copied."""
        self._manager.save(
            step,
            args=ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data)),
            metrics=metrics,
            force=True,
        )

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step with the highest validation mIoU, or the latest one if none was validated."""
        with _readable(f"the checkpoints in {self._directory}"):
            best = self._manager.best_step()
            return self.latest_step() if best is None else best

    def restore(self, step: int, abstract: TrainState, shardings: Any) -> tuple[TrainState, dict]:
        """State and data position at `step`, placed by `shardings`; UserError where shapes differ."""
        with _readable(f"checkpoint {self._directory / str(step)}"):
            self._check(step, abstract)
            target = sharding.abstract(abstract, shardings)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore()),
            )
            return restored["state"], restored["data"]

    def restore_model(self, step: int, params: Arrays, stats: Arrays) -> tuple[Arrays, Arrays]:
        """What prediction needs: parameters (their average, where one was kept) and statistics, on one device.

        params, stats: the model's abstract arrays. The optimiser's moments, two thirds of a checkpoint, are not read.
        """
        where = f"checkpoint {self._directory / str(step)}"
        with _readable(where):
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
        self._manager.wait_until_finished()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.wait()  # after an error too: what was saved before it is good
        self._manager.close()
