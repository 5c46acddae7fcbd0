"""From a config to the parts of a run that are compiled once: model structure, optimiser, steps, placements."""

import dataclasses
import functools
import gc
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ktda_jax import UserError, sharding
from ktda_jax.config.model import compute_dtype, model_of, teacher_arrays
from ktda_jax.config.settings import Settings, Weights
from ktda_jax.data import libc
from ktda_jax.data.mixture import Mixture
from ktda_jax.models import flat
from ktda_jax.models.initial import HostRngs
from ktda_jax.models.ktda import KTDA, KTDAConfig
from ktda_jax.models.vit import ViT
from ktda_jax.training import distilled, evaluate, explained, losses, optim, predicted, semi, trained
from ktda_jax.training.predicted import Predictor
from ktda_jax.training.state import TrainState
from ktda_jax.weights import loading


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled-once parts of a run: structure, optimiser, steps, placements."""

    mesh: Mesh
    graphdef: nnx.GraphDef
    optimizer: optax.GradientTransformation
    abstract: TrainState
    shardings: TrainState
    init: Callable[[], TrainState]
    encoder: nnx.GraphDef | None  # of the frozen teacher, where that is the model's encoder
    teacher: Callable[[], flat.Arrays]  # the frozen teacher's arrays; empty where nothing needs it
    train_step: functools.partial  # of a jitted function, with the seed
    eval_step: Callable
    compile_step: Callable  # such a partial, compiled for some arguments, which a call may otherwise do as well
    arguments: tuple  # train_step's three, as ShapeDtypeStructs with shardings: enough to compile it
    teacher_graphdef: nnx.GraphDef | None = None  # of the frozen teacher, where it is run
    mixture: Mixture | None = None  # of labelled and unlabelled rows
    loaded: frozenset[str] = frozenset()  # what did not start at random, by path
    notes: Sequence[str] = ()  # on where it came from
    predictor: Predictor | None = None  # of a model that makes maps


def train_step(
    current: TrainState,
    batch: dict,
    teacher: flat.Arrays,
    *,
    settings: Settings,
    graphdef,
    teacher_graphdef,
    optimizer,
    schedule,
    mesh,
    mixture: Mixture | None = None,
    seed: jax.Array | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimiser step. batch: `image` (B, H, W, bands), `label` (B, H, W), the rows of all devices.

    The teacher's taps are those of the batch (`taps`, precomputed), or `teacher`'s for these images. All rows are
    distilled; only those that have labels by the `mixture` go through the decoders and into the cross entropy. `seed`:
    the data of a key, so that trainings which differ in nothing else share a compiled program; None: settings.seed's.
    """
    key = jax.random.key(settings.seed) if seed is None else jax.random.wrap_key_data(seed)
    key = jax.random.fold_in(key, current.step)

    frozen_student = settings.optimizer.student_lr_mult == 0

    def loss_fn(params, stats, rows, key):
        if frozen_student:  # its backward pass is not even made
            params = {k: jax.lax.stop_gradient(v) if optim.of_student(k) else v for k, v in params.items()}
        model = flat.merge(graphdef, params, stats)
        given = teacher_graphdef is None or "taps" in rows
        frozen = None if given else flat.merge(teacher_graphdef, teacher, {})
        images, labels, decoded = rows["image"], rows.get("label"), None
        if mixture is not None:
            labels = mixture.labelled(labels)
            if settings.distill:
                decoded = mixture.labelled
            else:
                images = mixture.labelled(images)
        outputs = model(images, train=True, key=key, teacher=frozen, decoded=decoded)
        if "taps" in rows:
            outputs = outputs._replace(taps=model.scaled(rows["taps"]))
        loss, terms = losses.total_loss(outputs, labels, settings.loss)
        if settings.semi.weight:
            average, copy = flat.merge(graphdef, current.ema, stats), flat.merge(graphdef, params, stats)
            found = semi.loss(
                copy, average, mixture.others(rows["image"]), jax.random.fold_in(key, 1), current.step, settings.semi
            )
            loss, terms = loss + found[0], terms | found[1]
            terms["loss"] = loss
        if model.taps is not None and outputs.taps is not None:
            terms["explained"] = explained.of_batch(outputs.student, outputs.taps, settings.loss.distance)
        return loss, (terms, flat.batch_stats(model))

    grad_fn = jax.grad(loss_fn, has_aux=True)
    if settings.grad_accum == 1:
        grads, (terms, stats) = grad_fn(current.params, current.batch_stats, batch, key)
    else:
        micro = functools.partial(_micro_batches, count=settings.grad_accum, mesh=mesh)

        def accumulate(carry, rows):
            total, stats, index = carry
            grads, (terms, stats) = grad_fn(current.params, stats, rows, jax.random.fold_in(key, index))
            return (jax.tree.map(jnp.add, total, grads), stats, index + 1), terms

        zeros = jax.tree.map(jnp.zeros_like, current.params)
        carry = (zeros, current.batch_stats, jnp.zeros((), jnp.int32))
        (grads, stats, _), terms = jax.lax.scan(accumulate, carry, jax.tree.map(micro, batch))
        grads = jax.tree.map(lambda g: g / settings.grad_accum, grads)
        terms = jax.tree.map(lambda t: t.mean(0), terms)

    updates, opt_state = optimizer.update(grads, current.opt_state, current.params)
    params = optax.apply_updates(current.params, updates)
    ema = current.ema
    if ema is not None:
        ema = jax.tree.map(lambda e, p: settings.ema * e + (1 - settings.ema) * p, ema, params)
    terms |= {"grad_norm": optax.tree.norm(grads), "lr": schedule(current.step)}
    return TrainState(current.step + 1, params, stats, opt_state, ema), terms


