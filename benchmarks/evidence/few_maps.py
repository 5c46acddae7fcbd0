"""What models make of the same tiles: labels and predictions side by side, without the images, which are not ours.

    python benchmarks/evidence/few_maps.py --tiles=FOLDER --split=area6 --count=6 --output=docs/few_labels_maps.png \
        student=WORK/runs/final_16_0_student "distilled, frozen=WORK/runs/final_16_0_frozen_..."

FOLDER is one of few_labels.py's, WORK/tiles/SET_LABELS_DRAW. Tiles are taken at even distances by name, of those with
at least three classes, without a look at what the models make of them.
"""

import argparse
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # where `benchmarks` is, for a start by path

from ktda_jax import load_pretrained
from ktda_jax.data.datasets import IGNORE
from ktda_jax.data.images import read_image
from ktda_jax.data.labels import read_label
from ktda_jax.figures.sheets import paint, save_sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=pathlib.Path, required=True)
    parser.add_argument("--split", action="append", required=True)
    parser.add_argument("--count", type=int, default=6)
    parser.add_argument("--images", action="store_true", help="show them too")
    parser.add_argument("--output", type=pathlib.Path, required=True)
    parser.add_argument("models", nargs="+", metavar="NAME=WORKDIR")
    args = parser.parse_args()
    images = [path for split in args.split for path in sorted((args.tiles / "img_dir" / split).iterdir())]
    labels = [read_label(str(path).replace("/img_dir/", "/ann_dir/")) for path in images]
    several = [k for k, label in enumerate(labels) if len(set(np.unique(label)) - {IGNORE}) >= 3]
    chosen = [several[k] for k in np.linspace(0, len(several) - 1, args.count).round().astype(int)]
    shown = {"image": [read_image(str(images[k])) for k in chosen]} if args.images else {}
    maps = {"label": [labels[k] for k in chosen]}
    for model in args.models:
        name, _, workdir = model.partition("=")
        segmenter = load_pretrained(workdir)
        maps[name] = [segmenter.predict(read_image(str(images[k]))).labels for k in chosen]
    shown |= {name: [paint(ids, segmenter.palette) for ids in found] for name, found in maps.items()}
    names = [images[k].stem for k in chosen]
    save_sheet(
        args.output, list(zip(*shown.values(), strict=True)), list(shown), names, segmenter.classes, segmenter.palette
    )


if __name__ == "__main__":
    main()
