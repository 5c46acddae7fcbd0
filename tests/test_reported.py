"""Losses stay on the devices until somebody sees them, none that is not finite gets by, few steps are on their way."""

import io

import jax
import numpy as np
import pytest

from ktda_jax import UserError
from ktda_jax.training import reported
from ktda_jax.training.reported import AHEAD, TIMES, Losses, Pace
from ktda_jax.training.writers import Writer


class Loss:
    """A device's number, which says when it was waited for and fetched."""

    def __init__(self, value: float, log: list, name: int):
        self._value, self._log, self._name = value, log, name

    def block_until_ready(self):
        self._log.append(("waited", self._name))

    def __array__(self, dtype=None, copy=None):
        self._log.append(("fetched", self._name))
        return np.array(self._value, np.float32)


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(reported.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def train(tmp_path, clock):
    """train(steps, values={step: loss}, seconds=of a step, ...): what was waited for and fetched, in order."""

    def run(steps, values=None, seconds=0.0, log_every=10, enabled=True, flush=True):
        log, stream = [], io.StringIO()
        with Writer(tmp_path, total_steps=1000, enabled=enabled, stream=stream) as writer:
            losses = Losses(log_every, 4, writer, lambda: 3)
            for step in range(1, steps + 1):
                losses.push(
                    step, {"acc": np.float32(1), "loss": Loss((values or {}).get(step, 1 / step), log, step)}, 0
                )
                clock[0] += seconds
            if flush:
                losses.flush()
        return log

    return run


def test_losses_are_fetched_where_they_are_seen(train, tmp_path):
    log = train(35)
    assert [what for what in log if what[0] == "waited"] == [("waited", step) for step in range(1, 36)]
    fetched = [name for what, name in log if what == "fetched"]
    assert fetched == list(range(1, 36))  # all of them, in order
    turns = [log[k - 1][1] for k in range(1, len(log)) if log[k][0] == "fetched" and log[k - 1][0] == "waited"]
    assert turns == [1, 10, 20, 30, 35]
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [row[: row.index(",")] for row in rows] == [f'{{"step": {step}' for step in (1, 10, 20, 30)]
    assert rows[0] == '{"step": 1, "train/loss": 1.0, "train/acc": 1.0}'  # the loss first; no time of the first step


def test_few_steps_are_on_their_way(train):
    """The first one is waited for, then the one `AHEAD` steps before."""
    waited = [name for what, name in train(8, flush=False) if what == "waited"]
    assert waited == list(range(1, 8 - AHEAD + 1))


def test_the_display_and_long_intervals_fetch_too(train, monkeypatch):
    def turns(log):
        return [log[k - 1][1] for k in range(1, len(log)) if log[k][0] == "fetched" and log[k - 1][0] == "waited"]

    assert turns(train(29, seconds=1.0, log_every=1000)) == [1, 9, 19, 29]  # a line every ten seconds
    monkeypatch.setattr(reported, "HELD", 7)
    assert turns(train(21, log_every=1000, enabled=False)) == [1, 8, 15, 21]


@pytest.mark.parametrize("step", [1, 5, 10, 13])
def test_the_first_step_that_is_not_finite_is_named(train, tmp_path, step):
    with pytest.raises(
        UserError, match=f"not finite at step {step}: loss is nan; the last checkpoint is step 3. Lower"
    ):
        train(15, dict.fromkeys(range(step, 16), float("nan")))
    rows = (tmp_path / "metrics.jsonl").read_text() if step > 1 else ""
    assert "null" not in rows and rows.count("\n") == (step > 1) + (step > 10)


def test_pace_leaves_out_what_is_no_training(clock):
    pace = Pace(batch_size=4)
    with pace.waiting():
        clock[0] += 50  # before the first step is done, while it is compiled
    assert pace.since(1) == {}
    pace.start(1)
    for _ in range(10):
        with pace.waiting():
            clock[0] += 0.5
        clock[0] += 1.5
    with pace.paused():
        clock[0] += 1000
    assert pace.since(11) == pytest.approx(dict(zip(TIMES, (2.0, 0.25), strict=True)))
    clock[0] += 1
    assert pace.since(12) == pytest.approx(dict(zip(TIMES, (4.0, 0.0), strict=True)))


def test_losses_of_real_arrays(tmp_path):
    with Writer(tmp_path, total_steps=3, stream=io.StringIO()) as writer:
        losses = Losses(1, 4, writer, lambda: None)
        for step in range(1, 4):
            losses.push(step, jax.jit(lambda x: {"loss": x / 2, "lr": x})(np.float32(step)), step == 3)
        losses.flush()
    last = (tmp_path / "metrics.jsonl").read_text().splitlines()[-1]
    assert last.startswith('{"step": 3, "train/loss": 1.5, "train/lr": 3.0, "train/skipped_tiles": 1.0, ')
    assert '"train/images_per_s": ' in last and '"train/data_wait": 0.0}' in last
