"""Maps that go to a bucket: the files of a folder, as whole objects, whoever makes them."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest
import scene_files as sf
from test_images import error_of

from ktda_jax import UserError, predict
from ktda_jax.data import buckets
from ktda_jax.data.paths import place
from ktda_jax.prediction import files, outputs, records

WANTED = dict(probabilities=True, confidence=True, overlay=True, view=True)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for number, name in enumerate("abc"):
        sf.write(folder / f"{name}.tif", sf.smooth(150, 200 + 40 * number, seed=number))
    return folder


@pytest.fixture(autouse=True)
def model(monkeypatch, tmp_path):
    """In place of a trained one: each pixel's brightest band. Scratch folders lie where they can be counted."""
    sf.install(monkeypatch)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))


@pytest.fixture
def expected(scenes, tmp_path):
    """The files in a folder of this machine."""
    predict.run("x", str(scenes), str(tmp_path / "maps"), **WANTED)
    found = contents(tmp_path / "maps")
    assert len(found) == 3 * 6
    return found


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def scratch() -> list[str]:
    return os.listdir(tempfile.gettempdir())


def test_the_objects_are_the_files_and_a_listing_says_what_is_there(bucket, scenes, expected, monkeypatch, capsys):
    buckets.write_text(place("gs://bucket/maps/a.tif.ovr"), "of an older map")
    predict.run("x", str(scenes), "gs://bucket/maps", **WANTED)
    assert contents(bucket / "maps") == expected and not scratch()
    assert f"{scenes}/a.tif: 150 x 200 -> gs://bucket/maps/a.tif\n" in capsys.readouterr().out

    buckets.remove(place("gs://bucket/maps/b_overlay.png"))
    asked, inside = [], buckets.inside
    monkeypatch.setattr(buckets, "inside", lambda folder: asked.append(str(folder)) or inside(folder))
    times = {path.name: path.stat().st_mtime_ns for path in (bucket / "maps").iterdir()}
    predict.run("x", str(scenes), "gs://bucket/maps/", skip_existing=True, **WANTED)
    assert asked == ["gs://bucket/maps"] and "2 of 3 scenes are mapped already" in capsys.readouterr().out
    assert contents(bucket / "maps") == expected
    assert {name[0] for name in times if (bucket / "maps" / name).stat().st_mtime_ns != times[name]} == {"b"}

    predict.run("x", str(scenes / "a.tif"), "gs://bucket/one/map.tif", cog=True)
    assert {"map.tif", "map.tif.aux.xml"} == {path.name for path in (bucket / "one").iterdir()}


def test_several_processes(bucket, scenes, expected, capsys):
    """Each maps its share, and the first tells of all; their records are gone at the end."""
    given = dict(WANTED, coordinator="x:1", join_timeout=5)
    predict.run("x", str(scenes), "gs://bucket/shared", process=(1, 2), **given)
    (name,) = (bucket / "shared").glob(".predict*")
    assert json.loads(name.read_text())["ended"] and name.name == ".predict-00001-of-00002.json"
    predict.run("x", str(scenes), "gs://bucket/shared", process=(0, 2), **given)
    assert "\n2 processes mapped 3 of 3 scenes, 0 failed; " in capsys.readouterr().out
    assert contents(bucket / "shared") == expected


def test_what_a_process_of_this_machine_left_when_it_was_killed(bucket, tmp_path, monkeypatch):
    """Its record says so, and its scratch folder, which nobody else knows, is removed."""
    given = dict(scenes=2, skipped=0, failures=[], dealt=1, coordinator="x:1")
    folder = place("gs://bucket/killed")
    mine, other = (records.Record(folder, index, 2, **given) for index in range(2))
    with subprocess.Popen([sys.executable, "-c", ""]) as child:  # whose number nobody has any more
        pass
    other.values |= {"pid": child.pid, "token": "dead", "began": mine.values["began"], "start": None}
    other.write()
    drafts = pathlib.Path(tempfile.gettempdir(), "ktda_jax_dead")
    drafts.mkdir()
    (drafts / ".dead.1.tmp.tif").write_bytes(b"half")
    monkeypatch.setattr(records, "LOOK", (0.05, 0.05))
    with mine:
        pass
    found = records.gather(mine, 5, print)
    assert [each["token"] for each in found] == [outputs.TOKEN, "dead"] and not scratch()
    assert records.undone(found, [0, 2])[-1].endswith(": died; 2 of its scenes left")
    assert not list((bucket / "killed").iterdir())


def test_what_cannot_be_written(bucket, scenes, forbidding):
    line = error_of(files.make_folders, [files.Outputs(place_of("refused/a.tif"), None, None, None, None)])
    assert line.startswith("cannot write to the folder gs://bucket/refused: me@x lacks storage.objects.list access")
    with pytest.raises(UserError, match="^cannot look into gs://bucket/later: me@x lacks .*; log in with"):
        predict.run("x", str(scenes), "gs://bucket/later")
    assert not scratch()


def test_a_bucket_that_refuses_later_leaves_nothing_behind(bucket, scenes, monkeypatch):
    def refuse(local, path):
        raise buckets.Unreachable(5, "no more room", str(path))

    monkeypatch.setattr(buckets, "upload", refuse)
    line = error_of(predict.run, "x", str(scenes), "gs://bucket/full")
    assert line == "cannot write in gs://bucket/full: no more room" and not scratch()
    assert not (bucket / "full").exists() or not list((bucket / "full").iterdir())


def place_of(name: str):
    """Without a look at the bucket, which refuses."""
    from etils import epath

    return epath.Path(f"gs://bucket/{name}")
