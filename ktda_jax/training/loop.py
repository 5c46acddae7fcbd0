"""Training from a config to a workdir: `train_and_evaluate` reads from top to bottom."""

import contextlib
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ktda_jax import UserError, sharding
from ktda_jax.config import checks, extension
from ktda_jax.config import workdir as records
from ktda_jax.config.model import compute_dtype, model_of, teacher_identity
from ktda_jax.config.settings import Settings
from ktda_jax.data import pipeline
from ktda_jax.data.check import check_split
from ktda_jax.data.paths import expand
from ktda_jax.data.teacher_features import TeacherFeatures
from ktda_jax.figures import plots
from ktda_jax.models import flat
from ktda_jax.training import evaluate, lock, optim, whole
from ktda_jax.training.checkpoint import Checkpoints
from ktda_jax.training.inputs import (
    doubts,
    eval_source,
    features_folder,
    holds_jpeg,
    may_hide,
    open_features,
    open_source,
    processes,
)
from ktda_jax.training.program import Compilation, Program, build
from ktda_jax.training.state import TrainState
from ktda_jax.training.stop import StopSignal
from ktda_jax.training.writers import Writer


def train_and_evaluate(
    config: Mapping[str, Any], workdir: str | pathlib.Path, *, extend: bool = False, stop: StopSignal | None = None
) -> evaluate.Evaluation | None:
    """Trains, or resumes, then evaluates the best checkpoint; None if a signal (`stop.number`) stopped it before.

    config: a ConfigDict, or nested mappings as config.json has them. UserError says in a line what is wrong.
    extend: goes on although total_steps or batch_size are others than those that the workdir has.
    """
    workdir, settings = expand(workdir), checks.resolve(config)
    alone = contextlib.nullcontext(lambda: None)
    if jax.process_index() == 0:
        claim, remedy = f"workdir {workdir} is being trained", "use another --workdir or stop it"
        alone = lock.hold(workdir, place=f"--workdir={workdir}", claim=claim, remedy=remedy)
    with alone as still_alone, stop or StopSignal() as stop:
        finished, program = _to_the_end(settings, workdir, still_alone, stop, extend)
        return evaluate_workdir(config, workdir, program=program) if finished else None


def _to_the_end(
    settings: Settings, workdir: pathlib.Path, still_alone: Callable[[], None], stop: StopSignal, extend: bool
) -> tuple[bool, Program]:
    """Trains what is left of it; whether that was finished, and what it was made with."""
    if workdir.is_dir():
        _make(workdir)
    whole.check(workdir / "checkpoints")
    changed = records.compare(workdir, settings, extend=extend)
    extended = extension.recorded(workdir, _latest(workdir), changed)
    program = build(settings)
    compilation = Compilation(program) if _latest(workdir) < settings.total_steps else None
    try:
        data = _open_data(settings, extension.first_row(extended))
        _make(workdir)
        writer = Writer(workdir, total_steps=settings.total_steps, enabled=jax.process_index() == 0)
        still_alone()
        checkpoints = Checkpoints(workdir / "checkpoints", keep=settings.keep_checkpoints)
        with checkpoints, writer:
            start, current = _begin(workdir, settings, program, data, checkpoints, extended)
            writer.resume(start)
            _tell(writer, settings, program, data, start)
            if changed:
                writer.message(_extension(settings, start, changed))
            parts = program, data, start, current, compilation, checkpoints, writer
            finished = _train(settings, *parts, stop, still_alone)
        if finished:
            stop.end()
    except BaseException:
        if compilation is not None:
            compilation.give_up()
        raise
    return finished, program


def _make(workdir: pathlib.Path) -> None:
    """The workdir, and whether its files can be written: now, since the first one is after the first steps."""
    folder = workdir
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for folder in (workdir, workdir / "checkpoints"):
                if folder.exists():
                    with tempfile.TemporaryFile(dir=folder):
                        pass
    except OSError as error:
        where = "" if folder == workdir else f"/{folder.name}"
        raise UserError(f"cannot write to --workdir={workdir}{where}: {error.strerror}") from error


def _begin(
    workdir: pathlib.Path, settings: Settings, program: Program, data: "_Data", checkpoints: Checkpoints, extended: list
) -> tuple[int, TrainState]:
    """The step and state to go on from, and the workdir's record of the training."""
    start = checkpoints.latest_step() or 0
    if start:
        if doubt := records.compare_data(workdir, data.fingerprints, jpeg=data.jpeg, may_hide=data.may_hide):
            data.doubtful.append(doubt)
    if jax.process_index() == 0:
        records.write_run(workdir, settings, data.fingerprints, extended)  # first: a kill between them loses nothing
        records.write(workdir, settings)
    if not start:
        return 0, program.init()
    current, position = checkpoints.restore(start, program.abstract, program.shardings)
    data.batches.set_state(position)
    return start, current


