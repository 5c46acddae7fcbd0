"""The embedded default: five cover classes on `meadow`, synthetic tiles that are made in seconds.

Command:   python -m ktda_jax.main --config=configs/demo.py
Arguments: demo.py:tiny  a handful of steps, to see that everything runs
Hardware:  two CPU cores.
Time:      53 s on two CPU cores with 270 GFLOP/s (python -m ktda_jax.benchmark --machine), measured, data and
           compilation included.
Score:     validation mIoU 54.41, aAcc 69.55, measured; the best constant prediction has mIoU 5.36.
"""

from ml_collections import ConfigDict

from ktda_jax.config.base import arguments, base, shrink


def get_config(argument: str = "") -> ConfigDict:
    flags = arguments(argument, "tiny")
    config = base()
    shrink(config)
    config.total_steps, config.eval_every, config.log_every = 300, 100, 10
    config.batch_size, config.eval_batch_size = 4, 8
    config.data.source, config.data.name, config.data.root = "tfds", "meadow", "data/tfds"
    config.data.crop = config.model.teacher.image_size = (96, 96)  # of tiles of 128 px
    config.model.student.depths, config.model.neck_channels, config.model.head_channels = (1, 1, 1, 0), 32, 48
    if "tiny" in flags:
        config.total_steps, config.eval_every, config.schedule.warmup = 8, 4, 2
    return config
