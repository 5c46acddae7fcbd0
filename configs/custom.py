"""Your own tiles: a folder of images (8-bit RGB, or multi-band GeoTIFF of any number type) and label images.

Command:   python -m ktda_jax.main --config=configs/custom.py --config.data.root=DIR
           DIR/img_dir/{train,val}/NAME.{tif,png,jpg} and DIR/ann_dir/{train,val}/NAME.{png,tif}. Copy this file, edit
           the capitals below, and look at the result first: python -m ktda_jax.inspect --config=... Images must be at
           least as large as CROP; larger ones are scored in windows of it, as predict maps them.
Arguments: custom.py:tiny  a model and schedule for a laptop
Hardware, time, score: yours. With few tiles, 2,000 to 10,000 steps are a sensible first try.
"""

from ml_collections import ConfigDict

from ktda_jax.config.base import arguments, base, shrink

CLASSES = {  # name: colour in figures and maps, in the order of the class numbers
    "background": (60, 60, 60),
    "object": (230, 180, 40),
}
CROP = (256, 256)  # height, width in pixels, from 32

# Labels hold class numbers from 0, and 255 where pixels are to be ignored. Whatever else yours hold, name it all:
LABELS = None  # {128: 0, 64: 1, 0: 255}, or colours: {(255, 0, 0): 0, (0, 0, 0): 255}

# Images are 8-bit RGB. For anything else (pip install -e '.[geo]'), as in this Sentinel-2 example:
BANDS = None  # (2, 3, 4, 8): blue, green, red, near infrared, as GDAL counts the bands of the file
RGB = None  # (4, 3, 2): which of BANDS the teacher and the figures see as red, green and blue
SCALE = None  # (0, 4000): these values become 0 and 255, the rest is clipped; or ((0, 3000), ...), one pair per band
NODATA = None  # pixels of this value are ignored. None: where the file says so, if any of the above is given; plain
#                8-bit RGB files are taken whole


def get_config(argument: str = "") -> ConfigDict:
    flags = arguments(argument, "tiny")
    config = base()
    data = config.data
    data.name = "custom"
    data.classes, data.palette = tuple(CLASSES), tuple(CLASSES.values())
    data.crop = config.model.teacher.image_size = CROP
    data.eval_scale = "native"
    data.rotate = CROP[0] == CROP[1]  # images from above have no upright
    data.label_map = LABELS and tuple(LABELS.items())
    data.bands, data.rgb, data.scale, data.nodata = BANDS, RGB, SCALE, NODATA
    config.total_steps, config.eval_every = 5_000, 250
    config.schedule.warmup = 250
    if "tiny" in flags:
        shrink(config)
    return config