def _tell(writer: Writer, settings: Settings, program: Program, data: "_Data", start: int) -> None:
    """What will be trained, where, and from what."""
    writer.message(
        f"{flat.count(program.abstract.params) / 1e6:.1f} M parameters to train, {data.tiles} training tiles, "
        f"{program.mesh.size} {jax.default_backend()} device(s), compute in {compute_dtype(settings.dtype)}"
        + (f", resuming at step {start}" if start else "")
    )
    weights, features = settings.weights, data.features
    if features is not None:
        writer.message(f"teacher: features in {features.folder}, made by {features.source or 'a random teacher'}")
    for line in data.doubtful:
        writer.message(f"warning: {line}")
    if start:
        return
    if weights.student is None and weights.model is None and not settings.encodes:
        writer.message("warning: the student starts from random weights; set config.weights.student")
    if weights.teacher is None and (settings.encodes or (settings.distill and features is None)):
        writer.message("warning: the teacher starts from random weights; set config.weights.teacher")


def _extension(settings: Settings, start: int, changed: extension.Changes) -> str:
    """What --extend means for the learning rate and the order of the tiles."""
    lines = [f"extended at step {start}: " + ", ".join(f"{key} {old} -> {new}" for key, (old, new) in changed.items())]
    if "total_steps" in changed:
        options, totals = dataclasses.asdict(settings.schedule), changed["total_steps"]
        before, now = (float(optim.warmup_poly(settings.optimizer.lr, total, **options)(start)) for total in totals)
        lines.append(
            f"the learning rate now falls to 0 at step {totals[1]} instead of {totals[0]}: "
            f"for step {start + 1} it is {now:.3g} where it was {before:.3g}"
        )
    else:
        lines.append("the learning rate stays that of the step")
    if "batch_size" in changed:
        lines.append("the tiles go on in their order after the last one seen")
    return "; ".join(lines)


def _train(
    settings, program, data, start, current, compilation, checkpoints, writer, stop, still_alone
) -> bool:  # fmt: skip
    """The steps from `start` to the last; False if a signal stopped them before."""
    teacher, losses, skipped = program.teacher(), _Losses(settings.log_every, writer, checkpoints), 0
    for step in range(start + 1, settings.total_steps + 1):
        batch = next(data.batches)
        skipped += int(batch.pop("skipped", 0))
        batch = sharding.to_global(program.mesh, {k: batch[k] for k in ("image", "label", "taps") if k in batch})
        if step == start + 1 and compilation is not None:
            writer.message("compiling the training step")
            compilation.wait()
        if step == start + 1:
            if stop.agreed(start, now=True):
                writer.message("stopped by a signal before the first step; run the same command to go on")
                return False
            stop.begin()
        with jax.transfer_guard("disallow"):
            current, terms = program.train_step(current, batch, teacher)
        losses.push(step, terms, skipped)
        checkpoints.look()

        last = step == settings.total_steps
        validate = step % settings.eval_every == 0 or last
        save = validate or (settings.checkpoint_every and step % settings.checkpoint_every == 0)
        stopping = stop.agreed(step, now=last)
        if validate or save or stopping:
            losses.flush()  # a state that is not finite is never saved
            writer.pause()
            score = _validate(step, settings, program, data, current, teacher, writer) if validate else None
            still_alone()
            # Evaluate, save, and only then draw the next batch: the position belongs to this step.
            checkpoints.save(step, current, data.batches.get_state(), None if score is None else {"mIoU": score})
        if stopping:
            checkpoints.wait()
            writer.message(f"stopped by a signal at step {step}; run the same command to go on")
            return False
    return True


class _Losses:
    """A step's losses, fetched once the next step is on its way."""

    def __init__(self, log_every: int, writer: Writer, checkpoints: Checkpoints):
        self._log_every, self._writer, self._checkpoints, self._pending = log_every, writer, checkpoints, None

    def push(self, step: int, terms: dict[str, jax.Array], skipped: int) -> None:
        self.flush()
        self._pending = step, terms, skipped

    def flush(self) -> None:
        """UserError if they are not finite."""
        if self._pending is None:
            return
        (step, terms, skipped), self._pending = self._pending, None
        terms = {k: float(v) for k, v in jax.device_get(terms).items()}
        terms = {"loss": terms.pop("loss"), **terms}  # first in the file, so first in the figure
        _check_finite(step, terms, self._checkpoints.latest_step())
        if step % self._log_every == 0 or step == 1:
            logged = {**terms, "skipped_tiles": skipped} if skipped else terms
            self._writer.write(step, {f"train/{k}": v for k, v in logged.items()})
        self._writer.progress(step, {k: terms[k] for k in ("loss", "acc")})


def _validate(step, settings, program, data, current, teacher, writer) -> float | None:
    """The validation mIoU; None where no pixel is labelled: NaN cannot be ranked."""
    result = evaluate.evaluate(
        program.eval_step, current.params if current.ema is None else current.ema, current.batch_stats,
        data.val_batches, program.mesh, num_classes=settings.data.info.num_classes,
        frozen=teacher if settings.encodes else None,
    )  # fmt: skip
    scores = result.metrics.summary
    writer.write(step, {f"val/{k}": v for k, v in scores.items()})
    writer.message(f"step {step}: val mIoU {scores['mIoU']:.2f}, aAcc {scores['aAcc']:.2f}")
    return scores["mIoU"] if np.isfinite(scores["mIoU"]) else None


