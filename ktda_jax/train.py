"""Training from a config to a workdir: `train_and_evaluate` reads from top to bottom."""

import dataclasses
import functools
import json
import pathlib
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ktda_jax import config as configs
from ktda_jax import evaluate, figures, losses, optim, sharding, state, weights
from ktda_jax.checkpoint import Checkpoints
from ktda_jax.config import ConfigError
from ktda_jax.data import pipeline
from ktda_jax.data.sources import FolderSource, check_split
from ktda_jax.models.ktda import KTDA, KTDAConfig
from ktda_jax.models.vit import ViT
from ktda_jax.state import TrainState
from ktda_jax.writers import Writer


class TrainingError(RuntimeError):
    """Training that cannot go on; shown as one line."""


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled-once parts of a run: structure, optimiser, steps, placements."""

    mesh: Mesh
    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    schedule: Callable
    teacher: tuple[nnx.GraphDef | None, state.Arrays]
    abstract: TrainState
    shardings: TrainState
    init: Callable[[], TrainState]
    train_step: Callable
    eval_step: Callable


def train_step(
    current: TrainState, batch: dict, teacher: state.Arrays, *, config, graphdef, teacher_graphdef, optimizer, mesh
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step. batch: `image` (B, H, W, 3), `label` (B, H, W), optionally `teacher` features."""
    key = jax.random.fold_in(jax.random.key(config.seed), current.step)

    def loss_fn(params, stats, rows, key):
        model = state.merge(graphdef, params, stats)
        frozen = None if teacher_graphdef is None else state.merge(teacher_graphdef, teacher, {})
        outputs = model(rows["image"], train=True, key=key, teacher=frozen)
        loss, terms = losses.total_loss(outputs, rows["label"], config.loss)
        return loss, (terms, state.batch_stats(model))

    grad_fn = jax.grad(loss_fn, has_aux=True)
    if config.grad_accum == 1:
        grads, (terms, stats) = grad_fn(current.params, current.batch_stats, batch, key)
    else:
        micro = functools.partial(_micro_batches, count=config.grad_accum, mesh=mesh)

        def accumulate(carry, rows):
            total, stats, index = carry
            grads, (terms, stats) = grad_fn(current.params, stats, rows, jax.random.fold_in(key, index))
            return (jax.tree.map(jnp.add, total, grads), stats, index + 1), terms

        zeros = jax.tree.map(jnp.zeros_like, current.params)
        carry = (zeros, current.batch_stats, jnp.zeros((), jnp.int32))
        (grads, stats, _), terms = jax.lax.scan(accumulate, carry, jax.tree.map(micro, batch))
        grads = jax.tree.map(lambda g: g / config.grad_accum, grads)
        terms = jax.tree.map(lambda t: t.mean(0), terms)

    updates, opt_state = optimizer.update(grads, current.opt_state, current.params)
    params = optax.apply_updates(current.params, updates)
    ema = current.ema
    if ema is not None:
        ema = jax.tree.map(lambda e, p: config.ema * e + (1 - config.ema) * p, ema, params)
    terms["grad_norm"] = optax.global_norm(grads)
    return TrainState(current.step + 1, params, stats, opt_state, ema), terms


def _micro_batches(x: jax.Array, *, count: int, mesh: Mesh) -> jax.Array:
    """(B, ...) -> (count, B / count, ...) without moving rows between devices."""
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, sharding.BATCH)))


