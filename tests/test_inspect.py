"""What `python -m ktda_jax.inspect` finds in tiles whose contents we know."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import rasterio
import runs
import scene_files
from PIL import Image

from ktda_jax import inspect as verb
from ktda_jax.data import leaks, shares
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


def renamed(root, names: dict) -> None:
    """{split: names}, in the order of the tiles t0, t1, ..."""
    for kind in ("img_dir", "ann_dir"):
        for split, given in names.items():
            for number, name in enumerate(given):
                (path,) = (root / kind / split).glob(f"t{number}.*")
                path.rename(path.with_name(f"{name}{path.suffix}"))


def warned(root, tmp_path, capsys) -> list[str]:
    """What is printed as a warning, which is also in the report and makes nothing wrong."""
    assert run(root, tmp_path / "out") == []
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    report = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert [f"warning: {line}" for line in report["warnings"]] == lines and report["problems"] == []
    return lines


def test_a_scene_in_two_splits_is_warned_of(tiles, tmp_path, capsys):
    renamed(tiles, {"train": ["area1_0", "area1_1", "area2_0", "c"], "val": ["area1_2", "area2_1", "area3_0"]})
    (line,) = warned(tiles, tmp_path, capsys)
    assert line.startswith("warning: 3 tile(s) of train and 2 tile(s) of val are of the same 2 scene(s)")
    assert "train/area1_0 and val/area1_2; train/area2_0 and val/area2_1; hold whole areas out by config.data" in line


@pytest.mark.parametrize(
    "train, val, scenes",
    [
        (["t0", "t1"], ["t1", "t2"], None),
        (["tile_001", "tile_002"], ["tile_003", "tile_001"], None),
        (["tile7-001", "tile7-002"], ["tile7-003"], None),  # all begin so
        (["Forest_1", "River_1"], ["Forest_2", "River_2"], None),  # classes
        (["0_0", "0_1", "1_0"], ["0_0", "1_1"], 1),  # 0_0 in both: counted by each split for itself
        (["Wetlands_01_0416", "Wetlands_02_0001"], ["Wetlands_03_0416"], None),
        (["S2A_MSIL2A_T33UUP_0", "S2B_MSIL2A_T33UUP_1"], ["S2A_MSIL2A_T32TQM_0"], None),
        (["S2A_MSIL2A_T33UUP_0", "S2B_MSIL2A_T33UUQ_1"], ["S2A_MSIL2A_T33UUP_1"], 1),
        (["urban_LC80640452014041LGN00_patch_0_512"], ["urban_LC80640452014041LGN00_patch_512_0", "snow_LC8"], 1),
        (["top_mosaic_09cm_area1_0_0", "top_mosaic_09cm_area2_1"], ["top_mosaic_09cm_area1_0_5"], 1),
    ],
)
def test_what_names_a_scene(train, val, scenes):
    found = leaks.by_name({"train": train, "val": val})
    assert len(found) == (scenes is not None)
    assert not scenes or f"are of the same {scenes} scene(s)" in found[0]


def placed(root, split, columns, **profile):
    """Tiles t0, ... of 72 pixels of 30 m in some columns of a grid, as GeoTIFFs in the place of the PNGs."""
    for number, column in enumerate(columns):
        path = root / "img_dir" / split / f"t{number}.png"
        place = {"transform": rasterio.Affine(30, 0, 400_000.1 + column * 72 * 30, 0, -30, 4e6 / 3)} | profile
        scene_files.write(path.with_suffix(".tif"), np.array(Image.open(path)), **place)
        path.unlink()


def test_tiles_side_by_side_in_two_splits_are_warned_of(tiles, tmp_path, capsys):
    placed(tiles, "train", [0, 1, 2, 7])
    placed(tiles, "val", [3, 5, 6.5])
    (line,) = warned(tiles, tmp_path, capsys)
    assert line.startswith("warning: 2 of 3 tile(s) of val touch or overlap tiles of train, by their coordinates")
    assert "val/t0 and train/t2; val/t2 and train/t3; hold whole areas out by config.data.folds" in line


@pytest.mark.parametrize(
    "val, profile", [([3.02, 5, 9], {}), ([2, 3, 4], {"crs": "EPSG:32634"}), ([2, 3, 4], {"crs": None})]
)
def test_tiles_apart_are_not(tiles, tmp_path, capsys, val, profile):
    placed(tiles, "train", [0, 1, 2, 6.5])
    placed(tiles, "val", val, **profile)
    assert warned(tiles, tmp_path, capsys) == []


def test_nor_are_files_that_all_have_the_place_of_their_scene(tiles, tmp_path, capsys):
    placed(tiles, "train", [0] * 4)
    placed(tiles, "val", [0] * 3)
    assert warned(tiles, tmp_path, capsys) == []
