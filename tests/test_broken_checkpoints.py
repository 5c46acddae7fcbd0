"""Checkpoints that the disk has damaged, and a disk that is full: one line, and the newest whole one goes on."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import runs
from test_checkpoint import make_state, saved, shardings_of

import ktda_jax
from ktda_jax import UserError
from ktda_jax.reports import workdir as reported
from ktda_jax.training import loop, whole
from ktda_jax.training.checkpoint import Checkpoints


@pytest.fixture
def checkpoints(tmp_path):
    """Steps 4 and 7, the later one better."""
    with Checkpoints(tmp_path, keep=2) as opened:
        for step in (4, 7):
            opened.save(step, make_state(step), {"at": step}, {"mIoU": 10.0 * step})
    return tmp_path


def restore(directory, step=7):
    with Checkpoints(directory) as opened:
        state = make_state(step)
        return opened.restore(step, jax.eval_shape(lambda: state), shardings_of(state))


def overwrite(path, at, number=8):
    content = bytearray(path.read_bytes())
    content[at : at + number] = bytes(255 - byte for byte in content[at : at + number])
    path.write_bytes(content)


def as_formerly(folder):
    """A checkpoint as it was before there were sums: Orbax's own class has written the state."""
    (folder / "state" / whole.SUMS).unlink()
    written = (folder / whole.WRITER).read_text()
    theirs = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"
    (folder / whole.WRITER).write_text(written.replace("ktda_jax.training.checkpoint._StateHandler", theirs))


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_eight_bytes_of_any_file_are_noticed(checkpoints, share):
    """Orbax alone restores other values without a word: only its index has checksums."""
    folder = checkpoints / "7"
    written = [*json.loads((folder / "state" / whole.SUMS).read_text())["files"]]
    assert len(written) > 5
    for path in [*(folder / "state" / name for name in written), folder / whole.DATA, folder / whole.SCORE]:
        before = path.read_bytes()
        overwrite(path, int(share * len(before)))
        with pytest.raises(UserError, match=r"checkpoint .*/7 is damaged: .*; remove this folder, .* with step 4, the"):
            restore(checkpoints)
        path.write_bytes(before)
    assert restore(checkpoints)[1] == {"at": 7}


