"""A state scored: on validation while it is trained, and the best one of a workdir."""

import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from ktda_jax import UserError, sharding
from ktda_jax.config import checks, foreign
from ktda_jax.config import workdir as records
from ktda_jax.config.model import model_of
from ktda_jax.config.settings import Settings
from ktda_jax.data import buckets
from ktda_jax.data.paths import place
from ktda_jax.data.remembered import Checks
from ktda_jax.figures import plots
from ktda_jax.models.flat import Arrays
from ktda_jax.training import evaluate, explained, whole
from ktda_jax.training.checkpoint import Checkpoints
from ktda_jax.training.inputs import Inputs, checks_of, eval_source, held_out_batches
from ktda_jax.training.predicted import how
from ktda_jax.training.program import Program, build
from ktda_jax.training.state import TrainState
from ktda_jax.training.trackers import Tracker
from ktda_jax.training.trust import has_temperature, write_temperature
from ktda_jax.training.writers import Writer

Scored = evaluate.Evaluation | explained.Explained


def validate(
    step: int, settings: Settings, program: Program, data: Inputs, current: TrainState, teacher: Arrays, writer: Writer
) -> dict[str, float] | None:
    """The score that ranks checkpoints: the validation mIoU, or of a distillation the variance explained.

    None where no pixel is labelled: NaN cannot be ranked.
    """
    if not settings.supervised:
        found = explain(settings, program, data.val_batches, current, teacher)
        writer.write(step, {f"val/{k}": v for k, v in found.summary.items()})
        shares = " ".join(f"{share:.3f}" for share in found.shares)
        writer.message(f"step {step}: of the held-out images' teacher features {found.mean:.3f} explained ({shares})")
        return {"explained": found.mean}
    result = _evaluate(settings, program, data.val_batches, current, teacher)
    scores = result.metrics.summary
    writer.write(step, {f"val/{k}": v for k, v in scores.items()})
    writer.message(f"step {step}: val mIoU {scores['mIoU']:.2f}, aAcc {scores['aAcc']:.2f}")
    return {"mIoU": scores["mIoU"]} if np.isfinite(scores["mIoU"]) else None


def explain(
    settings: Settings, program: Program, batches: Iterable[dict], current: TrainState, teacher: Arrays
) -> explained.Explained:
    return explained.evaluate(
        program.eval_step, current.params if current.ema is None else current.ema, current.batch_stats, batches,
        program.mesh, teacher, tapped=model_of(settings).teacher.tapped, distance=settings.loss.distance,
    )  # fmt: skip


def evaluate_workdir(
    config: Mapping[str, Any] | Settings, workdir: str | pathlib.Path, *, program: Program | None = None,
    known: Checks | None = None, tracker: Tracker | None = None,
) -> Scored:  # fmt: skip
    """Evaluates the best checkpoint on the test split, or on validation without one; writes the figures.

    A distillation without labels is evaluated on its held-out images. `known`: the checks of tiles made so far.
    """
    workdir = place(workdir)
    settings = config if isinstance(config, Settings) else foreign.as_begun(workdir, checks.resolve(config))
    if tracker is None:
        with Tracker(settings, workdir, enabled=jax.process_index() == 0) as tracker:
            return evaluate_workdir(settings, workdir, program=program, known=known, tracker=tracker)
    known = known or checks_of(workdir)
    split = settings.data.test_split or settings.data.validation
    trained = (workdir / "checkpoints").is_dir()
    if trained:
        whole.check(workdir / "checkpoints", latest=False)
        decides = (
            "supervised",
            "model.",
            *(f"data.{key}" for key in "name classes palette bands rgb scale nodata".split()),
        )
        if settings.encodes or not settings.supervised:
            decides += ("weights.teacher", "teacher.bands")
        if settings.data.folds is not None and split == settings.data.validation:
            decides += ("data.fold", "data.train_split")  # of any other fold the model has seen the tiles
        if not settings.supervised:
            decides += ("data.crop", "loss.distance")
        records.compare(workdir, settings, only=decides)
    if not trained and not settings.supervised:
        raise UserError(f"no checkpoints in {workdir}; train first, or give --workdir of a trained run")
    if not trained and settings.weights.model is None:
        raise UserError(
            f"no checkpoints in {workdir}; train first, give --workdir of a trained run, or config.weights.model"
        )
    said = program is not None  # training has warned already
    program = program or build(settings, teacher=not settings.supervised, initial=not trained)
    obstacle = None if said or jax.process_index() else records.obstacle(workdir)
    if not obstacle and (tracked := tracker.begin(max(records.steps(workdir), default=0))):
        print(tracked, flush=True)
    if settings.supervised:
        batches, summary_of_split, doubtful = eval_source(settings.data, split, settings.eval_batch_size, known)
    else:
        (batches, held_out), doubtful = held_out_batches(settings.data, settings.eval_batch_size), []
        if trained and records.fingerprint(workdir, "held out") not in (None, held_out.fingerprint):
            doubtful.append("the images that score are not those held out in training, which may have trained on them")
    if not said and jax.process_index() == 0:
        for line in [*doubtful, *filter(None, [obstacle])]:
            print(f"warning: {line}", flush=True)
    if trained:
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            step = checkpoints.best_step()
            if step is None:
                raise UserError(f"no checkpoint in {workdir / 'checkpoints'}; train first")
            current, _ = checkpoints.restore(step, program.abstract, program.shardings)
    else:
        step, current = 0, program.init()  # the weights of settings.weights.model as they came
    teacher = program.teacher() if settings.encodes or not settings.supervised else {}
    if settings.supervised:
        result, info = _evaluate(settings, program, batches, current, teacher, trust=True), settings.data.info
        what, table = f"{split} split", f"tiles {how(settings.data)}\n{evaluate.table(result, info.classes)}"
        summary = result.metrics.summary | result.trust.summary
        about = {"step": step, "scale": how(settings.data), "fingerprint": summary_of_split.fingerprint}
        parts = workdir, split, info, settings.data.rgb_positions, about
        write = functools.partial(evaluate.write_report, result, *parts)
    else:
        result = explain(settings, program, batches, current, teacher)
        split, summary, table = "held out", result.summary, explained.table(result)
        what = f"{held_out.windows:,} windows held out"
        write = functools.partial(explained.write_report, result, workdir, held_out.windows)
    if jax.process_index() == 0:
        print(f"\n{what}, step {step}:\n{table}", flush=True)
    if jax.process_index() == 0 and not obstacle:
        with records.writing(workdir / "figures"):
            write()
            if (workdir / "metrics.jsonl").exists():
                plots.save_curves(workdir / "figures" / "curves.png", workdir / "metrics.jsonl")
        with records.writing(workdir / "metrics.jsonl"):
            _append_final(workdir, step, split, summary)
        tracker.final(step, split, summary)
        print(f"figures in {workdir / 'figures'}", flush=True)
    if trained and settings.supervised:
        again = functools.partial(_evaluate, settings, program, current=current, teacher=teacher, trust=True)
        line = _calibrate(workdir, settings, step, {split: (summary_of_split, result)}, again, obstacle, known)
        if line and jax.process_index() == 0:
            print(f"no temperature was fitted: {line}", flush=True)
    known.save(enabled=jax.process_index() == 0 and not obstacle)
    return result