class _Data(NamedTuple):
    batches: Any  # an iterator over the training batches, with get_state and set_state
    tiles: int  # for training
    val_batches: Any  # to go through from the start each time
    fingerprints: dict[str, str]  # of the splits and of precomputed features
    features: TeacherFeatures | None
    doubtful: list[str]  # what may be wrong with the tiles
    jpeg: bool  # whether they are JPEGs
    may_hide: Callable[[], bool]  # see inputs.py


def _open_data(settings: Settings, first_row: int = 0) -> _Data:
    """Makes the tiles where they can be made, and checks all of them. `first_row`: see pipeline.train_iterator."""
    data, size = settings.data, settings.eval_batch_size
    source = open_source(data, data.train_split)
    summary = check_split(source, crop=data.crop, on_corrupt=data.on_corrupt, num_threads=data.num_threads)
    doubtful = doubts(data, source, data.train_split, summary)
    val_batches, val, found = eval_source(data, data.val_split, size)
    fingerprints, doubtful = {"train": summary.fingerprint, "val": val.fingerprint}, doubtful + found
    if data.test_split not in (None, data.val_split):  # what is wrong with it must not wait for the end
        _, test, found = eval_source(data, data.test_split, size)
        fingerprints["test"], doubtful = test.fingerprint, doubtful + found
    features = None
    if settings.distill and settings.teacher.mode == "precomputed":
        identity = teacher_identity(settings.weights.teacher, settings.seed, model_of(settings))
        folder = features_folder(settings.teacher, data)
        features = open_features(folder, identity, data.train_split, summary.fingerprint)
        fingerprints["teacher features"] = features.fingerprint
    batches = pipeline.train_iterator(
        source, crop=data.crop, batch_size=settings.batch_size, seed=settings.seed, flip=data.flip,
        photometric=data.photometric, on_corrupt=data.on_corrupt, features=features, first_row=first_row,
        **processes(data.num_threads),
    )  # fmt: skip
    return _Data(
        batches, len(source), val_batches, fingerprints, features, list(dict.fromkeys(doubtful)), holds_jpeg(source),
        functools.partial(may_hide, source),
    )  # fmt: skip


def _latest(workdir: pathlib.Path) -> int:
    """The step of the last checkpoint, by the folders' names; 0 without one."""
    return max(records.steps(workdir), default=0)


def evaluate_workdir(
    config: Mapping[str, Any], workdir: str | pathlib.Path, *, program: Program | None = None
) -> evaluate.Evaluation:
    """Evaluates the best checkpoint on the test split, or on validation without one; writes the figures, if it may."""
    workdir, settings = expand(workdir), checks.resolve(config)
    split = settings.data.test_split or settings.data.val_split
    trained = (workdir / "checkpoints").is_dir()
    if trained:
        whole.check(workdir / "checkpoints", latest=False)
        decides = ("model.", *(f"data.{key}" for key in "name classes palette bands rgb scale nodata".split()))
        if settings.encodes:
            decides += ("weights.teacher",)
        records.compare(workdir, settings, only=decides)
    if not trained and settings.weights.model is None:
        raise UserError(
            f"no checkpoints in {workdir}; train first, give --workdir of a trained run, or config.weights.model"
        )
    said = program is not None  # training has warned already
    program = program or build(settings, teacher=False, initial=not trained)
    batches, _, doubtful = eval_source(settings.data, split, settings.eval_batch_size)
    obstacle = None if said or jax.process_index() else records.obstacle(workdir)
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
    info = settings.data.info
    params = current.params if current.ema is None else current.ema
    result = evaluate.evaluate(
        program.eval_step, params, current.batch_stats, batches, program.mesh, num_classes=len(info.classes),
        frozen=None if program.encoder is None else program.teacher(),
    )  # fmt: skip
    if jax.process_index() == 0:
        print(f"\n{split} split, step {step}:\n{evaluate.table(result, info.classes)}", flush=True)
    if jax.process_index() == 0 and not obstacle:
        with records.writing(workdir / "figures"):
            evaluate.write_report(result, workdir, split, info, settings.data.rgb_positions)
            if (workdir / "metrics.jsonl").exists():
                plots.save_curves(workdir / "figures" / "curves.png", workdir / "metrics.jsonl")
        with records.writing(workdir / "metrics.jsonl"):
            evaluate.append_final(workdir, step, split, result)
        print(f"figures in {workdir / 'figures'}", flush=True)
    return result


def _check_finite(step: int, terms: dict[str, float], saved: int | None) -> None:
    wrong = [f"{k} is {v}" for k, v in terms.items() if not np.isfinite(v)]
    if wrong:
        where = f"the last checkpoint is step {saved}" if saved else "no checkpoint was written yet"
        raise UserError(
            f"not finite at step {step}: {', '.join(wrong)}; {where}. Lower config.optimizer.lr or set config.clip_norm"
        )
