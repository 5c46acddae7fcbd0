"""What tiling does to the map of a real model: disagreement where tiles meet, and within tiles.

    python benchmarks/seams.py --checkpoint=runs/cloud_tiny --input=DIR --tile=128 --output=results/seams.json

The reference is each scene in one piece. `at borders` is the share of pixels within 4 px of where one tile hands over
to the next that differ from it, `inside` that of the others, in per cent. Scenes differ far more among themselves than
these two do, so the grid of tiles is moved over every scene in steps of 8 px: every pixel of the middle is then at a
border equally often, and both shares are of the same pixels. `excess` is the mean over scenes of their difference, with
its standard error. `steps` counts neighbours of different class across the hand-over, for each one across any other
line: about 1 where there is no seam to be seen.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time

import numpy as np
from PIL import Image

REACH = 4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--input", required=True, help="8-bit RGB scenes, of at least three tiles a side")
    parser.add_argument("--tile", type=int, help="by default the training crop")
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()

    import ktda_jax
    from ktda_jax.data.images import Reading, read_image
    from ktda_jax.data.raster import open_scene
    from ktda_jax.prediction import files
    from ktda_jax.tiling import device, pipeline
    from ktda_jax.tiling.windows import axis

    model = ktda_jax.load_pretrained(args.checkpoint)
    tile = args.tile or model.data["crop"][0]
    step = device.Step(device.of_segmenter(model), (tile, tile), 4)
    scenes = [read_image(str(path)) for path in files.expand(args.input)]
    reference = [model.predict(scene).labels for scene in scenes]

    def mapped(image, folder, overlap):
        path = pathlib.Path(folder) / "scene.png"
        Image.fromarray(image).save(path)
        strips = pipeline.finished(
            [open_scene(path, Reading(), 3)], step, classes=model.config.num_classes, overlap=overlap
        )
        return np.concatenate([strip.labels for strip in strips])

    def of_scene(image, expected, overlap, folder):
        """[[differ, all] at borders, [...] inside], and the same of changes of class from line to line."""
        stride, counts, steps = tile - overlap, np.zeros((2, 2)), np.zeros((2, 2))
        shifts = range(0, stride, 2 * REACH)
        tiles = (min(image.shape[:2]) - shifts[-1] - tile) // stride + 1
        if tiles < 2:
            sys.exit(f"error: {min(image.shape[:2])} px are too few for tiles of {tile}; give --tile")
        length = tile + (tiles - 1) * stride
        seams = np.array(axis(length, tile, overlap).seams(), int)
        first, end = seams[0] - REACH, seams[0] - REACH + (tiles - 1) * stride  # what shifted seams cover evenly
        for shift in shifts:
            window = slice(shift, shift + length)
            found, truth = mapped(image[window, window], folder, overlap), expected[window, window]
            middle = slice(first - shift, end - shift)  # the same pixels of the scene every time
            lines = np.arange(length)
            near_line = np.abs(lines[:, None] + 0.5 - seams).min(1) < REACH
            near = (near_line[:, None] | near_line)[middle, middle]
            differ = (found != truth)[middle, middle]
            counts += [[differ[near].sum(), near.sum()], [differ[~near].sum(), (~near).sum()]]
            for view in (found, found.T):
                change = (view[1:] != view[:-1])[:, middle].mean(1)
                at = np.isin(lines[1:], seams)
                inner = (lines[1:] >= middle.start) & (lines[1:] < middle.stop)
                steps += [
                    [change[at & inner].sum(), (at & inner).sum()],
                    [change[~at & inner].sum(), (~at & inner).sum()],
                ]
        return counts, steps

    rows = []
    print(f"{'overlap':>8} {'at borders %':>13} {'inside %':>9} {'steps':>6} {'excess':>15}")
    with tempfile.TemporaryDirectory() as folder:
        for overlap in (0, tile // 4):
            found = [of_scene(*pair, overlap, folder) for pair in zip(scenes, reference, strict=True)]
            counts, steps = (np.sum(part, 0) for part in zip(*found, strict=True))
            (at_borders, inside), (at, elsewhere) = 100 * counts[:, 0] / counts[:, 1], steps[:, 0] / steps[:, 1]
            each = [100 * (c[0, 0] / c[0, 1] - c[1, 0] / c[1, 1]) for c, _ in found]
            excess = np.mean(each), np.std(each, ddof=1) / len(each) ** 0.5
            rows.append(
                dict(overlap=overlap, at_borders=at_borders, inside=inside, steps=at / elsewhere, excess=excess)
            )
            shown = f"{excess[0]:7.3f} ± {excess[1]:.3f}"
            print(f"{overlap:8} {at_borders:13.3f} {inside:9.3f} {at / elsewhere:6.2f} {shown}", flush=True)
    if args.output:
        about = dict(command=" ".join(["python", *sys.argv]), date=time.strftime("%Y-%m-%d"))
        about |= dict(scenes=len(scenes), tile=tile)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
