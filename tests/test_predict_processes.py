"""Scenes mapped by several processes through launch/local.sh: the files of one process, whoever dies."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile

import jax
import numpy as np
import pytest
import runs
import scene_files as sf

from ktda_jax import UserError
from ktda_jax.data import buckets
from ktda_jax.data.paths import place
from ktda_jax.prediction import records, shares

SIZES = {"a": (240, 500), "b": (260, 400), "c": (600, 150), "d": (420, 200), "e": (64, 90), "f": (50, 70)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    runs.random_workdir(runs.make_tiles(folder / "tiles"), folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for number, (name, size) in enumerate(SIZES.items()):
        sf.write(folder / f"{name}.tif", sf.smooth(*size, seed=number))
    return folder


@pytest.fixture(scope="module")
def flags(checkpoint):
    return f"--checkpoint={checkpoint}", "--probabilities", "--overlay", "--batch_size=4"


@pytest.fixture(scope="module")
def expected(flags, scenes, tmp_path_factory):
    """The files of one process."""
    maps = tmp_path_factory.mktemp("maps")
    runs.finish(runs.start(*flags, f"--input={scenes}", f"--output={maps}", verb="predict"))
    found = contents(maps)
    assert len(found) == 4 * len(SIZES)
    return found


def put(path: pathlib.Path, target: pathlib.PurePath) -> None:
    buckets.upload(path, target) if buckets.is_remote(target) else shutil.copy(path, target)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def launch(processes: int, *flags: str, logs: pathlib.Path) -> subprocess.Popen:
    return subprocess.Popen(
        [runs.REPOSITORY / "launch" / "local.sh", str(processes), "predict", *flags],
        cwd=runs.REPOSITORY,
        env={
            **os.environ, "PYTHON": sys.executable, "GRACE": "0", "LOGS": str(logs), "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": runs.xla_flags(1),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


# The scenes that the last of so many processes has, of which it begins with the first.
@pytest.mark.parametrize(
    "processes, last, remote",
    [
        (2, "bcef", False),
        pytest.param(4, "def", False, marks=pytest.mark.slow),
        pytest.param(2, "bcef", True, marks=pytest.mark.slow),
    ],
)
def test_one_is_killed_and_the_same_command_makes_the_files_of_one_process(
    flags, scenes, expected, tmp_path, request, processes, last, remote
):
    """remote: scenes and maps are in a bucket, whose objects lie in a folder here."""
    maps = (request.getfixturevalue("bucket") if remote else tmp_path) / "maps"
    named, output = map(place, ("gs://bucket/scenes", "gs://bucket/maps") if remote else (tmp_path / "scenes", maps))
    if not remote:
        named.mkdir()
    for path in scenes.iterdir():
        put(path, named / path.name)
    flags = (*flags, f"--input={named}", f"--output={output}", "--skip_existing")
    launcher = launch(processes, *flags, logs=tmp_path / "logs")

    def is_writing() -> bool:
        """Whether the last process has begun to write its first map."""
        nonlocal record
        record = json.loads(runs.read(maps / f".predict-{processes - 1:05}-of-{processes:05}.json", "{}"))
        if not record:
            return False
        drafts = pathlib.Path(tempfile.gettempdir(), f"ktda_jax_{record['token']}") if remote else maps
        return any(drafts.glob(f".{record['token']}.*.tif"))

    record = None
    runs.wait_for(is_writing, launcher)
    os.kill(record["pid"], signal.SIGKILL)
    out, err = launcher.communicate(timeout=120)
    assert launcher.returncode == 128 + signal.SIGKILL
    assert f"process {processes - 1} ended with status 137; the others go on" in err
    assert f"\n{processes} processes mapped {6 - len(last)} of 6 scenes, 0 failed, {len(last)} left; " in out
    assert "error: stopped before all was mapped:\n" in err and f": died; {len(last)} of its scenes left\n" in err
    assert "the same command with --skip_existing maps what is left" in err
    assert not list(pathlib.Path(tempfile.gettempdir()).glob(f"ktda_jax_{record['token']}*"))
    there = contents(maps)
    assert there == {name: data for name, data in expected.items() if name[0] not in last}  # and nothing else
    times = {path: path.stat().st_mtime_ns for path in maps.iterdir()}

    for number in range(2):  # what cannot be read is named by process 0, whose share it may be in
        (tmp_path / "cut.tif").write_bytes(b"II*\0")
        put(tmp_path / "cut.tif", named / f"x{number}.tif")
    out, err = runs.finish(launch(processes, *flags, logs=tmp_path / "logs"), status=1)
    assert f"\n{processes} processes mapped {len(last)} of 8 scenes, {6 - len(last)} were there, 2 failed; " in out
    assert f"\n  {socket.gethostname()}, process 0, 1" in out
    assert err.count("error: 2 of 8 scenes could not be mapped:\n") == 1
    assert all(f"\n  cannot read {named}/x{number}.tif" in err for number in range(2))
    assert contents(maps) == expected and all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_shares_are_balanced_whole_and_the_same_everywhere():
    sizes = np.random.default_rng(0).integers(1, 1000, 200).tolist()
    dealt = shares.deal(sizes, 7)
    assert sorted(k for share in dealt for k in share) == list(range(200)) and all(
        share == sorted(share) for share in dealt
    )
    loads = [sum(sizes[k] for k in share) for share in dealt]
    assert max(loads) - min(loads) < 20 and shares.deal(sizes, 7) == dealt
    assert shares.deal([5, 100, 5, 5], 2) == [[1], [0, 2, 3]]
    assert [len(share) for share in shares.deal([0] * 9, 4)] == [3, 2, 2, 2]  # of which nothing can be read
    assert shares.deal([7], 3) == [[0], [], []]
    assert shares.sizes([pathlib.Path("nowhere.tif")]) == [0]


def test_which_process_this_is_under_slurm_and_on_a_slice(monkeypatch):
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "JAX_LOCAL_DEVICE_IDS", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    for name in shares.OWN_CHIPS:  # to be restored
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    with pytest.raises(
        UserError, match="^--coordinator=auto: neither Slurm nor .* give --num_processes and --process_"
    ):
        shares.by_cluster()
    monkeypatch.setenv("TPU_WORKER_ID", "2")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a,b,c,d")
    assert shares.by_cluster() == (2, 4) and os.environ["TPU_PROCESS_BOUNDS"] == "1,1,1"
    monkeypatch.setenv("TPU_WORKER_ID", "0")  # the second slice of two, of one host each, which has all its chips
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "a")
    monkeypatch.setenv("MEGASCALE_SLICE_ID", "1")
    monkeypatch.setenv("MEGASCALE_NUM_SLICES", "2")
    monkeypatch.delenv("TPU_PROCESS_BOUNDS")
    assert shares.by_cluster() == (1, 2) and "TPU_PROCESS_BOUNDS" not in os.environ
    seen = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: seen.append((name, value)))
    for name, value in (("PROCID", "5"), ("NTASKS", "16"), ("LOCALID", "1")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert shares.by_cluster() == (5, 16)
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "0,1,2,3")
    assert shares.by_cluster() == (5, 16)
    assert seen == [("jax_cuda_visible_devices", devices) for devices in ("1", "0,1,2,3")]


def record(folder, index, *, count=3, scenes=4, **how) -> records.Record:
    given = dict(skipped=0, failures=[], dealt=1, coordinator="x:1") | how
    return records.Record(folder, index, count, scenes=scenes, **given)


def test_what_process_0_finds(tmp_path, monkeypatch):
    """One that was stopped, one that was killed elsewhere, one with another list of scenes, and an older run's."""
    mine, said = record(tmp_path, 0, count=5), []
    with mine:
        mine.mapped(2_000_000)
        mine.mapped(2_000_000)
    mine.values |= {"seconds": 2.0, "scenes": 2}
    with pytest.raises(UserError), record(tmp_path, 1, count=5, failures=[UserError("no")]) as other:
        other.mapped(1_000_000)
        raise UserError("out of memory")
    elsewhere = record(tmp_path, 2, count=5)
    elsewhere.values |= {"host": "other", "machine": "other", "token": "t", "mapped": 1, "pixels": 8, "seconds": 1.0}
    elsewhere.write()
    (tmp_path / ".t.abc.tmp.tif").write_bytes(b"half")
    with record(tmp_path, 3, count=5, scenes=0, dealt=2):
        pass
    former = record(tmp_path, 4, count=5, coordinator="x:2")
    former.write()
    monkeypatch.setattr(records.lock, "DEAD", 1.0)
    found = records.gather(mine, 1.0, said.append)
    assert said == ["waiting for processes 2, 4"] and not list(tmp_path.iterdir())
    scenes = [2, 4, 4, 0, 4]
    lines = records.summary(found, scenes)
    assert lines[0].startswith("5 processes mapped 4 of 14 scenes, 1 failed, 9 left; 5 Mpixel, 2.5 Mpixel/s")
    assert lines[1] == "  never begun, process 4: 0 mapped, 0 failed"
    assert {f"  {found[0]['host']}, process 0, 1, 3: 3 mapped, 1 failed; 5 Mpixel, 2.5 Mpixel/s"} < set(lines)
    here = found[0]["host"]
    assert records.undone(found, scenes) == [
        f"process 1 on {here}: out of memory; 2 of its scenes left",
        "process 2 on other: died; 3 of its scenes left",
        f"process 3 on {here} found other scenes than process 0; some may be left",
        "process 4: never began; 4 of its scenes left",
    ]


def test_flags_of_processes_that_will_not_do(tmp_path):
    needed = "--checkpoint=x", "--input=x", f"--output={tmp_path}"
    for flags, line in [
        (["--num_processes=2"], "--num_processes and --process_id go together; give both"),
        (["--coordinator=a:1"], "--coordinator=HOST:PORT needs --num_processes and --process_id too"),
        (["--num_processes=2", "--process_id=2"], "--process_id=2 is not one of --num_processes=2, which are counted"),
    ]:
        _, err = runs.finish(runs.start(*needed, *flags, verb="predict"), status=1)
        assert err.startswith(f"error: {line}") and err.count("\n") == 1