def _micro_batches(x: jax.Array, *, count: int, mesh: Mesh) -> jax.Array:
    """(B, ...) -> (count, B / count, ...) without moving rows between devices."""
    x = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(None, sharding.BATCH)))


def batch_shapes(settings: Settings, model: KTDAConfig) -> dict:
    """A global training batch as ShapeDtypeStructs: image, label and, where precomputed, the teacher's taps."""
    rows, crop = settings.batch_size, tuple(settings.data.crop)
    shapes = {
        "image": jax.ShapeDtypeStruct((rows, *crop, model.student.bands), jnp.uint8),
    }
    if settings.supervised:
        shapes["label"] = jax.ShapeDtypeStruct((rows, *crop), jnp.uint8)
    if settings.distill and settings.teacher.mode == "precomputed":
        taps = (rows, *model.grid_of(*crop), model.teacher.width)
        tap = jax.ShapeDtypeStruct(taps, jnp.dtype(settings.teacher.dtype))
        shapes["taps"] = tuple(None if index is None else tap for index in model.teacher.tapped)
    return shapes


def build(
    settings: Settings, *, teacher: bool = True, initial: bool = True, devices: Sequence[jax.Device] | None = None
) -> Program:
    """Checks the model settings, loads weights, and jits the steps; compiles nothing yet.

    Evaluation needs neither the `teacher` nor, with a checkpoint at hand, the `initial` weights. `devices` are those of
    a machine to compile for, where it is not this one.
    """
    dtype = compute_dtype(settings.dtype)
    param_dtype = jnp.promote_types(dtype, jnp.float32)
    info = settings.data.info
    mesh = sharding.make_mesh(**dataclasses.asdict(settings.mesh), devices=devices)
    sharding.check_batch_size(mesh, settings.batch_size, "config.batch_size", settings.grad_accum)
    sharding.check_batch_size(mesh, settings.eval_batch_size, "config.eval_batch_size")
    mixture = None
    if settings.supervised and settings.data.unlabelled:
        rows = settings.batch_size // mesh.size // settings.grad_accum
        mixture = Mixture.of(settings.data.unlabelled_share, rows, settings.grad_accum)
    model_config = model_of(settings)
    options = dataclasses.asdict(settings.optimizer)
    schedule = optim.warmup_poly(options.pop("lr"), settings.total_steps, **dataclasses.asdict(settings.schedule))
    optimizer = optim.adamw(schedule, clip_norm=settings.clip_norm, **options)
    common = dict(dtype=dtype, param_dtype=param_dtype)
    graphdef, params, stats = flat.abstract(lambda: KTDA(model_config, **common, rngs=nnx.Rngs(0)))
    loaded, notes = _loaded(settings, model_config, params, stats) if initial else ({}, [])
    if initial and settings.optimizer.student_lr_mult == 0:
        _check_frozen(settings.weights, params, loaded)
    teacher_graphdef, teacher_shapes, teacher_arrays = None, {}, dict
    encodes = model_config.encoder == "teacher"
    computed = settings.teacher.mode == "computed" or not settings.supervised  # which the teacher scores as well
    if encodes or (teacher and settings.distill and computed):
        teacher_graphdef, teacher_shapes, teacher_arrays = frozen_teacher(
            settings.weights.teacher, settings.seed, model_config, dtype, mesh
        )
    encoder = teacher_graphdef if encodes else None

    ema = None if settings.ema is None else params
    moments = jax.eval_shape(optimizer.init, params)
    abstract = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, stats, moments, ema)
    shardings = sharding.tree_shardings(mesh, abstract)

    def init() -> TrainState:
        _, params, stats = flat.split(KTDA(model_config, **common, rngs=HostRngs(settings.seed)))
        params |= {k: v for k, v in loaded.items() if k in params}
        stats |= {k: v for k, v in loaded.items() if k in stats}
        # The optimiser's moments and counters begin at 0.
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
        ema = None if settings.ema is None else params
        return sharding.place(TrainState(zeros.step, params, stats, zeros.opt_state, ema), shardings)

    step = functools.partial(
        sharding.on_mesh(mesh, train_step), settings=settings, graphdef=graphdef,
        teacher_graphdef=teacher_graphdef, optimizer=optimizer,
        schedule=schedule, mesh=mesh, mixture=mixture,
    )  # fmt: skip
    options = compiler_options(mesh)

    def compile_step(*args, **kwargs) -> functools.partial | None:
        compiled = compile_ahead(jitted, *args, seed=seed, **kwargs)
        return compiled and functools.partial(compiled, seed=seed)

    placed = (shardings, sharding.replicated(mesh))
    jitted = jax.jit(step, donate_argnums=0, out_shardings=placed, compiler_options=options)
    seed = np.asarray(jax.random.key_data(jax.random.key(settings.seed)))
    if devices is None:
        seed = sharding.place(seed, sharding.replicated(mesh))
    model = predicted.Model(graphdef, encoder, len(info.classes), model_config.student.bands)
    eval_step = (
        evaluate.make_eval_step(graphdef, len(info.classes), mesh, encoder, options)
        if settings.supervised
        else explained.make_eval_step(graphdef, teacher_graphdef, mesh, options)
    )
    predictor = Predictor(model, mesh, tuple(settings.data.crop), settings.eval_batch_size, eval_step, options)
    batch = batch_shapes(settings, model_config)
    batch = sharding.abstract(batch, jax.tree.map(lambda _: sharding.batch_sharding(mesh), batch))
    return Program(
        mesh=mesh,
        graphdef=graphdef,
        optimizer=optimizer,
        abstract=abstract,
        shardings=shardings,
        init=init,
        encoder=encoder,
        teacher_graphdef=teacher_graphdef,
        mixture=mixture,
        loaded=frozenset(loaded),
        notes=notes,
        teacher=teacher_arrays,
        train_step=functools.partial(jitted, seed=seed),
        eval_step=eval_step,
        predictor=predictor if settings.supervised else None,
        compile_step=compile_step,
        arguments=(sharding.abstract(abstract, shardings), batch, teacher_shapes),
    )


