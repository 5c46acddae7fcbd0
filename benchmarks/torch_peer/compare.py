"""The sides of `run.py`: ours checked and timed, the children that do it, and the comparison itself."""

import copy
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import numpy as np

from benchmarks.timing import resident_peak, summary, timed
from ktda_jax import UserError, sharding
from ktda_jax.config.fields import flat as flat_settings
from ktda_jax.config.model import compute_dtype, model_of
from ktda_jax.config.settings import Settings
from ktda_jax.data.datasets import IGNORE
from ktda_jax.models import flat
from ktda_jax.models.vit import ViTConfig
from ktda_jax.training.program import build
from ktda_jax.weights import mmseg

HERE = pathlib.Path(__file__).resolve().parent
ON_GPU, ON_CPU = ("published", "once", "tf32", "compiled", "compiled_once"), ("published", "once")
TOLERANCE = 1e-4  # relative, of each term of the loss in float32
TERMS = ("decode", "aux", "distill")
GRADIENT_TOLERANCE = 1e-2  # relative, of the norm; BatchNorm over the batch's few pooled values amplifies rounding
# Fresh classifiers give logits near 0, whose cross entropy hardly depends on the rest of the model, and fresh attention
# hardly chooses among its tokens.
SHARPEN = 10.0
SHARPENED = ("conv_seg/kernel", "attn/qkv/kernel", "attn/proj/kernel")
PUBLISHED = {  # settings that change what is computed, and that the PyTorch side has in the published form only
    "grad_accum": 1, "ema": None, "clip_norm": None, "distill": True, "teacher.mode": "computed",
    "loss.kl_axis": "width", "model.fam": True, "model.fmm.enabled": True, "model.fmm.form": "transformer",
    "data.bands": None, "data.rgb": None,
}  # fmt: skip
NOISY = 1.5  # slowest step against the fastest: beyond this other work was on the machine


class ChildError(RuntimeError):
    """A child process failed; the last line that it said."""


def check_published(config) -> None:
    """UserError where the PyTorch side would compute something else."""
    values, model = flat_settings(Settings.of(config)), model_of(Settings.of(config))
    wrong = [f"config.{k}={values[k]!r} (published: {v!r})" for k, v in PUBLISHED.items() if values[k] != v]
    for name in ("taps", "patch", "registers", "swiglu", "rope", "mean", "std"):
        value, default = getattr(model.teacher, name), ViTConfig.__dataclass_fields__[name].default
        if value != default:
            wrong.append(f"a teacher with {name} {value}")
    if model.student.v2 or model.student.layer_scale != 1.0:
        wrong.append("a student other than ConvNeXt V1")
    if not model.aux_channels:
        wrong.append("no auxiliary head")
    if wrong:
        raise UserError(f"benchmarks/torch_peer/model.py is the published model; it has not {', '.join(wrong)}")


