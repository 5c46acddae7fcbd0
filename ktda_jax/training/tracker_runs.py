"""A run in Weights & Biases or in MLflow, as trackers.py needs it: `id`, `held`, `where`, `rows`, `final`, `end`.

`held` is the last step whose scalars the run has; W&B takes none of an earlier one, and of MLflow's run a tag says it.
Both are imported only where they are asked for.
"""

import contextlib
import csv
import dataclasses
import importlib
import logging
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence

from ktda_jax import UserError
from ktda_jax.config.fields import flat
from ktda_jax.config.settings import Settings
from ktda_jax.data import buckets
from ktda_jax.data.addresses import masked
from ktda_jax.data.paths import absolute

START = 30  # seconds that a tracker may take to answer before training starts
HELD = "ktda_jax.step"  # MLflow's tag


@dataclasses.dataclass(frozen=True)
class Row:
    step: int
    values: dict[str, float]
    time: float  # s since 1970


@dataclasses.dataclass(frozen=True)
class Table:
    """Of a final evaluation."""

    step: int
    split: str
    summary: dict[str, float]
    workdir: pathlib.PurePath

    @property
    def scores(self) -> dict[str, float]:
        """Those that are numbers, named as in metrics.jsonl."""
        return {f"final/{name}": float(value) for name, value in self.summary.items() if math.isfinite(value)}

    @contextlib.contextmanager
    def files(self) -> Iterator[list[pathlib.Path]]:
        """Of the workdir's figures/, as local ones."""
        folder = self.workdir / "figures"
        if not buckets.is_remote(folder):
            yield sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
            return
        with tempfile.TemporaryDirectory() as scratch:
            for name in buckets.listing(folder):
                buckets.download(folder / name, pathlib.Path(scratch) / name)
            yield sorted(pathlib.Path(scratch).iterdir())


