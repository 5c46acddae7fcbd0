"""Your own tiles: a folder of RGB images and label images with the same names.

Command:   python -m ktda_jax.main --config=configs/custom.py --config.data.root=DIR
           DIR/img_dir/{train,val}/NAME.{tif,png,jpg}: 8-bit RGB; DIR/ann_dir/{train,val}/NAME.png: class ids from
           0, 255 = ignore. Images must be at least as large as the crop; evaluation resizes them to it.
           Copy this file and edit CLASSES, PALETTE and the sizes.
Arguments: custom.py:tiny  a model and schedule for a laptop
Hardware, time, score: yours. With few tiles, 2,000 to 10,000 steps are a sensible first try.
"""

import pathlib
import runpy

from ml_collections import ConfigDict

grass = runpy.run_path(str(pathlib.Path(__file__).with_name("grass.py")))

CLASSES = ("background", "object")
PALETTE = ((60, 60, 60), (230, 180, 40))  # RGB, one per class
CROP = (256, 256)  # height, width; multiples of 32


def get_config(argument: str = "") -> ConfigDict:
    config = grass["get_config"](argument.replace("tiny", ""))
    config.data.name = "custom"
    config.data.classes, config.data.palette = CLASSES, PALETTE
    config.data.crop = config.model.teacher.image_size = CROP
    config.total_steps, config.eval_every = 5_000, 250
    config.schedule.warmup = 250
    if "tiny" in argument:
        grass["shrink"](config)
    return config
