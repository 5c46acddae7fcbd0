"""Ours against the published method in PyTorch, on one device: training step, inference, memory, in the same run.

    python benchmarks/torch_peer/run.py --config=configs/grass.py --config.batch_size=2
    python benchmarks/torch_peer/run.py --config=configs/grass.py --variants=published,compiled --output=a.json

First both compute the loss of the same weights and batch, in float32, without drop path and dropout; unless the terms
agree nothing is timed. Then every side runs alone, in a process of its own, so that its memory is its own. Ours is the
real training step (bfloat16 on accelerators, or --config.dtype) and a jitted forward pass.

    published      torch's default precision, the student twice per step, as published
    once           the same with one pass of the student, as ours
    tf32           as published, all products in TF32 (NVIDIA GPUs only)
    compiled       as published, bfloat16 autocast and torch.compile
    compiled_once  the same with one pass of the student

A step is timed from the batch in the host's memory to the new parameters on the device, waiting for each; inference
ends with the logits at head resolution and leaves the teacher out. Random tiles; weights as the config has them.
Peak memory is that of training: on GPUs what was allocated, on CPU the process's largest resident set.
"""

import datetime
import json
import os
import pathlib
import platform
import shlex
import sys
import tempfile
from importlib import metadata

import jax
from absl import app, flags
from ml_collections import config_flags

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # where `benchmarks` is, for a start by path

from benchmarks.torch_peer.compare import (
    ChildError,
    check_ours,
    check_published,
    chosen_variants,
    compare,
    measure_ours,
    table,
    write_inputs,
)  # fmt: skip
from ktda_jax import UserError
from ktda_jax.config import checks
from ktda_jax.config.workdir import write_json

CONFIG = config_flags.DEFINE_config_file("config", None, "Which model and batch size.")
VARIANTS = flags.DEFINE_list(
    "variants", None, "Of torch: published, once, tf32, compiled, compiled_once. Default: all on a GPU, two on CPU."
)
STEPS = flags.DEFINE_integer("steps", 5, "Timed training steps.", lower_bound=1)
WARMUP = flags.DEFINE_integer("warmup", 2, "Steps and forward passes before the timed ones.", lower_bound=1)
FORWARDS = flags.DEFINE_integer("forwards", 5, "Timed forward passes.", lower_bound=1)
FORWARD_BATCH = flags.DEFINE_integer("forward_batch", None, "Images per forward pass. Default: config.batch_size.")
OUTPUT = flags.DEFINE_string("output", None, "JSON file for the result.")
ROLE = flags.DEFINE_enum("role", None, ["check", "ours"], "Of a child process; set by this program alone.")
FOLDER = flags.DEFINE_string("folder", None, "Keeps weights, batch, logs and reports of both sides here.")


def machine() -> dict:
    model = platform.processor()
    if pathlib.Path("/proc/cpuinfo").is_file():
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {"platform": platform.platform(), "cpu": model, "cores": os.cpu_count(), "load": os.getloadavg()}


def main(_):
    config = CONFIG.value
    if config is None:
        raise UserError("give --config=FILE, such as --config=configs/grass.py")
    checks.resolve(config)
    checks.check_output(OUTPUT.value, "output")
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
            write_json(pathlib.Path(OUTPUT.value), {**about, **report})

    sizes = {
        "steps": STEPS.value,
        "warmup": WARMUP.value,
        "forwards": FORWARDS.value,
        "forward_batch": FORWARD_BATCH.value or config.batch_size,
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(FOLDER.value or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_inputs(config, folder, sizes)
        report = compare(config, folder, VARIANTS.value, save)
    print(f"{report['config']} {report['crop']}, batch {report['batch_size']}, {report['device']}\n{table(report)}")


if __name__ == "__main__":
    try:
        app.run(main)
    except (UserError, ChildError) as error:
        raise SystemExit(f"error: {error}") from None
