"""config.tracker: MLflow's client and W&B's own file give back what the workdir has; a dead one stops no training.

MLflow is real, with its database in a file, and W&B is real and offline; each is skipped where it is not installed.
"""

import csv
import functools
import importlib.util
import json
import sys
import threading
import time

import pytest
import runs
from arrived import Arrived, check_arrived, reported

from ktda_jax import UserError
from ktda_jax.config import checks
from ktda_jax.config import workdir as records
from ktda_jax.config.fields import flat
from ktda_jax.training import loop, tracker_runs, trackers
from ktda_jax.training.trackers import Tracker

INSTALLED = {kind: importlib.util.find_spec(kind) is not None for kind in trackers.RUNS}


SETTINGS = {"total_steps": 24, "eval_every": 6, "ema": 0.9}  # those of test_main.py, which may have compiled it


def needs(kind: str):
    return pytest.mark.skipif(not INSTALLED[kind], reason=f"{kind} is not installed")


EACH = pytest.mark.parametrize("kind", [pytest.param(kind, marks=needs(kind)) for kind in trackers.RUNS])


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return runs.make_tiles(tmp_path_factory.mktemp("tiles"))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The environment that says where runs go: a database in a file, whose artifacts lie beside it, and no network."""
    folder = tmp_path_factory.mktemp("trackers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.setenv("MLFLOW_EXPERIMENT_NAME", "meadow")
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("WANDB_MODE", "offline")
        for name in ("WANDB_DIR", "WANDB_NAME", "WANDB_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
            patch.delenv(name, raising=False)
        patch.chdir(folder)  # MLflow's artifacts go to ./mlruns
        yield folder
    if "wandb" in sys.modules and INSTALLED["wandb"]:
        sys.modules["wandb"].teardown()


# Trainings --------------------------------------------------------------------------------------------------------


@needs("mlflow")
def test_the_command_reports_to_mlflow(tiles, places, tmp_path):
    process = runs.start(*runs.arguments(tiles, tmp_path / "meadow", {**SETTINGS, "tracker": "mlflow"}))
    out, err = runs.finish(process)
    found = check_arrived(tmp_path / "meadow", "mlflow")
    assert f"tracked by mlflow: run {found.id} at sqlite:///{places}/mlflow.db\n" in out and err == ""
    settings = flat(records.read(tmp_path / "meadow"))
    assert found.settings == {name: str(value) for name, value in settings.items()} and found.status == "FINISHED"
    assert found.files == {path.name for path in (tmp_path / "meadow" / "figures").iterdir()} >= {"val.csv"}


@needs("wandb")
def test_scores_figures_and_settings_go_to_wandb(toy, tiles, places, tmp_path, capsys):
    toy(quality={3: 0.5, 6: 0.75}, figures=True)
    loop.train_and_evaluate(runs.config(tiles, {"tracker": "wandb"}), tmp_path)
    found = check_arrived(tmp_path, "wandb")
    assert f"tracked by wandb: offline; `wandb sync {tmp_path}/wandb/offline-run-" in capsys.readouterr().out
    assert found.settings == flat(records.read(tmp_path))
    assert found.files == {path.stem for path in (tmp_path / "figures").iterdir() if path.suffix != ".json"}
    (table,) = tmp_path.glob("wandb/offline-run-*/files/" + found.summary["figures/val"]["path"])
    written = json.loads(table.read_text())
    columns, *rows = csv.reader((tmp_path / "figures" / "val.csv").read_text().splitlines())
    assert written["columns"] == columns
    assert written["data"] == [[name, *(float(x) if x else None for x in rest)] for name, *rest in rows]


@EACH
def test_a_stopped_training_goes_on_in_its_run_and_computes_the_same(toy, tiles, places, tmp_path, kind):
    given = {"tracker": kind, "total_steps": 8, "eval_every": 4}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    toy()
    loop.train_and_evaluate(runs.config(tiles, given | {"tracker": None}), whole)
    toy(at={8: functools.partial(interrupt_once_arrived, 4, cut, kind)})  # step 5 is reported, and done again
    with pytest.raises(KeyboardInterrupt):
        loop.train_and_evaluate(runs.config(tiles, given), cut)
    first = Arrived(cut, kind)
    assert {step for step, _ in first.rows} == {1, 2, 3, 4, 5} and first.status in ("KILLED", 1)
    toy()
    loop.train_and_evaluate(runs.config(tiles, given | {"log_every": 2}), cut)
    again = Arrived(cut, kind)
    assert again.id == first.id and again.status in ("FINISHED", 2)
    assert again.rows == reported(cut) | first.rows and (5, "train/loss") in first.rows
    kept = [row for row in runs.rows(whole) if row["step"] not in (5, 7)]
    assert runs.rows(cut) == kept and "final/mIoU" in kept[-1]


def interrupt():
    raise KeyboardInterrupt


def interrupt_once_arrived(step: int, workdir, kind):
    """As soon as it has arrived where it stays whatever becomes of this process."""
    end = time.monotonic() + 30
    while step not in {step for step, _ in Arrived(workdir, kind, ended=False).rows}:
        assert time.monotonic() < end
        time.sleep(0.1)
    interrupt()


@needs("mlflow")
def test_a_workdir_that_was_not_tracked_is_sent_whole_and_without_a_checkpoint_a_run_is_new(
    toy, tiles, places, tmp_path
):
    toy(at={2: interrupt})
    with pytest.raises(KeyboardInterrupt):
        loop.train_and_evaluate(runs.config(tiles, {"tracker": "mlflow"}), tmp_path)
    nothing_saved = Arrived(tmp_path, "mlflow")
    toy()
    loop.train_and_evaluate(runs.config(tiles), tmp_path)
    loop.evaluate_workdir(runs.config(tiles, {"tracker": "mlflow"}), tmp_path)
    assert Arrived(tmp_path, "mlflow").id == nothing_saved.id  # eval goes on with whatever run there is
    (tmp_path / "tracker.json").write_text("{")
    loop.evaluate_workdir(runs.config(tiles, {"tracker": "mlflow"}), tmp_path)
    assert check_arrived(tmp_path, "mlflow").id != nothing_saved.id


@needs("mlflow")
def test_a_workdir_in_a_bucket(toy, tiles, places, bucket, tmp_path):
    toy(figures=True)
    loop.train_and_evaluate(runs.config(tiles, {"tracker": "mlflow"}), "gs://bucket/tracked")
    found = check_arrived(bucket / "tracked", "mlflow")
    assert found.files == {path.name for path in (bucket / "tracked" / "figures").iterdir()} >= {"val.csv"}


# What cannot be had -----------------------------------------------------------------------------------------------


def refused(tiles, workdir, kind: str) -> str:
    """The line with which a training ends before it begins."""
    with pytest.raises(UserError) as error:
        loop.train_and_evaluate(runs.config(tiles, {"tracker": kind}), workdir)
    assert "\n" not in str(error.value) and not (workdir / "config.json").exists()
    return str(error.value)


@pytest.mark.parametrize("kind", trackers.RUNS)
def test_one_that_is_not_installed_is_said(toy, tiles, tmp_path, monkeypatch, kind):
    toy(at={1: lambda: pytest.fail("trained")})
    monkeypatch.setitem(sys.modules, kind, None)
    assert f"config.tracker={kind} needs {kind}: pip install -e '.[{kind}]'" in refused(tiles, tmp_path / "a", kind)
    monkeypatch.delitem(sys.modules, kind)
    for name in [name for name in sys.modules if name.startswith(f"{kind}.")]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / kind).mkdir()  # as W&B leaves one where it runs, which Python takes for a package
    monkeypatch.setattr(sys, "path", [str(tmp_path), *(path for path in sys.path if "site-packages" not in path)])
    if importlib.util.find_spec(kind).origin is None:
        assert "pip install" in refused(tiles, tmp_path / "b", kind)


def test_an_unknown_one_is_said(tiles):
    with pytest.raises(UserError, match=r"config.tracker is 'tensorboard'; choose 'wandb' or 'mlflow'"):
        checks.resolve(runs.config(tiles, {"tracker": "tensorboard"}))


@needs("mlflow")
def test_a_server_that_does_not_answer_is_said_before_training(toy, tiles, places, tmp_path, monkeypatch):
    toy(at={1: lambda: pytest.fail("trained")})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somebody:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    line = refused(tiles, tmp_path, "mlflow")
    assert line.startswith("config.tracker=mlflow: no run can be begun (") and "set MLFLOW_TRACKING_URI" in line
    assert "secret" not in line


@needs("wandb")
def test_wandb_without_login_or_network_is_said_before_training(toy, tiles, places, tmp_path, monkeypatch):
    toy(at={1: lambda: pytest.fail("trained")})
    import wandb

    for name, value in {"WANDB_MODE": "online", "WANDB_BASE_URL": "http://127.0.0.1:9", "NETRC": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tracker_runs, "START", 1)
    wandb.teardown()  # it reads the environment once
    try:
        assert "not logged in; `wandb login`" in refused(tiles, tmp_path, "wandb")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        wandb.teardown()
        line = refused(tiles, tmp_path, "wandb")
        assert line.startswith("config.tracker=wandb: no run can be begun (") and "WANDB_MODE=offline" in line
    finally:
        wandb.teardown()


class Flaky:
    """A run whose server is down while `down` is set, and does not even answer while `hangs` is."""

    id, held, where, remedy = "7", 0, "here", "do something"
    down, hangs = False, threading.Event()

    def __init__(self, *_):
        self.found, self.ended, Flaky.last = [], None, self

    def rows(self, rows):
        if self.down:
            raise ConnectionError("the line is\ndead")
        self.found += [(row.step, row.values) for row in rows]

    def final(self, table):
        self.hangs.wait()
        self.rows([])

    def end(self, status):
        self.ended = status


@pytest.fixture
def flaky(monkeypatch):
    monkeypatch.setitem(trackers.RUNS, "mlflow", Flaky)
    monkeypatch.setattr(Flaky, "down", True)
    monkeypatch.setattr(Flaky, "hangs", threading.Event())
    yield Flaky
    Flaky.hangs.set()


def test_one_that_goes_down_is_said_once_and_gets_all_when_it_is_back(toy, tiles, tmp_path, monkeypatch, capsys, flaky):
    monkeypatch.setattr(trackers, "RETRY", 0.05)
    flaky.hangs.set()
    toy(at={6: lambda: setattr(flaky, "down", False)})
    loop.train_and_evaluate(runs.config(tiles, {"tracker": "mlflow", "total_steps": 8}), tmp_path)
    out = capsys.readouterr().out
    assert out.count("warning: cannot send to mlflow, and training goes on (the line is dead)") == 1
    assert {(step, name): [value] for step, row in flaky.last.found for name, value in row.items()} == reported(
        tmp_path
    )
    assert "did not take" not in out and flaky.last.ended == "finished"


def test_one_that_stays_down_or_hangs_is_left_and_says_what_to_do(tiles, tmp_path, monkeypatch, capsys, flaky):
    monkeypatch.setattr(trackers, "ENDING", 0.1)
    tmp_path.joinpath("figures").mkdir()
    settings = runs.settings(tiles, {"tracker": "mlflow"})
    for down in (True, False):  # the latter hangs
        flaky.down = down
        with Tracker(settings, tmp_path) as tracker:
            assert tracker.begin(0) == "tracked by mlflow: here" and tracker.begin(0) is None
            tracker.write(1, {"train/loss": 1.0})
            tracker.final(1, "val", {"mIoU": 1.0})
        out = capsys.readouterr().out
        assert out.endswith("warning: mlflow did not take all there was to send; do something\n")
        assert out.count("cannot send") == down


def test_rows_beyond_what_memory_should_hold_are_left_to_the_next_start(tiles, tmp_path, monkeypatch, flaky):
    monkeypatch.setattr(trackers, "KEPT", 3)
    with Tracker(runs.settings(tiles, {"tracker": "mlflow"}), tmp_path) as tracker:
        tracker.begin(0)
        for step in range(1, 100):
            tracker.write(step, {"a": 1.0})
            while step < 6 and len(tracker._waiting) < step - 1:
                threading.Event().wait(0.001)
        assert [row.step for row in tracker._waiting] == [1, 2, 3, 4]
        flaky.down = False


def test_an_error_ends_the_run_as_failed(tiles, tmp_path, flaky):
    flaky.down = False
    with pytest.raises(ZeroDivisionError), Tracker(runs.settings(tiles, {"tracker": "mlflow"}), tmp_path) as tracker:
        tracker.begin(0)
        raise ZeroDivisionError
    assert flaky.last.ended == "failed"


def test_settings_are_sent_without_what_signs_an_address(tiles):
    signed = "https://me:pass@host.org/a.tif?X-Amz-Signature=5,s3://bucket/b.tif,/vsicurl/https://host/c.tif?sig=1"
    sent = tracker_runs.public(runs.settings(tiles, {"data.unlabelled": signed, "weights.teacher": "what?"}))
    assert sent["data.unlabelled"] == (
        "https://***@host.org/a.tif?***,s3://bucket/b.tif,/vsicurl/https://host/c.tif?***"
    )
    assert sent["weights.teacher"] == "what?" and sent["data.crop"] == [64, 64]


@needs("wandb")
def test_the_command_line_is_sent_without_what_signs_an_address(tiles, places, tmp_path, monkeypatch):
    import wandb

    setting = "--config.data.unlabelled=https://me:SECRET@host.org/a.tif?X-Amz-Signature=SECRET"
    monkeypatch.setattr(sys, "argv", ["main.py", "--config=few_labels.py", setting])
    wandb.teardown()  # it reads arguments at its set-up
    settings = runs.settings(tiles, {"tracker": "wandb", "data.unlabelled": setting.partition("=")[2]})
    with Tracker(settings, tmp_path) as tracker:
        tracker.begin(0)
        tracker.write(1, {"train/loss": 1.0})
    assert sys.argv[-1] == setting
    Arrived(tmp_path, "wandb")  # all of it is in the files
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"few_labels.py" in content and b"//***@host.org/a.tif?***" in content for content in files)
    assert not any(b"SECRET" in content for content in files)


def test_other_processes_track_nothing(tiles, tmp_path, flaky):
    with Tracker(runs.settings(tiles, {"tracker": "mlflow"}), tmp_path, enabled=False) as tracker:
        assert tracker.begin(0) is None
        tracker.write(1, {"a": 1.0})
        tracker.final(1, "val", {})
    assert not (tmp_path / "tracker.json").exists()
