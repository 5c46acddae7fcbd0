"""Trainings into gs://, on a real server of buckets on this machine."""

import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import bucket_server
import numpy as np
import pytest
import rasterio
import runs
from etils import epath
from PIL import Image

from ktda_jax import UserError, export, predict, report
from ktda_jax.config import workdir as records
from ktda_jax.data import buckets, tfds_source
from ktda_jax.data.check import check_split
from ktda_jax.data.paths import expand, place
from ktda_jax.data.sources import read_tile
from ktda_jax.figures import plots
from ktda_jax.training import inputs, lock, loop, program, whole
from ktda_jax.training.checkpoint import Checkpoints
from ktda_jax.training.trained import from_workdir, read
from ktda_jax.training.writers import Writer
from ktda_jax.weights import folder

SETTINGS = {"eval_every": 2, "checkpoint_every": 1, "keep_checkpoints": 2}


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    with bucket_server.bucket(tmp_path_factory.mktemp("bucket")) as objects:
        yield objects


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return runs.make_tiles(tmp_path_factory.mktemp("tiles"))


def put(folder, path):
    for file in folder.rglob("*"):
        if file.is_file():
            buckets.upload(file, place(path) / file.relative_to(folder))


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
    assert loop.train_and_evaluate(config, "gs://bucket/run").metrics.summary["mIoU"] > 80
    said = capsys.readouterr().out
    assert "resuming at step 3" in said and "figures in gs://bucket/run/figures" in said
    assert (run / "metrics.jsonl").read_text() == (tmp_path / "whole/metrics.jsonl").read_text()
    states = []
    for workdir in (tmp_path / "whole", place("gs://bucket/run")):
        with Checkpoints(workdir / "checkpoints") as checkpoints:
            current, position = checkpoints.restore(6, program.abstract, program.shardings)
            states.append((float(current.params["seen"]), position, checkpoints.best_step()))
    assert states[0] == states[1] and states[0][2] == 4
    names = {path.name for path in run.iterdir() if path.is_file()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert len(events) == 2 and names - events == {"config.json", "run.json", "metrics.jsonl", "calibration.json"}
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


@pytest.fixture
def forbidding(monkeypatch):
    """A server that refuses all from now on."""

    class Forbids(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = json.dumps({"error": {"code": 403, "message": "me@x lacks storage.objects.list access"}}).encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        log_message = lambda *_: None  # noqa: E731

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbids) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


def test_what_may_not_be_looked_into_is_one_line(bucket, forbidding):
    with pytest.raises(UserError) as raised:
        place("gs://secret/run")
    assert str(raised.value).startswith("cannot look into gs://secret: me@x lacks storage.objects.list access; log in")
    assert "\n" not in str(raised.value)


def test_a_bucket_that_refuses_is_not_taken_for_a_damaged_checkpoint(trained, forbidding):
    line = r"cannot get at gs://bucket/trained/checkpoints/4\S*: me@x lacks storage.objects.list access; the same comma"
    checkpoint = epath.Path("gs://bucket/trained/checkpoints/4")
    for look in (whole.fault, whole.score):
        with pytest.raises(UserError, match=line):
            look(checkpoint)


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


# What others read -------------------------------------------------------------------------------------------------

SMALL = {
    "model.student.depths": (0, 0, 0, 0), "model.aux_channels": 0, "model.fmm.enabled": False, "distill": False,
    "total_steps": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(bucket, tiles):
    runs.random_workdir(tiles, place("gs://bucket/trained"), SMALL)
    return bucket / "trained"


def test_a_workdir_in_a_bucket_is_scored_reported_mapped_and_exported(trained, tiles, tmp_path, capsys):
    workdir = "gs://bucket/trained"
    scored = loop.evaluate_workdir(runs.config(tiles, SMALL), workdir)
    assert json.loads((trained / "figures/val.json").read_text())["confusion"] == scored.confusion.tolist()
    assert '"final/mIoU"' in (trained / "metrics.jsonl").read_text() and (trained / "calibration.json").exists()

    page = report.run([workdir], tiles=1)
    assert str(page) == f"{workdir}/report.html" and not list(trained.glob("*.tmp"))
    html = (trained / "report.html").read_text()
    assert "finished" in html and "data:image/png" in html

    image = tiles / "img_dir/val/t0.png"
    predict.run(workdir, str(image), str(tmp_path / "map.tif"), tile=64)
    with rasterio.open(tmp_path / "map.tif") as made:
        assert made.read(1).shape == (72, 72)
    described = export.run(workdir, tmp_path / "model.stablehlo", format="stablehlo", size=(64, 64))
    assert (described["source"]["workdir"], described["source"]["step"]) == (workdir, 4)


def test_converted_weights_are_fetched_once(trained, tiles, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = from_workdir(place("gs://bucket/trained"))
    folder.save(tmp_path / "weights", found)
    put(tmp_path / "weights", "gs://bucket/weights")
    for fetched in ("fetching 2 files", ""):
        again = read("gs://bucket/weights")
        assert fetched in capsys.readouterr().out or not fetched
        assert again.arrays.keys() == found.arrays.keys()
        assert all(np.array_equal(again.arrays[name], array) for name, array in found.arrays.items())
    settings = SMALL | {"weights.model": "gs://bucket/weights"}
    assert program.build(runs.settings(tiles, settings)).loaded == set(found.arrays)
    with pytest.raises(UserError, match="there is nothing at gs://bucket/weight; correct the name"):
        read("gs://bucket/weight")


# Data -------------------------------------------------------------------------------------------------------------


def test_tiles_are_staged_once_and_what_changed_again(bucket, tiles, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    put(tiles, "gs://bucket/tiles")
    data = runs.settings("gs://bucket/tiles").data
    ours, theirs = (inputs.open_source(d, "val") for d in (data, runs.settings(tiles).data))
    assert check_split(ours).fingerprint == check_split(theirs).fingerprint
    target = tmp_path / "ktda_jax/bucket/tiles/img_dir/val"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("fetching 5 files, ") and lines[0].endswith(f"/val to {target}")
    assert not (target.parent / "train").exists()

    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    changed = read_tile(theirs, 1)["image"][::-1]
    Image.fromarray(changed).save(tmp_path / "t1.png")
    images = place("gs://bucket/tiles/img_dir/val")
    buckets.upload(tmp_path / "t1.png", images / "t1.png")
    buckets.upload(tmp_path / "t1.png", images / "t9.png")
    buckets.remove(images / "t0.png")
    buckets.upload(tmp_path / "t1.png", place("gs://bucket/tiles/ann_dir/val/t9.png"))
    (target / "half.tmp").touch()  # of one that was killed
    again = inputs.open_source(data, "val")
    assert capsys.readouterr().out.startswith("fetching 2 files, ")
    assert again.names == ("t1", "t2", "t3", "t4", "t9") and np.array_equal(read_tile(again, 0)["image"], changed)
    after = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    assert {name for name in after if after[name] == before.get(name)} == {"t2.png", "t3.png", "t4.png"}
    assert set(after) == {f"{name}.png" for name in again.names}

    with pytest.raises(UserError, match="there is nothing at gs://bucket/tiles/img_dir/vol; correct the name"):
        inputs.open_source(data, "vol")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10))
    with pytest.raises(UserError, match="takes 0.00 GB more, and .*/img_dir has 0.00 GB free; make room, or"):
        inputs.open_source(data, "train")


def test_records_of_tfds_are_staged(bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    dummies = runs.REPOSITORY / "data_builders/grass/dummy_data"
    built = tfds_source.prepare("grass", tmp_path / "built", dummies)
    put(tmp_path / "built", "gs://bucket/tfds")
    data = runs.settings("gs://bucket/tfds", {"data.source": "tfds", "data.name": "grass"}).data
    ours, theirs = inputs.open_source(data, "val"), tfds_source.TfdsSource(built, "val", num_classes=5)
    assert len(ours) == len(theirs) > 0 and np.array_equal(ours[0]["image"], theirs[0]["image"])


def test_a_checkpoint_that_is_not_what_was_written_is_refused(trained, tiles, tmp_path):
    """Also in a copy on a disk, and one that was brought from there."""
    folder, name = trained / "checkpoints/4", "state/_sharding"
    local = tmp_path / "checkpoints/4"
    shutil.copytree(folder, local)
    assert whole.fault(local, content=True) is None
    content = bytearray((local / name).read_bytes())
    content[100] ^= 1
    (local / name).write_bytes(content)
    assert whole.fault(local, content=True) == f"{name} is not what was written, by its sum"
    copy = place("gs://bucket/copy/checkpoints/4")
    shutil.copytree(folder, trained.parent / "copy/checkpoints/4")
    assert whole.fault(copy, content=True) is None
    buckets.upload(local / name, copy / name)
    assert whole.fault(copy, content=True) == f"{name} is not what was written, by its sum"
    buckets.remove(copy / name)
    assert whole.fault(copy) == f"it lacks {name}"
    buckets.remove(copy / "commit_success.txt")
    assert whole.steps(copy.parent) == [] == records.steps(copy.parent.parent)
