"""What the tests of distillation share: scenes, a teacher, and the settings that name them."""

import numpy as np
import runs
import scene_files

from ktda_jax.config.model import model_of
from ktda_jax.config.settings import Settings
from ktda_jax.weights import folder
from ktda_jax.weights.folder import Weights

STANDARD = {"model.standardize_taps": True, "loss.distance": "mse", "model.student.drop_path": 0.0}
ALONE = {
    **STANDARD,
    "supervised": False,
    "total_steps": 200,
    "eval_every": 100,
    "log_every": 50,
    "data.photometric": False,
}


def write_scenes(place):
    """Two scenes of blocks of grey, as the tiles are."""
    rng = np.random.default_rng(1)
    for name, (height, width) in {"a.tif": (350, 216), "b.tif": (216, 288)}.items():
        blocks = np.kron(rng.integers(0, 5, (height // 9 + 1, width // 9 + 1)), np.ones((9, 9)))[:height, :width]
        pixels = (blocks[..., None] * 40 + rng.integers(0, 40, (height, width, 3))).astype(np.uint8)
        scene_files.write(place / name, pixels)
    return place


def save_teacher(path, tiles):
    config = runs.config(tiles)
    folder.save(path, Weights("teacher", model_of(Settings.of(config)).teacher, runs.random_teacher(config), {}))
    return path


def giving(images, teacher):
    """given(base, key=value...): the overrides of a config with these images and this teacher."""

    def make(base, **overrides):
        common = {"data.unlabelled": str(images), "weights.teacher": str(teacher)}
        return {**base, **common, **{k.replace("__", "."): v for k, v in overrides.items()}}

    return make
