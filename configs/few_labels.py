"""A map from few labelled tiles, with what a frozen DINOv2 knows: start from a student that configs/distill.py made.

Command:   python -m ktda_jax.main --config=configs/few_labels.py:10 --config.data.root=DIR \
               --config.data.classes=water,road,field --config.weights.student=runs/distill
Data:      DIR/img_dir/{train,val}/NAME.{tif,png,jpg}, 8-bit RGB of at least 252 px a side, and class numbers in
           DIR/ann_dir/{train,val}/NAME.{png,tif}, 255 where a pixel has no label.
Arguments: few_labels.py:10, :50 or :500  about so many labelled tiles (default 50)
           few_labels.py:10,unlabelled    goes on distilling, half of each batch from --config.data.unlabelled=SCENES;
                                          wants --config.weights.teacher=..., the one that was distilled from
With :10 student and FAM stay as they were distilled, and one linear layer learns; with more labels everything does.
Time:      600 steps of 4 for few_labels.py:10, 4 minutes on one core of 130 GFLOP/s with other work beside
Score:     from 16 tiles of Dubai 38.9 ± 1.5 mIoU on areas not seen, from scratch 17.5 ± 2.8 (EVIDENCE.md)
"""

from ml_collections import ConfigDict, config_dict

from ktda_jax.config.base import arguments, base, one_of, transfer

STEPS = {"10": 600, "50": 1_000, "500": 5_000}


def get_config(argument: str = "") -> ConfigDict:
    flags = arguments(argument, *STEPS, "unlabelled")
    labels = one_of(flags, STEPS, "50")
    config = base()
    transfer(config)
    config.data.name, config.data.classes = "custom", config_dict.placeholder(str)
    config.data.eval_scale = "native"
    config.model.fmm.enabled = False
    config.loss.avg_non_ignore = True  # tiles may be labelled in part
    config.distill = "unlabelled" in flags
    config.batch_size = 8 if config.distill else 4
    config.total_steps, config.eval_every, config.schedule.warmup = STEPS[labels], STEPS[labels], 20
    config.optimizer.lr = 1e-3
    config.model.neck_channels, config.model.head_channels, config.model.aux_channels = 64, 64, 32
    if labels == "10":  # too few to change what was distilled: a classifier is all that learns
        config.model.head, config.model.aux_channels = "linear", 0
        config.optimizer.student_lr_mult = 0.1 if config.distill else 0.0
    return config
