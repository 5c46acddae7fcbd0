"""--extend: more steps or another batch size, from the latest checkpoint on."""

import functools
import json
import os
import signal

import numpy as np
import pytest
import runs

from ktda_jax import UserError, sharding
from ktda_jax.config import extension
from ktda_jax.data import rows
from ktda_jax.training import loop, optim
from ktda_jax.training.checkpoint import Checkpoints
from ktda_jax.training.inputs import open_inputs
from ktda_jax.training.program import build


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return runs.make_tiles(tmp_path_factory.mktemp("tiles"))


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


def test_extended_is_as_if_it_had_been_so_from_there(toy, tiles, tmp_path, capsys):
    """Steps 5 to 8 of 4 + 4, stopped at 6, with other batches: the tiles go on where they were."""
    seen = []
    opened = rows.Shuffled.read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows.Shuffled, "read", lambda self, i: seen.append(i) or opened(self, i))
        flags = {"eval_every": 2, "data.num_threads": 0}
        toy()
        loop.train_and_evaluate(runs.config(tiles, {**flags, "total_steps": 4, "batch_size": 2}), tmp_path)
        longer = runs.config(tiles, {**flags, "total_steps": 8, "batch_size": 4})
        with pytest.raises(
            UserError, match=r"batch_size \(saved 2, now 4\).*or --extend to go on from step 4 with these"
        ):
            loop.train_and_evaluate(longer, tmp_path)
        toy(at={6: functools.partial(os.kill, os.getpid(), signal.SIGTERM)})
        assert loop.train_and_evaluate(longer, tmp_path, extend=True) is None
        assert "extended at step 4: batch_size 2 -> 4, total_steps 4 -> 8; the learning rate" in capsys.readouterr().out
        toy()
        loop.train_and_evaluate(longer, tmp_path)  # the plain command
    order = np.concatenate([np.random.default_rng([42, e]).permutation(6) for e in range(4)])
    assert seen == order.tolist()  # 4 steps of 2 and 4 of 4 are 24 tiles
    (entry,) = json.loads((tmp_path / "run.json").read_text())["extended"]
    assert entry == {"step": 4, "changed": {"batch_size": [2, 4], "total_steps": [4, 8]}}
    assert json.loads((tmp_path / "config.json").read_text())["total_steps"] == 8


def test_what_cannot_be_extended(toy, tiles, tmp_path):
    toy()
    loop.train_and_evaluate(runs.config(tiles), tmp_path)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match=r"total_steps is 5, but the latest checkpoint of .* is step 6; --extend needs"):
        loop.train_and_evaluate(runs.config(tiles, {"total_steps": 5}), tmp_path, extend=True)
    with pytest.raises(UserError, match=r"seed \(saved 42, now 1\).*; use another --workdir, or the saved settings$"):
        loop.train_and_evaluate(runs.config(tiles, {"total_steps": 9, "seed": 1}), tmp_path, extend=True)
    assert (tmp_path / "config.json").read_text() == before
