"""What a check has found is believed as long as nothing has changed that it depends on, and not a moment longer."""

import dataclasses
import json
import os
import time

import numpy as np
import pytest
import runs

from ktda_jax import UserError
from ktda_jax.data import remembered, tfds_source
from ktda_jax.data.check import SplitSummary, check_split
from ktda_jax.data.remembered import Checks
from ktda_jax.data.sources import FolderSource


@pytest.fixture
def tiles(tmp_path):
    return runs.make_tiles(tmp_path / "tiles")


@pytest.fixture
def counted(monkeypatch):
    """The sources that were read; files are as old as one likes."""
    read = []
    monkeypatch.setattr(remembered, "YOUNG", 0)
    monkeypatch.setattr(remembered, "check_split", lambda source, **o: read.append(source) or check_split(source, **o))
    return read


def source_of(root, **options):
    return FolderSource(root, "train", **{"num_classes": runs.CLASSES, **options})


def same(ours: SplitSummary, theirs: SplitSummary) -> bool:
    for field in dataclasses.fields(SplitSummary):
        one, two = (getattr(summary, field.name) for summary in (ours, theirs))
        if isinstance(one, np.ndarray):
            assert one.dtype == two.dtype
            np.testing.assert_array_equal(one, two)
        else:
            assert type(one) is type(two) and one == two, field.name
    return True


def test_the_same_files_are_read_once(tiles, tmp_path, counted):
    first = Checks(tmp_path / "checked.json")
    found = first.split(source_of(tiles), crop=(64, 64))
    assert first.split(source_of(tiles), crop=(64, 64), num_threads=1) is not found and len(counted) == 1
    first.save(enabled=False)
    assert not (tmp_path / "checked.json").exists()
    first.save()
    again = Checks(tmp_path / "checked.json").split(source_of(tiles), crop=(64, 64))
    assert len(counted) == 1 and same(again, found) and same(again, check_split(source_of(tiles), crop=(64, 64)))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["checked.json"]
    half = Checks(tmp_path / "checked.json").split(source_of(tiles).only([0, 2]), crop=(64, 64))
    assert len(counted) == 2 and half.tiles == 2  # a part of the split is another one


def another_pixel(root):
    """In place, of the same size, and with the time of change set back."""
    path = root / "img_dir/train/t1.png"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_mtime_ns == before.st_mtime_ns and path.stat().st_size == before.st_size


def touched(root):
    os.utime(root / "ann_dir/train/t0.png")


def beside_it(root):
    (root / "img_dir/train/t0.png.aux.xml").write_text("<PAMDataset/>")


def renamed(root):
    for kind in ("img_dir", "ann_dir"):
        (root / kind / "train/t0.png").rename(root / kind / "train/a0.png")


def linked_elsewhere(root):
    path = root / "img_dir/train/t0.png"
    path.unlink()
    path.symlink_to(root / "img_dir/train/t1.png")


@pytest.mark.parametrize("change", [another_pixel, touched, beside_it, renamed, linked_elsewhere])
def test_other_files_are_read_again(tiles, tmp_path, counted, change):
    Checks(tmp_path / "checked.json").split(source_of(tiles))
    checks = Checks(tmp_path / "checked.json")
    checks.split(source_of(tiles))
    checks.save()
    time.sleep(0.02)  # a tick of the file system's clock
    change(tiles)
    del counted[:]
    try:
        Checks(tmp_path / "checked.json").split(source_of(tiles))
    except UserError as error:
        assert change is another_pixel and "t1.png" in str(error)  # PNG has sums of its own
    assert len(counted) == 1


def test_a_link_is_what_it_points_to(tiles, tmp_path, counted):
    linked, original = tiles / "img_dir/train/t0.png", tmp_path / "original.png"
    linked.rename(original)
    linked.symlink_to(original)
    checks = Checks()
    for _ in range(2):
        checks.split(source_of(tiles))
    assert len(counted) == 1
    time.sleep(0.02)
    original.write_bytes((tiles / "img_dir/train/t1.png").read_bytes())
    changed = checks.split(source_of(tiles))
    assert len(counted) == 2 and same(changed, check_split(source_of(tiles)))