def build(config) -> Program:
    """Checks the model settings, loads weights, and jits the steps; compiles nothing yet."""
    dtype = configs.compute_dtype(config)
    param_dtype = jnp.promote_types(dtype, jnp.float32)
    info = configs.classes_of(config)
    try:
        mesh = sharding.make_mesh(**config.mesh)
        sharding.check_batch_size(mesh, config.batch_size, "config.batch_size", config.grad_accum)
        sharding.check_batch_size(mesh, config.eval_batch_size, "config.eval_batch_size")
        model_config = KTDAConfig.from_dict({**config.model, "num_classes": len(info.classes)})
        _check_grid(config, model_config)
        schedule = optim.warmup_poly(config.optimizer.lr, config.total_steps, **config.schedule)
        options = {k: v for k, v in config.optimizer.items() if k != "lr"}
        optimizer = optim.adamw(schedule, clip_norm=config.clip_norm, **options)
        common = dict(dtype=dtype, param_dtype=param_dtype)
        graphdef, params, _ = state.abstract(lambda: KTDA(model_config, **common, rngs=nnx.Rngs(0)))
        student = {k.removeprefix("student/"): v for k, v in params.items() if k.startswith("student/")}
        loaded = {}
        if config.weights.student is not None:
            tensors = weights.load(config.weights.student, student, "student")
            loaded = {f"student/{k}": v for k, v in tensors.items()}
        teacher_graphdef, teacher = None, {}
        if config.distill:
            teacher_graphdef, teacher = _teacher(config, model_config, common, mesh)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not loaded:
        logging.warning("the student starts from random weights; set config.weights.student to start from others")

    def init(loaded) -> TrainState:
        rngs = nnx.Rngs(params=jax.random.key(config.seed))
        _, params, stats = state.split(KTDA(model_config, **common, rngs=rngs))
        params |= loaded
        ema = None if config.ema is None else params
        return TrainState(state.step_zero(), params, stats, optimizer.init(params), ema)

    abstract = jax.eval_shape(init, loaded)
    shardings = sharding.tree_shardings(mesh, abstract)
    step = functools.partial(
        train_step, config=config, graphdef=graphdef, teacher_graphdef=teacher_graphdef, optimizer=optimizer,
        mesh=mesh,
    )  # fmt: skip
    return Program(
        mesh=mesh,
        graphdef=graphdef,
        optimizer=optimizer,
        schedule=schedule,
        teacher=(teacher_graphdef, teacher),
        abstract=abstract,
        shardings=shardings,
        init=lambda: jax.jit(init, out_shardings=shardings)(loaded),
        train_step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh))),
        eval_step=evaluate.make_eval_step(graphdef, len(info.classes), mesh),
    )


def _check_grid(config, model: KTDAConfig) -> None:
    """The FAM's output must have the teacher's grid to be compared with it."""
    teacher_grid = model.teacher.grid_of(*config.data.crop)
    if config.distill and model.grid is not None and model.grid != teacher_grid:
        raise ValueError(
            f"config.model.grid is {model.grid}, but the teacher sees a {config.data.crop[0]}x"
            f"{config.data.crop[1]} crop as {teacher_grid[0]}x{teacher_grid[1]} patches; set it to "
            f"{teacher_grid}, or to None"
        )
    if model.fmm is not None and model.fmm.form == "transformer":
        widths = (model.teacher.width,) if model.fam else model.student.channels
        for width in widths:
            if width % model.fmm.heads:
                raise ValueError(f"config.model.fmm.heads is {model.fmm.heads}, which does not divide {width}")
    if model.teacher.width % model.teacher.heads:
        raise ValueError(
            f"config.model.teacher.heads is {model.teacher.heads}, which does not divide {model.teacher.width}"
        )


def _teacher(config, model: KTDAConfig, common: dict, mesh: Mesh) -> tuple[nnx.GraphDef, state.Arrays]:
    """The frozen teacher: its structure, and its arrays on the mesh."""
    graphdef, expected, _ = state.abstract(lambda: ViT(model.teacher, **common, rngs=nnx.Rngs(0)))
    shardings = sharding.tree_shardings(mesh, expected)
    if config.weights.teacher is not None:
        return graphdef, sharding.place(weights.load(config.weights.teacher, expected, "teacher"), shardings)
    logging.warning(
        "the teacher has random weights, so distillation teaches little; set config.weights.teacher "
        "to pretrained DINOv2 weights"
    )
    key = jax.random.fold_in(jax.random.key(config.seed), 2**31 - 1)
    init = lambda: state.split(ViT(model.teacher, **common, rngs=nnx.Rngs(params=key)))[1]  # noqa: E731
    return graphdef, jax.jit(init, out_shardings=shardings)()


