"""Knowledge without labels: a ConvNeXt-V2 student and its FAM learn a frozen DINOv2's features from images alone.

Command:   python -m ktda_jax.main --config=configs/distill.py --workdir=runs/distill \
               --config.data.unlabelled=SCENES,more/scene.tif --config.weights.teacher=hf://facebook/dinov2-small
           Then train on labelled tiles with --config.weights.student=runs/distill (configs/few_labels.py).
Data:      folders, files and patterns, with commas between them, of 8-bit RGB images or GeoTIFF scenes of any size.
           Windows are drawn from them; a tenth is held out and scores. Several bands: as in configs/custom.py.
Time:      1,000 steps of 8 with precomputed features, 20 minutes on two cores of 280 GFLOP/s with other work beside
Score:     the share of the teacher's variance that the student explains on the held-out images, per layer.
"""

from ml_collections import ConfigDict

from ktda_jax.config.base import arguments, base, transfer


def get_config(argument: str = "") -> ConfigDict:
    arguments(argument)
    config = base()
    transfer(config)
    config.supervised = False
    config.data.name = "images"
    config.data.classes = "none"  # there are no labels
    config.batch_size, config.eval_batch_size = 8, 8
    config.total_steps, config.eval_every, config.schedule.warmup = 1_000, 100, 50
    config.optimizer.lr = 2e-3
    return config