def test_other_settings_and_readers_read_again(tiles, counted, monkeypatch):
    checks = Checks(reading=1)
    checks.split(source_of(tiles))
    for number, (source, options) in enumerate(
        (
            (source_of(tiles, num_classes=6), {}),
            (source_of(tiles, scale=(0, 200)), {}),
            (source_of(tiles, bands=(3, 2, 1)), {}),
            (source_of(tiles, nodata=7.0), {}),
            (source_of(tiles, label_map={k: min(k, 3) for k in range(5)}), {}),
            (source_of(tiles), {"crop": (32, 32)}),
            (source_of(tiles), {"on_corrupt": "skip"}),
        ),
        2,
    ):
        assert same(checks.split(source, **options), check_split(source, **options)) and len(counted) == number
    monkeypatch.setenv("GDAL_ERROR_ON_LIBJPEG_WARNING", "FALSE")
    checks.split(source_of(tiles))
    monkeypatch.setattr(remembered, "_version", lambda package: "1")
    checks.split(source_of(tiles))
    monkeypatch.setattr(remembered, "FORMAT", 0)
    checks.split(source_of(tiles))
    assert len(counted) == 11
    checks._reading = {"reading": 2}
    checks.split(source_of(tiles))
    assert len(counted) == 12


def test_young_files_are_not_trusted(tiles, tmp_path, counted, monkeypatch):
    """Changed again within a tick of the clock they would bear the same times."""
    monkeypatch.setattr(remembered, "YOUNG", 3600 * 10**9)
    checks = Checks(tmp_path / "checked.json")
    for _ in range(2):
        checks.split(source_of(tiles))
    checks.save()
    assert len(counted) == 2 and not (tmp_path / "checked.json").exists()


def test_files_that_change_while_they_are_read_are_not_trusted(tiles, counted, monkeypatch):
    monkeypatch.setattr(
        remembered,
        "check_split",
        lambda source, **_: counted.append(source) or (check_split(source), touched(tiles))[0],
    )
    checks = Checks()
    for _ in range(2):
        time.sleep(0.02)
        checks.split(source_of(tiles))
    assert len(counted) == 2


def test_what_could_not_be_read_is_tried_again(tiles, counted):
    (tiles / "img_dir/train/t2.png").write_bytes(b"")
    checks = Checks()
    for number in (1, 2):
        assert len(checks.split(source_of(tiles), on_corrupt="skip").unreadable) == 1 and len(counted) == number
    for number in (3, 4):
        with pytest.raises(UserError, match="t2.png"):
            checks.split(source_of(tiles))
        assert len(counted) == number


@pytest.mark.parametrize(
    "damage",
    [
        lambda saved: "",
        lambda saved: "[]",
        lambda saved: json.dumps({**saved, "format": 0}),
        lambda saved: json.dumps({**saved, "checks": 3}),
        lambda saved: json.dumps({**saved, "checks": {k: {} for k in saved["checks"]}}),
        lambda saved: json.dumps({**saved, "checks": {k: {**v, "pixels": [1]} for k, v in saved["checks"].items()}}),
        lambda saved: json.dumps(
            {**saved, "checks": {k: {**v, "by_tile": v["by_tile"][1:]} for k, v in saved["checks"].items()}}
        ),
    ],
)
def test_a_damaged_file_is_no_file(tiles, tmp_path, counted, damage):
    path = tmp_path / "checked.json"
    for _ in range(2):
        checks = Checks(path)
        found = checks.split(source_of(tiles))
        checks.save()
        assert same(found, check_split(source_of(tiles)))
        if len(counted) == 1:
            path.write_text(damage(json.loads(path.read_text())))
    assert len(counted) == 2
    Checks(path).split(source_of(tiles))
    assert len(counted) == 2  # it is whole again


def test_a_file_that_cannot_be_written_costs_time_alone(tiles, tmp_path, counted):
    checks = Checks(tmp_path / "nowhere" / "checked.json")
    checks.split(source_of(tiles))
    checks.save()
    assert not (tmp_path / "nowhere").exists()


def test_sources_without_files_are_read_every_time(counted):
    class Memory:
        num_classes = 2

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {"image": np.zeros((8, 8, 3), np.uint8), "label": np.zeros((8, 8), np.uint8), "name": "a"}

    checks = Checks()
    for _ in range(2):
        checks.split(Memory())
    assert len(counted) == 2


def test_records(tmp_path, counted):
    """By their shards, and by which of the records are meant."""
    tfds_source.prepare("meadow", tmp_path)

    def split(name):
        return checks.split(tfds_source.TfdsSource("meadow", name, data_dir=tmp_path, num_classes=5))

    checks = Checks()
    found = [split("val") for _ in range(2)]
    assert len(counted) == 1 and same(*found)
    assert split("val[:3]").tiles == 3 and len(counted) == 2
    (shard,) = tmp_path.rglob("*val.array_record*")
    time.sleep(0.02)
    content = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(content)
    assert same(split("val"), found[0]) and len(counted) == 3
