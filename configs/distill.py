"""Knowledge without labels: a ConvNeXt-V2 student and its FAM learn a frozen DINOv2's features from images alone.

Command:   python -m ktda_jax.main --config=configs/distill.py --workdir=runs/distill \
               --config.data.unlabelled=SCENES/,more/scene.tif --config.weights.teacher=hf://facebook/dinov2-small
           Then train on labelled tiles with --config.weights.student=runs/distill (configs/few_labels.py does).
Data:      folders, files and patterns of 8-bit RGB images or whole GeoTIFF scenes of any size; windows are drawn from
           them, a tenth is held out and scores. Multi-band images as in configs/custom.py.
Arguments: distill.py:tiny  a model and schedule for a laptop
Score:     the share of the teacher's variance that the student explains on the held-out images, per layer.
"""

from ml_collections import ConfigDict

from ktda_jax.config.base import arguments, base, shrink

CROP = (252, 252)  # 18 x 18 patches of the teacher


def get_config(argument: str = "") -> ConfigDict:
    flags = arguments(argument, "tiny")
    config = base()
    if "tiny" in flags:
        shrink(config)
    config.supervised = False
    distilled(config)
    config.data.name, config.data.classes, config.data.palette = (
        "images",
        ("none",),
        ((0, 0, 0),),
    )  # there are no labels
    config.batch_size, config.eval_batch_size = 8, 8
    config.total_steps, config.eval_every, config.schedule.warmup = 2_000, 200, 100
    config.optimizer.lr = 2e-3
    return config


def distilled(config: ConfigDict) -> None:
    """The student, the teacher and the loss between them, in which distillation and the training after it agree."""
    config.data.crop = config.model.teacher.image_size = CROP
    config.model.student.preset, config.model.student.drop_path = "v2_atto", 0.0
    config.model.teacher.preset = "small"
    config.model.standardize_taps = True
    config.loss.distance = "mse"
