"""launch/local.sh: real trainings that are killed and go on, and what it does with workers of every kind."""

import functools
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import runs

LAUNCH = runs.REPOSITORY / "launch"
ODD = ("--config.data.crop=(64,64)", "--config.name=two words", "--config.note=it's $HOME")  # hard to quote

# Little to compile, since only process 0 uses JAX's cache of compiled programs.
SETTINGS = {
    "total_steps": 24, "eval_every": 24, "eval_batch_size": 4, "checkpoint_every": 2, "ema": 0.9, "distill": False,
    "model.student.depths": (0, 0, 0, 0), "model.aux_channels": 0, "model.fmm.enabled": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return runs.make_tiles(tmp_path_factory.mktemp("tiles"))


# Real trainings ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def train(tiles):
    """train(workdir, processes) starts launch/local.sh with one device each."""
    workdirs = []

    def start(workdir, processes=2):
        workdirs.append(workdir)
        return subprocess.Popen(
            [LAUNCH / "local.sh", str(processes), *runs.arguments(tiles, workdir, SETTINGS)],
            cwd=runs.REPOSITORY,
            env={
                **os.environ,
                "PYTHON": sys.executable,
                "GRACE": "1",
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": runs.xla_flags(1),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    yield start
    for workdir in workdirs:  # of a test that failed half-way
        end(workers(workdir))


def workers(workdir) -> dict[int, int]:
    """{process_id: pid} of the processes that train in `workdir`."""
    found = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text().split("\0")
        except OSError:  # it ended meanwhile
            continue
        if f"--workdir={workdir}" in words and "ktda_jax.main" in words:
            number = next(w for w in words if w.startswith("--process_id=")).partition("=")[2]
            found[int(number)] = int(path.parent.name)
    return found


def end(pids: dict[int, int]) -> None:
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)


def killed_and_resumed_is_the_same_run(train, tiles, tmp_path, processes, *, stop=False):
    out, err = runs.finish(train(tmp_path / "whole", processes))
    assert f"{processes} cpu device(s)" in out and "val split, step 24:" in out and err == ""
    logs = sorted(path.name for path in (tmp_path / "whole" / "logs").glob("*.log"))
    assert logs == [f"process_{k}.log" for k in range(1, processes)]

    # One worker dies: all stop within seconds.
    workdir = tmp_path / "broken"
    launcher = train(workdir, processes)
    runs.wait_for(lambda: runs.reached(workdir, 8) and any(workdir.glob("checkpoints/[0-9]*")), launcher)
    pids = workers(workdir)
    assert sorted(pids) == list(range(processes))
    os.kill(pids[processes - 1], signal.SIGKILL)
    died = time.monotonic()
    _, err = launcher.communicate(timeout=60)
    assert time.monotonic() - died < 20 and workers(workdir) == {}
    assert launcher.returncode not in (0, 75)  # 137, unless another's broken connection was seen first
    assert "the same command goes on from the last checkpoint" in err

    if stop:  # A signal to the launcher: all save and stop.
        launcher = train(workdir, processes)
        runs.wait_for(functools.partial(runs.reached, workdir, 11), launcher)
        launcher.send_signal(signal.SIGTERM)
        out, _ = launcher.communicate(timeout=60)
        assert launcher.returncode == 75 and workers(workdir) == {}
        assert re.search(r"resuming at step [2468]\b", out) and "stopped by a signal at step 20; run the same" in out

    # The same command resumes. All are killed, the launcher first.
    launcher = train(workdir, processes)
    runs.wait_for(functools.partial(runs.reached, workdir, 22), launcher)
    launcher.kill()
    assert "resuming at step" in launcher.stdout.readline() + launcher.stdout.readline()
    end(workers(workdir))
    while workers(workdir):
        time.sleep(0.05)
    out, _ = runs.finish(train(workdir, processes))  # not refused: nothing is left of the killed ones
    assert re.search(r"resuming at step (18|20|22)\b", out) and "val split, step 24:" in out
    runs.assert_same_run(tmp_path / "whole", workdir, tiles, SETTINGS)


@pytest.mark.slow
def test_two_processes_killed_one_and_all_change_nothing(train, tiles, tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, "checkpoint_every", 6)  # a checkpoint takes longer than the steps between
    killed_and_resumed_is_the_same_run(train, tiles, tmp_path, 2)


@pytest.mark.slow
def test_four_processes_killed_and_stopped_change_nothing(train, tiles, tmp_path):
    killed_and_resumed_is_the_same_run(train, tiles, tmp_path, 4, stop=True)


def test_processes_that_do_not_meet_say_so_in_one_line(tiles, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joining = (*runs.arguments(tiles, tmp_path), "--num_processes=3", "--join_timeout=3")
    # Of three, the second has another address than the first, and the third never starts.
    addresses = address, "localhost:1"
    started = [runs.start(*joining, f"--coordinator={a}", f"--process_id={k}") for k, a in enumerate(addresses)]
    for process, where in zip(started, addresses, strict=True):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1 and err.count("\n") == 1
        assert err.startswith(
            f"error: not all processes met at --coordinator={where} within 3 s; start all with the same"
        )


def test_a_process_that_fails_alone_ends_soon(tiles, tmp_path):
    """Rather than wait at exit for one that waits for it."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        flags = f"--coordinator=localhost:{free.getsockname()[1]}", "--num_processes=2"
    first, second = (
        runs.start(*runs.arguments(root, tmp_path / "run"), *flags, f"--process_id={k}")
        for k, root in enumerate((tiles, tmp_path / "nowhere"))
    )
    line = second.stderr.readline()
    while line.startswith("[Gloo]"):
        line = second.stderr.readline()
    said = time.monotonic()
    assert line.startswith("error: no such directory:")
    assert second.wait(20) == 1 and time.monotonic() - said < 12
    first.kill()
    first.communicate()


# local.sh by itself, with a worker that does what it is told ------------------------------------------------------


@pytest.fixture
def local(tmp_path):
    """local(N, *flags, worker=BASH) starts local.sh; workers know their number K and leave their flags in `seen`."""
    seen = tmp_path / "seen"
    seen.mkdir()

    def start(processes, *flags, worker="exit 0", verb=None, **environment):
        words = [str(processes), *([verb] if verb else []), f"--workdir={tmp_path / 'run'}", *flags]
        python = runs.script(
            tmp_path,
            "python",
            f"""[[ $1 == -c ]] && exec {shlex.quote(sys.executable)} "$@"
for flag in "$@"; do case $flag in --process_id=*) K=${{flag#*=}} ;; esac; done
printf '%s\\n' "$@" >> {seen}/flags.$K
echo "${{CUDA_VISIBLE_DEVICES:-}}" >> {seen}/gpu.$K
{worker}""",
        )
        # Tests that run in the background ignore ctrl-c, and bash does not trap what was ignored from the start.
        heard = (
            "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
        )
        return subprocess.Popen(
            [sys.executable, "-c", heard, LAUNCH / "local.sh", *words],
            env={**os.environ, "PYTHON": str(python), "JAX_PLATFORMS": "cpu", "GRACE": "1", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    start.seen = seen
    return start


def test_every_process_gets_the_flags_and_its_number(local):
    out, err = local(3, *ODD, worker="echo I am $K").communicate(timeout=30)
    assert (out, err) == ("I am 0\n", "")
    for k in range(3):
        given = (local.seen / f"flags.{k}").read_text().splitlines()
        assert given[:2] == ["-m", "ktda_jax.main"] and given[3 : 3 + len(ODD)] == list(ODD)
        coordinator, *rest = given[3 + len(ODD) :]
        assert re.fullmatch(r"--coordinator=localhost:\d+", coordinator)
        assert rest == ["--num_processes=3", f"--process_id={k}", "--stopped_status=75"]
    assert (local.seen.parent / "run/logs/process_2.log").read_text() == "I am 2\n"


def test_a_worker_that_fails_stops_the_others_and_gives_the_status(local):
    began = time.monotonic()
    launcher = local(3, worker="[[ $K == 1 ]] && { echo why >&2; exit 7; }; trap '' TERM; sleep 60")
    _, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 7 and time.monotonic() - began < 10
    assert "process 1 ended with status 7; the others are stopped\nwhy\n" in err


def test_another_verb_and_that_those_that_map_go_on(local):
    launcher = local(3, worker="[[ $K == 1 ]] && exit 7; sleep 2; echo $2", verb="predict")
    out, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 7 and out == "ktda_jax.predict\n"
    assert (local.seen.parent / "run/logs/process_2.log").read_text() == "ktda_jax.predict\n"
    assert "process 1 ended with status 7; the others go on\n" in err
    assert "failed with status 7; the same command with --skip_existing maps what is left\n" in err
    assert local(2, worker="echo $2", verb="extract").communicate(timeout=30) == ("ktda_jax.extract\n", "")
    _, err = local(2, verb="report").communicate(timeout=10)
    assert err == "local.sh: error: 'report' is no verb for several processes; use main, predict or extract\n"


def test_retries_start_all_again(local):
    worker = '[[ $K == 0 || $(wc -l < "${0%/*}/seen/gpu.1") -ge 3 ]] || kill -KILL $$'
    launcher = local(2, worker=worker, RETRIES="1")
    assert launcher.wait(30) == 128 + signal.SIGKILL and "restart 1 of 1" in launcher.stderr.read()
    launcher = local(2, worker=worker, RETRIES="1")  # the third time it does not die
    assert launcher.wait(30) == 0 and launcher.stderr.read() == ""
    assert len((local.seen / "gpu.0").read_text().splitlines()) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_once_and_nothing_is_started_again(local, number):
    worker = "trap 'echo stopping; exit 75' TERM; echo ready; while :; do sleep 0.1; done"
    launcher = local(2, worker=worker, RETRIES="5")
    assert launcher.stdout.readline() == "ready\n"
    time.sleep(0.5)  # the other one, too
    launcher.send_signal(number)
    out, err = launcher.communicate(timeout=30)
    assert launcher.returncode == 75 and out == "stopping\n" and err.count("SIGTERM") == 1 and "restart" not in err


def test_a_second_signal_ends_workers_that_do_not_listen(local):
    launcher = local(2, worker="trap '' TERM; echo ready; sleep 60")
    assert launcher.stdout.readline() == "ready\n"
    launcher.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(10) == 128 + signal.SIGKILL


@pytest.mark.skipif(shutil.which("flock") is None, reason="local.sh guards against this only where there is flock")
def test_workers_that_outlived_their_launcher_are_not_joined_by_others(local):
    first = local(2, worker="echo $$; sleep 60")
    pid = int(first.stdout.readline())
    first.kill()
    second = local(2)
    assert second.wait(20) == 2 and "processes of an earlier local.sh still run" in second.stderr.read()
    os.killpg(pid, signal.SIGKILL)
    for number in range(pid - 20, pid + 20):  # the other worker leads a group of its own
        if "--process_id=1" in runs.read(pathlib.Path(f"/proc/{number}/cmdline")).split("\0"):
            os.killpg(number, signal.SIGKILL)


@pytest.mark.parametrize(
    "count, given, seen", [(2, None, ["0", "1"]), (2, "4,6", ["4", "6"]), (1, "", [""]), (0, None, ["", ""])]
)
def test_one_gpu_for_each_process(local, tmp_path, count, given, seen):
    runs.script(tmp_path / "bin", "nvidia-smi", f"for ((k = 0; k < {count}; k++)); do echo GPU $k: H; done")
    environment = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "JAX_PLATFORMS": ""}
    if given is not None:
        environment["CUDA_VISIBLE_DEVICES"] = given
    launcher = local(len(seen), **environment)
    assert launcher.wait(30) == 0, launcher.stderr.read()
    assert [(local.seen / f"gpu.{k}").read_text().strip() for k in range(len(seen))] == seen


def test_what_local_refuses(local, tmp_path):
    runs.script(tmp_path / "bin", "nvidia-smi", "echo GPU 0; echo GPU 1")
    gpus = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "JAX_PLATFORMS": ""}
    for processes, environment, line in [
        ("--config=x", {}, "the number of processes is '--config=x'; usage: local.sh N --config=FILE [FLAGS...]"),
        (2, {"RETRIES": "many"}, "RETRIES is 'many'; give a number"),
        (2, {"PYTHON": "nopython"}, "no 'nopython' on PATH; activate the environment, or set PYTHON"),
        (3, gpus, "3 processes do not fit 2 GPUs; use 2, or set CUDA_VISIBLE_DEVICES"),
    ]:
        launcher = local(processes, **environment)
        _, err = launcher.communicate(timeout=10)
        assert launcher.returncode == 2 and line in err and err.count("\n") == 1
