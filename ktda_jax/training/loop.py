"""Training from a config to a workdir: `train_and_evaluate` reads from top to bottom."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax

from ktda_jax import UserError, sharding
from ktda_jax.config import checks, extension, foreign
from ktda_jax.config import workdir as records
from ktda_jax.config.model import compute_dtype
from ktda_jax.config.settings import Settings
from ktda_jax.data import buckets, tfds_source
from ktda_jax.data.paths import place
from ktda_jax.data.remembered import Checks
from ktda_jax.models import flat
from ktda_jax.training import lock, optim, tap_statistics, whole
from ktda_jax.training.checkpoint import Checkpoints
from ktda_jax.training.inputs import Inputs, checks_of, open_inputs
from ktda_jax.training.profile import Profile
from ktda_jax.training.program import Compilation, Program, build
from ktda_jax.training.reported import Losses
from ktda_jax.training.scoring import Scored, evaluate_workdir, validate
from ktda_jax.training.state import TrainState
from ktda_jax.training.stop import Patience, StopSignal
from ktda_jax.training.trackers import Tracker
from ktda_jax.training.writers import Writer


def train_and_evaluate(
    config: Mapping[str, Any], workdir: str | pathlib.Path, *, extend: bool = False, stop: StopSignal | None = None,
    profile: tuple[int, int] | None = None,
) -> Scored | None:  # fmt: skip
    """Trains, or resumes, then evaluates the best checkpoint; None if a signal (`stop.number`) stopped it before.

    config: a ConfigDict, or nested mappings as config.json has them. UserError says in a line what is wrong.
    extend: goes on although total_steps or batch_size are others than those that the workdir has.
    profile: first and last of the steps whose trace is left in WORKDIR/profile, by process 0.
    """
    workdir = place(workdir)
    settings = foreign.as_begun(workdir, checks.resolve(config))
    alone = contextlib.nullcontext(lambda: None)
    if jax.process_index() == 0:
        claim, remedy = f"workdir {workdir} is being trained", "use another --workdir or stop it"
        alone = lock.hold(workdir, place=f"--workdir={workdir}", claim=claim, remedy=remedy)
    with alone as still_alone, stop or StopSignal() as stop:
        settings, newer = records.as_begun(workdir, settings)
        known = checks_of(workdir)
        with Tracker(settings, workdir, enabled=jax.process_index() == 0) as tracker:
            options = extend, profile, known, tracker
            finished, program = _to_the_end(settings, newer, workdir, still_alone, stop, *options)
            if not finished:
                return None
            return evaluate_workdir(settings, workdir, program=program, known=known, tracker=tracker)


def _to_the_end(
    settings: Settings,
    newer: list[str],
    workdir: pathlib.Path,
    still_alone: Callable[[], None],
    stop: StopSignal,
    extend: bool,
    profile: tuple[int, int] | None,
    known: Checks,
    tracker: Tracker,
) -> tuple[bool, Program]:
    """Trains what is left of it; whether that was finished, and what it was made with."""
    if workdir.is_dir():
        _make(workdir)
    whole.check(workdir / "checkpoints")
    changed = records.compare(workdir, settings, extend=extend)
    extended = extension.recorded(workdir, _latest(workdir), changed)
    tracked = tracker.begin(_latest(workdir))
    program = build(settings)
    patience = Patience.of(settings, workdir)
    ahead = _latest(workdir) < settings.total_steps and not patience.exhausted()
    if settings.data.source != "folder":
        tfds_source.imported()  # not while another thread traces the step
    compilation = Compilation(program) if ahead else None
    try:
        data = open_inputs(settings, program.mixture, extension.first_row(extended), known)
        _make(workdir)
        first = jax.process_index() == 0
        known.save(enabled=first)
        writer = Writer(workdir, total_steps=settings.total_steps, enabled=first, tracker=tracker)
        still_alone()
        checkpoints = Checkpoints(workdir / "checkpoints", keep=settings.keep_checkpoints)
        traced = Profile(profile, workdir / "profile", writer.message, enabled=first)
        with checkpoints, writer, traced:
            start, current = _begin(workdir, settings, newer, program, data, checkpoints, extended, writer)
            writer.resume(start)
            _tell(writer, settings, program, data, start)
            if tracked:
                writer.message(tracked)
            if newer:
                values = ", ".join(f"config.{key}={getattr(settings.data, key.removeprefix('data.'))}" for key in newer)
                writer.message(f"this training is older than some settings and goes on as it was begun: {values}")
            if changed:
                writer.message(_extension(settings, start, changed))
            traced.resume(start)
            parts = program, data, start, current, compilation, checkpoints, writer, traced
            finished = _train(settings, *parts, stop, patience, still_alone)
        if finished:
            stop.end()
    except BaseException:
        if compilation is not None:
            compilation.give_up()
        raise
    return finished, program


def _make(workdir: pathlib.Path) -> None:
    """The workdir, and whether its files can be written: now, since the first one is after the first steps."""
    if buckets.is_remote(workdir):  # where there are no folders, and the lock has been written
        return
    folder = workdir
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for folder in (workdir, workdir / "checkpoints"):
                if folder.exists():
                    buckets.probe(folder)
    except OSError as error:
        where = "" if folder == workdir else f"/{folder.name}"
        raise UserError(f"cannot write to --workdir={workdir}{where}: {error.strerror}") from error


def _begin(
    workdir: pathlib.Path,
    settings: Settings,
    newer: list[str],
    program: Program,
    data: Inputs,
    checkpoints: Checkpoints,
    extended: list,
    writer: Writer,
) -> tuple[int, TrainState]:
    """The step and state to go on from, and the workdir's record of the training."""
    start = checkpoints.latest_step() or 0
    if start:
        if doubt := records.compare_data(workdir, data.fingerprints, jpeg=data.jpeg, may_hide=data.may_hide):
            data.doubtful.append(doubt)
    if jax.process_index() == 0:
        # First: a kill between them loses nothing.
        records.write_run(workdir, settings, data.fingerprints, extended, data.counts)
        records.write(workdir, settings, without=newer)
    if not start:
        return 0, _initial(settings, program, data, writer)
    current, position = checkpoints.restore(start, program.abstract, program.shardings)
    data.batches.set_state(position)
    return start, current