def compile_ahead(
    jitted: Callable, *args, given_up: Callable[[], bool] = lambda: False, **kwargs
) -> jax.stages.Compiled | None:
    """Compiles what a later call with such arguments then runs, and returns the compiler's memory to the system.

    The C library would keep it: 2.2 GB while the base model's step runs on a CPU. None if it was `given_up` in time.
    """
    lowered = jitted.lower(*args, **kwargs)
    if given_up():
        return None
    compiled = lowered.compile()
    gc.collect()
    libc.trim()
    return compiled


class Compilation:
    """The training step's, in a thread of its own: it needs no tiles, so they are made and checked meanwhile."""

    def __init__(self, program: Program):
        self._given_up = threading.Event()
        pool = ThreadPoolExecutor(1, "compilation")
        self._compiled = pool.submit(program.compile_step, *program.arguments, given_up=self._given_up.is_set)
        pool.shutdown(wait=False)

    def give_up(self) -> None:
        """Not in the middle of the compiler's own work, which cannot be stopped."""
        self._given_up.set()

    def wait(self) -> None:
        self._compiled.result()


def compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """LLVM's first level of optimisation for CPUs: as fast to run as the third, a sixth less to compile (NOTES.md)."""
    if mesh.devices.flat[0].platform != "cpu" or jax.config.read("jax_disable_most_optimizations"):
        return None
    return {"xla_backend_optimization_level": 1}


