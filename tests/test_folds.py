"""config.data.folds: whole areas held out for validation, in every command that reads tiles."""

import json
import pickle
import shutil

import numpy as np
import pytest
import rasterio
import runs
import scene_files

from ktda_jax import UserError, extract
from ktda_jax import inspect as inspection
from ktda_jax.config import checks
from ktda_jax.config.settings import Settings
from ktda_jax.data import folds, places
from ktda_jax.data.check import check_split
from ktda_jax.data.sources import FolderSource
from ktda_jax.data.tfds_source import TfdsSource, prepare
from ktda_jax.reports import gather
from ktda_jax.training import inputs, loop, scoring

AREAS = {"area1": 3, "area2": 4, "area3": 2}
SIDE = 64 * 30.0  # metres


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """Tiles of three areas in `train`, and no other split."""
    root = runs.make_tiles(tmp_path_factory.mktemp("named"), train=sum(AREAS.values()), val=1, size=64)
    names = [f"{area}_{k}-0" for area, count in AREAS.items() for k in range(count)]
    for kind in ("img_dir", "ann_dir"):
        for number, name in enumerate(names):
            (root / kind / "train" / f"t{number}.png").rename(root / kind / "train" / f"{name}.png")
        shutil.rmtree(root / kind / "val")
    return root


def write_places(root, split, spots, *, name="t{}", **profile):
    """A tile at each (column, row) of a grid of tiles side by side."""
    label = np.arange(64 * 64).reshape(64, 64) % runs.CLASSES
    for number, (column, row) in enumerate(spots):
        runs.write_tile(root, split, name.format(number), np.zeros((64, 64, 3)), label)
        (root / "img_dir" / split / f"{name.format(number)}.png").unlink()
        place = rasterio.Affine(30, 0, 400_000.1 + column * SIDE, 0, -30, 4_200_000.7 - row * SIDE)
        path = root / "img_dir" / split / f"{name.format(number)}.tif"
        scene_files.write(path, scene_files.smooth(64, 64, seed=number), **{"transform": place, **profile})
    return root


@pytest.fixture(scope="module")
def placed(tmp_path_factory):
    """Eight by two tiles side by side."""
    spots = [(column, row) for column in range(8) for row in range(2)]
    return write_places(tmp_path_factory.mktemp("placed"), "train", spots)


def data_of(root, **given):
    return checks.resolve(runs.config(root, {f"data.{key}": value for key, value in given.items()})).data


def opened(root, **given):
    """(trained on, held out)"""
    data = data_of(root, **given)
    return inputs.open_source(data, data.train_split), inputs.open_source(data, data.validation)


def test_areas_by_name():
    names = ["b_2", "a-1", "b-3_0", "c", "a_2"]
    assert folds.by_name(names) == [("a", [1, 4]), ("b", [0, 2]), ("c", [3])]
    assert folds.by_name(names, 2) == [("a, c", [1, 3, 4]), ("b", [0, 2])]
    with pytest.raises(UserError, match="name:4, but there are 3 areas: a .2 tiles., b .2 tiles., c .1 tiles.; give a"):
        folds.by_name(names, 4)


def test_groups_of_areas_are_about_as_large():
    sizes = np.random.default_rng(0).integers(1, 30, 40)
    names = [f"s{area:02}_{k}" for area, size in enumerate(sizes) for k in range(size)]
    groups = folds.by_name(names, 5)
    counts = [len(group.tiles) for group in groups]
    assert max(counts) - min(counts) <= 2
    assert sorted(index for group in groups for index in group.tiles) == list(range(len(names)))
    areas = [{names[index][:3] for index in group.tiles} for group in groups]
    assert sum(map(len, areas)) == 40  # none in two groups