def _initial(settings: Settings, program: Program, data: Inputs, writer: Writer) -> TrainState:
    """Before the first step; with the taps' statistics, unless they came with the weights or no teacher is asked."""
    current, needed = program.init(), settings.model.standardize_taps and (settings.distill or settings.encodes)
    if needed and tap_statistics.MEAN not in program.loaded:
        writer.message(f"measuring the teacher's taps on {tap_statistics.IMAGES} images")
        return tap_statistics.with_statistics(current, program, settings, data.batches)
    return current


def _tell(writer: Writer, settings: Settings, program: Program, data: Inputs, start: int) -> None:
    """What will be trained, where, and from what."""
    stay = {k: v for k, v in program.abstract.params.items() if optim.of_student(k)}
    count, kept = (flat.count(x) for x in (program.abstract.params, stay))
    parameters = f"{count / 1e6:.1f} M parameters to train"
    if settings.optimizer.student_lr_mult == 0:
        parameters = f"{count - kept:,} parameters to train, {kept / 1e6:.1f} M that stay"
    writer.message(
        f"{parameters}, {data.what}, "
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
    for line in program.notes:
        writer.message(line)
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
    settings, program, data, start, current, compilation, checkpoints, writer, profile, stop, patience, still_alone
) -> bool:  # fmt: skip
    """The steps from `start` to the last; False if a signal stopped them before."""
    teacher, skipped = program.teacher(), 0
    losses = Losses(settings.log_every, settings.batch_size, writer, checkpoints.latest_step)
    needed = ("image", "label", "taps") if settings.supervised else ("image", "taps")
    for step in range(start + 1, settings.total_steps + 1):
        if patience.exhausted():
            writer.message(f"stopped early at step {step - 1}: no better score in config.patience={settings.patience}")
            break
        with losses.pace.waiting():  # while the steps before run
            batch = next(data.batches)
            skipped += int(batch.pop("skipped", 0))
            batch = sharding.to_global(program.mesh, {k: batch[k] for k in needed if k in batch})
        if step == start + 1 and compilation is not None:
            writer.message("compiling the training step")
            compilation.wait()
        if step == start + 1:
            if stop.agreed(start, now=True):
                writer.message("stopped by a signal before the first step; run the same command to go on")
                return False
            stop.begin()
        if profile.begins(step):
            losses.flush()
            with losses.pace.paused():
                profile.begin()
        with jax.transfer_guard("disallow"):
            current, terms = program.train_step(current, batch, teacher)
        losses.push(step, terms, skipped)
        if profile.ends(step):
            losses.flush()
            with losses.pace.paused():
                profile.end()
        checkpoints.look()

        last = step == settings.total_steps
        scored = step % settings.eval_every == 0 or last
        save = scored or (settings.checkpoint_every and step % settings.checkpoint_every == 0)
        stopping = stop.agreed(step, now=last)
        if scored or save or stopping:
            losses.flush()  # a state that is not finite is never saved
            writer.pause()
            with losses.pace.paused():
                score = validate(step, settings, program, data, current, teacher, writer) if scored else None
                patience.add(step, score)
                still_alone()
                writer.upload()  # before a checkpoint that stands for these rows
                # Evaluate, save, and only then draw the next batch: the position belongs to this step.
                checkpoints.save(step, current, data.batches.get_state(), score)
        if stopping:
            checkpoints.wait()
            writer.message(f"stopped by a signal at step {step}; run the same command to go on")
            return False
    return True


def _latest(workdir: pathlib.Path) -> int:
    """The step of the last checkpoint, by the folders' names; 0 without one."""
    return max(records.steps(workdir), default=0)
