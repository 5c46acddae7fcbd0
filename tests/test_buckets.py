"""Trainings into gs://, on a real server of buckets on this machine."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import runs

from ktda_jax import UserError
from ktda_jax.data import buckets
from ktda_jax.data.paths import expand, place
from ktda_jax.figures import plots
from ktda_jax.training import lock, loop, whole
from ktda_jax.training.checkpoint import Checkpoints
from ktda_jax.training.writers import Writer

SETTINGS = {"eval_every": 2, "checkpoint_every": 1, "keep_checkpoints": 2}


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return runs.make_tiles(tmp_path_factory.mktemp("tiles"))


# Training ---------------------------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys
import pytest, runs, toy
from ktda_jax.data import buckets
from ktda_jax.training import loop, whole

written = whole.write

def killed(state, *rest):  # all arrays of a checkpoint are there, and the object that completes it is not
    written(state, *rest)
    if state.parent.name == "4":
        os.kill(os.getpid(), signal.SIGKILL)

whole.write = killed
toy.install(pytest.MonkeyPatch(), quality={2: 0.4, 4: 0.9, 6: 0.7})
loop.train_and_evaluate(runs.config(sys.argv[1], eval(sys.argv[3])), sys.argv[2])
"""


def test_killed_during_a_save_and_resumed_is_the_same_run(bucket, toy, tiles, tmp_path, capsys):
    program = toy(quality={2: 0.4, 4: 0.9, 6: 0.7})
    config = runs.config(tiles, SETTINGS)
    loop.train_and_evaluate(config, tmp_path / "whole")

    command = [sys.executable, "-c", CHILD, tiles, "gs://bucket/run", repr(SETTINGS)]
    environment = {**os.environ, "PYTHONPATH": str(runs.REPOSITORY)}
    child = subprocess.run(command, cwd=runs.REPOSITORY / "tests", env=environment)
    run = bucket / "run"
    assert child.returncode == -signal.SIGKILL
    assert (run / "checkpoints/4/state/sums.json").exists() and not (run / "checkpoints/4/commit_success.txt").exists()
    assert (run / "lock.json").exists()
    assert [row["step"] for row in runs.rows(run) if "train/loss" in row][:4] == [1, 2, 3, 4]

    capsys.readouterr()
    result = loop.train_and_evaluate(config, "gs://bucket/run", profile=(5, 5))
    assert result.metrics.summary["mIoU"] > 80
    assert any(run.glob("profile/**/*.xplane.pb"))
    said = capsys.readouterr().out
    assert "resuming at step 3" in said and "figures in gs://bucket/run/figures" in said
    assert runs.reported(run) == runs.reported(tmp_path / "whole")
    states = []
    for workdir in (tmp_path / "whole", place("gs://bucket/run")):
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            current, position = checkpoints.restore(6, program.abstract, program.shardings)
            states.append((float(current.params["seen"]), position, checkpoints.best_step()))
    assert states[0] == states[1] and states[0][2] == 4
    names = {path.name for path in run.iterdir() if path.is_file()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    names -= events | {"checked.json"}  # which is not there if the tiles are seconds old
    assert len(events) == 2 and names == {"config.json", "run.json", "metrics.jsonl", "calibration.json"}
    plots.save_confusion("gs://bucket/run/figures/some.png", np.eye(2, dtype=int), ("a", "b"))
    assert (run / "figures/some.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_real_command_killed_and_resumed_is_the_same_run(bucket, tiles, tmp_path):
    settings = {"total_steps": 12, "eval_every": 6, "checkpoint_every": 2, "distill": False, "ema": 0.9}
    runs.finish(runs.start(*runs.arguments(tiles, tmp_path / "whole", settings)))
    first = runs.start(*runs.arguments(tiles, "gs://bucket/command", settings))
    steps = bucket / "command/checkpoints"
    saving = lambda n: (steps / n / "state").exists() and not (steps / n / "commit_success.txt").exists()  # noqa: E731
    runs.wait_for(lambda: any(saving(n) for n in ("4", "6", "8")), first)
    first.kill()
    first.communicate()
    out, _ = runs.finish(runs.start(*runs.arguments(tiles, "gs://bucket/command", settings)))
    assert "resuming at step" in out
    runs.assert_same_run(tmp_path / "whole", place("gs://bucket/command"), tiles, settings)


@pytest.mark.slow
def test_two_hosts_of_which_one_is_killed_and_that_resume_are_the_same_run(bucket, tiles, tmp_path):
    settings = {"total_steps": 12, "eval_every": 12, "checkpoint_every": 2, "distill": False, "ema": 0.9}
    for process in runs.start_two(*runs.arguments(tiles, tmp_path / "whole", settings)):
        runs.finish(process)
    given = runs.arguments(tiles, "gs://bucket/hosts", settings)
    both = runs.start_two(*given)
    runs.wait_for(lambda: (bucket / "hosts/checkpoints/4/commit_success.txt").exists(), both[0])
    both[1].kill()
    time.sleep(1)
    both[0].kill()
    for process in both:
        process.communicate()
    (out, _), _ = map(runs.finish, runs.start_two(*given))
    assert re.search(r"resuming at step (4|6|8|10)\b", out)
    runs.assert_same_run(tmp_path / "whole", place("gs://bucket/hosts"), tiles, settings)


def test_rows_are_uploaded_now_and_then_and_those_of_others_are_kept(bucket, monkeypatch):
    from ktda_jax.training import uploads

    workdir = place("gs://bucket/rows")
    buckets.write_text(workdir / "metrics.jsonl", '{"step": 1, "a": 1.0}\n{"step": 5, "a": 1.0}\n')
    with Writer(workdir, total_steps=9) as writer:
        assert writer.resume(2) == 1
        writer.write(3, {"a": 2.0})
        assert '"step": 3' not in buckets.read_text(workdir / "metrics.jsonl")
        monkeypatch.setattr(uploads, "SECONDS", 0.0)
        writer.write(4, {"a": 2.0})
        there = buckets.read_text(workdir / "metrics.jsonl")
        assert [json.loads(line)["step"] for line in there.splitlines()] == [1, 3, 4]
        buckets.write_text(workdir / "metrics.jsonl", there + '{"step": 2, "split": "val", "final/mIoU": 9.0}\n')
        writer.write(5, {"a": 2.0})
    rows = [json.loads(line) for line in buckets.read_text(workdir / "metrics.jsonl").splitlines()]
    assert [row["step"] for row in rows] == [1, 3, 4, 5, 2] and rows[-1]["final/mIoU"] == 9.0
    assert len(list((bucket / "rows").glob("events.out.tfevents.*"))) == 1


# One writer -------------------------------------------------------------------------------------------------------


def hold(folder, **options):
    return lock.hold(place(folder), place=folder, claim="it is held", remedy="wait", **options)


def test_checkpoints_copied_from_a_disk_are_not_taken_for_none(bucket):
    """On a disk the name of the folder says that a checkpoint is whole; in a bucket it is there from the beginning."""
    folder = place("gs://bucket/copied/checkpoints/3")
    sums = {"files": {"a": [1, "0123"]}, "data": {}, "metrics": None}
    buckets.write_text(folder / "state/sums.json", json.dumps(sums))
    with pytest.raises(UserError, match="checkpoints/3 was copied from a disk and lacks the object commit_success.txt"):
        whole.check(folder.parent)
    sums["files"] = {"a": [1, "crc32c:0123"]}
    buckets.write_text(folder / "state/sums.json", json.dumps(sums))
    whole.check(folder.parent)  # a save that was killed, to be written anew


def test_a_second_training_is_refused_and_nothing_is_left_of_a_lock(bucket, toy, tiles):
    toy()
    with hold("gs://bucket/held") as alone:
        refusal = r"workdir gs://bucket/held is being trained by process \d+ on .*; use another --workdir or stop it"
        with pytest.raises(UserError, match=refusal):
            loop.train_and_evaluate(runs.config(tiles, SETTINGS), "gs://bucket/held")
        alone()
        record = place("gs://bucket/held/lock.json")
        assert not buckets.create(record, "another")
        buckets.write_text(record, json.dumps({"token": "another", "pid": 7, "host": "far", "since": "now"}))
        with pytest.raises(UserError, match="it is held by process 7 on far since now; wait"):
            alone()
        buckets.remove(record)
    assert not list((bucket / "held").rglob("*.json"))


def test_a_dead_ones_place_is_taken_and_a_heartbeat_seen(bucket, monkeypatch):
    monkeypatch.setattr(lock, "DEAD", 0.6)
    monkeypatch.setattr(lock, "HEARTBEAT", 0.05)
    monkeypatch.setattr(lock, "SETTLED", 0.05)
    record, said = place("gs://bucket/dead/lock.json"), []
    buckets.write_text(record, json.dumps({"token": "x", "pid": 7, "host": "far", "machine": "another", "beat": 1e12}))
    with hold("gs://bucket/dead", say=said.append):
        waits = "process 7 on far held this folder; waiting up to 1 s for a sign of life"
        assert said == [f"gs://bucket/dead/lock.json: {waits}"]
        monkeypatch.setattr(lock, "_is_dead", lambda *_, **__: None)  # as from another machine
        with pytest.raises(UserError, match=f"it is held by process {os.getpid()} on"), hold("gs://bucket/dead"):
            pass


# What is wrong, in a line -----------------------------------------------------------------------------------------


def test_a_bucket_that_is_not_there_is_one_line(bucket, tiles):
    for workdir, line in {
        "gs://nobucket/run": "there is no bucket gs://nobucket; make it, or correct the name",
        "gs://": "gs:// names no bucket; give gs://BUCKET/FOLDER",
        "s3://bucket/run": "--workdir=s3://bucket/run is neither a path nor gs://BUCKET/FOLDER",
    }.items():
        _, err = runs.finish(runs.start(*runs.arguments(tiles, workdir)), status=1)
        assert err == f"error: {line}\n"


def test_a_local_path_is_asked_for_where_a_bucket_will_not_do():
    with pytest.raises(UserError, match="gs://bucket/maps is in a bucket, and this must be a local path"):
        expand("gs://bucket/maps")


def test_what_may_not_be_looked_into_is_one_line(bucket, forbidding):
    with pytest.raises(UserError) as raised:
        place("gs://secret/run")
    assert str(raised.value).startswith("cannot look into gs://secret: me@x lacks storage.objects.list access; log in")
    assert "\n" not in str(raised.value)


def test_one_is_told_of_a_bucket_that_does_not_answer(monkeypatch, capsys):
    class Mute:
        def info(self, name):
            time.sleep(0.3)
            raise OSError("no route to host")

    monkeypatch.setattr(buckets, "SLOW", 0.05)
    monkeypatch.setattr(buckets, "files", Mute)
    with pytest.raises(UserError, match="cannot look into gs://mute: no route to host; log in"):
        place("gs://mute/run")
    assert capsys.readouterr().err == "gs://mute has not answered for 0.05 s; it is still tried\n"


def test_without_gcsfs_a_line_says_how_to_have_it():
    code = "import sys; sys.modules['gcsfs'] = None\nfrom ktda_jax.data.paths import place\nplace('gs://bucket/x')"
    found = subprocess.run([sys.executable, "-c", code], cwd=runs.REPOSITORY, capture_output=True, text=True)
    assert found.stderr.splitlines()[-1].endswith("gs:// needs gcsfs: pip install -e '.[gcs]'")


def test_tensorflow_is_left_alone_where_it_is_installed(bucket, tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('TensorFlow was imported')")
    code = (
        "from etils import epath\nfrom ktda_jax.data.paths import place\nepath.Path('/').exists()\n"
        "path = place('gs://bucket/tf/x')\npath.write_text('hello')\n"
        "print(path.read_text(), [p.name for p in path.parent.iterdir()])"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{runs.REPOSITORY}"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (found.stdout, found.stderr) == ("hello ['x']\n", "")
