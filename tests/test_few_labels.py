"""benchmarks/evidence/few_labels.py's parts: which tiles are drawn, and the table's numbers."""

import json

import numpy as np
import pytest
from PIL import Image

from benchmarks.evidence import draws, few_choice, few_table


@pytest.fixture
def tiles(tmp_path, monkeypatch):
    """12 tiles of each of three areas, of which some have no label, and only few have class 4."""
    rng = np.random.default_rng(0)
    for area in ("area1", "area2", "area4", "area7"):
        for number in range(12):
            label = rng.integers(0, 4, (20, 20)).astype(np.uint8)
            if number % 3 == 0:
                label[:2] = 4
            if number == 1:
                label[:] = 255
            for kind, array in (("img_dir", label * 40), ("ann_dir", label)):
                path = tmp_path / "tiles" / kind / "train" / f"{area}_{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    monkeypatch.setattr(draws, "HERE", tmp_path)
    return tmp_path / "tiles"


def test_draws_take_areas_in_turn_and_leave_out_no_class(tiles, tmp_path):
    seen = set()
    for number in range(5):
        names = draws.draw(tiles, "choose", 6, number)
        assert [sum(n.startswith(area) for n in names) for area in ("area1", "area2", "area7")] == [2, 2, 2]
        assert not any(n.endswith("_1") for n in names)  # without a label
        labels = np.stack([np.asarray(Image.open(tiles / "ann_dir" / "train" / f"{n}.png")) for n in names])
        assert np.bincount(labels.ravel(), minlength=5).min() >= 0.005 * labels.size
        assert json.loads((tmp_path / "draws" / f"choose_6_{number}.json").read_text()) == names
        assert draws.draw(tiles, "choose", 6, number) == names
        seen.add(tuple(names))
    assert len(seen) == 5


def test_what_is_scored_is_not_trained_on(tiles, tmp_path):
    root = draws.folder(tmp_path / "work", tiles, "choose", 6, 0)
    found = {
        split.name: {path.stem.split("_")[0] for path in split.iterdir()} for split in (root / "img_dir").iterdir()
    }
    assert found == {"train": {"area1", "area2", "area7"}, "images": {"area1", "area2", "area7"}, "area4": {"area4"}}
    assert len(list((root / "ann_dir" / "train").iterdir())) == 6
    assert len(list((draws.folder(tmp_path / "work", tiles, "choose", 0, 0) / "img_dir" / "train").iterdir())) == 36


def test_differences_are_paired_by_draw(tmp_path):
    """Student 10, 20; distilled 13, 25, and a third draw without a partner."""
    for name, scores in {"student": (10, 20), "distilled": (13, 25, 90)}.items():
        for draw, value in enumerate(scores):
            row = {
                "set": "final", "labels": 16, "draw": draw, "row": name, "changed": {}, "seconds": 9.0,
                "scores": {"area3": {"mIoU": value}, "all": {"mIoU": value}},
            }  # fmt: skip
            (tmp_path / f"{name}_{draw}.json").write_text(json.dumps(row))
    lines = few_table.table(few_table.read(tmp_path)["final", 16]).splitlines()
    assert lines[0] == "| model | draws | mIoU | area3 | against student | seconds |"
    assert lines[2] == "| `student` | 2 | 15.00 ± 5.00 | 15.0 |  | 9 |"
    assert lines[3] == "| `distilled` | 3 | 42.67 ± 23.92 | 42.7 | +4.00 ± 1.00 | 9 |"


def test_the_best_on_area_4_is_what_is_scored_elsewhere(tmp_path):
    """Of settings that were run in all three draws; what was run in one only does not count, however good."""

    def write(row, draw, changed, value):
        found = {"row": row, "draw": draw, "changed": changed, "scores": {"all": {"mIoU": value}}}
        (tmp_path / f"choose_16_{draw}_{row}_{len(changed)}.json").write_text(json.dumps(found))

    linear = {"model.head": "linear", "model.aux_channels": 0}
    for draw in range(3):
        write("student", draw, {}, 20 + draw)
        write("student", draw, linear, 22)
        write("frozen", draw, {**linear}, 35)
    write("distilled", 0, {}, 90)
    best = few_choice.chosen(tmp_path)
    assert {kind: (round(score), row) for kind, (score, row, _) in best.items()} == {
        "student": (22, "student"), "distilled": (35, "frozen"),
    }  # fmt: skip
    lines = few_choice.final(tmp_path)
    assert lines[0] == "--set=final --labels=0 --draw=0 --row=distillation" and lines[1] == "wait"
    with_linear = " --with=model.head=linear --with=model.aux_channels=0"
    assert f"--set=final --labels=16 --draw=4 --row=frozen{with_linear}" in lines
    assert f"--set=final --labels=32 --draw=2 --row=student{with_linear}" in lines
    assert len(lines) == 2 + 2 * 5 + 2 * 2 * 3 + 2 and all("choose" not in line for line in lines)
