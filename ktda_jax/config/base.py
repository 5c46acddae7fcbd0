"""The config that all of configs/ change: every setting, with the published values of the grass model and schedule.

What each means is in `settings.py`; a copy of configs/custom.py may lie anywhere and still start from here.
"""

from collections.abc import Iterable

from ml_collections import ConfigDict, config_dict


def arguments(argument: str, *known: str) -> set[str]:
    """What stands behind the colon of --config=FILE:ARGUMENT,ARGUMENT; ValueError names an unknown one."""
    given = set(filter(None, argument.split(",")))
    if unknown := given - set(known):
        raise ValueError(f"config argument {', '.join(sorted(unknown))!r} is unknown; known: {', '.join(known)}")
    return given


def one_of(given: set[str], choices: Iterable[str], default: str) -> str:
    """The one among `given` arguments that is a choice; ValueError for two."""
    chosen = sorted(given & set(choices))
    if len(chosen) > 1:
        raise ValueError(f"config arguments {', '.join(chosen)} exclude each other; give one of them")
    return chosen[0] if chosen else default


def base() -> ConfigDict:
    config = ConfigDict()
    config.seed = 42
    config.total_steps = 23_000
    config.batch_size = 4  # over all devices
    config.eval_batch_size = 4
    config.grad_accum = 1  # micro-batches per step: less memory, the same batch
    config.dtype = "auto"  # compute; bfloat16 on accelerators, float32 on CPU. Parameters are float32
    config.clip_norm = config_dict.placeholder(float)  # of the global gradient
    config.ema = config_dict.placeholder(float)  # decay of averaged parameters for evaluation, 0.999 say
    config.log_every = 50
    config.eval_every = 230
    config.patience = config_dict.placeholder(int)  # evaluations without a better score before it stops early
    config.checkpoint_every = config_dict.placeholder(int)  # besides every evaluation
    config.keep_checkpoints = 2  # the latest ones, besides the best: one to go on from should the last be damaged
    config.tracker = config_dict.placeholder(str)  # wandb or mlflow, beside TensorBoard
    config.mesh = dict(data=-1, fsdp=1)  # -1: all devices; fsdp > 1 also splits the parameters

    config.data = dict(
        source="folder",  # or tfds, built by data_builders/
        name="grass",  # gives the classes and the palette (ktda_jax/data/datasets.py)
        root=config_dict.placeholder(str),  # folder; for tfds its data_dir
        manual_dir=config_dict.placeholder(str),  # tfds: where the published folders are
        train_split="train",
        val_split="val",  # selects the best checkpoint
        test_split=config_dict.placeholder(str),  # evaluated at the end; None: val_split
        folds=config_dict.placeholder(str),  # name, name:K or place:K: an area of train_split in the place of val_split
        fold=0,  # which one
        bands=config_dict.placeholder(tuple),  # of multi-band files, counted from 1; None: 8-bit RGB
        rgb=config_dict.placeholder(tuple),  # those that the teacher and the figures see; None: the first three
        scale=config_dict.placeholder(tuple),  # (low, high), or one pair per band: what becomes 0 and 255
        nodata=config_dict.placeholder(float),  # value of pixels without data; None: as the file declares
        label_map=config_dict.placeholder(tuple),  # ((stored value or (r, g, b), class), ...); None: as stored
        unlabelled=config_dict.placeholder(str),  # images or scenes without labels, for the distillation
        unlabelled_share=0.5,  # of a batch's rows that come from them
        unlabelled_val=config_dict.placeholder(str),  # score a distillation without labels; None: a tenth of them
        crop=(256, 256),
        eval_scale="crop",  # how tiles are scored: squeezed to the crop, as published; or native, as predict maps them
        flip=0.5,
        rotate=False,  # quarter turns, too: all eight views of images from above
        zoom=config_dict.placeholder(tuple),  # (0.75, 1.5): crops enlarged by such a factor
        cutmix=0.0,  # probability that a part of another crop is pasted in
        rare_crops=0.0,  # share of crops around a class drawn by its inverse frequency
        photometric=True,
        on_corrupt="stop",  # or skip: take the next tile and count
        num_threads=config_dict.placeholder(int),
    )
    config.model = dict(
        student=dict(preset="base", depths=config_dict.placeholder(tuple), channels=config_dict.placeholder(tuple),
                     drop_path=0.4, remat=False),
        teacher=dict(preset="base", width=config_dict.placeholder(int), depth=config_dict.placeholder(int),
                     heads=config_dict.placeholder(int), image_size=(256, 256),
                     taps=config_dict.placeholder(tuple)),  # which layers teach, from 1; None: the last of each quarter
        encoder=config_dict.placeholder(str),  # None: the student; or teacher: the frozen one under the same decoder
        tap_scales=config_dict.placeholder(tuple),  # of the teacher's four taps; None: 1, as published
        standardize_taps=False,  # their channels, over the training images
        fam=True,
        align_grid=False,  # the student's grid on the teacher's tokens, of which the FAM then sees all
        fmm=dict(enabled=True, form="transformer", blocks=4, heads=8, mlp_ratio=4.0, remat=False),
        grid=config_dict.placeholder(tuple),  # of the FAM's output; None: the teacher's
        head="uper",  # or linear, for very few labels: a classifier on the FAM's maps, without the neck
        neck_channels=config_dict.placeholder(int),  # of all behind the FAM; None: the teacher's width, as published
        head_channels=512,
        aux_channels=256,  # 0: no auxiliary head
        dropout=0.1,
    )  # fmt: skip
    config.distill = True
    config.supervised = True  # False: student and FAM learn from the teacher alone (configs/distill.py)
    config.teacher = dict(
        mode="computed",  # in every training step; or precomputed, by python -m ktda_jax.extract
        features=config_dict.placeholder(str),  # folder of precomputed ones; None: features/<data.name>
        dtype="bfloat16",  # in which they are stored; or float16
        bands=config_dict.placeholder(tuple),  # those of data.bands that the teacher sees; None: red, green, blue
    )
    config.weights = dict(  # folders of ktda_jax.convert, source files, hf://ORG/NAME, or workdirs
        student=config_dict.placeholder(str),
        teacher=config_dict.placeholder(str),
        model=config_dict.placeholder(str),  # a whole KTDA model, to go on from or to evaluate
        new_classifier=False,  # of `model`: leave its classifiers out, for other classes
    )
    config.loss = dict(
        alpha=0.5,  # of KL against MSE
        temperature=1.0,
        kl_axis="width",  # as published; or channel, position
        aux_weight=0.4,
        class_weights=config_dict.placeholder(tuple),
        avg_non_ignore=False,  # as published: ignored pixels count in the mean's denominator
        distance="published",  # of student and teacher: KL and MSE; or mse, cosine
        tap_weights=config_dict.placeholder(tuple),  # of the four levels in it; None: 1
        cross_entropy=1.0,  # weights of what both heads learn from labels; as published, the cross entropy alone
        dice=0.0,
        focal=0.0,
        focal_gamma=2.0,
        lovasz=0.0,
        hard_share=config_dict.placeholder(float),  # of the labelled pixels, in the cross entropy; None: all pixels
    )
    config.semi = dict(  # learning from what the parameters' average says of data.unlabelled; needs config.ema
        weight=0.0,  # 0: not at all
        threshold=0.95,  # probability from which a pixel counts
        ramp=0,  # steps in which the weight rises
    )
    config.optimizer = dict(
        lr=6e-4, b1=0.9, b2=0.999, weight_decay=0.01,
        student_lr_mult=1.0,  # times lr, for student and FAM; 0: they stay as they came
    )  # fmt: skip
    config.schedule = dict(warmup=1150, poly_begin=config_dict.placeholder(int), power=0.9)
    return config


