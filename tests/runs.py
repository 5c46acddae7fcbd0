"""Tiny runs for tests: a handful of tiles, a model that compiles in seconds, and the real command on both."""

import dataclasses
import json
import os
import pathlib
import re
import runpy
import socket
import subprocess
import sys
import time

import jax
import numpy as np
from flax import nnx
from PIL import Image

from ktda_jax.config import checks
from ktda_jax.config import workdir as records
from ktda_jax.config.settings import Settings
from ktda_jax.data.check import check_split
from ktda_jax.models import flat
from ktda_jax.models.ktda import KTDAConfig
from ktda_jax.models.vit import ViT
from ktda_jax.training.checkpoint import Checkpoints
from ktda_jax.training.inputs import open_source
from ktda_jax.training.program import build
from ktda_jax.training.reported import TIMES
from ktda_jax.training.state import TrainState

REPOSITORY = pathlib.Path(__file__).parents[1]
CLASSES = 5

# Two ConvNeXt blocks, since the first one's drop path rate is 0 by construction.
TINY = {
    "total_steps": 6,
    "batch_size": 4,
    "eval_batch_size": 2,
    "log_every": 1,
    "eval_every": 3,
    "schedule.warmup": 2,
    "data.crop": (64, 64),
    "model.student.depths": (0, 0, 1, 1),
    "model.student.channels": (8, 8, 16, 16),
    "model.student.drop_path": 0.5,
    "model.teacher.width": 16,
    "model.teacher.depth": 4,
    "model.teacher.heads": 2,
    "model.teacher.image_size": (64, 64),
    "model.fmm.form": "mlp",
    "model.fmm.blocks": 1,
    "model.fmm.heads": 2,
    "model.head_channels": 16,
    "model.aux_channels": 8,
    "model.dropout": 0.3,
    "loss.alpha": 0.5,
    "optimizer.lr": 2e-3,
    "data.photometric": True,
}


def make_tiles(root: pathlib.Path, *, train: int = 6, val: int = 5, size: int = 72) -> pathlib.Path:
    """Tiles in the published layout: blocks of classes that brightness tells apart."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            label = np.kron(rng.integers(0, CLASSES, (8, 8)), np.ones((size // 8,) * 2)).astype(np.uint8)
            write_tile(root, split, f"t{number}", label[..., None] * 40 + rng.integers(0, 40, (size, size, 3)), label)
    return root


def write_tile(root: pathlib.Path, split: str, name: str, image: np.ndarray, label: np.ndarray) -> None:
    for kind, array in (("img_dir", image), ("ann_dir", label)):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(array.astype(np.uint8)).save(root / kind / split / f"{name}.png")


def config(root: pathlib.Path, overrides: dict | None = None):
    """configs/grass.py:tiny, made tiny in earnest; on one device unless overridden."""
    config = runpy.run_path(str(REPOSITORY / "configs" / "grass.py"))["get_config"]("tiny")
    config.update_from_flattened_dict({"data.root": str(root), "mesh.data": 1, **TINY, **(overrides or {})})
    return config.lock()


def settings(root: pathlib.Path, overrides: dict | None = None) -> Settings:
    return Settings.of(config(root, overrides))


def arguments(root: pathlib.Path, workdir: pathlib.Path | None, overrides: dict | None = None) -> list[str]:
    """The command line that means `config(root, overrides)`, on all devices; None leaves a setting as it is."""
    values = {"data.root": root, **TINY, **(overrides or {})}
    return [
        f"--config={REPOSITORY / 'configs' / 'grass.py'}:tiny",
        *([f"--workdir={workdir}"] if workdir else []),
        *(f"--config.{key}={value}" for key, value in values.items() if value is not None),
    ]


def random_state(program) -> TrainState:
    """Some state of a program on the host, at step 0; compiling the real initialisation takes longer than a step."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), program.abstract)
    params = _random(program.abstract.params)
    stats = {path: value + path.endswith("var") for path, value in zeros.batch_stats.items()}
    return dataclasses.replace(zeros, params=params, batch_stats=stats, ema=zeros.ema and params)


def random_workdir(root: pathlib.Path, workdir: pathlib.Path, overrides: dict | None = None, *, sure: float = 1.0):
    """As a finished training leaves it, but with random arrays, so that no training step is compiled: its config, its
    program and its state. The random model sees two classes or more, which a few steps would not teach it, and its
    logits are `sure` times as large."""
    made = config(root, overrides)
    program = build(Settings.of(made))
    workdir.mkdir(parents=True)
    records.write(workdir, Settings.of(made))
    val = check_split(open_source(Settings.of(made).data, "val"))
    records.write_run(workdir, Settings.of(made), {"val": val.fingerprint})
    state = random_state(program)
    params = {path: value * (sure if "/conv_seg/" in path else 1) for path, value in state.params.items()}
    state = jax.device_put(dataclasses.replace(state, params=params), program.shardings)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(made.total_steps, state, {}, {"mIoU": 1.0})
    return made, program, state


