"""A program in place of the real one, for tests of the loop around it (the fixture `toy` of conftest.py).

Its parameter `seen` depends on every image, so that equal states have seen equal batches in equal order. Figures
take longer than all the rest, and are left out unless asked for.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import runs

from ktda_jax import sharding
from ktda_jax.training import loop, scoring
from ktda_jax.training.predicted import Model, Predictor
from ktda_jax.training.program import Program
from ktda_jax.training.state import TrainState


def install(monkeypatch, quality=None, at=None, loss=None, ema=None, figures=False) -> Program:
    """quality={step: share of right pixels}, at={step: callable}, loss={step: value} of the returned program."""
    if not figures:
        monkeypatch.setattr(scoring.evaluate, "write_report", lambda *_: None)
        monkeypatch.setattr(scoring.plots, "save_curves", lambda *_: None)
    mesh = sharding.make_mesh(1)

    def init():
        zero = jnp.zeros((), jnp.int32)
        params = {"seen": jnp.zeros(()), "steps": jnp.zeros(())}
        return TrainState(zero, params, {}, (), ema and {"seen": jnp.zeros(()), "steps": jnp.full((), ema)})

    @jax.jit
    def advance(current, batch):
        params = {
            "seen": 0.9 * current.params["seen"] + batch["image"].mean(),
            "steps": current.params["steps"] + 1,
        }
        return dataclasses.replace(current, step=current.step + 1, params=params)

    def train_step(current, batch, teacher):
        current = advance(current, batch)
        with jax.transfer_guard("allow"):
            step = int(current.step)
            (at or {}).get(step, lambda: None)()
            return current, {"loss": jnp.asarray((loss or {}).get(step, 1 / step)), "acc": jnp.ones(())}

    def eval_step(params, stats, batch, probabilities=False):
        share = (quality or {}).get(int(params["steps"]), 0.5)
        right = np.eye(runs.CLASSES) * share * 1000
        wrong = np.roll(np.eye(runs.CLASSES), 1, 1) * (1 - share) * 1000
        confusions = np.zeros((*batch["mask"].shape, runs.CLASSES, runs.CLASSES), np.int32)
        confusions[0] = np.nan_to_num(right + wrong)  # the first row is always a tile
        size = batch["label"].shape
        uniform = jnp.full((size[0], runs.CLASSES, *size[1:]), 1 / runs.CLASSES)
        return jnp.asarray(confusions), jnp.zeros_like(batch["label"]), uniform

    start = jax.eval_shape(init)
    program = Program(
        encoder=None,
        mesh=mesh, graphdef=None, optimizer=None, abstract=start,
        shardings=sharding.tree_shardings(mesh, start), init=init, teacher=dict, train_step=train_step,
        eval_step=eval_step, predictor=Predictor(Model(None, None, runs.CLASSES, 3), mesh, (64, 64), 2, eval_step),
        compile_step=lambda *args, **options: None, arguments=(),
    )  # fmt: skip
    for module in (loop, scoring):
        monkeypatch.setattr(module, "build", lambda config, **options: program)
    return program
