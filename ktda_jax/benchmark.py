"""`python -m ktda_jax.benchmark --config=...`: how fast and how large the training step and a forward pass are.

    python -m ktda_jax.benchmark --config=configs/grass.py --config.batch_size=2
    python -m ktda_jax.benchmark --config=configs/cloud.py --config.batch_size=2 --steps=1
    python -m ktda_jax.benchmark --config=configs/grass.py --config.teacher.mode=precomputed    # without the teacher
    python -m ktda_jax.benchmark --machine    # how fast this machine is, to compare times of two machines

Random tiles and weights: neither changes the time. A step's time includes moving the batch to the device. On CPU the
peak memory is the process's largest resident set, which holds everything, the compiler's work too.
"""

import sys

from absl import flags

from ktda_jax import cli

if __name__ == "__main__":  # flags are one namespace for all that is imported, and other verbs have the same ones
    cli.define_config()
    flags.DEFINE_integer("steps", 3, "Timed training steps; 0: none.", lower_bound=0)
    flags.DEFINE_integer("warmup", 1, "Steps and passes before the clock starts.", lower_bound=0)
    flags.DEFINE_integer("forwards", 3, "Timed forward passes; 0: none.", lower_bound=0)
    flags.DEFINE_integer("forward_batch", 1, "Images in a forward pass.", lower_bound=1)
    flags.DEFINE_float("peak_tflops", None, "Of one device, for MFU; known for the devices in benchmark.py.")
    flags.DEFINE_string("trace", None, "Folder for a profiler trace of three training steps.")
    flags.DEFINE_string("output", None, "JSON file of the results.")
    flags.DEFINE_bool("machine", False, "Only the speed of a product and of a copy on this machine; takes no config.")
    alone = any(argument.lstrip("-") in ("machine", "machine=true") for argument in sys.argv[1:])
    PARSE = cli.parsed(cli.parser() if alone else cli.parse_config)  # before the imports below, which take seconds

import functools
import os
import platform
import resource
import statistics
import time
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from ktda_jax import sharding
from ktda_jax.config import checks
from ktda_jax.config.model import compute_dtype, model_of
from ktda_jax.config.settings import Settings
from ktda_jax.config.workdir import write_json
from ktda_jax.models import flat
from ktda_jax.plan import flops
from ktda_jax.training import profile
from ktda_jax.training.program import batch_shapes, build

# Dense bfloat16 TFLOP/s, as their makers state them.
PEAKS = {
    "NVIDIA H200": 990, "NVIDIA H100 80GB HBM3": 990, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA A100-SXM4-40GB": 312,
    "TPU v4": 275, "TPU v5 lite": 197, "TPU v5": 459, "TPU v6 lite": 918,
}  # fmt: skip
COMPILED = "/jax/core/compile/backend_compile_duration"


def run(config: ConfigDict, *, steps=3, warmup=1, forwards=3, forward_batch=1, peak=None, trace=None) -> dict:
    """The measurements by name; times in seconds, memory in GB (1e9), operations in TFLOP."""
    settings = checks.resolve(config)
    program, model = build(settings), model_of(settings)
    crop, rng = settings.data.crop, np.random.default_rng(0)
    device = jax.devices()[0]
    current, teacher = program.init(), program.teacher()
    operations = flops.of_model(model, crop, distill=bool(teacher))
    peak = peak or PEAKS.get(device.device_kind)
    report = {
        "config": settings.data.name,
        "crop": crop,
        "batch_size": settings.batch_size,
        "dtype": str(compute_dtype(settings.dtype)),
        "devices": f"{program.mesh.size} x {device.device_kind}",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "parameters_M": round(flat.count({**program.abstract.params, **teacher}) / 1e6, 1),
        "training_tflop_per_image": round(operations["training"] / 1e12, 6),
        "inference_tflop_per_image": round(operations["inference"] / 1e12, 6),
    }
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: name == COMPILED and compiled.append(name)
    )

    def measure(function, count, images, operations):
        for _ in range(warmup):
            jax.block_until_ready(function())
        compiled.clear()
        times = []
        for _ in range(count):
            start = time.perf_counter()
            jax.block_until_ready(function())
            times.append(time.perf_counter() - start)
        if compiled:
            raise RuntimeError(f"{len(compiled)} programs were compiled within the timed calls; the times mean nothing")
        median = statistics.median(times)
        found = {"s": median, "spread_s": [min(times), max(times)], "images_per_s": images / median}
        if peak:
            found["mfu"] = operations * images / median / (peak * 1e12 * program.mesh.size)
        return found

    host = _batch(settings, model, rng)
    if steps:
        start = time.perf_counter()
        step = program.compile_step(current, sharding.to_global(program.mesh, host), teacher)
        report["compile_s"] = time.perf_counter() - start
        report["temporary_gb"] = step.func.memory_analysis().temp_size_in_bytes / 1e9

        def train():
            nonlocal current
            current, terms = step(current, sharding.to_global(program.mesh, host), teacher)
            return terms

        report["step"] = measure(train, steps, settings.batch_size, operations["training"])
        report["peak_training_gb"] = _peak_gb(device)
        if trace:
            with profile.trace(trace):
                for _ in range(3):
                    jax.block_until_ready(train())
    if forwards:
        image = jax.device_put(rng.integers(0, 256, (forward_batch, *crop, model.student.bands), np.uint8))

        @jax.jit
        def forward(params, stats, teacher, image):
            encoder = None if program.encoder is None else flat.merge(program.encoder, teacher, {})
            return flat.merge(program.graphdef, params, stats)(image, teacher=encoder).logits

        arguments = current.params, current.batch_stats, teacher, image
        jax.block_until_ready(forward(*arguments))
        report["forward"] = measure(lambda: forward(*arguments), forwards, forward_batch, operations["inference"])
        report["peak_gb"] = _peak_gb(device)
    return report


