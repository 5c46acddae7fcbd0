"""A set of 20,000 tiles: is memory flat while it is built and trained on, and is resuming late as quick as early?

    python benchmarks/scale.py --folder=/tmp/scale            # about 8 GB there, half an hour on two cores

Generates 256 px tiles in the published layout, builds them as TFDS `grass`, and trains a tiny model on 64 px crops
through the real command, stopped and resumed at about step 10 and step 15,000. Prints the resident memory of each
process over time, its peak, and the seconds from a resumed command's start to its first step.
"""

import argparse
import concurrent.futures
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
TINY = {
    "total_steps": 15_040, "eval_every": 100_000, "log_every": 1, "schedule.warmup": 10, "data.source": "tfds",
    "data.crop": (64, 64), "data.photometric": True, "data.val_split": "val", "batch_size": 4,
    "model.student.depths": (1, 1, 1, 1), "model.student.channels": (8, 8, 16, 16), "model.teacher.width": 16,
    "model.teacher.depth": 4, "model.teacher.heads": 2, "model.teacher.image_size": (64, 64), "model.fmm.form": "mlp",
    "model.head_channels": 16, "model.aux_channels": 8, "optimizer.lr": 1e-4,
}  # fmt: skip


def generate(root: pathlib.Path, tiles: int) -> None:
    """Every tile differs: a window of one of 64 generated meadows, in other brightness."""
    from data_builders.meadow.generate import generate_tile

    meadows = [generate_tile(0, index, 512) for index in range(64)]
    for kind in ("img_dir", "ann_dir"):
        for split in ("train", "val"):
            (root / kind / split).mkdir(parents=True)

    def write(number: int) -> None:
        split, rng = ("train", np.random.default_rng(number)) if number < tiles else ("val", np.random.default_rng(0))
        image, label = meadows[number % len(meadows)]
        top, left = rng.integers(256, size=2)
        window = np.s_[top : top + 256, left : left + 256]
        brightness = np.clip(image[window].astype(int) + rng.integers(-40, 40), 0, 255).astype(np.uint8)
        Image.fromarray(brightness).save(root / "img_dir" / split / f"{number}.tif")
        Image.fromarray(label[window]).save(root / "ann_dir" / split / f"{number}.png")

    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(write, range(tiles + 8)))


def resident(pid: int) -> float:
    """MB."""
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1e3
    return 0.0


class Watched:
    """A command whose memory is sampled once a second."""

    def __init__(self, *command: str, log: pathlib.Path):
        self.begun, self.samples = time.monotonic(), []
        with open(log, "w") as file:
            command = [sys.executable, "-m", *command]
            environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment)
        self.log = log

    def until(self, condition=lambda: False) -> float:
        """Seconds since the start, once `condition()` holds or the process has ended."""
        sampled = 0.0
        while self.process.poll() is None and not condition():
            if time.monotonic() - sampled > 1:
                sampled = time.monotonic()
                self.samples.append((sampled - self.begun, resident(self.process.pid)))
            time.sleep(0.02)
        if self.process.poll() not in (None, 0):
            sys.exit(self.log.read_text())
        return time.monotonic() - self.begun

    def report(self, what: str) -> None:
        memory = [mb for _, mb in self.samples]
        shown = np.linspace(0, len(memory) - 1, 9).astype(int)
        course = ", ".join(f"{self.samples[k][0]:.0f} s: {memory[k]:.0f}" for k in shown)
        print(f"{what}: peak {max(memory):.0f} MB, {self.samples[-1][0]:.0f} s; MB at {course}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=pathlib.Path, required=True)
    parser.add_argument("--tiles", type=int, default=20_000)
    parser.add_argument("--late", type=int, default=15_000, help="step of the second stop")
    args = parser.parse_args()
    folder = args.folder.absolute()
    if not (folder / "tiles").exists():
        generate(folder / "tiles", args.tiles)
    if not (folder / "tfds").exists():
        build = (
            "ktda_jax.data.tfds_source",
            "grass",
            f"--data_dir={folder / 'tfds'}",
            f"--manual_dir={folder / 'tiles'}",
        )
        build = Watched(*build, log=folder / "build.log")
        build.until()
        build.report(f"building {args.tiles:,} tiles")

    workdir = folder / "run"
    settings = {**TINY, "total_steps": args.late + 40, "data.root": folder / "tfds"}
    flags = [f"--config.{k}={v}" for k, v in settings.items()]
    command = ("ktda_jax.main", f"--config={ROOT / 'configs/grass.py'}:tiny", f"--workdir={workdir}", *flags)
    command += ("--stopped_status=0",)

    def steps() -> int:
        """Rows so far: one a step."""
        path = workdir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    for number, stop_at in enumerate((10, args.late, None)):
        before, training = steps(), Watched(*command, log=folder / f"train{number}.log")
        first = training.until(lambda before=before: steps() > before)
        print(f"from step {before}: {first:.1f} s from the command to the first step", flush=True)
        if stop_at is not None:
            training.until(lambda stop_at=stop_at: steps() >= stop_at)
            training.process.send_signal(signal.SIGTERM)
        training.until()
        training.report(f"training from step {before} to {steps()}")


if __name__ == "__main__":
    main()
