"""A training that goes on with more steps or another batch size (--extend): what may change, and run.json's record.

`extended` in run.json is a list of {'step': n, 'changed': {key: [before, now]}}: from the checkpoint of step n on.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence

from ktda_jax import UserError
from ktda_jax.data import buckets

MAY_CHANGE = ("total_steps", "batch_size")
Changes = Mapping[str, Sequence]  # by setting: the value before, and now


def check(workdir: pathlib.Path, total_steps: int, latest: int) -> None:
    """UserError where no step is left to be trained."""
    if total_steps <= latest:
        raise UserError(
            f"config.total_steps is {total_steps}, but the latest checkpoint of {workdir} is step {latest}; "
            "--extend needs more steps than that"
        )


def recorded(workdir: pathlib.Path, step: int, changed: Changes) -> list[dict]:
    """The extensions that hold for going on from the checkpoint of `step`, with the one that `changed` is.

    One recorded for a later step counts from here, as its checkpoints are gone; and one that was recorded for this
    step, but whose training was killed before the next checkpoint, is the same one, begun again.
    """
    try:
        before = json.loads(buckets.read_text(workdir / "run.json")).get("extended", [])
        before = [entry for entry in before if {"step", "changed"} <= entry.keys()]
    except buckets.Unreachable:
        raise
    except (OSError, ValueError, AttributeError, TypeError):  # it is not as we wrote it
        before = []
    entries = [entry for entry in before if entry["step"] < step]
    here = {}
    for changes in (*(entry["changed"] for entry in before if entry["step"] >= step), changed):
        for key, (old, new) in changes.items():
            here[key] = [here[key][0] if key in here else old, new]
    return entries + [{"step": step, "changed": here}] if here and step else entries


def first_row(entries: Sequence[Mapping]) -> int:
    """Where batch 0 would begin in the sequence of tiles, if all batches had today's size: the next one begins where
    the last one ended."""
    first = 0
    for entry in entries:
        before, now = entry["changed"].get("batch_size", (0, 0))
        first += entry["step"] * (before - now)
    return first
