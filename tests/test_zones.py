"""`python -m ktda_jax.areas`: pixels and hectares of maps, in all and within polygons, and by a sample of errors."""

import csv
import json

import numpy as np
import pytest
import rasterio
import rasterio.warp
import runs
import scene_files as sf

from ktda_jax import UserError, areas
from ktda_jax.metrics import by_tile
from ktda_jax.metrics.areas import clustered, stratified
from ktda_jax.prediction import sampled, zones

pyogrio, shapely = pytest.importorskip("pyogrio"), pytest.importorskip("shapely")
NAMES = ("water", "meadow, wet", "forest")
CONFUSION = np.array([[40, 3, 1], [2, 50, 6], [0, 4, 60]])  # rows are labels


def write_map(path, labels, tags=NAMES, **profile):
    given = dict(crs="EPSG:32633", transform=sf.UTM, nodata=255, tiled=True, blockxsize=256, blockysize=256)
    sf.write(path, labels[..., None], **(given | profile))
    if tags:
        with rasterio.open(path, "r+") as file:
            file.update_tags(**{f"CLASS_{k}": name for k, name in enumerate(tags)})
    return path


def write_polygons(path, shapes, crs="EPSG:32633", names=None, **more):
    geometry = np.array([None if shape is None else shapely.to_wkb(shape) for shape in shapes], object)
    names = np.array(names or [f"p{k}" for k in range(len(shapes))], object)
    pyogrio.raw.write(
        str(path), geometry, field_data=[names], fields=["name"], crs=crs, geometry_type=more.pop("kind", "Unknown"),
        **more,
    )  # fmt: skip
    return path


def ground(*corners):
    """A polygon through places in columns and rows of the map."""
    return shapely.Polygon([sf.UTM @ corner for corner in corners])


@pytest.fixture(scope="module")
def labels():
    labels = np.random.default_rng(0).integers(0, 3, (600, 500)).astype(np.uint8)
    labels[:, 300:] = 2
    labels[500:, :100] = 255
    return labels


@pytest.fixture(scope="module")
def folder(tmp_path_factory, labels):
    folder = tmp_path_factory.mktemp("areas")
    write_map(folder / "map.tif", labels)
    return folder


@pytest.fixture
def run(folder, tmp_path, capsys):
    def go(map=folder / "map.tif", **given) -> tuple[list[dict], str]:
        """The CSV's rows, and what was said."""
        areas.run(str(map), str(tmp_path / "new" / "areas.csv"), **{k: v and str(v) for k, v in given.items()})
        with open(tmp_path / "new" / "areas.csv", newline="") as file:
            return list(csv.DictReader(file)), capsys.readouterr().out

    return go


def within(labels, shape) -> np.ndarray:
    """Pixels by value whose centres a polygon in columns and rows holds, one by one."""
    rows, columns = np.indices(labels.shape)
    inside = shapely.contains_xy(shape, columns + 0.5, rows + 0.5)
    return np.bincount(labels[inside], minlength=256)


def test_hectares_of_a_map(run, labels):
    rows, said = run()
    assert [row["class"] for row in rows] == [*NAMES, "no data", "all classes"]
    counts = np.bincount(labels.ravel(), minlength=256)
    assert [int(row["pixels"]) for row in rows] == [*counts[:3], counts[255], counts[:3].sum()]
    assert [float(row["mapped"]) for row in rows] == pytest.approx([0.09 * int(row["pixels"]) for row in rows])
    assert {row["unit"] for row in rows} == {"ha"} and {row["map"] for row in rows} == {"map.tif"}
    assert sum(float(row["mapped_percent"]) for row in rows[:3]) == pytest.approx(100, abs=1e-3)
    assert "areas: 900 m² a pixel by EPSG:32633" in said and "adjusted" not in rows[0]