@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_areas_by_place_are_compact_and_about_as_large(count):
    rng = np.random.default_rng(1)
    middles = rng.uniform((0, 0), (400, 100), (210, 2))
    areas = folds.by_place(middles, count)
    sizes = [len(area.tiles) for area in areas]
    assert max(sizes) - min(sizes) <= 3 and sorted(i for area in areas for i in area.tiles) == list(range(210))
    boxes = [(middles[area.tiles].min(0), middles[area.tiles].max(0)) for area in areas]
    for number, (low, high) in enumerate(boxes):  # they are rectangles side by side
        assert not any((low < b).all() and (a < high).all() for a, b in boxes[:number])
    order = rng.permutation(210)
    again = folds.by_place(middles[order], count)
    assert [sorted(order[area.tiles].tolist()) for area in again] == [area.tiles for area in areas]


def test_tiles_at_one_place_stay_together_and_degrees_shrink_northwards():
    middles = np.repeat([(0.0, 0.0), (1.0, 0.0), (2.0, 0.0), (3.0, 0.0)], [1, 1, 7, 1], axis=0)
    first, second = folds.by_place(middles, 2)
    assert [first.tiles, second.tiles] == [[0, 1], [2, 3, 4, 5, 6, 7, 8, 9]]
    corners = np.array([(0.0, 70.0), (0.0, 72.0), (4.0, 70.0), (4.0, 72.0)])  # 2 degrees are 223 km, 4 are 145 km
    assert [area.tiles for area in folds.by_place(corners, 2, degrees=True)] == [[0, 2], [1, 3]]
    assert [area.tiles for area in folds.by_place(corners, 2)] == [[0, 1], [2, 3]]


def test_both_parts_are_sources_like_the_whole(named):
    train, val = opened(named, folds="name", fold=1)
    whole = FolderSource(named, "train", num_classes=runs.CLASSES)
    assert val.names == tuple(f"area2_{k}-0" for k in range(4)) and isinstance(train, FolderSource)
    assert sorted(train.names + val.names) == list(whole.names) and train.split == "train" and train.plain
    for part in (train, val):
        for index, name in enumerate(part.names):
            at = whole.names.index(name)
            assert part.image_paths[index] == whole.image_paths[at] and part.describe(index) == whole.describe(at)
            np.testing.assert_array_equal(part[index]["label"], whole[at]["label"])
            assert part[index]["name"] == name and part.label_size(index) == (64, 64)
    assert str(train.fold) == "fold 1 of 0 to 2: area2 held out, 4 tiles" and whole.fold is None
    assert check_split(val).tiles == 4 and "tiles=4" in repr(val)


