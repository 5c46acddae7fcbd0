"""Time and memory of the real training step and of a single-image forward pass, after compilation.

    python benchmarks/step.py --config=configs/grass.py --config.batch_size=2
    python benchmarks/step.py --config=configs/cloud.py --config.batch_size=2 --steps=1
    python benchmarks/step.py --config=configs/grass.py --config.teacher.mode=precomputed    # without the teacher

Random tiles and weights: neither changes the time. Peak memory is the process's largest resident set, which
on CPU holds everything: parameters, Adam's moments, activations and the program.
"""

import json
import resource
import statistics
import time

import jax
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from ktda_jax import config as configs
from ktda_jax import sharding, state
from ktda_jax.data.teacher_features import DTYPES
from ktda_jax.program import build, model_config_of

CONFIG = config_flags.DEFINE_config_file("config", None, "Which model and batch size.")
STEPS = flags.DEFINE_integer("steps", 3, "Timed training steps.")
FORWARDS = flags.DEFINE_integer("forwards", 3, "Timed forward passes of one image.")


def timed(function) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux counts KiB


def main(_):
    config = CONFIG.value
    configs.check(config)
    config.eval_batch_size = config.batch_size
    program = build(config)
    crop, rng = tuple(config.data.crop), np.random.default_rng(0)

    model = model_config_of(config)
    grid = model.teacher.grid_of(*crop)

    def batch(rows):
        made = {
            "image": rng.integers(0, 256, (rows, *crop, 3), np.uint8),
            "label": rng.integers(0, len(configs.classes_of(config).classes), (rows, *crop), np.uint8),
        }
        if config.distill and config.teacher.mode == "precomputed":
            taps = rng.normal(size=(rows, *grid, model.teacher.width))
            made["teacher"] = (taps.astype(DTYPES[config.teacher.dtype]),) * 4
        return made

    current, teacher = program.init(), program.teacher()
    host = batch(config.batch_size)
    rows = sharding.to_global(program.mesh, host)
    report = {
        "config": config.data.name,
        "crop": crop,
        "batch_size": config.batch_size,
        "dtype": str(configs.compute_dtype(config)),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "parameters_M": round(state.count({**program.abstract.params, **teacher}) / 1e6, 1),
    }
    if STEPS.value:
        start = time.perf_counter()
        step = program.compile_step(current, rows, teacher)
        report["compile_s"] = round(time.perf_counter() - start, 1)
        report["temporary_gb"] = round(step.memory_analysis().temp_size_in_bytes / 1e9, 2)

        def one():
            nonlocal current
            current, terms = step(current, sharding.to_global(program.mesh, host), teacher)
            return terms

        times = [timed(one) for _ in range(STEPS.value)]  # compiled above, so that the first one counts too
        report["step_s"] = round(statistics.median(times), 2)
        report["step_spread_s"] = [round(min(times), 2), round(max(times), 2)]
        report["peak_training_gb"] = round(peak_gb(), 2)
    if FORWARDS.value:

        @jax.jit
        def forward(params, stats, image):
            return state.merge(program.graphdef, params, stats)(image).logits

        image = batch(1)["image"]
        timed(lambda: forward(current.params, current.batch_stats, image))
        times = [timed(lambda: forward(current.params, current.batch_stats, image)) for _ in range(FORWARDS.value)]
        report["forward_s"] = round(statistics.median(times), 2)
        report["peak_gb"] = round(peak_gb(), 2)
    print(json.dumps(report))


if __name__ == "__main__":
    app.run(main)
