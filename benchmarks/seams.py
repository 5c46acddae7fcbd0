"""What tiling does to the map of a real model: disagreement where tiles meet, and within tiles.

    python benchmarks/seams.py --checkpoint=runs/cloud_tiny --input=DIR --output=seams.json

Every scene is mapped with several overlaps, and compared with a reference: `whole`, the scene at once as a single tile
(up to 2048 px), or `dense`, tiles that overlap by 7/8, where every pixel is an average over many places within tiles.
`at borders` is the share of pixels within 4 px of where one tile hands over to the next that differ from the reference,
`inside` that of all others, both in per cent over all scenes; `excess` is the mean over scenes of their difference,
with its standard error. `steps` counts neighbours of different class across the
hand-over, for each one across any other line: about 1 where there is no seam to be seen.
"""

import argparse
import json
import pathlib
import sys
import time

import numpy as np

REACH = 4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--input", required=True, help="scenes larger than a tile, for a model of 8-bit RGB")
    parser.add_argument("--tile", type=int, help="by default the training crop")
    parser.add_argument("--reference", choices=["whole", "dense"], default="whole")
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()

    import ktda_jax
    from ktda_jax.scenes import device, files, pipeline
    from ktda_jax.scenes.raster import Reading, RowReader, open_scene

    model = ktda_jax.load_pretrained(args.checkpoint)
    tile = args.tile or model.data["crop"][0]
    step = device.Step(device.of_segmenter(model), (tile, tile), 4)
    scenes = [open_scene(path, Reading(), 3) for path in files.expand(args.input)]
    for scene in scenes:
        if min(scene.height, scene.width) <= tile:
            sys.exit(f"error: {scene.path} is not larger than a tile of {tile} px")

    def mapped(overlap):
        maps, grids, parts = [], [], []
        for strip in pipeline.finished(scenes, step, classes=model.config.num_classes, overlap=overlap):
            parts.append(strip.labels)
            if strip.row.last:
                maps.append(np.concatenate(parts))
                grids.append(strip.row.grid)
                parts = []
        return maps, grids

    if args.reference == "whole":
        whole = (RowReader(scene).rows(0, scene.height)[0].transpose(1, 2, 0) for scene in scenes)
        reference = [model.predict(image).labels for image in whole]
    else:
        reference, _ = mapped(tile * 7 // 8)
    rows = []
    print(f"{'overlap':>8} {'at borders %':>13} {'inside %':>9} {'steps':>6} {'excess':>15}")
    for overlap in (0, tile // 8, tile // 4, tile // 2):
        counts, steps, excess = np.zeros((2, 2)), np.zeros((2, 2)), []
        maps, grids = mapped(overlap)
        for found, expected, grid in zip(maps, reference, grids, strict=True):
            near = np.zeros(found.shape, bool)
            for axis, view in ((grid.rows, (near, found)), (grid.columns, (near.T, found.T))):
                for seam in axis.seams():
                    view[0][int(seam) - REACH : int(seam) + REACH] = True
                change = (view[1][1:] != view[1][:-1]).mean(1)
                at = np.isin(np.arange(1, axis.length), np.array(axis.seams(), int))
                steps += [[change[at].sum(), at.sum()], [change[~at].sum(), (~at).sum()]]
            differ = found != expected
            excess.append(100 * (differ[near].mean() - differ[~near].mean()))
            counts += [[differ[near].sum(), near.sum()], [differ[~near].sum(), (~near).sum()]]
        (at_borders, inside), (at, elsewhere) = 100 * counts[:, 0] / counts[:, 1], steps[:, 0] / steps[:, 1]
        excess = np.mean(excess), np.std(excess, ddof=1) / len(excess) ** 0.5
        rows.append(dict(overlap=overlap, at_borders=at_borders, inside=inside, steps=at / elsewhere, excess=excess))
        print(
            f"{overlap:8} {at_borders:13.3f} {inside:9.3f} {at / elsewhere:6.2f} {excess[0]:7.3f} ± {excess[1]:.3f}",
            flush=True,
        )
    if args.output:
        about = dict(command=" ".join(["python", *sys.argv]), date=time.strftime("%Y-%m-%d"))
        about |= dict(scenes=len(scenes), tile=tile, reference=args.reference)
        args.output.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
