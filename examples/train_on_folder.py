"""Trains on tiles and labels of your own: DIR/img_dir/{train,val}/NAME.png and DIR/ann_dir/{train,val}/NAME.png.

    python examples/train_on_folder.py DIR WORKDIR           # 5,000 steps of the full model, for an accelerator
    python examples/train_on_folder.py DIR WORKDIR --tiny    # 300 of a small one, to see that everything fits

Edit CLASSES first. The same command again goes on where it stopped; more settings are in configs/custom.py.
"""

import argparse
import pathlib
import runpy
import sys

from ktda_jax import UserError
from ktda_jax.training.loop import train_and_evaluate

CLASSES = {"background": (60, 60, 60), "object": (230, 180, 40)}  # name: colour, in the order of the class numbers
CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "custom.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="that holds img_dir and ann_dir")
    parser.add_argument("workdir", help="where checkpoints, metrics and figures go")
    parser.add_argument("--tiny", action="store_true", help="a small model and few steps")
    parser.add_argument("--steps", type=int, help="how many, instead of the config's")
    parser.add_argument("--crop", type=int, help="side of the square of pixels that is trained on")
    given = parser.parse_args()

    config = runpy.run_path(str(CONFIG))["get_config"]("tiny" if given.tiny else "")
    config.data.root = given.folder
    config.data.classes, config.data.palette = tuple(CLASSES), tuple(CLASSES.values())
    if given.crop:
        config.data.crop = config.model.teacher.image_size = (given.crop, given.crop)
    if given.steps:
        config.total_steps = config.eval_every = given.steps
        config.schedule.warmup = given.steps // 20
    try:
        result = train_and_evaluate(config.lock(), given.workdir)
    except UserError as error:
        sys.exit(f"error: {error}")
    if result is not None:
        print(f"validation mIoU {result.metrics.summary['mIoU']:.2f}; the model is in {given.workdir}")


if __name__ == "__main__":
    main()
