"""What a token's position alone explains of the teacher, by layer: the share that no student need see an image for."""

import pathlib
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from ktda_jax import sharding
from ktda_jax.config.model import model_of
from ktda_jax.config.settings import Settings
from ktda_jax.data.teacher_features import TeacherFeatures
from ktda_jax.models import flat
from ktda_jax.models.ktda import teacher_images
from ktda_jax.training import program


def shares(settings: Settings, stored: pathlib.Path, held_out: Iterable[dict]) -> dict[str, float]:
    """{'layer 3': share}: the mean of each position over the training windows, whose features are `stored`, as the
    prediction for the images held out; channels standardised over the training windows, 1 - error / variance as in
    training/explained.py.
    """
    features, model = TeacherFeatures(stored, {}), model_of(settings)
    total, squares = 0.0, 0.0
    for index in range(len(features)):
        taps = features.read(index, False).astype(np.float64)  # (n, h, w, C)
        total, squares = total + taps, squares + np.square(taps).mean((1, 2))
    by_position = total / len(features)
    mean = by_position.mean((1, 2))
    scale = 1 / np.sqrt(squares / len(features) - mean**2)
    layers = sorted({index for index in model.teacher.tapped if index is not None})
    graphdef, _, place = program.frozen_teacher(
        settings.weights.teacher, 0, model, jnp.float32, sharding.make_mesh(1, 1)
    )
    arrays = place()

    @jax.jit
    def run(arrays, images):
        taps = flat.merge(graphdef, arrays, {})(teacher_images(images, model.seen, model.teacher, jnp.float32))
        return [taps[model.teacher.tapped.index(layer)] for layer in layers]

    found = [[] for _ in layers]
    for batch in held_out:
        for level, taps in enumerate(run(arrays, batch["image"])):
            found[level].append(np.asarray(taps, np.float64)[batch["mask"]])
    result = {}
    for level, layer in enumerate(layers):
        taps = np.concatenate(found[level])
        error = np.square((taps - by_position[level]) * scale[level]).sum()
        variance = np.square((taps - taps.mean((0, 1, 2))) * scale[level]).sum()
        result[f"layer {layer + 1}"] = round(float(1 - error / variance), 4)
    return result