def random_teacher(config) -> dict[str, np.ndarray]:
    if not config.distill:
        return {}
    teacher = KTDAConfig.from_dict({**config.model, "num_classes": CLASSES}).teacher
    types = dict(dtype=np.float32, param_dtype=np.float32)
    return _random(flat.abstract(lambda: ViT(teacher, **types, rngs=nnx.Rngs(0)))[1])


def _random(shapes) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {path: 0.1 * rng.standard_normal(x.shape).astype(np.float32) for path, x in shapes.items()}
    return {path: value + path.endswith("scale") for path, value in arrays.items()}


# Environment of a process that compiles with all of XLA's optimisations, and anew.
AS_USERS_COMPILE = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "JAX_ENABLE_COMPILATION_CACHE": "0", "XLA_FLAGS": ""}


def xla_flags(devices: int) -> str:
    """This process's XLA_FLAGS, but for so many devices."""
    return re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])


def start(
    *flags: str,
    devices: int = 1,
    verb: str = "main",
    **environment: str,
) -> subprocess.Popen:
    """`python -m ktda_jax.VERB FLAGS` in a process of its own, compiled as conftest.py says."""
    settings = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices), **environment}
    return subprocess.Popen(
        [sys.executable, "-m", f"ktda_jax.{verb}", *flags],
        cwd=REPOSITORY,
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_two(*flags: str, verb: str = "main") -> list[subprocess.Popen]:
    """Real processes, one device each, that meet on localhost."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = (*flags, f"--coordinator={address}", "--num_processes=2")
    return [start(*flags, f"--process_id={k}", verb=verb) for k in range(2)]


def finish(process: subprocess.Popen, status: int = 0) -> tuple[str, str]:
    """stdout and stderr of a process that must succeed, or end with that status."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    return out, err


def wait_for(condition, process: subprocess.Popen) -> None:
    """Returns as soon as `condition()` holds while the process is at work."""
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.002)


def reached(workdir: pathlib.Path, step: int) -> bool:
    """Whether a running process has reported `step`."""
    path = workdir / "metrics.jsonl"
    return path.exists() and f'"step": {step},' in path.read_text()


def rows(workdir: pathlib.Path, *, times: bool = False) -> list[dict]:
    """Of metrics.jsonl; without what no two runs have alike, unless `times`."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return found if times else [{k: v for k, v in row.items() if k not in TIMES} for row in found]


def reported(workdir: pathlib.Path) -> str:
    """The rows as they stand in the file."""
    return "".join(json.dumps(row) + "\n" for row in rows(workdir))


def steps(workdir: pathlib.Path, name: str) -> list[int]:
    """The steps of the rows that hold scalar `name`."""
    return [row["step"] for row in rows(workdir) if name in row]


def read(path: pathlib.Path, default: str = "") -> str:
    """The text of a file that may not be there yet, or, below /proc, any more."""
    try:
        return path.read_text()
    except OSError:
        return default


def saved_state(workdir: pathlib.Path, tiles: pathlib.Path, settings: dict) -> tuple[int, dict, dict]:
    """The latest checkpoint: step, all arrays by path, data position."""
    program = build(checks.resolve(config(tiles, settings)))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        step = checkpoints.latest_step()
        current, position = checkpoints.restore(step, program.abstract, program.shardings)
    return step, {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree.leaves_with_path(current)}, position


def assert_same_run(ours: pathlib.Path, theirs: pathlib.Path, tiles: pathlib.Path, settings: dict) -> None:
    """Two finished workdirs hold the same state, data position and metrics, bit for bit."""
    (step, arrays, position), (other, others, elsewhere) = (saved_state(w, tiles, settings) for w in (ours, theirs))
    assert step == other == settings["total_steps"] and position == elsewhere
    for part in (".params", ".batch_stats", ".opt_state", ".ema"):
        assert any(path.startswith(part) for path in arrays)
    assert arrays.keys() == others.keys()
    for path, value in arrays.items():
        assert value.tobytes() == others[path].tobytes(), path
    assert reported(ours) == reported(theirs)


def script(folder: pathlib.Path, name: str, body: str) -> pathlib.Path:
    """An executable bash script, to stand in for a command."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)
    return path
