"""A linear probe of the frozen teacher: multinomial logistic regression per token on its four taps.

What the teacher's features are worth without any decoder, student or context: the yardstick for KTDA, trained and
scored on the same tiles. Targets are the class shares of the pixels that a token covers; the logits are resized
bilinearly to pixels and scored like every other model.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from ktda_jax import sharding
from ktda_jax.config.model import model_of
from ktda_jax.config.settings import Settings
from ktda_jax.data.datasets import IGNORE
from ktda_jax.data.images import read_image
from ktda_jax.data.labels import read_label
from ktda_jax.metrics.confusion import confusion_matrix
from ktda_jax.models import flat
from ktda_jax.models.ktda import normalize
from ktda_jax.models.layers import resize
from ktda_jax.training import program


def features(config, tiles: dict) -> dict[str, list[np.ndarray]]:
    """{name: four of float32 (h, w, C)}: the teacher's taps of whole tiles."""
    settings = Settings.of(config)
    model = model_of(settings)
    mesh = sharding.make_mesh(1, 1)
    graphdef, _, place = program.frozen_teacher(settings.weights.teacher, settings.seed, model, jnp.float32, mesh)
    arrays = place()

    @jax.jit
    def taps(arrays, image):
        seen = normalize(image[None], jnp.float32, model.teacher.mean, model.teacher.std)
        return [tap[0] for tap in flat.merge(graphdef, arrays, {})(seen)]

    return {name: jax.device_get(taps(arrays, read_image(str(image)))) for name, (image, _) in tiles.items()}


def colours(tiles: dict, patch: int) -> dict[str, np.ndarray]:
    """{name: float32 (h, w, 3)}: mean colour of every patch x patch pixels, the last ones padded by their edge."""
    found = {}
    for name, (image, _) in tiles.items():
        pixels = read_image(str(image)).astype(np.float32)
        (height, width), padding = pixels.shape[:2], [(0, -size % patch) for size in pixels.shape[:2]]
        padded = np.pad(pixels, [*padding, (0, 0)], mode="edge")
        found[name] = padded.reshape(-(-height // patch), patch, -(-width // patch), patch, 3).mean((1, 3))
    return found


def class_shares(label: np.ndarray, patch: int, num_classes: int) -> np.ndarray:
    """uint8 (H, W) -> float32 (h, w, num_classes): pixels of each class per token over patch * patch; ignored: none."""
    padding = [(0, -size % patch) for size in label.shape]
    label = np.pad(label, padding, constant_values=IGNORE)
    h, w = (size // patch for size in label.shape)
    hot = label[..., None] == np.arange(num_classes)
    return hot.reshape(h, patch, w, patch, num_classes).mean((1, 3), dtype=np.float32)


@functools.partial(jax.jit, static_argnames="classes")
def _loss(parameters, x, targets, l2, classes):
    """Cross entropy per labelled pixel plus l2 / 2 times the squared weights; and its gradient."""

    def loss(parameters):
        table = parameters.reshape(-1, classes)
        logits = x @ table[:-1] + table[-1]
        entropy = -(targets * jax.nn.log_softmax(logits)).sum() / targets.sum()
        return entropy + 0.5 * l2 * jnp.square(table[:-1]).sum()

    return jax.value_and_grad(loss)(parameters)


def fit(x: np.ndarray, targets: np.ndarray, l2: float, *, iterations: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """x: (N, F), targets: (N, C) -> weights (F, C) and bias (C,), for x as it came. L-BFGS."""
    mean, deviation = x.mean(0), x.std(0) + 1e-6
    scaled, classes = jnp.asarray((x - mean) / deviation), targets.shape[1]

    def loss(parameters):
        value, gradient = _loss(jnp.asarray(parameters, jnp.float32), scaled, jnp.asarray(targets), l2, classes)
        return float(value), np.asarray(gradient, np.float64)

    start = np.zeros((x.shape[1] + 1) * classes)
    found = scipy.optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": iterations})
    table = found.x.reshape(-1, classes)
    weights = table[:-1] / deviation[:, None]
    return weights.astype(np.float32), (table[-1] - mean @ weights).astype(np.float32)


def run(taps: dict, tiles: dict, train, val, *, patch: int, num_classes: int, l2: float) -> np.ndarray:
    """Trains on the tiles `train` and gives the confusion matrix int64 (C, C) over the pixels of `val`."""
    labels = {name: read_label(str(tiles[name][1])) for name in (*train, *val)}
    x = np.concatenate([taps[n].reshape(-1, taps[n].shape[-1]) for n in train])
    targets = np.concatenate([class_shares(labels[n], patch, num_classes).reshape(-1, num_classes) for n in train])
    weights, bias = fit(x, targets, l2)
    total = np.zeros((num_classes, num_classes), np.int64)
    for name in val:
        logits = jnp.asarray(taps[name] @ weights + bias)
        whole = resize(logits[None], (logits.shape[0] * patch, logits.shape[1] * patch))
        height, width = labels[name].shape
        predicted = jnp.argmax(whole[:, :height, :width], -1)
        total += np.asarray(confusion_matrix(labels[name][None], predicted, num_classes), np.int64)
    return total