def _loaded(
    settings: Settings, model: KTDAConfig, params: flat.Arrays, stats: flat.Arrays
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Parameters and statistics that do not start at random, and what to say of them."""
    chosen = settings.weights
    if chosen.model is not None:
        if chosen.student is not None:
            raise UserError("config.weights.model brings its own student; leave config.weights.student out")
        expected = {**params, **stats}
        if chosen.new_classifier:
            expected = {k: v for k, v in expected.items() if "/conv_seg/" not in k}
        options = dict(new_classifier=chosen.new_classifier, rgb=model.rgb, read=trained.read)
        return loading.load(chosen.model, expected, "model", model, **options), []
    if chosen.new_classifier:
        raise UserError("config.weights.new_classifier says what not to take from config.weights.model; give that too")
    if chosen.student is None:
        return {}, []
    read = functools.cache(trained.read)  # once for both
    student = {k.removeprefix("student/"): v for k, v in params.items() if k.startswith("student/")}
    tensors = loading.load(chosen.student, student, "student", model.student, rgb=model.rgb, read=read)
    fam, notes = distilled.fam_of(read(chosen.student), settings, model, {**params, **stats})
    notes += distilled.read_otherwise(read(chosen.student), settings, model.student.bands)
    return {f"student/{k}": v for k, v in tensors.items()} | fam, notes


def _check_frozen(chosen: Weights, params: flat.Arrays, loaded: Mapping[str, np.ndarray]) -> None:
    """UserError where a part that is to stay as it came would stay random: the FAM, of a student that brings none."""
    name, source = "config.optimizer.student_lr_mult=0", chosen.student or chosen.model
    if source is None and any(map(optim.of_student, params)):
        raise UserError(f"{name} keeps a student that starts at random; give one, as config.weights.student=WORKDIR")
    if random := sorted({path.split("/")[0] for path in params if optim.of_student(path) and path not in loaded}):
        raise UserError(
            f"{name} keeps student and FAM as they came, and {source} brings no {random[0]} for this model; give one "
            "that was distilled with these settings (configs/distill.py), or let it learn"
        )


def frozen_teacher(
    path: str | None, seed: int, model: KTDAConfig, dtype: jnp.dtype, mesh: Mesh
) -> tuple[nnx.GraphDef, flat.Arrays, Callable[[], flat.Arrays]]:
    """The frozen teacher's structure, its arrays' shapes and shardings, and what puts them on the mesh.

    path: config.weights.teacher, which is read and checked now; without one the weights are random.
    """
    common = dict(dtype=dtype, param_dtype=jnp.promote_types(dtype, jnp.float32))
    graphdef, expected, _ = flat.abstract(lambda: ViT(model.teacher, **common, rngs=nnx.Rngs(0)))
    shardings = sharding.tree_shardings(mesh, expected)
    shapes = sharding.abstract(expected, shardings)
    if path is not None:
        arrays = teacher_arrays(path, expected, model)
        return graphdef, shapes, lambda: sharding.place(arrays, shardings)
    key = jax.random.fold_in(jax.random.key(seed), 2**31 - 1)

    def init() -> flat.Arrays:
        return flat.split(ViT(model.teacher, **common, rngs=nnx.Rngs(params=key)))[1]

    return graphdef, shapes, lambda: jax.jit(init, out_shardings=shardings, compiler_options=compiler_options(mesh))()
