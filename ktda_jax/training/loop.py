"""Training from a config to a workdir: `train_and_evaluate` reads from top to bottom."""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from ktda_jax import UserError, sharding
from ktda_jax.config import checks
from ktda_jax.config import workdir as records
from ktda_jax.config.model import compute_dtype, model_of, teacher_identity
from ktda_jax.config.settings import Settings
from ktda_jax.data import pipeline
from ktda_jax.data.check import check_split
from ktda_jax.data.teacher_features import TeacherFeatures
from ktda_jax.figures import plots
from ktda_jax.models import flat
from ktda_jax.training import evaluate
from ktda_jax.training.checkpoint import Checkpoints
from ktda_jax.training.inputs import eval_source, features_folder, open_features, open_source, processes
from ktda_jax.training.program import Compilation, Program, build
from ktda_jax.training.stop import StopSignal
from ktda_jax.training.writers import Writer


def train_and_evaluate(config, workdir: str | pathlib.Path) -> evaluate.Evaluation | None:
    """Trains, or resumes, then evaluates the best checkpoint; None if a signal stopped it before the end."""
    workdir, settings = pathlib.Path(workdir), checks.resolve(config)
    records.compare(workdir, settings)
    program = build(settings)
    info, mesh = settings.data.info, program.mesh

    compilation = None
    if _latest(workdir) < settings.total_steps:
        compilation = Compilation(program)
    try:
        data = _open_data(settings)
    except BaseException:
        if compilation is not None:
            compilation.give_up()
        raise
    batches, fingerprints, features = data.batches, data.fingerprints, data.features

    first = jax.process_index() == 0
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --workdir={workdir}: {error.strerror}") from error
    writer = Writer(workdir, total_steps=settings.total_steps, enabled=first)
    with Checkpoints(workdir / "checkpoints") as checkpoints, writer, StopSignal() as stop:
        start = checkpoints.latest_step() or 0
        if start:
            records.compare_data(workdir, fingerprints)
        if first:
            records.write(workdir, settings)
            records.write_run(workdir, settings, fingerprints)
        if start:
            current, position = checkpoints.restore(start, program.abstract, program.shardings)
            batches.set_state(position)
        else:
            current = program.init()
        writer.resume(start)
        writer.message(
            f"{flat.count(program.abstract.params) / 1e6:.1f} M parameters to train, {data.tiles} training "
            f"tiles, {mesh.size} {jax.default_backend()} device(s), compute in {compute_dtype(settings.dtype)}"
            + (f", resuming at step {start}" if start else "")
        )
        if features is not None:
            writer.message(f"teacher: features in {features.folder}, made by {features.source or 'a random teacher'}")
        encodes = program.encoder is not None
        computed = encodes or (settings.distill and features is None)
        for part, needed in (("student", settings.weights.model is None and not encodes), ("teacher", computed)):
            if needed and getattr(settings.weights, part) is None and not start:
                writer.message(f"warning: the {part} starts from random weights; set settings.weights.{part}")
        teacher = program.teacher()
        pending, skipped = None, 0

        def report(pending):
            """Fetches a step's metrics, once the next step is on its way; aborts if they are not finite."""
            step, terms, skipped = pending
            terms = {k: float(v) for k, v in jax.device_get(terms).items()}
            terms = {"loss": terms.pop("loss"), **terms}  # first in the file, so first in the figure
            _check_finite(step, terms, checkpoints.latest_step())
            if step % settings.log_every == 0 or step == 1:
                logged = {**terms, "skipped_tiles": skipped} if skipped else terms
                writer.write(step, {f"train/{k}": v for k, v in logged.items()})
            writer.progress(step, {k: terms[k] for k in ("loss", "acc")})

        step = start
        while step < settings.total_steps:
            batch = next(batches)
            skipped += int(batch.pop("skipped", 0))
            batch = sharding.to_global(mesh, {k: batch[k] for k in ("image", "label", "taps") if k in batch})
            if step == start and compilation is not None:
                writer.message("compiling the training step")
                compilation.wait()
            with jax.transfer_guard("disallow"):
                current, terms = program.train_step(current, batch, teacher)
            step += 1
            if pending is not None:
                report(pending)
            pending = (step, terms, skipped)

            last = step == settings.total_steps
            validate = step % settings.eval_every == 0 or last
            save = validate or (settings.checkpoint_every and step % settings.checkpoint_every == 0)
            stopping = stop.agreed(step)
            if validate or save or stopping:
                report(pending)  # a state that is not finite is never saved
                pending, scores = None, None
                writer.pause()
                if validate:
                    params = current.params if current.ema is None else current.ema
                    result = evaluate.evaluate(
                        program.eval_step, params, current.batch_stats, data.val_batches, mesh,
                        num_classes=len(info.classes), frozen=teacher if encodes else None,
                    )  # fmt: skip
                    scores = result.metrics.summary
                    writer.write(step, {f"val/{k}": v for k, v in scores.items()})
                    writer.message(f"step {step}: val mIoU {scores['mIoU']:.2f}, aAcc {scores['aAcc']:.2f}")
                # The score of a set without labelled pixels is NaN, which no comparison can rank.
                if scores is not None and not np.isfinite(scores["mIoU"]):
                    scores = None
                # Evaluate, save, and only then draw the next batch: the position belongs to this step.
                checkpoints.save(step, current, batches.get_state(), scores and {"mIoU": scores["mIoU"]})
            if stopping and not last:
                checkpoints.wait()
                writer.message(f"stopped by a signal at step {step}; run the same command to go on")
                return None
    return evaluate_workdir(config, workdir, program=program)


