"""Ours against the published method in PyTorch, on one device: training step, inference, memory, in the same run.

    python benchmarks/torch_peer.py --config=configs/grass.py --config.batch_size=2
    python benchmarks/torch_peer.py --config=configs/grass.py --variants=published,compiled --steps=20 --output=a.json

First both compute the loss of the same weights and batch, in float32, without drop path and dropout; unless the terms
agree nothing is timed. Then every side runs alone, in a process of its own, so that its memory is its own. Ours is the
real training step of `ktda_jax.program` (bfloat16 on accelerators, or --config.dtype) and a jitted forward pass.

    published      torch's default precision, the student twice per step, as published
    once           the same with one pass of the student, as ours
    tf32           as published, all products in TF32 (NVIDIA GPUs only)
    compiled       as published, bfloat16 autocast and torch.compile
    compiled_once  the same with one pass of the student

A step is timed from the batch in the host's memory to the new parameters on the device, waiting for each; inference
ends with the logits at head resolution and leaves the teacher out. Random tiles; weights as the config has them.
Peak memory is that of training: on GPUs what was allocated, on CPU the process's largest resident set.
"""

import copy
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags
from timing import resident_peak, summary, timed

from ktda_jax import config as configs
from ktda_jax import sharding, state
from ktda_jax.config import ConfigError
from ktda_jax.convert import mmseg
from ktda_jax.models.vit import ViTConfig
from ktda_jax.program import build, model_config_of

CONFIG = config_flags.DEFINE_config_file("config", None, "Which model and batch size.")
VARIANTS = flags.DEFINE_list(
    "variants", None, "Of torch: published, once, tf32, compiled, compiled_once. Default: all on a GPU, two on CPU."
)
STEPS = flags.DEFINE_integer("steps", 5, "Timed training steps.", lower_bound=1)
WARMUP = flags.DEFINE_integer("warmup", 2, "Steps and forward passes before the timed ones.", lower_bound=1)
FORWARDS = flags.DEFINE_integer("forwards", 5, "Timed forward passes.", lower_bound=1)
FORWARD_BATCH = flags.DEFINE_integer("forward_batch", None, "Images per forward pass. Default: config.batch_size.")
OUTPUT = flags.DEFINE_string("output", None, "JSON file for the result.")
ROLE = flags.DEFINE_enum("role", None, ["check", "ours"], "Of a child process; set by this program.")
FOLDER = flags.DEFINE_string("folder", None, "A child's place for files; set by this program.")

HERE = pathlib.Path(__file__).resolve().parent
ON_GPU, ON_CPU = ("published", "once", "tf32", "compiled", "compiled_once"), ("published", "once")
TOLERANCE = 1e-4  # relative, of each term of the loss in float32
TERMS = ("decode", "aux", "distill")
SHARPEN = 10.0  # fresh classifiers give logits near 0, whose cross entropy hardly depends on the rest of the model
PUBLISHED = {  # settings that change what is computed, and that the PyTorch side has in the published form only
    "grad_accum": 1, "ema": None, "clip_norm": None, "distill": True, "teacher.mode": "computed",
    "loss.kl_axis": "width", "model.fam": True, "model.fmm.enabled": True, "model.fmm.form": "transformer",
    "data.bands": None, "data.rgb": None,
}  # fmt: skip


class ChildError(RuntimeError):
    """A child process failed; the last line that it said."""


def check_published(config) -> None:
    """ConfigError where the PyTorch side would compute something else."""
    values = configs.flat(config)
    wrong = [f"config.{k}={values[k]!r} (published: {v!r})" for k, v in PUBLISHED.items() if values[k] != v]
    model = model_config_of(config)
    for name in ("patch", "registers", "swiglu", "rope", "mean", "std"):
        value, default = getattr(model.teacher, name), ViTConfig.__dataclass_fields__[name].default
        if value != default:
            wrong.append(f"a teacher with {name} {value}")
    if model.student.v2 or model.student.layer_scale != 1.0:
        wrong.append("a student other than ConvNeXt V1")
    if not model.aux_channels:
        wrong.append("no auxiliary head")
    if wrong:
        raise ConfigError(f"benchmarks/torch_model.py is the published model; it has not {', '.join(wrong)}")