def test_polygons_hold_the_pixels_whose_centres_they_hold(run, tmp_path, labels, monkeypatch):
    """Of several blocks; overlapping ones count each for itself; one reaches beyond the map."""
    monkeypatch.setattr(zones, "BLOCK", 50_000)
    corners = [
        [(10.3, 20.2), (420.7, 90.1), (380.2, 560.9), (30.4, 480.6)],
        [(100.4, 100.4), (200.6, 100.4), (200.6, 200.6), (100.4, 200.6)],
        [(-500, 450), (250, 450), (250, 900), (-500, 900)],
        [(7.6, 7.6), (7.9, 7.6), (7.9, 7.9), (7.6, 7.9)],  # holds no centre
    ]
    hole = shapely.Polygon(corners[0], [[(200, 200), (300, 200), (300, 300), (200, 300)]])
    pixels = [hole, *map(shapely.Polygon, corners[1:])]
    shapes = [shapely.transform(shape, lambda xy: np.column_stack(sf.UTM @ xy.T)) for shape in pixels]
    path = write_polygons(tmp_path / "p.gpkg", shapes, names=["hole", "square", "beyond", "none"])
    rows, said = run(polygons=path, id_field="name")
    assert "1 of 4 polygons hold no pixel: none; left out" in said
    for name, shape in zip(("hole", "square", "beyond"), pixels, strict=False):
        found = {row["class"]: int(row["pixels"]) for row in rows if row["polygon"] == name}
        expected = within(labels, shape)
        assert [found[c] for c in NAMES] == expected[:3].tolist() and found.get("no data", 0) == expected[255]
    rows, _ = run(polygons=path)
    assert {row["polygon"] for row in rows} == {"", "1", "2", "3"}


def test_polygons_of_another_crs_are_reprojected(run, tmp_path, labels):
    """Two degrees of latitude, whose parallels are bent in UTM by several of these pixels of a kilometre."""
    place = rasterio.Affine(1000, 0, 300_000, 0, -1000, 5_700_000)
    path = write_map(tmp_path / "m.tif", labels, transform=place)
    box = write_polygons(tmp_path / "p.geojson", [shapely.box(13, 48, 18, 50)], crs="EPSG:4326")
    rows, _ = run(path, polygons=box)
    found = {row["class"]: int(row["pixels"]) for row in rows if row["polygon"]}
    down, across = np.indices(labels.shape)
    x, y = place @ (across.ravel() + 0.5, down.ravel() + 0.5)
    east, north = (np.array(v) for v in rasterio.warp.transform("EPSG:32633", "EPSG:4326", x, y))
    inside = (13 < east) & (east < 18) & (48 < north) & (north < 50)
    expected = np.bincount(labels.ravel()[inside], minlength=256)
    assert inside.sum() > 70_000 and sum(found[name] for name in NAMES) == found["all classes"]
    assert [found[name] for name in NAMES] == pytest.approx(expected[:3].tolist(), abs=15)


@pytest.mark.parametrize(
    "crs, west, north, side",
    [
        ("EPSG:32633", 4e5, 5.5e6, 1e3),
        ("EPSG:32601", 2e5, 7e6, 6e3),  # across the date line
        ("EPSG:3413", -1e6, 1e6, 2e4),  # around the pole
        ("EPSG:3857", -20037508, 20037508, 400750.16),  # all of it
    ],
)
@pytest.mark.parametrize("world", [(-180, -90, 180, 90), (0, -90, 360, 90)])
def test_a_polygon_of_the_whole_world_holds_the_whole_map(tmp_path, crs, west, north, side, world):
    place = rasterio.Affine(side, 0, west, 0, -side, north)
    path = write_map(tmp_path / "m.tif", np.ones((100, 100), np.uint8), crs=crs, transform=place)
    box = write_polygons(tmp_path / "p.geojson", [shapely.box(*world), shapely.box(*world[:3], -80)], crs="EPSG:4326")
    all_of_it, south = zones.within(path, zones.read(str(box), say=print))
    assert all_of_it.pixels[1] == 10_000
    assert crs == "EPSG:3857" or south is None


