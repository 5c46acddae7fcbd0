"""Mapping a large scene: how many pixels a second the pipeline sustains, and how much memory it takes.

    pip install -e '.[geo]'
    python benchmarks/scene.py --output=scene.json     # generates the scenes, two files of up to 1.2 GB, in --scratch

`full` has data everywhere: 512 px meadow tiles in random order. `sparse` has them in a tenth of its blocks, the others
were never written. Both are tiled GeoTIFFs of three 8-bit bands, deflate with a predictor. The model `none` compares
the bands of each pixel, so that reading, moving, blending and writing are all there is to measure; `tiny` is a KTDA of
a few thousand parameters with random weights. Every measurement is a process of its own; peak memory is its largest
resident set, with Python, JAX and GDAL. Pixels are the scene's, each once, those without data too.
"""

import argparse
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # where `benchmarks` is, for a start by path

from benchmarks.timing import resident_peak

BLOCK = 512
CASES = (("none", "full"), ("none", "sparse"), ("tiny", "sparse"))  # `tiny` on `full` on demand: it takes long


def generate(path: pathlib.Path, side: int, share: float) -> None:
    """A scene with data in `share` of its blocks, georeferenced."""
    import rasterio
    from rasterio.windows import Window

    from data_builders.meadow.generate import generate_tile

    tiles = [np.maximum(generate_tile(0, k, BLOCK)[0], 1) for k in range(64)]
    rng = np.random.default_rng(0)
    options = dict(tiled=True, blockxsize=BLOCK, blockysize=BLOCK, compress="deflate", predictor=2, sparse_ok=True)
    place = dict(crs="EPSG:32633", transform=rasterio.Affine(0.5, 0, 4e5, 0, -0.5, 4.2e6), nodata=0)
    temporary = path.with_name(f".{path.name}")
    with rasterio.open(
        temporary, "w", driver="GTiff", width=side, height=side, count=3, dtype="uint8", num_threads="ALL_CPUS",
        interleave="pixel", bigtiff="if_safer", **options, **place,
    ) as file:  # fmt: skip
        for top in range(0, side, BLOCK):
            for left in range(0, side, BLOCK):
                if rng.random() < share:
                    window = Window(left, top, min(BLOCK, side - left), min(BLOCK, side - top))
                    tile = tiles[rng.integers(64)][: window.height, : window.width]
                    file.write(np.moveaxis(tile, -1, 0), window=window)
    os.replace(temporary, path)


def model_of(kind: str):
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from ktda_jax.models import flat
    from ktda_jax.models.ktda import KTDA, KTDAConfig
    from ktda_jax.models.layers import resize
    from ktda_jax.tiling.device import Model

    if kind == "none":
        return Model(lambda arrays, images: images.astype(jnp.float32) / 255, (), 3, 3)
    config = KTDAConfig.from_dict(
        dict(
            num_classes=5, student=dict(depths=(1, 1, 1, 1), channels=(8, 16, 16, 16)),
            teacher=dict(width=16, depth=4, heads=2, patch=14), fmm=dict(form="mlp", blocks=1, heads=2),
            head_channels=16, aux_channels=0,
        )
    )  # fmt: skip
    graphdef, *arrays = flat.split(KTDA(config, rngs=nnx.Rngs(0)))

    def apply(arrays, images):
        logits = flat.merge(graphdef, *arrays)(images).logits
        return jax.nn.softmax(resize(logits, images.shape[1:3]), -1)

    return Model(apply, arrays, 3, 5)


def measure(kind: str, scene: pathlib.Path, tile: int, overlap: int, batch: int) -> dict:
    from ktda_jax.data.images import Reading
    from ktda_jax.prediction.files import name_outputs
    from ktda_jax.prediction.mapping import check_scenes, map_scenes
    from ktda_jax.prediction.outputs import Legend
    from ktda_jax.tiling.device import Step

    model = model_of(kind)
    step = Step(model, (tile, tile), batch)
    images = np.zeros(step.shape, np.uint8)
    step(images, *(np.ones((step.batch_size, tile), np.float32),) * 2).block_until_ready()  # compiled before the clock
    with tempfile.TemporaryDirectory(dir=scene.parent) as folder:
        outputs = name_outputs([scene], f"{folder}/map.tif", one=True)
        scenes = check_scenes([scene], Reading(), 3, print)
        busy = time.process_time()
        used = map_scenes(scenes, outputs, step, Legend.of(model.classes), overlap=overlap, say=lambda text: None)
        busy = time.process_time() - busy
    return {**used, "peak_bytes": resident_peak(), "cpu_seconds": busy}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=pathlib.Path, default=pathlib.Path(tempfile.gettempdir()) / "ktda_scenes")
    parser.add_argument("--side", type=int, default=20_000, help="pixels of the scene's sides")
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--overlap", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="*", default=["/".join(case) for case in CASES], help="MODEL/SCENE")
    parser.add_argument("--output", type=pathlib.Path, help="JSON file of the results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    scenes = {name: args.scratch / f"{name}_{args.side}.tif" for name in ("full", "sparse")}
    if args.one:
        kind, scene = args.one.split("/")
        print(json.dumps(measure(kind, scenes[scene], args.tile, args.overlap, args.batch)))
        return
    args.scratch.mkdir(parents=True, exist_ok=True)
    for name, share in (("full", 1.0), ("sparse", 0.1)):
        if any(case.endswith(name) for case in args.cases) and not scenes[name].exists():
            generate(scenes[name], args.side, share)
    print(f"{'model/scene':14} {'Mpixel/s':>9} {'spread':>16} {'seconds':>8} {'CPU s':>7} {'peak GB':>8}")
    results = {}
    for case in args.cases:
        command = [sys.executable, *sys.argv, f"--one={case}"]
        runs = []
        for _ in range(args.repeats if case.startswith("none") else 1):
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
        rates = [run["pixels"] / run["seconds"] / 1e6 for run in runs]
        rate, spread = statistics.median(rates), f"{min(rates):.1f} to {max(rates):.1f}"
        seconds, busy = (statistics.median(run[name] for run in runs) for name in ("seconds", "cpu_seconds"))
        peak = max(run["peak_bytes"] for run in runs) / 1e9
        results[case] = {"runs": runs, "mpixel_per_s": rate, "peak_gb": peak}
        print(f"{case:14} {rate:9.1f} {spread:>16} {seconds:8.1f} {busy:7.1f} {peak:8.2f}", flush=True)
    if args.output:
        versions = ("jax", "jaxlib", "numpy", "rasterio")
        about = {
            "command": " ".join(["python", *sys.argv]),
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
            "versions": {name: metadata.version(name) for name in versions},
            "scene_bytes": {name: path.stat().st_size for name, path in scenes.items() if path.exists()},
        }
        args.output.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