def shrink(config: ConfigDict) -> None:
    """A model of the same shape, about 3 M parameters, and a schedule of minutes on two CPU cores."""
    config.total_steps, config.eval_every, config.log_every = 300, 100, 10
    config.schedule.warmup = 20
    if config.schedule.poly_begin is not None:
        config.schedule.poly_begin = 10
    student, teacher, fmm = config.model.student, config.model.teacher, config.model.fmm
    student.preset, student.drop_path = "laptop", 0.0
    teacher.preset = "laptop"
    fmm.blocks, fmm.heads = 1, 1
    config.model.head_channels, config.model.aux_channels = 64, 32
    # A few hundred steps are too few to learn past colour distortion, drop path and the KL term of a random teacher.
    config.optimizer.lr, config.data.photometric, config.loss.alpha = 2e-3, False, 0.0


def transfer(config: ConfigDict) -> None:
    """Student, teacher and the loss between them: in these a distillation and the training after it agree."""
    config.data.crop = config.model.teacher.image_size = (252, 252)  # 18 x 18 patches of the teacher
    config.model.student.preset, config.model.student.drop_path = "v2_atto", 0.0
    config.model.teacher.preset, config.model.teacher.taps = "small", (3, 3, 6, 9)
    config.model.align_grid = config.model.standardize_taps = True
    config.loss.distance = "mse"