def write_inputs(config, folder: pathlib.Path, sizes: dict[str, int]) -> None:
    """`spec.json` and `batch.npz`, which both sides read. `sizes`: steps, warmup, forwards, forward_batch."""
    rows, crop, classes = config.batch_size, tuple(config.data.crop), Settings.of(config).data.info.num_classes
    rng = np.random.default_rng(config.seed)
    labels = rng.integers(0, classes, (rows, *crop), np.uint8)
    labels[:, : crop[0] // 8] = IGNORE
    np.savez(
        folder / "batch.npz",
        image=rng.integers(0, 256, (rows, *crop, 3), np.uint8),
        label=labels,
        forward=rng.integers(0, 256, (sizes["forward_batch"], *crop, 3), np.uint8),
    )
    spec = {
        "model": dataclasses.asdict(model_of(Settings.of(config))),
        "loss": config.loss.to_dict(),
        "optimizer": config.optimizer.to_dict(),
        "schedule": {**config.schedule.to_dict(), "total_steps": config.total_steps},
        "batch_size": rows,
        "crop": crop,
        **sizes,
    }
    (folder / "spec.json").write_text(json.dumps(spec))


def read_spec(folder: pathlib.Path) -> dict:
    return json.loads((folder / "spec.json").read_text())


def read_batch(folder: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(folder / "batch.npz") as file:
        return dict(file)


def check_ours(config, folder: pathlib.Path) -> dict:
    """The terms of a real training step in float32 without drop path and dropout; writes its weights for torch."""
    config = copy.deepcopy(config)
    config.dtype, config.model.dropout, config.model.student.drop_path = "float32", 0.0, 0.0
    batch = read_batch(folder)
    exact = None if jax.default_backend() == "cpu" else "highest"  # accelerators would take TF32 or less
    with jax.default_matmul_precision(exact):
        program = build(Settings.of(config))
        current, teacher = program.init(), program.teacher()
        sharp = {k: SHARPEN * v if k.endswith(SHARPENED) else v for k, v in current.params.items()}
        current = dataclasses.replace(current, params=sharp)
        write_weights(folder / "weights.npz", {**current.params, **current.batch_stats}, teacher)
        rows = sharding.to_global(program.mesh, {k: batch[k] for k in ("image", "label")})
        _, terms = program.compile_step(current, rows, teacher)(current, rows, teacher)
    return {"terms": {k: float(v) for k, v in terms.items()}}


def write_weights(path: pathlib.Path, arrays: flat.Arrays, teacher: flat.Arrays) -> None:
    """A whole checkpoint by upstream's names, which torch loads strictly."""
    counts = {k.removesuffix("mean") + "num_batches_tracked": np.int64(0) for k in arrays if k.endswith("bn/mean")}
    arrays = {**arrays, **{f"teacher/{k}": v for k, v in teacher.items()}}
    np.savez(path, **mmseg.to_upstream({**{k: np.asarray(v) for k, v in arrays.items()}, **counts}))


def measure_ours(config, folder: pathlib.Path) -> dict:
    """Times the compiled training step and a forward pass."""
    spec, batch = read_spec(folder), read_batch(folder)
    host = {k: batch[k] for k in ("image", "label")}
    program = build(Settings.of(config))
    current, teacher = program.init(), program.teacher()
    start = time.perf_counter()
    step = program.compile_step(current, sharding.to_global(program.mesh, host), teacher)
    compiled = time.perf_counter() - start

    def train():
        nonlocal current
        current, terms = step(current, sharding.to_global(program.mesh, host), teacher)
        jax.block_until_ready((current, terms))

    report = {"passes": 1, "precision": str(compute_dtype(config.dtype)), "compile_s": compiled}
    report["first_steps_s"] = timed(train, spec["warmup"])
    report["train"] = summary(timed(train, spec["steps"]), config.batch_size)
    statistics = jax.devices()[0].memory_stats() or {}  # None on CPU
    report["train"]["peak_bytes"] = statistics.get("peak_bytes_in_use") or resident_peak()

    @jax.jit
    def forward(params, stats, image):
        return flat.merge(program.graphdef, params, stats)(image).logits

    def infer():
        jax.block_until_ready(forward(current.params, current.batch_stats, batch["forward"]))

    timed(infer, spec["warmup"])
    report["inference"] = summary(timed(infer, spec["forwards"]), len(batch["forward"]))
    return report


def child(name: str, folder: pathlib.Path) -> dict:
    """Runs one side, `check`, `ours`, `torch_check` or a variant, in a process of its own and reads its report."""
    if name in ("check", "ours"):
        command = [sys.executable, str(HERE / "run.py"), *sys.argv[1:], f"--role={name}", f"--folder={folder}"]
    else:
        command = [sys.executable, str(HERE / "worker.py"), f"--folder={folder}", f"--variant={name}"]
    environment = dict(os.environ)
    if name == "check":  # which is not timed: no need to search for the fastest kernels
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0"
    log = folder / f"{name}.log"
    with open(log, "w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment).returncode
    report = folder / f"{name}.json"
    if code or not report.is_file():
        lines = log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        print("\n".join(lines[-30:]), file=sys.stderr)
        raise ChildError(f"{name} ended with status {code}: {lines[-1]}")
    return json.loads(report.read_text())


def agree(ours: dict, theirs: dict) -> dict[str, float]:
    """Relative difference of each term and of the gradient's norm; SystemExit where one is too large."""
    differences = {k: abs(theirs[k] - ours[k]) / abs(ours[k]) for k in (*TERMS, "grad_norm")}
    listed = ", ".join(f"{k} {ours[k]:.7g} and {theirs[k]:.7g} ({differences[k]:.1e})" for k in differences)
    print(f"ours and PyTorch's of the same weights: {listed}", flush=True)
    limits = {**dict.fromkeys(TERMS, TOLERANCE), "grad_norm": GRADIENT_TOLERANCE}
    wrong = [f"{k} by more than {limit:g}" for k, limit in limits.items() if not differences[k] <= limit]  # or is NaN
    if wrong:
        raise SystemExit(f"they differ in {', '.join(wrong)}: nothing to compare, nothing timed")
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
    spec = read_spec(folder)
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
    text += [f"{name}: {why}" for name, why in report["left_out"].items()]
    for name, row in report["rows"].items():
        low, high = row["train"]["spread_s"]
        if high > NOISY * low:
            text.append(f"{name}: steps took {low:.4g} to {high:.4g} s; the machine was busy, quote nothing from this")
    return "\n".join(text)
