"""Tiles in, weighted probabilities out: the model on all local devices, each with whole tiles of the batch."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ktda_jax import sharding
from ktda_jax.models import flat
from ktda_jax.models.ktda import full_size
from ktda_jax.models.layers import resize

# Test-time augmentation: the mirror images at scale 1, and two other scales upright: 6.1 times the work.
FLIPS = ((), (2,), (1,), (1, 2))  # axes of (B, H, W, C)
SCALES = (0.75, 1.25)
MULTIPLE = 32  # to which other sizes are rounded: the student's coarsest stride


@dataclasses.dataclass(frozen=True)
class Model:
    """`apply(arrays, images)`: uint8 or float 0..255 (B, H, W, bands) -> probabilities (B, H, W, classes)."""

    apply: Callable[[Any, jax.Array], jax.Array]
    arrays: Any
    bands: int
    classes: int


def of_segmenter(segmenter, *, tta: bool = False) -> Model:
    """A `prediction.segmenter.Segmenter` as the pipeline wants it."""

    def apply(arrays, images):
        logits = flat.merge(segmenter.graphdef, *arrays)(images).logits
        return jax.nn.softmax(full_size(logits, images.shape[1:3]), -1)

    config = segmenter.config
    arrays = segmenter.params, segmenter.stats
    return Model(augmented(apply) if tta else apply, arrays, config.student.bands, config.num_classes)


def augmented(apply):
    """The mean of `apply` over FLIPS and SCALES."""

    def mean(arrays, images):
        size = images.shape[1:3]
        total = sum(jnp.flip(apply(arrays, jnp.flip(images, axes)), axes) for axes in FLIPS)
        for scale in SCALES:
            other = [max(round(side * scale / MULTIPLE), 1) * MULTIPLE for side in size]
            total += resize(apply(arrays, resize(images.astype(jnp.float32), other)), size)
        return total / (len(FLIPS) + len(SCALES))

    return mean


class Step:
    """One compiled program for one shape of batch: rows of tiles over all local devices, or over `devices`."""

    def __init__(
        self, model: Model, tile: tuple[int, int], batch_size: int, *, devices: Sequence[jax.Device] | None = None,
        compiler_options: dict | None = None,
    ):  # fmt: skip
        """batch_size: tiles over all devices; raised to a multiple of their number."""
        self.mesh = sharding.make_mesh(devices=devices or jax.local_devices())
        self.batch_size = -(-batch_size // self.mesh.size) * self.mesh.size
        self.shape = (self.batch_size, model.bands, *tile)
        self._rows = sharding.batch_sharding(self.mesh)
        self.arrays = jax.device_put(model.arrays, sharding.replicated(self.mesh))  # others of the same shapes may come

        def run(arrays, images, rows, columns):
            found = model.apply(arrays, jnp.transpose(images, (0, 2, 3, 1)))
            # Planes of one class are what the host can add up and compare fast.
            found = jnp.transpose(found, (0, 3, 1, 2)).astype(jnp.float32)
            return found * rows[:, None, :, None] * columns[:, None, None, :]

        self._run = jax.jit(
            sharding.on_mesh(self.mesh, run), out_shardings=self._rows, compiler_options=compiler_options
        )

    def __call__(self, images: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
        """images: uint8 `shape`; rows (B, h) and columns (B, w): weights -> (B, classes, h, w) float32, in flight.

        The arrays must not be changed afterwards: on CPU the device may read them in place.
        """
        return self._run(self.arrays, *(jax.device_put(x, self._rows) for x in (images, rows, columns)))
