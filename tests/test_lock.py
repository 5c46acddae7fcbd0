"""One training in a workdir at a time: with and without flock, on one machine and several, after deaths."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import runs

from ktda_jax import UserError
from ktda_jax.training import lock

HOLDER = """
import pathlib, sys, time
from ktda_jax import UserError
from ktda_jax.training import lock
flocked = lock._flock
if sys.argv[2] == "without":
    lock._flock = lambda folder: None
try:
    while not pathlib.Path(sys.argv[3]).exists():
        pass
    with lock.hold(pathlib.Path(sys.argv[1]), place="W", claim="W is being trained", remedy="stop it"):
        print("held", flush=True)
        time.sleep(60)
except UserError as error:
    print(error, flush=True)
"""


@pytest.fixture(params=["with", "without"])
def flocks(request, monkeypatch):
    """With flock and, as on file systems that lack it, without."""
    if request.param == "without":
        monkeypatch.setattr(lock, "_flock", lambda folder: None)
    return request.param


@pytest.fixture
def holder(tmp_path, flocks):
    """holder() starts a process that takes the folder as soon as `go` is there; it does without JAX."""
    go, started = tmp_path / "go", []
    go.touch()

    def start():
        command = [sys.executable, "-c", HOLDER, tmp_path / "run", flocks, go]
        started.append(subprocess.Popen(command, cwd=runs.REPOSITORY, stdout=subprocess.PIPE, text=True))
        return started[-1]

    start.go = go
    yield start
    for process in started:
        process.kill()
        process.communicate()


def hold(folder, **given):
    return lock.hold(folder, place="--workdir=W", claim="workdir W is being trained", remedy="stop it", **given)


@contextlib.contextmanager
def quick(monkeypatch, dead=0.6):
    monkeypatch.setattr(lock, "HEARTBEAT", dead / 4)
    monkeypatch.setattr(lock, "DEAD", dead)
    yield


def test_it_is_free_again_afterwards_and_nothing_is_left(tmp_path, flocks):
    for _ in range(2):
        with hold(tmp_path / "deep" / "run") as still_ours:
            still_ours()
            record = json.loads((tmp_path / "deep" / "run" / "lock.json").read_text())
            assert record["pid"] == os.getpid()
        assert not (tmp_path / "deep" / "run").exists()  # we made it, and nothing came of it
    (tmp_path / "run").mkdir()
    with pytest.raises(ZeroDivisionError), hold(tmp_path / "run"):
        raise ZeroDivisionError
    assert list((tmp_path / "run").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to --workdir=W: File exists"):
        hold(tmp_path / "file").__enter__()


def test_a_second_process_is_told_who_the_first_is(holder, tmp_path):
    process = holder()
    assert process.stdout.readline() == "held\n"
    who = (
        rf"^workdir W is being trained by process {process.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d; stop it$"
    )
    with pytest.raises(UserError, match=who):
        hold(tmp_path / "run").__enter__()
    process.kill()
    process.wait()
    assert (tmp_path / "run" / "lock.json").exists()  # and yet its restart goes on at once
    with hold(tmp_path / "run"):
        pass


def test_of_two_that_start_together_one_wins(holder, tmp_path):
    holder.go.unlink()
    for _ in range(4):  # the first time they make the folder, too
        processes = [holder() for _ in range(3)]
        time.sleep(0.3)  # all wait for the same moment
        holder.go.touch()
        lines = [process.stdout.readline() for process in processes]
        assert lines.count("held\n") == 1, lines
        assert all(re.match("W is being trained by (process|another)", line) for line in lines if line != "held\n")
        for process in processes:  # the next ones find a dead one's record
            process.kill()
            process.wait()
        holder.go.unlink()


def test_a_number_that_came_again_is_no_living_holder(tmp_path, flocks):
    """A killed one's number is now that of this process, or of one that is only waited for."""
    record = {**lock.this_process(), "token": "x", "since": "then", "beat": time.time()}
    (tmp_path / "lock.json").write_text(json.dumps(record | {"started": "1"}))
    with hold(tmp_path):
        pass
    with subprocess.Popen(["true"]) as ended:
        while lock._started(ended.pid) is not None:
            time.sleep(0.01)
        (tmp_path / "lock.json").write_text(json.dumps(record | {"pid": ended.pid}))
        with hold(tmp_path):
            pass
    (tmp_path / "lock.json").write_text(json.dumps(record))  # but this is us
    with pytest.raises(UserError, match="by process"):
        hold(tmp_path).__enter__()


ELSEWHERE = {"host": "far", "machine": "another", "namespace": "pid:[1]", "pid": 7, "started": "1", "since": "then"}


def elsewhere(path, beat):
    lock._write(path, ELSEWHERE | {"token": "theirs"})
    if beat:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"beat": beat}))