def test_what_prediction_reads_is_checked_too(checkpoints):
    largest = max((checkpoints / "7").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    overwrite(largest, largest.stat().st_size // 2)
    state = make_state(7)
    with pytest.raises(UserError, match="/7 is damaged"), Checkpoints(checkpoints) as opened:
        opened.restore_model(7, *jax.eval_shape(lambda: (state.params, state.batch_stats)))


@pytest.mark.parametrize("name, was, now", [(whole.DATA, "7", "4"), (whole.SCORE, "70", "90")])
def test_another_digit_in_a_small_file_is_noticed(checkpoints, name, was, now):
    path = checkpoints / "7" / name
    path.write_text(path.read_text().replace(was, now))
    with pytest.raises(UserError, match=f"/7 is damaged: {name} is not what was written"):
        restore(checkpoints)


def test_pages_that_change_places_are_noticed(tmp_path):
    path = tmp_path / "file"
    pages = np.random.default_rng(0).integers(0, 256, (3, whole.PAGE), np.uint8)
    sums = set()
    for order in ([0, 1, 2], [1, 0, 2], [0, 1]):
        path.write_bytes(pages[order].tobytes()[:-3])
        sums.add(whole._sum(path))
    assert len(sums) == 3


@pytest.mark.parametrize("former", [(4,), (7,), (4, 7)])
def test_a_checkpoint_of_a_former_version_has_no_sums_and_restores(checkpoints, former):
    """Beside ours, before or after them, or alone; the golden one is in test_old_workdirs.py."""
    for step in former:
        as_formerly(checkpoints / str(step))
    whole.check(checkpoints)
    assert restore(checkpoints)[1] == {"at": 7} and restore(checkpoints, 4)[1] == {"at": 4}


@pytest.mark.parametrize(
    "lost, remedy",
    [((7,), "remove this folder, .* with step 4, the newest whole one"), ((4, 7), "no other one here is whole; .*")],
)
def test_sums_that_are_lost_make_no_former_version(checkpoints, lost, remedy):
    """Nothing would be compared any more: with the sums of one checkpoint gone, or of all."""
    for step in lost:
        (checkpoints / str(step) / "state" / whole.SUMS).unlink()
    overwrite(max((checkpoints / "7").rglob("*"), key=lambda path: path.stat().st_size * path.is_file()), 3000)
    state = make_state(7)
    for use in (
        lambda: whole.check(checkpoints),
        lambda: restore(checkpoints),
        lambda: Checkpoints(checkpoints).restore_model(7, *jax.eval_shape(lambda: (state.params, state.batch_stats))),
    ):
        with pytest.raises(UserError, match=f"/7 is damaged: it lacks state/sums.json; {remedy}$"):
            use()
    (checkpoints / "7" / whole.WRITER).unlink()  # every version has written that
    with pytest.raises(UserError, match="/7 is damaged: it lacks _CHECKPOINT_METADATA; "):
        whole.check(checkpoints)


DAMAGE = {
    "empty folder": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "it is empty"),
    "data cut": (lambda folder: _cut(max(folder.glob("state/ocdbt*/d/*"), key=_size)), "bytes"),
    "data missing": (lambda folder: max(folder.glob("state/ocdbt*/d/*"), key=_size).unlink(), "it lacks state/ocdbt"),
    "manifest empty": (lambda folder: (folder / "state/manifest.ocdbt").write_bytes(b""), "manifest.ocdbt is empty"),
    "_METADATA gone": (lambda folder: (folder / "state/_METADATA").unlink(), "it lacks state/_METADATA"),
    "data/metadata gone": (lambda folder: (folder / "data/metadata").unlink(), "it lacks data/metadata"),
    "state gone": (lambda folder: shutil.rmtree(folder / "state"), "it lacks state/manifest.ocdbt"),
    "metrics empty": (lambda folder: (folder / "metrics/metrics").write_bytes(b""), "metrics/metrics is not JSON"),
    "metrics gone": (lambda folder: shutil.rmtree(folder / "metrics"), "it lacks metrics/metrics"),
}


def _size(path) -> int:
    return path.stat().st_size


def _cut(path) -> None:
    path.write_bytes(path.read_bytes()[: _size(path) // 2])


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damage_is_named(checkpoints, capfd, damage, sums):
    spoil, words = DAMAGE[damage]
    if not sums:
        as_formerly(checkpoints / "7")
        words = "" if damage.startswith("data") else words  # Orbax's own, of a file that it does not find
    spoil(checkpoints / "7")
    with pytest.raises(UserError) as raised:
        whole.check(checkpoints)
        restore(checkpoints)
    line = str(raised.value)
    assert re.search(rf"/7 is damaged: .*{words}.*; remove this folder, and the same command goes on with step 4", line)
    assert "\n" not in line and capfd.readouterr().err == ""
    shutil.rmtree(checkpoints / "7")
    assert whole.best_step(checkpoints) == 4 and restore(checkpoints, 4)[1] == {"at": 4}


def test_half_of_one_that_was_being_removed_is_in_nobodys_way(checkpoints):
    """A kill may leave that."""
    for damage in ("state gone", "metrics gone"):
        DAMAGE[damage][0](checkpoints / "4")
        whole.check(checkpoints)
        assert whole.best_step(checkpoints) == 7 and restore(checkpoints)[1] == {"at": 7}
    with Checkpoints(checkpoints) as opened:
        opened.save(9, make_state(9), {}, None)
    assert whole.steps(checkpoints) == [7, 9]


def test_a_lost_score_leaves_the_best_open(tmp_path):
    saved(tmp_path, {1: 10.0, 2: None})
    as_formerly(tmp_path / "1")
    (tmp_path / "1" / whole.SCORE).unlink()
    with pytest.raises(UserError, match=r"/1 is damaged: it lacks metrics/metrics; remove .* with step 2"):
        Checkpoints(tmp_path).best_step()
    restore(tmp_path, 2)  # training goes on


# The verbs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(tiles, workdir) with the checkpoints of steps 2 and 4 of 4."""
    tiles = runs.make_tiles(tmp_path_factory.mktemp("tiles"))
    workdir = tmp_path_factory.mktemp("runs") / "run"
    loop.train_and_evaluate(runs.config(tiles, {"total_steps": 4, "eval_every": 2}), workdir)
    return tiles, workdir


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["empty folder", "manifest empty", "metrics gone"])
def test_every_verb_says_so_in_a_line(trained, tmp_path, damage):
    tiles, workdir = trained
    config, copy = runs.config(tiles, {"total_steps": 4, "eval_every": 2}), tmp_path / "run"
    shutil.copytree(workdir, copy)
    best = whole.best_step(copy / "checkpoints")
    shutil.rmtree(copy / "checkpoints" / str(6 - best))  # so that the latest is the best one
    shutil.copytree(copy / "checkpoints" / str(best), copy / "checkpoints" / "1")
    DAMAGE[damage][0](copy / "checkpoints" / str(best))
    words = f"/{best} is damaged: .*goes on with step 1, the newest whole one"
    with pytest.raises(UserError, match=words):
        loop.train_and_evaluate(config, copy)
    if damage == "empty folder":  # nothing says how good it was
        shutil.rmtree(copy / "checkpoints" / "1")
        words = f"/{best} is damaged: it is empty; no other one here is whole"
    for verb in (lambda: loop.evaluate_workdir(config, copy), lambda: ktda_jax.load_pretrained(copy)):
        with pytest.raises(UserError, match=words):
            verb()
    reported.check(copy)


@pytest.mark.slow
def test_a_full_disk_while_a_checkpoint_is_written_is_one_line(trained, tmp_path):
    tiles, workdir = trained
    shutil.copytree(workdir, tmp_path / "run")
    flags = runs.arguments(tiles, tmp_path / "run", {"total_steps": 8, "eval_every": 2, "mesh.data": 1})
    flags = (*flags, "--extend")
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", sys.executable, "-m", "ktda_jax.main", *flags]
    settings = {
        **os.environ,
        "XLA_FLAGS": runs.xla_flags(1),
        "JAX_ENABLE_COMPILATION_CACHE": "0",
    }  # else it is full, too
    done = subprocess.run(limited, cwd=runs.REPOSITORY, env=settings, capture_output=True, text=True)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    line = done.stderr
    assert done.returncode == 1 and re.match(
        "error: cannot write a checkpoint to .*: File too large; .*the same command goes on from step 4", line
    )
    out, err = runs.finish(runs.start(*flags))
    assert "resuming at step 4" in out and err == ""
    assert max(whole.steps(tmp_path / "run" / "checkpoints")) == 8