def open_source(config, split: str):
    """The tiles of a split, from TFDS array_records or from a folder in the published layout."""
    data, num_classes = config.data, len(configs.classes_of(config).classes)
    if data.source == "folder":
        if data.root is None:
            raise ConfigError("config.data.root is not set; give the folder that holds img_dir/ and ann_dir/")
        return FolderSource(data.root, split, num_classes=num_classes)
    from ktda_jax.data import tfds_source

    if jax.process_index() == 0:
        tfds_source.prepare(data.name, data.root, data.manual_dir)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("data set prepared")
    return tfds_source.TfdsSource(data.name, split, data_dir=data.root, num_classes=num_classes)


def eval_source(config, split: str):
    """Batches of a split for evaluation, and the checked split's fingerprint."""
    source = open_source(config, split)
    summary = check_split(source, num_threads=config.data.num_threads)
    batches = pipeline.eval_batches(
        source, crop=tuple(config.data.crop), batch_size=config.eval_batch_size, **_processes(config)
    )
    return batches, summary.fingerprint


def _processes(config) -> dict[str, Any]:
    return dict(
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.num_threads,
    )


def train_and_evaluate(config, workdir: str | pathlib.Path) -> evaluate.Evaluation | None:
    """Trains, or resumes, then evaluates the best checkpoint; None if a signal stopped it before the end."""
    workdir = pathlib.Path(workdir)
    configs.check(config)
    program = build(config)
    info, mesh, crop = configs.classes_of(config), program.mesh, tuple(config.data.crop)

    train_source = open_source(config, config.data.train_split)
    summary = check_split(
        train_source, crop=crop, on_corrupt=config.data.on_corrupt, num_threads=config.data.num_threads
    )
    val_batches, val_fingerprint = eval_source(config, config.data.val_split)
    batches = pipeline.train_iterator(
        train_source, crop=crop, batch_size=config.batch_size, seed=config.seed, flip=config.data.flip,
        photometric=config.data.photometric, on_corrupt=config.data.on_corrupt, **_processes(config),
    )  # fmt: skip

    first = jax.process_index() == 0
    workdir.mkdir(parents=True, exist_ok=True)
    configs.write_or_compare(workdir, config)
    if first:
        _write_run(workdir, config, {"train": summary.fingerprint, "val": val_fingerprint})

    checkpoints = Checkpoints(workdir / "checkpoints")
    start = checkpoints.latest_step() or 0
    if start:
        current, position = _restore(checkpoints, start, program)
        batches.set_state(position)
    else:
        current = program.init()
    writer = Writer(workdir, total_steps=config.total_steps, enabled=first)
    with writer, _StopSignal() as stop:
        writer.resume(start)
        writer.message(
            f"{state.count(program.abstract.params) / 1e6:.1f} M parameters to train, {len(train_source)} training "
            f"tiles, {mesh.size} {jax.default_backend()} device(s), compute in {configs.compute_dtype(config)}"
            + (f", resuming at step {start}" if start else "")
        )
        pending, skipped = None, 0

        def report(pending, force=False):
            """Fetches a step's metrics, once the next step is on its way; aborts if they are not finite."""
            step, terms, skipped = pending
            terms = {k: float(v) for k, v in jax.device_get(terms).items()}
            _check_finite(step, terms, checkpoints.latest_step())
            if step % config.log_every == 0 or step == start + 1 or force:
                terms = {f"train/{k}": v for k, v in terms.items()}
                terms["train/lr"] = float(program.schedule(step - 1))
                if skipped:
                    terms["train/skipped_tiles"] = skipped
                writer.write(step, terms)
            shown = {k: terms[k] for k in terms if k.rpartition("/")[2] in ("loss", "acc")}
            writer.progress(step, shown)

        step = start
        while step < config.total_steps:
            batch = next(batches)
            skipped += int(batch.pop("skipped", 0))
            batch = sharding.to_global(mesh, {k: batch[k] for k in ("image", "label")})
            with jax.transfer_guard("disallow"):
                current, terms = program.train_step(current, batch, program.teacher[1])
            step += 1
            if pending is not None:
                report(pending)
            pending = (step, terms, skipped)

            last = step == config.total_steps
            validate = step % config.eval_every == 0 or last
            save = validate or (config.checkpoint_every and step % config.checkpoint_every == 0)
            stopping = stop.agreed(step)
            if validate or save or stopping:
                report(pending)  # a state that is not finite is never saved
                pending, scores = None, None
                writer.pause()
                if validate:
                    params = current.params if current.ema is None else current.ema
                    result = evaluate.evaluate(
                        program.eval_step, params, current.batch_stats, val_batches, mesh,
                        num_classes=len(info.classes),
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
                checkpoints.close()
                writer.message(f"stopped by a signal at step {step}; run the same command to go on")
                return None
    checkpoints.close()
    return evaluate_workdir(config, workdir, program=program)


def evaluate_workdir(config, workdir: str | pathlib.Path, *, program: Program | None = None) -> evaluate.Evaluation:
    """Evaluates the best checkpoint on the test split, or on validation without one; writes the figures."""
    workdir = pathlib.Path(workdir)
    configs.check(config)
    split = config.data.test_split or config.data.val_split
    if not (workdir / "checkpoints").is_dir():
        raise ConfigError(f"no checkpoints in {workdir}; train first, or give --workdir of a trained run")
    program = program or build(config)
    batches, _ = eval_source(config, split)
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    step = checkpoints.best_step()
    if step is None:
        raise ConfigError(f"no checkpoint in {workdir / 'checkpoints'}; train first")
    current, _ = _restore(checkpoints, step, program)
    checkpoints.close()
    info = configs.classes_of(config)
    params = current.params if current.ema is None else current.ema
    result = evaluate.evaluate(
        program.eval_step, params, current.batch_stats, batches, program.mesh, num_classes=len(info.classes)
    )
    if jax.process_index() == 0:
        table = evaluate.write_report(result, workdir, split, info)
        if (workdir / "metrics.jsonl").exists():
            figures.save_curves(workdir / "figures" / "curves.png", workdir / "metrics.jsonl")
        _append_final(workdir, step, split, result)
        print(f"\n{split} split, step {step}:\n{table}\nfigures in {workdir / 'figures'}", flush=True)
    return result


def _append_final(workdir: pathlib.Path, step: int, split: str, result: evaluate.Evaluation) -> None:
    """One `metrics.jsonl` row per (step, split): evaluating again replaces it."""
    path, scores = workdir / "metrics.jsonl", result.metrics.summary
    row = {"step": step, "split": split}
    row |= {f"final/{k}": v if np.isfinite(v) else None for k, v in scores.items()}
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [x for x in lines if not ("final/mIoU" in x and json.loads(x).get("split") == split)]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("\n".join([*kept, json.dumps(row)]) + "\n")
    temporary.replace(path)


def _restore(checkpoints: Checkpoints, step: int, program: Program) -> tuple[TrainState, dict]:
    try:
        return checkpoints.restore(step, program.abstract, program.shardings)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _check_finite(step: int, terms: dict[str, float], saved: int | None) -> None:
    wrong = [f"{k} is {v}" for k, v in terms.items() if not np.isfinite(v)]
    if wrong:
        where = f"the last checkpoint is step {saved}" if saved else "no checkpoint was written yet"
        raise TrainingError(
            f"not finite at step {step}: {', '.join(wrong)}; {where}. Lower config.optimizer.lr or set "
            "config.clip_norm"
        )


def _write_run(workdir: pathlib.Path, config, fingerprints: dict[str, str]) -> None:
    """What a later reader needs to know about how the numbers came about."""
    import importlib.metadata as metadata

    packages = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "ktda-jax")
    versions = {}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    configs.write_json(
        workdir / "run.json",
        {
            "versions": versions,
            "python": sys.version.split()[0],
            "devices": [str(d) for d in jax.devices()],
            "processes": jax.process_count(),
            "seed": config.seed,
            "weights": dict(config.weights),
            "data": fingerprints,
        },
    )


class _StopSignal:
    """Notes SIGTERM and SIGINT; `agreed` is true in every process at the same step."""

    EVERY = 10  # steps between agreements of several processes, which cost a round trip

    def __enter__(self):
        self.received = False
        self._previous = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: whoever owns it handles signals
                break
        return self

    def _note(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt  # a second ctrl-c means now
        self.received = True

    def agreed(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self.received
        if step % self.EVERY:
            return False
        return bool(np.any(multihost_utils.process_allgather(np.array(self.received))))

    def __exit__(self, *exception):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