class WandbRun:
    """Offline, each start leaves a folder of its own with the same id, which `wandb sync` puts together."""

    def __init__(self, workdir: pathlib.PurePath, settings: Settings, known: str | None, start: int):
        """known: the id of a run to go on with. UserError in a line."""
        # Of a process that is killed its file lacks what came since: 15 s by default. Other versions ignore this.
        os.environ.setdefault("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
        self._wandb = _imported("wandb", "init")
        local = None if buckets.is_remote(workdir) or "WANDB_DIR" in os.environ else str(workdir)
        name = None if "WANDB_NAME" in os.environ else absolute(workdir).name
        ours = self._wandb.Settings(
            console="off", silent=True, init_timeout=START, finish_timeout=2 * START, finish_timeout_raises=True
        )
        arguments = sys.argv
        sys.argv = list(map(masked, arguments))  # W&B keeps them
        try:
            online = self._wandb.setup().settings.mode == "online"
            if online and not self._wandb.login(prompt=False, verify=False):
                raise UserError(
                    "config.tracker=wandb: not logged in; `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline"
                )
            identity = known or os.environ.get("WANDB_RUN_ID")
            self._run = self._wandb.init(id=identity, resume="allow", name=name, dir=local, settings=ours)
            self._run.config.update(public(settings), allow_val_change=True)
        except UserError:
            raise
        except Exception as error:
            raise _refused("wandb", error, known, "WANDB_MODE=offline keeps it here") from error
        finally:
            sys.argv = arguments
        self.id = self._run.id
        self.held = self._run.step - 1 if self._run.resumed else start if known and not online else 0
        folder = pathlib.Path(self._run.settings.sync_dir)
        self.where = self._run.url if online else f"offline; `wandb sync {folder}` sends it"
        self.remedy = f"`wandb sync {folder}` sends the rest"

    def rows(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._run.log(row.values, step=row.step, commit=True)

    def final(self, table: Table) -> None:
        """In the summary, where no step is taken for it."""
        found = {**table.scores, "final/split": table.split, "final/step": table.step}
        with table.files() as files:
            for path in files:
                if path.suffix == ".png":
                    found[f"figures/{path.stem}"] = self._wandb.Image(str(path))
                elif path.suffix == ".csv":
                    found[f"figures/{path.stem}"] = self._wandb.Table(*_table(path))
            self._run.summary.update(found)

    def end(self, status: str) -> None:
        self._run.finish(exit_code={"finished": 0, "stopped": 130, "failed": 1}[status])


class MLflowRun:
    """Settings are its parameters, which MLflow lets nobody change: later values, of another length say, are tags."""

    remedy = "the same command sends the rest"

    def __init__(self, workdir: pathlib.PurePath, settings: Settings, known: str | None, start: int):
        """known: the id of a run to go on with. UserError in a line."""
        for name, value in (("MAX_RETRIES", 2), ("TIMEOUT", START)):  # 7 tries of 120 s unless somebody says otherwise
            os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", str(value))
        mlflow = _imported("mlflow", "MlflowClient")
        for noisy in ("mlflow", "alembic"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        self._entities = mlflow.entities
        try:
            self._client = mlflow.MlflowClient()
            run = self._known(known) if known else None
            if run is None:
                run = self._client.create_run(self._experiment(), run_name=absolute(workdir).name)
            self.id, self.held = run.info.run_id, int(run.data.tags.get(HELD, 0))
            self._client.update_run(self.id, status="RUNNING")
            self._write_settings(public(settings), run.data.params)
        except Exception as error:
            raise _refused("mlflow", error, known, "set MLFLOW_TRACKING_URI") from error
        self.where = f"run {self.id} at {masked(mlflow.get_tracking_uri())}"

    def _known(self, run: str):
        """None where it has been deleted, or is of another server."""
        try:
            found = self._client.get_run(run)
        except Exception as error:
            if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return found if found.info.lifecycle_stage == "active" else None

    def _experiment(self) -> str:
        if found := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return found
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        experiment = self._client.get_experiment_by_name(name)
        return self._client.create_experiment(name) if experiment is None else experiment.experiment_id

    def _write_settings(self, values: Mapping[str, object], before: Mapping[str, str]) -> None:
        texts = {key: str(value)[:6000] for key, value in values.items()}  # its limit
        new = [self._entities.Param(key, text) for key, text in texts.items() if key not in before]
        for first in range(0, len(new), 100):  # its limit, too
            self._client.log_batch(self.id, params=new[first : first + 100])
        for key, text in texts.items():
            if before.get(key, text) != text:
                self._client.set_tag(self.id, key, text)

    def rows(self, rows: Sequence[Row]) -> None:
        """With the tag, so that both arrive or neither."""
        found = [
            self._entities.Metric(name, value, round(row.time * 1000), row.step)
            for row in rows
            for name, value in row.values.items()
        ]
        *firsts, last = (found[first : first + 1000] for first in range(0, max(len(found), 1), 1000))  # its limit
        for part in firsts:
            self._client.log_batch(self.id, metrics=part)
        self._client.log_batch(self.id, metrics=last, tags=[self._entities.RunTag(HELD, str(rows[-1].step))])

    def final(self, table: Table) -> None:
        """The scores at the step of the checkpoint that has them."""
        now = round(time.time() * 1000)
        metrics = [self._entities.Metric(name, value, now, table.step) for name, value in table.scores.items()]
        self._client.log_batch(self.id, metrics=metrics, tags=[self._entities.RunTag("final/split", table.split)])
        with table.files() as files:
            for path in files:
                self._client.log_artifact(self.id, str(path), "figures")

    def end(self, status: str) -> None:
        words = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
        self._client.set_terminated(self.id, words[status])


def public(settings: Settings) -> dict[str, object]:
    """The settings by name, without what signs an address in them."""
    return {key: masked(value) if isinstance(value, str) else value for key, value in flat(settings).items()}


def _imported(package: str, needed: str):
    """The client, once it is known to be there: a folder of that name, as W&B leaves one, is an empty package."""
    try:
        found = importlib.import_module(package)
    except ImportError as error:
        found, lacking = None, f" ({error})" if getattr(error, "name", package) != package else ""
    else:
        lacking = ""
    if not hasattr(found, needed):
        raise UserError(f"config.tracker={package} needs {package}{lacking}: pip install -e '.[{package}]'")
    return found


def _refused(kind: str, error: Exception, known: str | None, hint: str) -> UserError:
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    again = f", or remove tracker.json for another run than {known}" if known else ""
    return UserError(f"config.tracker={kind}: no run can be begun ({masked(reason, prose=True)}); {hint}{again}")


def _table(path: pathlib.Path) -> tuple[list[str], list[list[str | float | None]]]:
    """Of a CSV whose first column is words: its columns and rows, None where a cell is empty."""
    with open(path, encoding="utf-8", newline="") as file:
        columns, *rows = csv.reader(file)
    return columns, [[name, *(float(value) if value else None for value in rest)] for name, *rest in rows]