def _calibrate(
    workdir: pathlib.Path, settings: Settings, step: int, scored: Mapping[str, tuple], evaluate: Callable,
    obstacle: str | None, checked: Checks,
) -> str | None:  # fmt: skip
    """Keeps the temperature of the best checkpoint on the tiles that chose it, unless it is there; or says why not.

    On other tiles, those it was trained on for example, it would be another one. All processes call this.
    """
    split, data = settings.data.validation, settings.data
    known, asked = records.fingerprint(workdir, "val"), split in scored
    if not asked and has_temperature(workdir, step):
        return None
    if sharding.any_process(obstacle is not None):  # which has been said
        return None
    try:
        if asked:
            summary, found = scored[split]
        else:
            batches, summary, _ = eval_source(data, split, settings.eval_batch_size, checked)
        if known is not None and summary.fingerprint != known:
            return f"the tiles of {split} are not those by which the checkpoint was chosen"
        if not asked:
            found = evaluate(batches=batches)
    except UserError as error:
        return str(error)
    if jax.process_index() == 0:
        write_temperature(workdir, step, split, found.trust)
    return None


def _evaluate(
    settings: Settings, program: Program, batches: Iterable[dict], current: TrainState, teacher: Arrays, trust=False
) -> evaluate.Evaluation:
    params, frozen = current.params if current.ema is None else current.ema, teacher if settings.encodes else None
    if settings.data.eval_scale == "native" or trust:
        return evaluate.evaluate_tiles(program.predictor, batches, params, current.batch_stats, frozen, trust=trust)
    return evaluate.evaluate(
        program.eval_step, params, current.batch_stats, batches, program.mesh,
        num_classes=settings.data.info.num_classes, frozen=frozen,
    )  # fmt: skip


def _append_final(workdir: pathlib.Path, step: int, split: str, summary: Mapping[str, float]) -> None:
    """Adds a row to `metrics.jsonl`, if it is not there. Never rewrites: a training may have the file open."""
    row = {"step": step, "split": split}
    row |= {f"final/{k}": v if np.isfinite(v) else None for k, v in summary.items()}
    path = workdir / "metrics.jsonl"
    if buckets.is_remote(path):
        before = buckets.read_text(path) if path.exists() else ""
        if json.dumps(row) not in before.splitlines():
            buckets.write_text(path, before + json.dumps(row) + "\n")
        return
    with open(path, "a+", encoding="utf-8") as file:
        file.seek(0)
        if json.dumps(row) not in file.read().splitlines():
            file.write(json.dumps(row) + "\n")
