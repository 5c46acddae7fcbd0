"""What is read from gs://: workdirs by the other verbs, converted weights, tiles and records, on a real server."""

import json
import shutil

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
from ktda_jax.data.paths import place
from ktda_jax.data.sources import read_tile
from ktda_jax.training import inputs, loop, program, whole
from ktda_jax.training.trained import from_workdir, read
from ktda_jax.weights import folder


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return runs.make_tiles(tmp_path_factory.mktemp("tiles"))


def put(folder, path):
    for file in folder.rglob("*"):
        if file.is_file():
            buckets.upload(file, place(path) / file.relative_to(folder))


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


def test_a_bucket_that_refuses_is_not_taken_for_a_damaged_checkpoint(trained, forbidding):
    line = r"cannot get at gs://bucket/trained/checkpoints/4\S*: me@x lacks storage.objects.list access; the same comma"
    checkpoint = epath.Path("gs://bucket/trained/checkpoints/4")
    for look in (whole.fault, whole.score):
        with pytest.raises(UserError, match=line):
            look(checkpoint)