def test_polygons_in_web_mercator_go_around_the_world(tmp_path):
    """All of it; and one beyond its eastern end, over a map at the western one."""
    place = rasterio.Affine(1000, 0, 5e5, 0, -1000, 7e6)
    path = write_map(tmp_path / "m.tif", np.ones((50, 50), np.uint8), crs="EPSG:32601", transform=place)
    shapes = [shapely.box(-2e7, -2e7, 2e7, 2e7), shapely.box(2e7, 8e6, 2.1e7, 1e7), shapely.box(0, 8e6, 1e6, 1e7)]
    box = write_polygons(tmp_path / "p.gpkg", shapes, crs="EPSG:3857")
    world, beyond, elsewhere = zones.within(path, zones.read(str(box), say=print))
    assert world.pixels[1] == beyond.pixels[1] == 2500 and elsewhere is None


def test_polygons_without_a_place_on_the_map_are_named(tmp_path):
    """A map of the Earth as a satellite sees it: no place for what lies behind."""
    place = rasterio.Affine(110_000, 0, -5.5e6, 0, -110_000, 5.5e6)
    seen = dict(crs="+proj=geos +h=35785831 +datum=WGS84", transform=place)
    path = write_map(tmp_path / "m.tif", np.ones((100, 100), np.uint8), **seen)
    shapes = [shapely.box(*corners) for corners in ((-9, -9, 9, 9), (150, -9, 170, 9), (-180, -90, 180, 90))]
    near = write_polygons(tmp_path / "near.geojson", shapes[:1], crs="EPSG:4326")
    assert zones.within(path, zones.read(str(near), say=print))[0].pixels[1] > 200
    world = write_polygons(tmp_path / "world.geojson", shapes, crs="EPSG:4326", names=["here", "behind", "world"])
    with pytest.raises(UserError, match=r"2 of 3 \(behind, world\) cannot be brought to .*; cut them to the map"):
        zones.within(path, zones.read(str(world), field="name", say=print))


def test_degrees_are_areas_row_by_row(run, tmp_path):
    """A map of 2 x 2 degrees up to the pole's side, whose lower half is a class."""
    labels = np.repeat(np.uint8([0, 1]), 100)[:, None].repeat(200, 1)
    path = write_map(tmp_path / "m.tif", labels, crs="EPSG:4326", transform=rasterio.Affine(0.01, 0, 10, 0, -0.01, 62))
    box = write_polygons(tmp_path / "p.gpkg", [shapely.box(10, 60, 12, 62)], crs="EPSG:4326")
    rows, said = run(path, polygons=box)
    # From the equal-area cylinder of another program, EPSG:6933, in which PROJ gives the corners.
    corners = rasterio.warp.transform("EPSG:4326", "EPSG:6933", [10, 12, 10, 10], [60, 60, 61, 62])
    (west, east, *_), (south, _, middle, north) = corners
    expected = [(east - west) * (north - middle) / 1e4, (east - west) * (middle - south) / 1e4]
    for start in (0, 4):
        assert [float(row["mapped"]) for row in rows[start : start + 2]] == pytest.approx(expected, rel=1e-6)
    assert "row by row on the WGS 84 ellipsoid" in said and "Web" not in said


def test_without_a_crs_there_are_pixels_and_it_is_said(run, tmp_path, labels):
    path = write_map(tmp_path / "m.tif", labels, crs=None, transform=None, tags=None)
    rows, said = run(path)
    assert "warning: pixels only, no areas: it has no CRS" in said
    assert {row["unit"] for row in rows} == {"pixels"} and rows[0]["mapped"] == rows[0]["pixels"]
    assert [row["class"] for row in rows] == ["0", "1", "2", "no data", "all classes"]