def write_inputs(config, folder: pathlib.Path) -> dict:
    """`spec.json`, which the torch side reads, and `batch.npz`; returns the former."""
    rows, forward = config.batch_size, FORWARD_BATCH.value or config.batch_size
    crop, classes = tuple(config.data.crop), len(configs.classes_of(config).classes)
    rng = np.random.default_rng(config.seed)
    labels = rng.integers(0, classes, (rows, *crop), np.uint8)
    labels[:, : crop[0] // 8] = configs.IGNORE
    np.savez(
        folder / "batch.npz",
        image=rng.integers(0, 256, (rows, *crop, 3), np.uint8),
        label=labels,
        forward=rng.integers(0, 256, (forward, *crop, 3), np.uint8),
    )
    spec = {
        "model": dataclasses.asdict(model_config_of(config)),
        "loss": config.loss.to_dict(),
        "optimizer": config.optimizer.to_dict(),
        "schedule": {**config.schedule.to_dict(), "total_steps": config.total_steps},
        "batch_size": rows,
        "forward_batch": forward,
        "crop": crop,
        "steps": STEPS.value,
        "warmup": WARMUP.value,
        "forwards": FORWARDS.value,
    }
    (folder / "spec.json").write_text(json.dumps(spec))
    return spec


def read_batch(folder: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(folder / "batch.npz") as file:
        return dict(file)


def check_ours(config, folder: pathlib.Path) -> dict:
    """The terms of a real training step in float32 without drop path and dropout; writes its weights for torch."""
    config = copy.deepcopy(config)
    config.dtype, config.model.dropout, config.model.student.drop_path = "float32", 0.0, 0.0
    batch = read_batch(folder)
    with jax.default_matmul_precision("highest"):  # not TF32
        program = build(config)
        current, teacher = program.init(), program.teacher()
        sharp = {k: SHARPEN * v if k.endswith("conv_seg/kernel") else v for k, v in current.params.items()}
        current = dataclasses.replace(current, params=sharp)
        write_weights(folder / "weights.npz", {**current.params, **current.batch_stats}, teacher)
        rows = sharding.to_global(program.mesh, {k: batch[k] for k in ("image", "label")})
        _, terms = program.compile_step(current, rows, teacher)(current, rows, teacher)
    return {"terms": {k: float(v) for k, v in terms.items()}}


def write_weights(path: pathlib.Path, arrays: state.Arrays, teacher: state.Arrays) -> None:
    """A whole checkpoint by upstream's names, which torch loads strictly."""
    counts = {k.removesuffix("mean") + "num_batches_tracked": np.int64(0) for k in arrays if k.endswith("bn/mean")}
    arrays = {**arrays, **{f"teacher/{k}": v for k, v in teacher.items()}}
    np.savez(path, **mmseg.to_upstream({**{k: np.asarray(v) for k, v in arrays.items()}, **counts}))


def measure_ours(config, folder: pathlib.Path) -> dict:
    """Times the compiled training step and a forward pass."""
    batch = read_batch(folder)
    host = {k: batch[k] for k in ("image", "label")}
    program = build(config)
    current, teacher = program.init(), program.teacher()
    start = time.perf_counter()
    step = program.compile_step(current, sharding.to_global(program.mesh, host), teacher)
    compiled = time.perf_counter() - start

    def train():
        nonlocal current
        current, terms = step(current, sharding.to_global(program.mesh, host), teacher)
        jax.block_until_ready((current, terms))

    report = {"passes": 1, "precision": str(configs.compute_dtype(config)), "compile_s": compiled}
    report["first_steps_s"] = timed(train, WARMUP.value)
    report["train"] = summary(timed(train, STEPS.value), config.batch_size)
    statistics = jax.devices()[0].memory_stats() or {}  # None on CPU
    report["train"]["peak_bytes"] = statistics.get("peak_bytes_in_use") or resident_peak()

    @jax.jit
    def forward(params, stats, image):
        return state.merge(program.graphdef, params, stats)(image).logits

    def infer():
        jax.block_until_ready(forward(current.params, current.batch_stats, batch["forward"]))

    timed(infer, WARMUP.value)
    report["inference"] = summary(timed(infer, FORWARDS.value), len(batch["forward"]))
    return report


def child(name: str, folder: pathlib.Path) -> dict:
    """Runs one side, `check`, `ours`, `torch_check` or a variant, in a process of its own and reads its report."""
    if name in ("check", "ours"):
        command = [sys.executable, __file__, *sys.argv[1:], f"--role={name}", f"--folder={folder}"]
    else:
        variant = name.removeprefix("torch_")
        command = [sys.executable, str(HERE / "torch_worker.py"), f"--folder={folder}", f"--variant={variant}"]
    log = folder / f"{name}.log"
    with open(log, "w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    report = folder / f"{name}.json"
    if code or not report.is_file():
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        print("\n".join(lines[-30:]), file=sys.stderr)
        raise ChildError(f"{name} ended with status {code}: {lines[-1]}")
    return json.loads(report.read_text())


def agree(ours: dict, theirs: dict) -> dict[str, float]:
    """Relative difference of each term of the loss; SystemExit where one is too large."""
    differences = {k: abs(theirs[k] - ours[k]) / abs(ours[k]) for k in TERMS}
    listed = ", ".join(f"{k} {ours[k]:.7g} and {theirs[k]:.7g} ({differences[k]:.1e})" for k in TERMS)
    print(f"ours and PyTorch's from the same weights: {listed}", flush=True)
    wrong = [k for k in TERMS if not differences[k] <= TOLERANCE]  # so that NaN is wrong
    if wrong:
        raise SystemExit(f"{', '.join(wrong)} differ by more than {TOLERANCE:g}: nothing to compare, nothing timed")
    return differences


def chosen_variants(wanted: list[str] | None, where: str) -> tuple[list[str], dict[str, str]]:
    """The variants that run on the platform `where`, and why others do not."""
    names = list(wanted if wanted is not None else ON_GPU if where == "gpu" else ON_CPU)
    if unknown := set(names) - set(ON_GPU):
        raise SystemExit(f"--variants has {', '.join(sorted(unknown))}; known: {', '.join(ON_GPU)}")
    if where == "cpu" and "tf32" in names:
        return [n for n in names if n != "tf32"], {"tf32": "left out: CPUs have no TF32"}
    return names, {}


def compare(config, folder: pathlib.Path, wanted: list[str] | None, save: Callable, child: Callable = child) -> dict:
    """Checks, then times, one child after the other; `save` gets the report after each."""
    spec = write_inputs(config, folder)
    report = {k: spec[k] for k in ("batch_size", "forward_batch", "crop", "steps", "warmup", "forwards")}
    report |= {"config": config.data.name, "rows": {}}
    ours, theirs = child("check", folder), child("torch_check", folder)
    if ours["platform"] != theirs["platform"]:
        raise SystemExit(
            f"JAX runs on {ours['device']} and torch on {theirs['device']}: nothing to compare, nothing timed"
        )
    differences = agree(ours["terms"], theirs["terms"])
    report["check"] = {"ours": ours["terms"], "torch": theirs["terms"], "relative": differences}
    report |= {"device": ours["device"], "versions": {**ours["versions"], **theirs["versions"]}}
    names, report["left_out"] = chosen_variants(wanted, ours["platform"])
    for name in ("ours", *names):
        try:
            report["rows"][name] = child(name, folder)
        except ChildError as error:
            if name == "ours":
                raise
            report["left_out"][name] = str(error)  # no compiler for torch.compile, or too little memory
        row = report["rows"].get(name)
        print(f"{name}: {row['train']['median_s']:.4g} s a step" if row else report["left_out"][name], flush=True)
        save(report)
    return report


def table(report: dict) -> str:
    """One line per side; the last two columns say how many times as fast ours is."""
    head = ("", "train step s", "spread", "images/s", "inference images/s", "peak GB", "ours: training", "inference")
    ours, lines = report["rows"]["ours"], [head]
    for name, row in report["rows"].items():
        train, inference = row["train"], row["inference"]
        spread = " to ".join(f"{s:.4g}" for s in train["spread_s"])
        lines.append((
            f"{name} ({row['precision']})",
            f"{train['median_s']:.4g}",
            spread,
            f"{train['images_per_s']:.4g}",
            f"{inference['images_per_s']:.4g}",
            f"{train['peak_bytes'] / 1e9:.2f}",
            f"{train['median_s'] / ours['train']['median_s']:.2f} x",
            f"{inference['median_s'] / ours['inference']['median_s']:.2f} x",
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, *(f"{name}: {why}" for name, why in report["left_out"].items())])


def machine() -> dict:
    model = platform.processor()
    if pathlib.Path("/proc/cpuinfo").is_file():
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {"platform": platform.platform(), "cpu": model, "cores": os.cpu_count()}


def main(_):
    config = CONFIG.value
    configs.check(config)
    # One device on either side; with more than one, PyTorch would need a launcher.
    config.mesh.data, config.mesh.fsdp, config.eval_batch_size = 1, 1, config.batch_size
    check_published(config)
    if ROLE.value:
        folder = pathlib.Path(FOLDER.value)
        report = (check_ours if ROLE.value == "check" else measure_ours)(config, folder)
        report |= {"platform": jax.default_backend(), "device": jax.devices()[0].device_kind}
        report["versions"] = {k: metadata.version(k) for k in ("jax", "jaxlib", "flax", "optax", "numpy")}
        report["versions"]["python"] = platform.python_version()
        (folder / f"{ROLE.value}.json").write_text(json.dumps(report))
        return
    chosen_variants(VARIANTS.value, "gpu")  # names the unknown ones before anything runs
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    about = {"command": shlex.join(["python", *sys.argv]), "date": now, "machine": machine()}

    def save(report):
        if OUTPUT.value:
            configs.write_json(pathlib.Path(OUTPUT.value), {**about, **report})

    with tempfile.TemporaryDirectory() as folder:
        report = compare(config, pathlib.Path(folder), VARIANTS.value, save)
    print(f"{report['config']} {report['crop']}, batch {report['batch_size']}, {report['device']}\n{table(report)}")


if __name__ == "__main__":
    try:
        app.run(main)
    except (ConfigError, ChildError) as error:
        raise SystemExit(f"error: {error}") from None
