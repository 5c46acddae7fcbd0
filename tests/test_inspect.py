"""What `python -m ktda_jax.inspect` finds in tiles whose contents we know."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import runs
from PIL import Image

from ktda_jax import inspect as verb
from ktda_jax.data import shares
from ktda_jax.data.datasets import IGNORE
from ktda_jax.data.sources import FolderSource


@pytest.fixture
def tiles(tmp_path):
    return runs.make_tiles(tmp_path / "data", train=4, val=3)


def run(tiles, output) -> list[str]:
    return verb.run(runs.config(tiles), output, samples=2)


def test_counts_are_those_of_the_labels(tiles):
    label = np.array(Image.open(tiles / "ann_dir/train/t0.png"))
    label[:10] = IGNORE
    Image.fromarray(label).save(tiles / "ann_dir/train/t0.png")
    (tiles / "img_dir/train/t1.png").write_bytes(b"broken")
    found = shares.count(FolderSource(tiles, "train", num_classes=runs.CLASSES), num_threads=2)
    labels = [np.array(Image.open(tiles / f"ann_dir/train/t{k}.png")) for k in (0, 2, 3)]
    np.testing.assert_array_equal(found.pixels, sum(np.bincount(x.ravel(), minlength=256) for x in labels))
    np.testing.assert_array_equal(found.tiles_with, [sum((x == v).any() for x in labels) for v in range(256)])
    assert found.tiles == 4 and found.sizes == {(72, 72): 3}
    assert len(found.unreadable) == 1 and "t1.png" in found.unreadable[0]


def test_class_weights():
    pixels = np.array([100, 50, 0, 25])
    np.testing.assert_allclose(shares.inverse_frequency(pixels), np.array([1, 2, 0, 4]) * 3 / 7)
    weights = shares.effective_number(np.array([1, 2, 0]), beta=0.5)
    np.testing.assert_allclose(weights, np.array([1, 2 / 3, 0]) * 2 / (5 / 3))  # 0.5 / (1 - 0.5^n)
    np.testing.assert_allclose(shares.effective_number(np.array([7, 7, 7])), 1)


def test_good_data_gets_tables_and_figures(tiles, tmp_path, capsys):
    assert run(tiles, tmp_path / "out") == []
    text = capsys.readouterr().out
    assert "sizes in train: 72 x 72 (4)" in text and "inverse frequency  (" in text
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"inspection.json", "classes.png", "samples.png"}
    report = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert report["splits"]["train"]["tiles"] == 4 and report["problems"] == []
    assert sum(report["splits"]["val"]["pixels"]) == 3 * 72 * 72
    with Image.open(tmp_path / "out" / "samples.png") as sheet:
        assert sheet.width > 6 * 2.3 * 150


def test_an_image_in_two_splits_is_named(tiles, tmp_path):
    shutil.copy(tiles / "img_dir/train/t2.png", tiles / "img_dir/val/t1.png")
    (problem,) = run(tiles, tmp_path / "out")
    assert problem.startswith("1 image(s) stand in two splits") and problem.endswith("train/t2 = val/t1")
    assert json.loads((tmp_path / "out" / "inspection.json").read_text())["doubles"] == [["train/t2", "val/t1"]]


def test_all_that_is_wrong_is_said_for_every_split(tiles, tmp_path):
    Image.fromarray(np.full((72, 72), 9, np.uint8)).save(tiles / "ann_dir/train/t0.png")
    (tiles / "img_dir/val/t1.png").write_bytes(b"")
    first, second = run(tiles, tmp_path / "out")
    assert "label values outside 0..4" in first and "t0" in first
    assert "cannot be read" in second and "t1.png" in second


@pytest.mark.parametrize("size, said", [((80, 72), "image and label differ in size"), ((40, 40), "smaller than")])
def test_a_tile_of_another_size_does_not_end_the_inspection(tiles, tmp_path, size, said):
    Image.new("RGB", size).save(tiles / "img_dir/train/t0.png")
    if "smaller" in said:
        Image.new("L", size).save(tiles / "ann_dir/train/t0.png")
    (problem,) = run(tiles, tmp_path / "out")
    assert said in problem and "t0" in problem
    assert json.loads((tmp_path / "out" / "inspection.json").read_text())["problems"] == [problem]


def test_no_data_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "ktda_jax.inspect", "--config=configs/grass.py", "--config.data.root=/nowhere",
         f"--output={tmp_path / 'out'}"],
        cwd=runs.REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1 and not (tmp_path / "out").exists()
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all(line.startswith("error: ") and "/nowhere" in line for line in lines)  # train, val
