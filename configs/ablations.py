"""The ablations of KTDA: one name for each, as small changes of configs/cloud.py.

Command:   python -m ktda_jax.main --config=configs/ablations.py:full,base --config.data.root=DIR \\
             --config.weights.teacher=weights/dinov2b
           benchmarks/evidence/run.py runs them over folds, seeds and shares of the labels, and makes the table.
Arguments: ablations.py:NAME[,base|,small], NAME one of
           student      the student alone: its own pyramid goes to the decoder
           fam          + FAM (and the neck that goes with it), without distillation
           fam_distill  + FAM with distillation
           fmm          the student with FMM, without FAM
           no_distill   FAM and FMM without distillation: what the larger decoder alone gives
           full         KTDA with the published losses
           scaled       full, with the teacher's taps brought to one size before they are distilled
           mse          full, distilled by MSE only
           kl_width     full, distilled by KL only, softmax along the width as published
           kl_channel   ... along the channels
           kl_position  ... along all positions
           fmm_mlp      full with the `mlp` form of the FMM
           dinov2       the frozen teacher as the encoder under the same decoder: no student, FAM or FMM
           With base, the published sizes on a schedule for some twenty tiles; with small, that schedule for ConvNeXt-V2
           atto, a DINOv2-S teacher, whose features must be precomputed (run.py does), and an FMM of one block
           and 48 channels; without either, configs/cloud.py's schedule.
           Label fractions are folders of fewer tiles: benchmarks/evidence/run.py --labels.
Hardware:  two CPU cores with small; one accelerator without.
Time, score: benchmarks/evidence/LANDSAT24.md.
"""

import pathlib
import runpy

from ml_collections import ConfigDict, config_dict

from ktda_jax.config.base import arguments

cloud = runpy.run_path(str(pathlib.Path(__file__).with_name("cloud.py")))

PLAIN = {"model.fam": False, "model.fmm.enabled": False, "distill": False}
# One over the standard deviation of DINOv2-S's taps on the 24 tiles: 0.042, 0.083, 0.190, 1.98.
TAP_SCALES = (24.0, 12.0, 5.0, 0.5)
ABLATIONS = {
    "student": PLAIN,
    "fam": {"model.fmm.enabled": False, "distill": False},
    "fam_distill": {"model.fmm.enabled": False},
    "fmm": {"model.fam": False, "distill": False},
    "no_distill": {"distill": False},
    "full": {},
    "scaled": {"model.tap_scales": TAP_SCALES},
    "mse": {"loss.alpha": 0.0},
    "kl_width": {"loss.alpha": 1.0},
    "kl_channel": {"loss.alpha": 1.0, "loss.kl_axis": "channel"},
    "kl_position": {"loss.alpha": 1.0, "loss.kl_axis": "position"},
    "fmm_mlp": {"model.fmm.form": "mlp"},
    "dinov2": {**PLAIN, "model.encoder": "teacher"},
}


def get_config(argument: str = "full") -> ConfigDict:
    name, *flags = argument.split(",")
    if name not in ABLATIONS:
        raise ValueError(f"ablation {name!r} is unknown; known: {', '.join(ABLATIONS)}")
    flags = arguments(",".join(flags), "small", "base")
    config = cloud["get_config"]()
    if "base" in flags or "small" in flags:
        short(config)
    if "small" in flags:
        small(config)
    config.update_from_flattened_dict(ABLATIONS[name])
    return config


def short(config: ConfigDict) -> None:
    """A schedule for some twenty tiles of 256 px without a test split, scored once, at the end."""
    config.total_steps = config.eval_every = 300
    config.log_every, config.batch_size, config.eval_batch_size = 50, 4, 6
    config.schedule.warmup, config.schedule.poly_begin = 30, None
    config.data.crop, config.data.test_split = (256, 256), config_dict.placeholder(str)
    config.model.student.remat = config.model.fmm.remat = False


def small(config: ConfigDict) -> None:
    """For two CPU cores: 128 px squares, which evidence/run.py cuts and whose teacher features it precomputes."""
    config.eval_batch_size = 24
    config.data.crop = config.model.teacher.image_size = (128, 128)
    config.teacher.mode = "precomputed"  # the teacher then sees the tiles without the colour distortion
    student, teacher, fmm = config.model.student, config.model.teacher, config.model.fmm
    student.preset, student.drop_path = "v2_atto", 0.0
    teacher.preset = "small"
    # The teacher's 384 channels at 40 x 40 tokens would make decoder and FMM ten times the student.
    config.model.neck_channels, fmm.blocks, fmm.heads, fmm.mlp_ratio = 48, 1, 1, 2.0
    config.model.head_channels, config.model.aux_channels = 64, 32
    config.optimizer.lr = 1e-3