def test_what_is_held_out_by_place_is_not_touched(placed):
    train, val = opened(placed, folds="place:4", fold=1)
    columns = [{int(name[1:]) // 2 for name in part.names} for part in (train, val)]
    assert columns == [{0, 5, 6, 7}, {2, 3}]  # 1 and 4 lie beside
    assert train.fold.left_out == 4 and str(train.fold).startswith("fold 1 of 0 to 3: around (40")
    assert str(train.fold).endswith(" held out, 4 tiles; 4 that touch them left out")


def test_tiles_in_several_zones_are_dealt_by_degrees(tmp_path):
    write_places(tmp_path, "train", [(0, 0), (1, 0)])
    write_places(tmp_path, "train", [(0, 0), (1, 0)], name="east{}", crs="EPSG:32634")
    train, val = opened(tmp_path, folds="place:2")
    assert (val.names, train.names) == (("t0", "t1"), ("east0", "east1"))
    assert "around (13." in str(train.fold)


def test_control_points_are_a_place_too(tmp_path):
    points = [rasterio.control.GroundControlPoint(r, c, 1000 + c, 2000 - r) for r in (0, 64) for c in (0, 64)]
    path = scene_files.write(tmp_path / "a.tif", scene_files.smooth(64, 64), transform=None, gcps=points)
    extents = places.read([str(path), str(tmp_path / "missing.tif")])
    np.testing.assert_allclose(extents.boxes[0], (1000, 1936, 1064, 2000))
    assert extents.located.tolist() == [True, False] and extents.crs.tolist() == ["EPSG:32633", ""]


def test_touching_is_what_all_pairs_say():
    rng = np.random.default_rng(2)

    def tiles(count):
        corner, size = rng.uniform(0, 1000, (count, 2)), rng.uniform(5, 40, (count, 1))
        crs = rng.choice(["EPSG:32633", "EPSG:32634"], count)
        return places.Extents(np.concatenate([corner, corner + size], 1), np.full(count, 2.0), crs)

    ours, theirs = tiles(300), tiles(400)
    found = places.touching(ours, theirs)
    for index, box in enumerate(ours.boxes):
        near = (theirs.boxes[:, :2] <= box[2:] + 1).all(1) & (theirs.boxes[:, 2:] >= box[:2] - 1).all(1)
        near &= theirs.crs == ours.crs[index]
        assert near[found[index]] if near.any() else found[index] == -1


@pytest.mark.parametrize(
    "given, message",
    [
        ({"folds": "place"}, "config.data.folds is 'place'; give name .*, name:K .* or place:K"),
        ({"folds": "place:1"}, "config.data.folds is 'place:1'; give name"),
        ({"fold": 1}, "config.data.fold is 1, but no areas are made; set config.data.folds"),
        ({"folds": "name", "fold": -1}, "config.data.fold is -1; give at least 0"),
        ({"folds": "place:2", "source": "tfds"}, "config.data.folds=place:2 needs files with coordinates"),
        (
            {"folds": "name", "fold": 3},
            r"config.data.fold is 3, but config.data.folds=name makes 3 areas: area1 \(3 tiles\), area2 \(4 tiles\), "
            r"area3 \(2 tiles\); give 0 to 2",
        ),
        ({"folds": "name:4"}, "config.data.folds is name:4, but there are 3 areas: area1 .* give a smaller number"),
        (
            {"folds": "place:2"},
            "config.data.folds=place:2 deals tiles by their coordinates, and 9 of 9 images have none .*: "
            "img_dir/train/area1_0-0.png .* give GeoTIFFs, or config.data.folds=name",
        ),
    ],
)
def test_what_cannot_be_is_one_line(named, given, message):
    with pytest.raises(UserError, match=message) as caught:
        opened(named, **given)
    assert "\n" not in str(caught.value)


def test_names_that_make_no_areas(tmp_path):
    root = runs.make_tiles(tmp_path, train=3, val=2)
    with pytest.raises(UserError, match="no name has one: t0, t1, t2; call tiles AREA_..., or give place:K"):
        opened(root, folds="name")
    for kind in ("img_dir", "ann_dir"):
        for path in sorted((root / kind / "train").iterdir()):
            path.rename(path.with_name(f"tile_{path.name}"))
    with pytest.raises(UserError, match=r"finds one area alone in .*, tile \(3 tiles\), and nothing to train on"):
        opened(root, folds="name")


def test_places_that_make_no_areas(placed, tmp_path):
    with pytest.raises(UserError, match="has 16 tiles at 16 places; give place:2 to place:16"):
        opened(placed, folds="place:17")
    write_places(tmp_path, "train", [(0, 0), (1, 0), (1, 0)])
    with pytest.raises(UserError, match="all tiles of the other areas touch those of around"):
        opened(tmp_path, folds="place:2")


def test_records_have_names_too(named, tmp_path):
    prepare("grass", tmp_path, named)
    whole = TfdsSource("grass", "train", data_dir=tmp_path, num_classes=runs.CLASSES)
    data = data_of(tmp_path, source="tfds", folds="name", fold=1)
    train, val = (inputs.open_source(data, split, build=False) for split in (data.train_split, data.validation))
    assert train.fold.tiles == tuple(AREAS.items()) and "tiles=4" in repr(val)
    files = opened(named, folds="name", fold=1)
    for records, tiles in zip((train, pickle.loads(pickle.dumps(val))), files, strict=True):
        assert records.names == tiles.names and check_split(records).fingerprint == check_split(tiles).fingerprint
    assert val.describe(1).startswith("record 4 of train") and val.label_size(1) == (64, 64)
    assert len(whole) == 9 and whole.names[4] == val.names[1]
    with pytest.raises(IndexError):
        val[4]


def test_inspection_shows_the_areas(named, placed, tmp_path, capsys):
    assert inspection.run(runs.config(named, {"data.folds": "name", "data.fold": 2}), tmp_path / "a", samples=2) == []
    text = capsys.readouterr().out
    assert "areas by config.data.folds=name, with tiles:\n    0         3  area1\n" in text
    assert "    2         2  area3  (held out)\n" in text and "warning" not in text
    report = json.loads((tmp_path / "a" / "inspection.json").read_text())
    assert report["fold"] == {"folds": "name", "number": 2, "left_out": 0, "tiles": [list(x) for x in AREAS.items()]}
    assert {split: found["tiles"] for split, found in report["splits"].items()} == {"train": 7, "train_fold2": 2}
    assert inspection.run(runs.config(placed, {"data.folds": "place:2"}), tmp_path / "b", samples=2) == []
    text = capsys.readouterr().out
    assert "2 tiles of the others touch those held out, and are not trained on" in text and "warning" not in text
    (problem,) = inspection.run(runs.config(named, {"data.folds": "name", "data.fold": 9}), tmp_path / "c", samples=2)
    assert problem.startswith("config.data.fold is 9")


# Trained --------------------------------------------------------------------------------------------------------------

SETTINGS = {"data.folds": "name", "data.fold": 1, "total_steps": 3, "eval_every": 3, "mesh.data": None}


@pytest.fixture(scope="module")
def trained(named, tmp_path_factory):
    """(workdir, stdout) of the real command."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    return workdir, runs.finish(runs.start(*runs.arguments(named, workdir, SETTINGS)))[0]


def test_a_training_scores_the_area_held_out(trained, named):
    workdir, out = trained
    assert "5 training tiles (fold 1 of 0 to 2: area2 held out, 4 tiles)" in out and "train_fold1 split, step" in out
    confusion = np.array(json.loads((workdir / "figures" / "train_fold1.json").read_text())["confusion"])
    held = [tile for tile in FolderSource(named, "train", num_classes=runs.CLASSES) if "area2" in tile["name"]]
    labels = np.concatenate([tile["label"].ravel() for tile in held])
    np.testing.assert_array_equal(confusion.sum(1), np.bincount(labels, minlength=runs.CLASSES))


def test_it_is_evaluated_on_no_other(trained, named):
    workdir, _ = trained
    flags = {**SETTINGS, "data.fold": 0}
    message = r"begun with another config: data.fold \(saved 1, now 0\)"
    with pytest.raises(UserError, match=message):
        scoring.evaluate_workdir(runs.config(named, flags | {"mesh.data": 1}), workdir)
    with pytest.raises(UserError, match=message):  # nor resumed
        loop.train_and_evaluate(runs.config(named, flags | {"mesh.data": 1}), workdir)
    out, _ = runs.finish(runs.start(*runs.arguments(named, workdir, SETTINGS), "--mode=eval"))
    assert "train_fold1 split, step 3" in out
    assert runs.rows(workdir)[-1]["split"] == "train_fold1"


def test_a_report_finds_its_tiles(trained, named):
    (run,) = gather.gather([trained[0]], root=str(named), keep=1, say=lambda _: None)
    assert run.split == "train_fold1" and run.scored.startswith("the 4 tiles of train_fold1")
    assert "which are not the tiles" not in run.scored
    assert {split: shares.tiles for split, shares in run.shares.items()} == {"train": 5, "train_fold1": 4}


def test_features_of_another_fold_are_refused(named, tmp_path):
    def config(fold):
        given = {"data.folds": "name", "data.fold": fold, "teacher.features": str(tmp_path / "features")}
        return runs.config(named, {**given, "teacher.mode": "precomputed"})

    extract.run(config(1))
    assert inputs.open_inputs(Settings.of(config(1)), None).features is not None
    with pytest.raises(UserError, match="are of other tiles .*: extract them again .* into a new config.teacher"):
        inputs.open_inputs(Settings.of(config(0)), None)
    with pytest.raises(UserError, match="are of other tiles"):
        extract.run(config(0))