def test_several_maps_and_what_lies_beside_them(run, tmp_path, labels):
    maps = tmp_path / "maps"
    maps.mkdir()
    write_map(maps / "a.tif", labels)
    write_map(maps / "a_confidence.tif", labels)
    write_map(maps / "b.tif", labels, transform=sf.UTM @ rasterio.Affine.translation(500, 0))
    across = write_polygons(tmp_path / "p.gpkg", [ground((400, 100), (600, 100), (600, 300), (400, 300))])
    rows, said = run(maps, polygons=across)
    assert "overlap" not in said
    assert list(dict.fromkeys(row["map"] for row in rows)) == ["a.tif", "b.tif", "all maps"]
    total = {row["class"]: int(row["pixels"]) for row in rows if row["map"] == "all maps" and not row["polygon"]}
    assert total["forest"] == 2 * (labels == 2).sum()
    part = [row for row in rows if row["polygon"]]
    assert {row["map"] for row in part} == {"all maps"} and int(part[-1]["pixels"]) == 200 * 200
    write_map(maps / "c.tif", labels)
    assert "a.tif and " in (said := run(maps)[1]) and "overlap; what both map counts twice" in said


def workdir(path, tiles: bool):
    (path / "figures").mkdir(parents=True)
    single = np.random.default_rng(1).multinomial(2000, (CONFUSION / CONFUSION.sum()).ravel(), 12).reshape(12, 3, 3)
    values = {"classes": NAMES, "confusion": single.sum(0).tolist()}
    (path / "figures" / "val.json").write_text(json.dumps(values))
    if tiles:
        (path / "figures" / "val_tiles.csv").write_text(by_tile.to_csv(single))
    return single


def test_what_a_sample_makes_of_it(run, tmp_path, labels):
    """Of tiles, of pixels, of points counted by somebody: rows of the CSV are what the estimators give."""
    single, box = (
        workdir(tmp_path / "run", True),
        write_polygons(tmp_path / "p.gpkg", [ground((0, 0), (300, 0), (9, 99))]),
    )
    mapped = 0.09 * np.bincount(labels.ravel(), minlength=256)[:3]
    rows, said = run(confusion=tmp_path / "run", polygons=box)
    expected = clustered(mapped, np.swapaxes(single, 1, 2))
    low, high = expected.interval
    for k, row in enumerate(rows[:3]):
        for column, value in {
            "adjusted": expected.area[k], "adjusted_se": expected.area_error[k], "adjusted_low": low[k],
            "adjusted_high": high[k], "users_accuracy_percent": 100 * expected.users[k],
            "users_accuracy_se": 100 * expected.users_error[k],
            "producers_accuracy_percent": 100 * expected.producers[k],
            "producers_accuracy_se": 100 * expected.producers_error[k],
        }.items():  # fmt: skip
            assert float(row[column]) == pytest.approx(value, abs=1e-3), column
        assert (row["sampling_unit"], row["sampling_units"]) == ("tile", "12")
        assert row["remark"] == sampled.PROBABILITY
    assert float(rows[4]["adjusted"]) == pytest.approx(mapped.sum())
    assert float(rows[4]["overall_accuracy_percent"]) == pytest.approx(100 * expected.overall, abs=1e-3)
    assert not rows[3]["adjusted"] and rows[3]["class"] == "no data"
    assert "errors within the polygon taken to be those of the whole sample" in rows[5]["remark"]
    part = 0.09 * np.array([int(row["pixels"]) for row in rows[5:8]])
    errors = clustered(part, np.swapaxes(single, 1, 2)).area_error
    assert [float(row["adjusted_se"]) for row in rows[5:8]] == pytest.approx(errors, abs=1e-3)
    assert "12 tiles; holds for a probability sample" in said and "± " in said

    (tmp_path / "run" / "figures" / "val_tiles.csv").unlink()  # as trainings left it before
    rows, said = run(confusion=tmp_path / "run" / "figures" / "val.json")
    simple = stratified(mapped, single.sum(0).T)
    assert float(rows[0]["adjusted_se"]) == pytest.approx(simple.area_error[0], abs=1e-3)
    assert rows[0]["sampling_unit"] == "pixel" and "the true errors are larger" in rows[0]["remark"]

    for head, counts in (("map", CONFUSION.T), ("Reference", CONFUSION)):
        with open(tmp_path / "counts.csv", "w", newline="", encoding="utf-8-sig") as file:
            lines = zip(NAMES, counts.tolist(), strict=True)
            csv.writer(file).writerows([[head, *NAMES], *([name, *line] for name, line in lines)])
        rows, _ = run(confusion=tmp_path / "counts.csv")
        points = stratified(mapped, CONFUSION.T)
        assert [float(row["adjusted"]) for row in rows[:3]] == pytest.approx(points.area, abs=1e-3)
        assert rows[0]["sampling_unit"] == "sampled unit" and rows[0]["sampling_units"] == str(CONFUSION.sum())


