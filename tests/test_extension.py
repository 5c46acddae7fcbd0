"""--extend: more steps or another batch size, from the latest checkpoint on; the loop's part is in test_train.py."""

import json

import numpy as np
import pytest
import runs

from ktda_jax import sharding
from ktda_jax.config import extension
from ktda_jax.training import loop, optim
from ktda_jax.training.checkpoint import Checkpoints
from ktda_jax.training.inputs import open_inputs
from ktda_jax.training.program import build


@pytest.mark.slow
def test_from_there_on_it_is_the_longer_training_bit_for_bit(tmp_path, capsys):
    """The state of step 4 of 4, and then the steps 5 to 8 of 8: their batches, random draws and learning rates."""
    tiles = runs.make_tiles(tmp_path / "tiles")
    config, longer = (runs.config(tiles, {"total_steps": n, "eval_every": 4, "ema": 0.9}) for n in (4, 8))
    loop.train_and_evaluate(config, tmp_path / "run")
    settings = runs.settings(tiles, {"total_steps": 8, "eval_every": 4, "ema": 0.9})
    program = build(settings)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        state, position = checkpoints.restore(4, program.abstract, program.shardings)
    batches, teacher = open_inputs(settings, None).batches, program.teacher()
    batches.set_state(position)
    for _ in range(4):
        batch = next(batches)
        batch = sharding.to_global(program.mesh, {k: batch[k] for k in ("image", "label")})
        state, _ = program.train_step(state, batch, teacher)

    loop.train_and_evaluate(longer, tmp_path / "run", extend=True)
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        extended, _ = checkpoints.restore(8, program.abstract, program.shardings)
    for part in ("params", "batch_stats", "ema"):
        ours, theirs = getattr(extended, part), getattr(state, part)
        assert all(np.asarray(value).tobytes() == np.asarray(theirs[path]).tobytes() for path, value in ours.items())

    rates = {row["step"]: row["train/lr"] for row in runs.rows(tmp_path / "run") if "train/lr" in row}
    before, after = (optim.warmup_poly(settings.optimizer.lr, n, warmup=settings.schedule.warmup) for n in (4, 8))
    expected = [float((before if step < 4 else after)(step)) for step in range(8)]
    assert list(rates.values()) == pytest.approx(expected, rel=1e-6)
    assert f"for step 5 it is {expected[4]:.3g} where it was {float(before(4)):.3g}" in capsys.readouterr().out


def test_extensions_add_up():
    """Wherever a training goes on from, the first new tile is the one after the last that its checkpoint has seen."""
    one = {"step": 10, "changed": {"batch_size": [4, 8]}}
    two = {"step": 20, "changed": {"batch_size": [8, 2]}}
    assert extension.first_row([one, two]) + 20 * 2 == 10 * 4 + 10 * 8


@pytest.mark.parametrize(
    "step, changed, expected",
    [
        (12, {}, [{"step": 10, "changed": {"batch_size": [4, 8]}}]),  # the plain command
        (10, {"batch_size": [4, 8]}, [{"step": 10, "changed": {"batch_size": [4, 8]}}]),  # killed before config.json
        (10, {"batch_size": [8, 16]}, [{"step": 10, "changed": {"batch_size": [4, 16]}}]),
        (6, {}, [{"step": 6, "changed": {"batch_size": [4, 8]}}]),  # the checkpoint of step 10 was damaged
        (0, {}, []),
    ],
)
def test_an_extension_counts_from_the_checkpoint_that_is_there(tmp_path, step, changed, expected):
    (tmp_path / "run.json").write_text(json.dumps({"extended": [{"step": 10, "changed": {"batch_size": [4, 8]}}]}))
    assert extension.recorded(tmp_path, step, changed) == expected