class _Data(NamedTuple):
    batches: Any  # an iterator over the training batches, with get_state and set_state
    tiles: int  # for training
    val_batches: Any  # to go through from the start each time
    fingerprints: dict[str, str]  # of the splits and of precomputed features
    features: TeacherFeatures | None


def _open_data(settings: Settings) -> _Data:
    """Makes the tiles where they can be made, and checks all of them."""
    data, size = settings.data, settings.eval_batch_size
    source = open_source(data, data.train_split)
    summary = check_split(source, crop=data.crop, on_corrupt=data.on_corrupt, num_threads=data.num_threads)
    val_batches, val_fingerprint = eval_source(data, data.val_split, size)
    fingerprints = {"train": summary.fingerprint, "val": val_fingerprint}
    if data.test_split not in (None, data.val_split):  # what is wrong with it must not wait for the end
        fingerprints["test"] = eval_source(data, data.test_split, size)[1]
    features = None
    if settings.distill and settings.teacher.mode == "precomputed":
        identity = teacher_identity(settings.weights.teacher, settings.seed, model_of(settings))
        folder = features_folder(settings.teacher, data)
        features = open_features(folder, identity, data.train_split, summary.fingerprint)
        fingerprints["teacher features"] = features.fingerprint
    batches = pipeline.train_iterator(
        source, crop=data.crop, batch_size=settings.batch_size, seed=settings.seed, flip=data.flip,
        photometric=data.photometric, on_corrupt=data.on_corrupt, features=features, **processes(data.num_threads),
    )  # fmt: skip
    return _Data(batches, len(source), val_batches, fingerprints, features)


def _latest(workdir: pathlib.Path) -> int:
    """The step of the last checkpoint, by the folders' names; 0 without one."""
    folder = workdir / "checkpoints"
    return max((int(p.name) for p in folder.iterdir() if p.name.isdigit()), default=0) if folder.is_dir() else 0


def evaluate_workdir(config, workdir: str | pathlib.Path, *, program: Program | None = None) -> evaluate.Evaluation:
    """Evaluates the best checkpoint on the test split, or on validation without one; writes the figures."""
    workdir, settings = pathlib.Path(workdir), checks.resolve(config)
    split = settings.data.test_split or settings.data.val_split
    trained = (workdir / "checkpoints").is_dir()
    if trained:
        decides = (
            "model.",
            "data.name",
            "data.classes",
            "data.palette",
            "data.bands",
            "data.rgb",
            "data.scale",
            "data.nodata",
        )
        if settings.encodes:
            decides += ("weights.teacher",)
        records.compare(workdir, settings, only=decides)
    if not trained and settings.weights.model is None:
        raise UserError(
            f"no checkpoints in {workdir}; train first, give --workdir of a trained run, or settings.weights.model"
        )
    program = program or build(settings, teacher=False, initial=not trained)
    batches, _ = eval_source(settings.data, split, settings.eval_batch_size)
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
        table = evaluate.write_report(result, workdir, split, info, settings.data.rgb_positions)
        if (workdir / "metrics.jsonl").exists():
            plots.save_curves(workdir / "figures" / "curves.png", workdir / "metrics.jsonl")
        _append_final(workdir, step, split, result)
        print(f"\n{split} split, step {step}:\n{table}\nfigures in {workdir / 'figures'}", flush=True)
    return result


def _append_final(workdir: pathlib.Path, step: int, split: str, result: evaluate.Evaluation) -> None:
    """Adds a row to `metrics.jsonl`, if it is not there. Never rewrites: a training may have the file open."""
    row = {"step": step, "split": split}
    row |= {f"final/{k}": v if np.isfinite(v) else None for k, v in result.metrics.summary.items()}
    with open(workdir / "metrics.jsonl", "a+", encoding="utf-8") as file:
        file.seek(0)
        if json.dumps(row) not in file.read().splitlines():
            file.write(json.dumps(row) + "\n")


def _check_finite(step: int, terms: dict[str, float], saved: int | None) -> None:
    wrong = [f"{k} is {v}" for k, v in terms.items() if not np.isfinite(v)]
    if wrong:
        where = f"the last checkpoint is step {saved}" if saved else "no checkpoint was written yet"
        raise UserError(
            f"not finite at step {step}: {', '.join(wrong)}; {where}. Lower config.optimizer.lr or set config.clip_norm"
        )
