"""SIGINT and SIGTERM, whenever they come: one line, status 130 or 143, soon, and nothing left behind."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
import runs

from ktda_jax import cli

LINES = {signal.SIGINT: "error: stopped from the keyboard\n", signal.SIGTERM: "error: stopped by a signal\n"}


def ended(process: subprocess.Popen, number: int) -> str:
    """stdout of a process that must end as a signal wants it."""
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, LINES[number])
    return out


# Without JAX ------------------------------------------------------------------------------------------------------

# A verb, at work where Python hears of no signal; several lines `ready` say that it got there.
VERB = """
import gc, hashlib, os, signal, sys, threading, time
from ktda_jax import UserError, cli
def ready(): print("ready", flush=True)
def compile(): hashlib.pbkdf2_hmac("sha512", b"", b"", 10**9)
def main(argv):
    {}
    print("not stopped", flush=True)
sys.argv[1:] = []
cli.run(main, cli.parsed(cli.parser()))
"""


def verb(body: str) -> subprocess.Popen:
    code = VERB.format("\n    ".join(body.strip().splitlines()))
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=runs.REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", LINES)
@pytest.mark.parametrize(
    "body, cleaned",
    [
        ("ready(); compile()", ""),  # in other languages' code, with nothing to clean up
        ("cli.stop_cleanly(); ready(); compile()", ""),  # and with something that it keeps us from
        (
            """
cli.stop_cleanly()
try:
    ready(); time.sleep(60)
finally:
    print("cleaned up", flush=True)""",
            "cleaned up\n",
        ),
        (  # what became of it on its way is not what the user is told
            """
cli.stop_cleanly()
try:
    ready(); time.sleep(60)
except BaseException as error:
    raise UserError("cannot read the file") from error""",
            "",
        ),
        (  # threads that wait for the main one, and say so when they are broken off
            """
cli.stop_cleanly()
for _ in range(3):
    threading.Thread(target=time.sleep, args=(60,)).start()
ready(); time.sleep(60)""",
            "",
        ),
        (  # Python prints and forgets what is raised in here
            """
cli.stop_cleanly()
class Slow:
    def __del__(self): ready(); time.sleep(1e-3 if self is None else 5)
Slow(); time.sleep(60)""",
            "",
        ),
    ],
)
def test_a_verb_ends_in_one_line(body, cleaned, number):
    process = verb(body)
    process.send_signal(number)
    assert ended(process, number) == cleaned


@pytest.mark.parametrize("number", LINES)
def test_one_that_wakes_nobody(number):
    """Heard by another thread, as by a main one that is just about to wait."""
    process = verb(f"""
cli.stop_cleanly()
threading.Timer(0.2, lambda: signal.pthread_kill(threading.get_ident(), {number:d})).start()
try:
    ready(); time.sleep(60)
finally:
    print("cleaned up", flush=True)""")
    assert ended(process, number) == "cleaned up\n"


@pytest.mark.parametrize("number", LINES)
def test_a_second_signal_means_now(number):
    """One that comes right behind the first is the same: a terminal sends it to a wrapper, too, which passes it on."""
    process = verb("""
cli.stop_cleanly()
try:
    ready(); time.sleep(60)
finally:
    ready(); time.sleep(1); ready(); time.sleep(60)""")
    process.send_signal(number)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "ready\n"  # so that one was not heard
    process.send_signal(number)
    ended(process, number)


def test_a_status_of_ones_own():
    process = verb("""
from absl import flags
flags.DEFINE_integer("stopped_status", 75, "")
ready(); compile()""")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (75, "", LINES[signal.SIGTERM])


# The verbs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return runs.make_tiles(tmp_path_factory.mktemp("tiles"))


@pytest.mark.parametrize("verb", [verb for verb in cli.VERBS if verb != "areas"])  # which does without JAX
def test_while_libraries_are_imported(tiles, tmp_path, verb):
    """Which swallow some exceptions, and turn others into their own."""
    with_config = runs.arguments(tiles, None)
    flags = {
        "main": [*with_config, f"--workdir={tmp_path / 'run'}"],
        "predict": ["--checkpoint=x", "--input=x", "--output=x"],
        "evaluate": ["--checkpoint=x", "--images=x", "--labels=x"],
        "report": [f"--workdir={tmp_path}"],
        "export": ["--checkpoint=x", "--format=onnx", "--output=x"],
        "convert": ["--input=x", "--output=x"],
    }
    process = runs.start(*flags.get(verb, with_config), verb=verb)
    maps = pathlib.Path(f"/proc/{process.pid}/maps")
    runs.wait_for(lambda: "libjax" in runs.read(maps) or "jaxlib" in runs.read(maps), process)
    process.send_signal(signal.SIGINT)
    ended(process, signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_while_a_training_compiles(tiles, tmp_path, number):
    """There is nothing to save yet, so it is not waited for; nor is there anything to go on from."""
    process = runs.start(*runs.arguments(tiles, tmp_path / "run"), **runs.AS_USERS_COMPILE)
    runs.wait_for(lambda: "compiling the training step" in process.stdout.readline(), process)
    process.send_signal(number)
    ended(process, number)
    assert not list((tmp_path / "run").glob("*lock*")) and not list((tmp_path / "run" / "checkpoints").iterdir())


@pytest.mark.slow
def test_a_training_that_was_stopped_has_not_succeeded(tiles, tmp_path):
    """It saves first, so the same command goes on; a second ctrl-c does not wait for that."""
    settings = {"total_steps": 1000, "eval_every": 1000, "distill": False, "model.aux_channels": 0}
    flags = runs.arguments(tiles, tmp_path / "run", settings | {"model.student.depths": (0, 0, 0, 0)})
    for number, status, more in (
        (signal.SIGINT, 130, []),
        (signal.SIGTERM, 143, []),
        (signal.SIGTERM, 75, ["--stopped_status=75"]),
        (signal.SIGINT, 0, ["--stopped_status=0"]),
    ):
        before = max(runs.steps(tmp_path / "run", "train/loss")) if (tmp_path / "run").exists() else 0
        process = runs.start(*flags, *more)
        runs.wait_for(lambda before=before: runs.reached(tmp_path / "run", before + 5), process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (status, "") and "stopped by a signal at step" in out
        assert not (tmp_path / "run" / "lock.json").exists()

    evaluation = runs.start(*flags, "--mode=eval", PYTHONUNBUFFERED="1")
    threads = pathlib.Path(f"/proc/{evaluation.pid}/task")
    runs.wait_for(lambda: threads.exists() and len(os.listdir(threads)) > 8, evaluation)  # XLA's
    evaluation.send_signal(signal.SIGTERM)
    ended(evaluation, signal.SIGTERM)


def test_what_is_half_extracted_is_removed(tiles, tmp_path):
    flags = runs.arguments(tiles, None, {"teacher.features": tmp_path / "features"})
    process = runs.start(*flags, verb="extract", **runs.AS_USERS_COMPILE)
    runs.wait_for((tmp_path / ".features.tmp").exists, process)
    process.send_signal(signal.SIGTERM)
    ended(process, signal.SIGTERM)
    assert list(tmp_path.iterdir()) == []


def test_a_build_of_a_data_set(tmp_path):
    process = runs.start("meadow", f"--data_dir={tmp_path}", verb="data.tfds_source")
    runs.wait_for(lambda: any(tmp_path.rglob("*array_record*")), process)
    process.send_signal(signal.SIGTERM)
    ended(process, signal.SIGTERM)