def test_a_class_that_was_never_sampled_leaves_the_areas_open(run, tmp_path):
    (tmp_path / "c.csv").write_text('map,water,"meadow, wet",forest\nwater,9,1,0\n"meadow, wet",1,8,1\nforest,0,0,0\n')
    rows, said = run(confusion=tmp_path / "c.csv")
    assert "no unit of the sample was mapped as forest (" in said and not rows[0]["adjusted"] and rows[0]["mapped"]


def test_what_is_wrong_with_polygons_is_one_line(run, tmp_path, folder, labels):
    square = ground((10, 10), (50, 10), (50, 50), (10, 50))
    bow = ground((60, 60), (100, 100), (100, 60), (60, 100))
    write_polygons(tmp_path / "mixed.gpkg", [square, bow, shapely.Point(0, 0), None], names=["a", "b", "c", "d"])
    rows, said = run(polygons=tmp_path / "mixed.gpkg", id_field="name")
    assert "2 of 4 (c, d) without a polygon, left out" in said
    assert "1 of 2 (b) not valid, repaired (Self-intersection" in said
    assert {row["polygon"] for row in rows} == {"", "a", "b"}
    assert int([row for row in rows if row["polygon"] == "b"][-1]["pixels"]) == pytest.approx(800, abs=40)

    spike = ground((10, 10), (30, 10), (30, 20), (90, 20), (30, 20), (30, 30), (10, 30))
    sliver = ground((10, 10), (30, 10), (10, 10))
    write_polygons(tmp_path / "spikes.gpkg", [spike, sliver], names=["spike", "sliver"])
    rows, said = run(polygons=tmp_path / "spikes.gpkg", id_field="name")
    assert "1 of 2 (sliver) without a polygon, left out" in said and "1 of 1 (spike) not valid, repaired" in said
    assert {row["polygon"] for row in rows} == {"", "spike"} and int(rows[-1]["pixels"]) == 400

    far = shapely.transform(square, lambda xy: xy + 1e6)
    write_polygons(tmp_path / "far.gpkg", [far])
    write_polygons(tmp_path / "points.gpkg", [shapely.Point(1, 2)], kind="Point")
    write_polygons(tmp_path / "empty.gpkg", [])
    write_polygons(tmp_path / "sliver.gpkg", [sliver])
    write_polygons(tmp_path / "bare.gpkg", [square], crs=None)
    write_polygons(tmp_path / "two.gpkg", [square], layer="one")
    write_polygons(tmp_path / "two.gpkg", [square], layer="other", append=True)
    (tmp_path / "text.gpkg").write_text("no file of polygons")
    plain = write_map(tmp_path / "plain.tif", labels, crs=None)
    for given, message in (
        (dict(polygons="far.gpkg"), "none of the 1 polygons of .*far.gpkg holds a pixel's centre of map.tif"),
        (dict(polygons="points.gpkg"), "points.gpkg holds no polygons, but Point"),
        (dict(polygons="sliver.gpkg"), "sliver.gpkg holds no polygons with an area"),
        (dict(polygons="empty.gpkg"), "empty.gpkg has no features"),
        (dict(polygons="bare.gpkg"), "bare.gpkg has no CRS, so where the polygons lie on the map is not known"),
        (dict(polygons="mixed.gpkg", map=plain), "plain.tif has no CRS, so where"),
        (dict(polygons="two.gpkg"), "two.gpkg has the layers one, other; choose one by --layer"),
        (dict(polygons="two.gpkg", layer="third"), "two.gpkg has no layer 'third'; it has one, other"),
        (dict(polygons="mixed.gpkg", id_field="id"), "mixed.gpkg has no field 'id'; it has name"),
        (dict(polygons="text.gpkg"), "cannot read --polygons=.*text.gpkg"),
        (dict(polygons="nowhere.shp"), "cannot read --polygons=.*nowhere.shp"),
    ):
        given["polygons"] = tmp_path / given["polygons"]
        with pytest.raises(UserError, match=message) as found:
            run(**given)
        assert "\n" not in str(found.value)
    assert int(run(polygons=tmp_path / "two.gpkg", layer="one")[0][-1]["pixels"]) == 1600
    assert int(run(plain, polygons=tmp_path / "bare.gpkg")[0][-1]["pixels"]) == 1600


