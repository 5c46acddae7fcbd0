"""What to cite for a model, as BibTeX: the method, and the networks that it is made of."""

from ktda_jax.data.datasets import dataset_info
from ktda_jax.models.ktda import KTDAConfig

KTDA = dataset_info("grass").citation
DINOV2 = """\
@article{oquab2024dinov2,
  title={DINOv2: Learning Robust Visual Features without Supervision},
  author={Oquab, Maxime and Darcet, Timoth{\\'e}e and Moutakanni, Th{\\'e}o and Vo, Huy and
    Szafraniec, Marc and others},
  journal={Transactions on Machine Learning Research},
  year={2024},
  note={arXiv:2304.07193}
}"""
REGISTERS = """\
@inproceedings{darcet2024vision,
  title={Vision Transformers Need Registers},
  author={Darcet, Timoth{\\'e}e and Oquab, Maxime and Mairal, Julien and Bojanowski, Piotr},
  booktitle={International Conference on Learning Representations (ICLR)},
  year={2024},
  note={arXiv:2309.16588}
}"""
DINOV3 = """\
@article{simeoni2025dinov3,
  title={DINOv3},
  author={Sim{\\'e}oni, Oriane and Vo, Huy V. and Seitzer, Maximilian and Baldassarre, Federico and
    Oquab, Maxime and others},
  journal={arXiv:2508.10104},
  year={2025}
}"""
CONVNEXT = """\
@inproceedings{liu2022convnet,
  title={A ConvNet for the 2020s},
  author={Liu, Zhuang and Mao, Hanzi and Wu, Chao-Yuan and Feichtenhofer, Christoph and Darrell, Trevor and
    Xie, Saining},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year={2022},
  note={arXiv:2201.03545}
}"""
CONVNEXT_V2 = """\
@inproceedings{woo2023convnext,
  title={ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders},
  author={Woo, Sanghyun and Debnath, Shoubhik and Hu, Ronghang and Chen, Xinlei and Liu, Zhuang and Kweon, In So and
    Xie, Saining},
  booktitle={IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year={2023},
  note={arXiv:2301.00808}
}"""


def of_model(config: KTDAConfig, *, taught: bool = True) -> list[str]:
    """taught: whether a teacher had a part in it."""
    cited = [KTDA]
    if config.encoder != "teacher":
        cited.append(CONVNEXT_V2 if config.student.v2 else CONVNEXT)
    if taught and config.teacher.foreign is None:
        cited.append(DINOV3 if config.teacher.rope else DINOV2)
        if config.teacher.registers and not config.teacher.rope:
            cited.append(REGISTERS)
    return cited