def test_another_machine_that_lives_is_left_alone_as_soon_as_it_gives_a_sign(tmp_path, flocks, monkeypatch):
    monkeypatch.setattr(lock, "DEAD", 30.0)
    elsewhere(tmp_path / "lock.json", None)
    said = []
    later = threading.Timer(0.2, elsewhere, (tmp_path / "lock.json", None))
    later.start()
    began = time.monotonic()
    with pytest.raises(UserError, match="by process 7 on far since then; stop it"):
        hold(tmp_path, say=said.append).__enter__()
    assert time.monotonic() - began < 20
    assert said == [
        f"{tmp_path / 'lock.json'}: process 7 on far held this folder; waiting up to 30 s for a sign of life"
    ]
    assert json.loads((tmp_path / "lock.json").read_text())["token"] == "theirs"


def test_another_machine_that_is_silent_is_replaced(tmp_path, flocks, monkeypatch):
    with quick(monkeypatch):
        elsewhere(tmp_path / "lock.json", None)
        said = []
        with hold(tmp_path, say=said.append) as still_ours:
            still_ours()
        assert len(said) == 1
        elsewhere(tmp_path / "lock.json", time.time() - 2 * lock.FORGOTTEN)  # nobody waits for that one
        with hold(tmp_path, say=said.append):
            pass
        (tmp_path / "lock.json").write_text("")  # killed while it wrote it
        with hold(tmp_path, say=said.append):
            pass
        assert len(said) == 2 and "another process held" in said[1]


def test_another_machine_that_ends_meanwhile_is_replaced_at_once(tmp_path, flocks, monkeypatch):
    monkeypatch.setattr(lock, "DEAD", 30.0)
    elsewhere(tmp_path / "lock.json", None)
    threading.Timer(0.2, (tmp_path / "lock.json").unlink).start()
    began = time.monotonic()
    with hold(tmp_path, say=str):
        assert time.monotonic() - began < 20


def test_another_container_of_this_machine_counts_as_elsewhere(tmp_path, flocks, monkeypatch):
    """Its process 7 is another one than ours."""
    record = {**lock.this_process(), "namespace": "pid:[1]", "pid": 2**22 + 1, "token": "x", "since": "then"}
    with quick(monkeypatch):
        lock._write(tmp_path / "lock.json", record)
        said = []
        with hold(tmp_path, say=said.append):
            assert len(said) == 1


def test_the_heart_beats_and_notices_what_it_lost(tmp_path, flocks, monkeypatch):
    path = tmp_path / "lock.json"
    with quick(monkeypatch), hold(tmp_path) as still_ours:
        first = path.read_text()
        runs_until(lambda: path.read_text() not in ("", first))
        path.unlink()  # by somebody who tidies up
        still_ours()
        runs_until(path.exists)
        elsewhere(path, None)  # a machine that took us for dead
        with pytest.raises(UserError, match="by process 7 on far"):
            still_ours()
        time.sleep(3 * lock.HEARTBEAT)
        assert json.loads(path.read_text())["token"] == "theirs"
    assert json.loads(path.read_text())["token"] == "theirs"


def runs_until(condition) -> None:
    while not condition():
        time.sleep(0.01)


def test_file_systems_without_flock(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    assert lock._flock(tmp_path) is None
    with hold(tmp_path), pytest.raises(UserError, match=f"by process {os.getpid()} on"):
        hold(tmp_path).__enter__()


@pytest.mark.slow
def test_the_same_command_twice(tmp_path):
    """The second one says so before it has built anything; after a kill it goes on at once."""
    tiles = runs.make_tiles(tmp_path / "tiles")
    settings = {"total_steps": 400, "checkpoint_every": 2, "eval_every": 400, "distill": False, "model.aux_channels": 0}
    flags = runs.arguments(tiles, tmp_path / "run", settings | {"model.student.depths": (0, 0, 0, 0)})
    first = runs.start(*flags)
    runs.wait_for(lambda: runs.reached(tmp_path / "run", 4), first)
    before = (tmp_path / "run" / "config.json").stat().st_mtime_ns
    second = runs.start(*flags)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 1 and out == ""
    line = rf"error: workdir {re.escape(str(tmp_path / 'run'))} is being trained by process {first.pid} on \S+ since "
    assert re.fullmatch(line + r".*; use another --workdir or stop it\n", err)
    assert (tmp_path / "run" / "config.json").stat().st_mtime_ns == before
    first.send_signal(signal.SIGKILL)
    first.communicate()
    third = runs.start(*flags)
    runs.wait_for(lambda: pathlib.Path(f"/proc/{third.pid}").exists() and "resuming" in third.stdout.readline(), third)
    third.kill()
    third.communicate()
    steps = runs.steps(tmp_path / "run", "train/loss")
    assert len(set(steps)) == len(steps)
