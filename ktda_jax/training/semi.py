"""Semi-supervised training: the parameters' average labels images without labels, and the student learns from that.

As in FixMatch (Sohn et al., 2020) with CutMix (Yun et al., 2019), for segmentation: the average sees the image as it
is, the student its colours distorted and a rectangle of it exchanged for one of another image. Only pixels of which the
average is confident count. BatchNorm's running statistics are left alone: they are those of labelled rows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ktda_jax.config.settings import Semi
from ktda_jax.data.datasets import IGNORE
from ktda_jax.models.ktda import KTDA, full_size
from ktda_jax.training.losses import cross_entropy

BRIGHTNESS, CONTRAST, SATURATION = 48.0, 0.5, 0.5  # +- grey levels; factors of 1 +- these


def loss(
    student: KTDA, average: KTDA, images: jax.Array, key: jax.Array, step: jax.Array, config: Semi
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted cross entropy of the `student` against what the `average` says of images (B, H, W, bands), and terms.

    The mean is over all pixels, also those of which the average is not confident.
    """
    labels, confident = pseudo_labels(lambda x: average(x).logits, images, config.threshold)
    keys = jax.random.split(key, 3)
    strong, labels = cutmix(distorted(images, keys[0]), labels, keys[1])
    logits = student(strong, train=True, key=keys[2]).logits
    weight = config.weight * jnp.clip(step / max(config.ramp, 1), 0, 1)
    value = weight * cross_entropy(full_size(logits, labels.shape[1:3]), labels)
    return value, {"pseudo": value, "confident": 100 * confident}


def pseudo_labels(
    logits: Callable[[jax.Array], jax.Array], images: jax.Array, threshold: float
) -> tuple[jax.Array, jax.Array]:
    """uint8 (B, H, W), 255 where the highest probability is below `threshold`; and the share of the other pixels."""
    probabilities = jax.nn.softmax(full_size(logits(images), images.shape[1:3]))
    confident = probabilities.max(-1) >= threshold
    labels = jnp.where(confident, jnp.argmax(probabilities, -1), IGNORE).astype(jnp.uint8)
    return jax.lax.stop_gradient(labels), jax.lax.stop_gradient(confident.mean())


def distorted(images: jax.Array, key: jax.Array) -> jax.Array:
    """Contrast, brightness and, of each pixel about its grey, saturation, per image: float32 0..255."""
    rows = (images.shape[0], 1, 1, 1)
    contrast, brightness, saturation = (
        jax.random.uniform(k, rows, minval=-1, maxval=1) for k in jax.random.split(key, 3)
    )
    x = images.astype(jnp.float32)
    x = x * (1 + CONTRAST * contrast) + BRIGHTNESS * brightness
    grey = x.mean(-1, keepdims=True)
    return jnp.clip(grey + (x - grey) * (1 + SATURATION * saturation), 0, 255)


def cutmix(images: jax.Array, labels: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A rectangle of each image and label comes from the next one: at a random place, half of the image on average."""
    count, height, width = labels.shape
    sizes, places = (jax.random.uniform(k, (2, count, 1)) for k in jax.random.split(key))
    sizes = 0.45 + 0.5 * sizes  # of each side
    inside = []
    for axis, length in enumerate((height, width)):
        start = places[axis] * (1 - sizes[axis])
        x = (jnp.arange(length) + 0.5) / length
        inside.append((x >= start) & (x < start + sizes[axis]))
    box = inside[0][:, :, None] & inside[1][:, None, :]
    others, other_labels = jnp.roll(images, 1, axis=0), jnp.roll(labels, 1, axis=0)
    return jnp.where(box[..., None], others, images), jnp.where(box, other_labels, labels)