def machine(side: int = 2048, megabytes: int = 256, count: int = 10) -> dict:
    """Speed of a float32 product of two `side` x `side` matrices and of a copy, the best of `count`, on one device."""
    square, long = jnp.ones((side, side), jnp.float32), jnp.ones(megabytes * 10**6 // 4, jnp.float32)

    def best(function, *arrays) -> float:
        jax.block_until_ready(function(*arrays))
        times = []
        for _ in range(count):
            start = time.perf_counter()
            jax.block_until_ready(function(*arrays))
            times.append(time.perf_counter() - start)
        return min(times)

    # float32 to the last bit, where an accelerator would round its inputs.
    product = best(jax.jit(functools.partial(jnp.matmul, precision="highest")), square, square)
    copy = best(jax.jit(jnp.negative), long)  # negated: a plain copy may be no work at all
    return {
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "product_gflop_per_s": 2 * side**3 / product / 1e9,
        "copy_gb_per_s": 2 * long.nbytes / copy / 1e9,  # read and written
    }


def _batch(settings: Settings, model, rng) -> dict:
    def random(shape):
        if shape.dtype != np.uint8:
            return rng.normal(size=shape.shape).astype(shape.dtype)
        return rng.integers(0, 256 if len(shape.shape) == 4 else model.num_classes, shape.shape, np.uint8)

    return jax.tree.map(random, batch_shapes(settings, model))


def _peak_gb(device) -> float:
    memory = device.memory_stats() or {}  # None on CPU
    used = memory.get("peak_bytes_in_use")
    return (used or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024) / 1e9  # Linux counts KiB


def table(report: dict) -> str:
    """The report for people."""
    rows = [(key.replace("_", " "), _shown(value)) for key, value in report.items() if not isinstance(value, dict)]
    for key in ("step", "forward"):
        for name, value in report.get(key, {}).items():
            rows.append((f"{key} {name.replace('_', ' ')}", _shown(value)))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def _shown(value) -> str:
    if isinstance(value, (list, tuple)):
        return " to ".join(map(_shown, value)) if isinstance(value, list) else " x ".join(map(_shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(_: list[str]) -> None:
    cli.start()
    config, given = cli.config(), flags.FLAGS
    if given.machine:
        speed = machine()
        if output := checks.check_output(given.output, "output"):
            write_json(output, speed)
        return print(table(speed))
    with config.unlocked():
        config.eval_batch_size = config.batch_size  # evaluation is not run; let it divide by the devices
    output = checks.check_output(given.output, "output")
    trace = checks.check_output(given.trace, "trace", folder=True)
    report = run(
        config, steps=given.steps, warmup=given.warmup, forwards=given.forwards,
        forward_batch=given.forward_batch, peak=given.peak_tflops, trace=trace and str(trace),
    )  # fmt: skip
    print(table(report))
    if output:
        write_json(output, {**report, "command": " ".join(sys.argv)})


if __name__ == "__main__":
    cli.run(main, PARSE)
