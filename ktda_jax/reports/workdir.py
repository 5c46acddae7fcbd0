"""What a workdir tells without its data: settings, environment, curves, and the scores that evaluation left."""

import dataclasses
import json
import pathlib

import numpy as np

from ktda_jax import UserError
from ktda_jax.config import checks
from ktda_jax.config.settings import Settings
from ktda_jax.config.workdir import flatten
from ktda_jax.data import buckets
from ktda_jax.figures.plots import read_curves
from ktda_jax.reports.features import FeatureMaps
from ktda_jax.reports.tiles import Shares, Tile
from ktda_jax.training.stop import Patience


@dataclasses.dataclass
class Run:
    """One workdir. `missing` says by section ('scores', 'tiles', ...) what the page lacks, and why."""

    path: pathlib.Path
    name: str
    settings: Settings | None = None
    values: dict = dataclasses.field(default_factory=dict)  # the settings as saved: {'data.root': ...}
    environment: dict = dataclasses.field(default_factory=dict)
    curves: dict[str, tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=dict)
    classes: tuple[str, ...] = ()
    palette: tuple[tuple[int, int, int], ...] = ()
    split: str = ""  # the one that was evaluated
    confusion: np.ndarray | None = None  # (C, C) int64, rows are labels
    scored: str = ""  # where the confusion matrix is from
    trust: dict = dataclasses.field(default_factory=dict)  # of that file: training.trust.as_json, by newer versions
    worst: list[Tile] = dataclasses.field(default_factory=list)
    best: list[Tile] = dataclasses.field(default_factory=list)
    followed: str = ""  # the run whose best and worst tiles these are, if another's
    features: FeatureMaps | None = None
    shares: dict[str, Shares] = dataclasses.field(default_factory=dict)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def step(self) -> int:
        """The last one that was reported."""
        return int(max((steps[-1] for steps, _ in self.curves.values()), default=0))

    @property
    def status(self) -> str:
        total = self.settings and self.settings.total_steps
        if not total:
            return f"step {self.step:,}" if self.step else "nothing reported yet"
        done = "finished" if self.step >= total else "not finished"
        if self.step < total and Patience.of(self.settings, self.path).exhausted():
            done = "stopped early"
        return f"{done}: step {self.step:,} of {total:,}"


def check(path: pathlib.Path) -> None:
    """UserError if `path` is no workdir."""
    if not path.is_dir():
        raise UserError(f"--workdir={path} is no folder; give the folder of a training")
    if not any((path / file).is_file() for file in ("config.json", "metrics.jsonl")):
        raise UserError(f"--workdir={path} is no workdir: neither config.json nor metrics.jsonl is in it")


def read(path: pathlib.Path, name: str) -> Run:
    """UserError if `path` is no workdir; what is in it and cannot be read is `missing`."""
    check(path)
    run, figures = Run(path, name), path / "figures"
    try:
        saved = _json(path / "config.json")
        run.values = flatten(saved)
        run.settings = checks.resolve(saved)
        info = run.settings.data.info
        run.classes, run.palette = info.classes, info.palette
        run.split = run.settings.data.test_split or run.settings.data.validation
    except FileNotFoundError:
        run.missing["config"] = "no config.json in the workdir"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        text = " ".join(str(error).split()).strip("'\"")
        text = f"it lacks {text}" if isinstance(error, KeyError | AttributeError) else text
        run.missing["config"] = f"config.json cannot be used, was it written by another version? ({text})"
    try:
        run.environment = _json(path / "run.json")
    except (OSError, ValueError) as error:
        run.missing["environment"] = f"no run.json that can be read ({type(error).__name__})"
    try:
        run.curves = read_curves(path / "metrics.jsonl")
    except (OSError, UnicodeDecodeError) as error:
        run.missing["curves"] = f"no metrics.jsonl that can be read ({type(error).__name__})"
    if not run.curves:
        run.missing.setdefault("curves", "metrics.jsonl has no values yet")
    if not run.split or not (figures / f"{run.split}.json").is_file():
        evaluated = sorted(figures.glob("*.json"))
        run.split = evaluated[0].stem if evaluated and "config" in run.missing else run.split
    _read_scores(run, figures / f"{run.split}.json")
    return run


def _read_scores(run: Run, path: pathlib.Path) -> None:
    """The confusion matrix of the last evaluation, which wrote `figures/<split>.json`."""
    try:
        values = _json(path)
        confusion = np.array(values["confusion"], np.int64)
        classes = tuple(str(name) for name in values["classes"])
        if confusion.shape != (len(classes),) * 2 or (run.classes and classes != tuple(run.classes)):
            raise UserError(f"its classes are {', '.join(classes)}")
        if (confusion < 0).any():
            raise UserError(f"a count of pixels is {confusion.min()}")
    except FileNotFoundError:
        run.missing["scores"] = "not evaluated yet: that is done when training ends, or by --mode=eval"
        return
    except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        run.missing["scores"] = f"{path.parent.name}/{path.name} cannot be used: {error}"
        return
    run.trust = {key: values[key] for key in ("interval", "boundary_miou", "calibration") if values.get(key)}
    run.confusion, run.classes, run.scored = confusion, classes, f"{path.parent.name}/{path.name}"


def _json(path: pathlib.Path) -> dict:
    values = json.loads(buckets.read_text(path))
    if not isinstance(values, dict):
        raise UserError(f"{path.name} holds no object")
    return values
