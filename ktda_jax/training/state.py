"""The train state: what a checkpoint holds, and a step turns into the next."""

import dataclasses
from typing import Any

import jax

from ktda_jax.models.flat import Arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a resumed run needs besides the data position. Random keys derive from (seed, step)."""

    step: jax.Array  # int32 scalar, optimiser steps done
    params: Arrays
    batch_stats: Arrays
    opt_state: Any
    ema: Arrays | None  # exponential moving average of params, when asked for