def test_what_is_wrong_with_maps_and_samples_is_one_line(run, tmp_path, labels):
    sf.write(tmp_path / "rgb.tif", sf.smooth(20, 20))
    write_map(tmp_path / "more.tif", labels + (labels == 2) * np.uint8(3))
    write_map(tmp_path / "others.tif", labels, tags=("a", "b", "c"))
    workdir(tmp_path / "run", False)
    (tmp_path / "run" / "figures" / "test.json").write_text("{}")
    (tmp_path / "none").mkdir()
    for name, text in (
        ("head.csv", "classes,a,b\na,1,2\nb,3,4\n"),
        ("order.csv", "map,a,b\nb,1,2\na,3,4\n"),
        ("words.csv", "map,a,b\na,1,two\nb,3,4\n"),
        ("zero.csv", "map,a,b\na,0,0\nb,0,0\n"),
        ("other.json", '{"confusion": [[1, 2]], "classes": ["a"]}'),
    ):
        (tmp_path / name).write_text(text)
    for given, message in (
        (dict(map="rgb.tif"), "rgb.tif is no map of classes: 3 bands of uint8"),
        (dict(map="more.tif"), "more.tif holds 5, and its 3 classes are 0 to 2"),
        (dict(map="others.tif", confusion="run/figures/val.json"), "others.tif are a, b, c, and those of --confusion"),
        (dict(confusion="run"), "run holds several: .*test.json, .*val.json; give one of them"),
        (dict(confusion="none"), "none holds no figures/SPLIT.json and no scores.json; evaluate first"),
        (dict(confusion="nowhere"), "there is no --confusion=.*nowhere"),
        (dict(confusion="run/figures/test.json"), "test.json cannot be used: it lacks 'confusion'"),
        (dict(confusion="other.json"), "other.json cannot be used: no counts for 1 classes"),
        (dict(confusion="head.csv"), "its first cell is 'classes'; write there what the rows are, map or reference"),
        (dict(confusion="order.csv"), "are not the same classes in order"),
        (dict(confusion="words.csv"), "words.csv cannot be used: invalid literal"),
        (dict(confusion="zero.csv"), "all are 0"),
    ):
        with pytest.raises(UserError, match=message) as found:
            run(**{key: tmp_path / value for key, value in given.items()})
        assert "\n" not in str(found.value)
    with pytest.raises(UserError, match="must be a file that ends in .csv"):
        areas.run(str(tmp_path / "rgb.tif"), str(tmp_path))


def test_the_command(folder, tmp_path):
    target = tmp_path / "areas.csv"
    out, _ = runs.finish(runs.start(f"--map={folder / 'map.tif'}", f"--output={target}", verb="areas"))
    assert f"table in {target}" in out and "meadow, wet" in out and target.exists()
    process = runs.start("--map=/none.tif", f"--output={target}", verb="areas")
    out, err = process.communicate()
    assert (process.returncode, out, err) == (1, "", "error: there is no file --map=/none.tif\n")


def test_matrices_of_tiles_as_text():
    single = np.random.default_rng(0).integers(0, 2, (5, 3, 3)) * 2**40
    single[:, 1, 1] += 1
    np.testing.assert_array_equal(by_tile.from_csv(by_tile.to_csv(single), 3), single)
    for text in ("", "tile,label\n1,2\n", "tile,label,prediction,pixels\n0,3,0,1\n"):
        with pytest.raises(ValueError, match="its columns|of no class below 3"):
            by_tile.from_csv(text, 3)
