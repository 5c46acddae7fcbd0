"""KTDA with DINOv3: a frozen ViT teaches a ConvNeXt-B that starts from ImageNet, DINOv3's own ConvNeXt, or nothing.

Command:   python -m ktda_jax.main --config=configs/dinov3.py:web,imagenet --config.data.root=DIR \
               --config.data.classes=water,road,field
Data:      as for configs/custom.py: DIR/img_dir/{train,val}, DIR/ann_dir/{train,val}, 8-bit RGB of at least 256 px a
           side, class numbers, 255 where a pixel has no label. Several bands, scale, nodata: flags of config.data.
Arguments: web        the teacher is a ViT-B/16 trained on images of the web (default)
           satellite  a ViT-L/16 trained on satellite images, with their statistics; the smallest of these
           imagenet, dinov3, nothing    where the student starts (default imagenet)
           tiny       a model and schedule for a laptop, without weights: to see that it runs
           The student without the teacher: --config.distill=False. Another size: its preset and its weights, as
           --config.model.teacher.preset=dinov3_small with hf://facebook/dinov3-vits16-pretrain-lvd1689m
Weights:   DINOv3's are given out on request, at https://huggingface.co/facebook/NAME of each; then `hf auth login`.
           Files of Meta and timm do as well: --config.weights.teacher=dinov3_vitb16_pretrain_lvd1689m-73cec8be.pth
Time, score: not measured by us, who could not have these weights. As published, linear layers on frozen features reach
           on ADE20k 46.3 mIoU (ConvNeXt-B), 47.0 (ViT-S), 51.8 (ViT-B) and 55.9 (the 7B from which these three are
           distilled; arXiv 2508.10104). By that measure a ViT-B knows 5.5 more than a ConvNeXt that learned from the
           7B on 1.7 billion images: about what this teacher has to give to that student, and no more.
Which one: "the web trained ViT outperforms the satellite trained ViT on semantic but not metric tasks" in the paper: on
           trees as a class, not on their height (one who made these comparisons, facebookresearch/dinov3 issue 117).
"""

from ml_collections import ConfigDict, config_dict

from ktda_jax.config.base import arguments, base, one_of, shrink

HUB = "hf://facebook/"
TEACHERS = {  # argument: preset, weights
    "web": ("dinov3_base", "dinov3-vitb16-pretrain-lvd1689m"),
    "satellite": ("dinov3_large_sat", "dinov3-vitl16-pretrain-sat493m"),
}
STUDENTS = {
    "imagenet": ("base", "convnext-base-224"),
    "dinov3": ("dinov3_base", "dinov3-convnext-base-pretrain-lvd1689m"),
    "nothing": ("base", None),
}


def get_config(argument: str = "") -> ConfigDict:
    flags = arguments(argument, *TEACHERS, *STUDENTS, "tiny")
    teacher, student = one_of(flags, TEACHERS, "web"), one_of(flags, STUDENTS, "imagenet")
    config = base()
    config.data.name, config.data.classes = "custom", config_dict.placeholder(str)
    config.data.eval_scale, config.data.rotate = "native", True
    config.data.crop = config.model.teacher.image_size = (256, 256)  # 16 x 16 patches
    config.total_steps, config.eval_every, config.schedule.warmup = 5_000, 250, 250
    config.model.neck_channels = 768  # the same decoder under both teachers
    config.model.teacher.preset, name = TEACHERS[teacher]
    config.weights.teacher = HUB + name
    config.model.student.preset, name = STUDENTS[student]
    config.weights.student = name and HUB + name
    if "tiny" in flags:
        shrink(config)
        config.model.neck_channels = config.weights.teacher = config.weights.student = None
    return config
