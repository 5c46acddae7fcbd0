"""Learning-rate schedules, AdamW and the rule for weight decay."""

from collections.abc import Callable, Mapping

import jax.numpy as jnp
import optax

from ktda_jax import UserError

WARMUP_START = 1e-3  # mmengine's LinearLR start_factor as published


def warmup_poly(
    base: float, total_steps: int, *, warmup: int, poly_begin: int | None = None, power: float = 0.9
) -> Callable:
    """Linear warm-up times polynomial decay to 0 at the last step; learning rate by step (an array or a number).

    Both published schedules: the decay begins where the warm-up ends (grass, `poly_begin` None), or earlier
    (cloud), where mmengine lets both act on the current value, so that their factors multiply.
    """
    begin = warmup if poly_begin is None else poly_begin
    if total_steps < 1:
        raise UserError(f"config.total_steps is {total_steps}; give at least 1")
    if not 0 <= warmup or not 0 <= begin <= max(total_steps - 1, 0):
        raise UserError(
            f"config.schedule: warmup {warmup}, poly_begin {begin} do not fit into total_steps {total_steps}"
        )
    length = max(total_steps - begin - 1, 1)  # mmengine counts the last step as the end point

    def schedule(step):
        step = jnp.asarray(step)
        rising = WARMUP_START + (1 - WARMUP_START) * jnp.minimum(step / max(warmup - 1, 1), 1.0)
        falling = jnp.clip(1.0 - (step - begin) / length, 0.0, 1.0) ** power
        return base * jnp.where(warmup > 0, rising, 1.0) * falling

    return schedule


def decays(path: str) -> bool:
    """Whether a parameter takes weight decay: all do but those with 'norm' in their path, as published.

    BatchNorm (`bn`), the ConvNeXt downsampling LayerNorms (`ln`), layer scales and biases do decay.
    """
    return "norm" not in path


def decay_mask(params: Mapping) -> dict[str, bool]:
    return {path: decays(path) for path in params}


def of_student(path: str) -> bool:
    """Whether a parameter is the student's or the FAM's: what a distillation has trained before."""
    return path.startswith(("student/", "fam/"))


def adamw(
    learning_rate: Callable, *, b1: float = 0.9, b2: float = 0.999, weight_decay: float = 0.01,
    clip_norm: float | None = None, student_lr_mult: float = 1.0,
) -> optax.GradientTransformation:  # fmt: skip
    """AdamW as torch's, with optional clipping of the global gradient norm, and other steps for student and FAM."""
    parts = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    parts.append(optax.adamw(learning_rate, b1=b1, b2=b2, eps=1e-8, weight_decay=weight_decay, mask=decay_mask))
    if student_lr_mult != 1:
        parts.append(optax.masked(optax.scale(student_lr_mult), lambda params: {k: of_student(k) for k in params}))
    return optax.chain(*parts)
