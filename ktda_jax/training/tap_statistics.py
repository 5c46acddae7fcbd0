"""Mean and variance of the teacher's taps over the training images, measured before the first step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ktda_jax import sharding
from ktda_jax.config.model import compute_dtype, model_of
from ktda_jax.config.settings import Settings
from ktda_jax.models import flat
from ktda_jax.models.ktda import teacher_images
from ktda_jax.models.layers import at_least_float32
from ktda_jax.training.program import Program
from ktda_jax.training.state import TrainState

IMAGES = 256  # at least so many rows; some 80,000 tokens at 252 px
MEAN, VAR = "taps/mean", "taps/var"


def with_statistics(current: TrainState, program: Program, settings: Settings, batches: Any) -> TrainState:
    """The state with the statistics of the taps of the first training batches, which training then sees again."""
    position, count = batches.get_state(), -(-IMAGES // settings.batch_size)
    step, teacher, found = _moments(program, settings), program.teacher(), None
    for _ in range(count):
        batch = next(batches)
        rows = sharding.to_global(program.mesh, {k: batch[k] for k in ("image", "taps") if k in batch})
        mean, var = (np.asarray(x, np.float64) for x in jax.device_get(step(rows, teacher)))
        # All batches are of one size, so that the whole's moments are means of theirs.
        sums = np.stack([mean, var + mean**2])
        found = sums if found is None else found + sums
    batches.set_state(position)
    mean, square = found / count
    measured = {MEAN: mean, VAR: np.maximum(square - mean**2, 0)}
    stats = {k: measured[k].astype(v.dtype) if k in measured else v for k, v in current.batch_stats.items()}
    return dataclasses.replace(current, batch_stats=sharding.place(stats, program.shardings.batch_stats))


def _moments(program: Program, settings: Settings):
    """(rows, teacher) -> mean and variance of each level's channels, (4, C); levels without a tap have 0 and 1."""
    model, dtype = model_of(settings), compute_dtype(settings.dtype)

    def moments(rows, teacher):
        taps = rows.get("taps")
        if taps is None:
            seen = teacher_images(rows["image"], model.seen, model.teacher, dtype)
            taps = flat.merge(program.teacher_graphdef, teacher, {})(seen)
        taps = [None if tap is None else at_least_float32(tap) for tap in taps]
        width = model.teacher.width
        means = [jnp.zeros(width) if tap is None else tap.mean((0, 1, 2)) for tap in taps]
        variances = [jnp.ones(width) if tap is None else tap.var((0, 1, 2)) for tap in taps]
        return jnp.stack(means), jnp.stack(variances)

    return jax.jit(sharding.on_mesh(program.mesh, moments), out_shardings=sharding.replicated(program.mesh))
