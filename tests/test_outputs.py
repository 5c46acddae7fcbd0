"""Maps as files: names, place, colours, nodata, beside files, and what a full disk leaves of them."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import scene_files as sf
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.rpc import RPC

from ktda_jax import UserError
from ktda_jax.data.images import Reading
from ktda_jax.data.raster import open_scene
from ktda_jax.prediction import files, polygons
from ktda_jax.prediction.outputs import Legend


def test_a_map_lies_where_its_scene_does(tmp_path):
    values = sf.smooth(700, 530)
    values[:60, 500:] = 0
    path = sf.write(tmp_path / "scene.tif", values, nodata=0)
    assert sf.map_one(path, tmp_path / "map.tif") == [f"{path}: 700 x 530 -> {tmp_path / 'map.tif'}"]
    with rasterio.open(path) as scene, rasterio.open(tmp_path / "map.tif") as made:
        assert made.transform == scene.transform and made.crs == scene.crs and made.bounds == scene.bounds
        assert made.profile["tiled"] and made.profile["compress"] == "deflate" and made.block_shapes == [(512, 512)]
        assert made.dtypes == ("uint8",) and made.nodata == 255 and made.colorinterp == (ColorInterp.palette,)
        colours = made.colormap(1)
        assert len({colours[k] for k in range(3)}) == 3 and colours[255] == (0, 0, 0, 0) and colours[0][3] == 255
        assert made.tags()["CLASS_1"] == "class 1"
        np.testing.assert_array_equal(made.read(1), np.where((values == 0).all(-1), 255, values.argmax(-1)))
    assert "<Category>class 2</Category>" in (tmp_path / "map.tif.aux.xml").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.tif", "map.tif.aux.xml", "scene.tif"]


@pytest.mark.parametrize("how", ["rotated", "points", "rational"])
def test_other_ways_to_say_where(tmp_path, how):
    values = sf.smooth(70, 80)
    numbers = dict.fromkeys(("height", "lat", "line", "long", "samp"), 3.5)
    rational = RPC(
        **{f"{name}_off": value for name, value in numbers.items()},
        **{f"{name}_scale": value for name, value in numbers.items()},
        **{f"{name}_{part}_coeff": [0.5] * 20 for name in ("line", "samp") for part in ("num", "den")},
    )
    points = (0, 0), (0, 79), (69, 9)
    given = {
        "rotated": dict(transform=sf.UTM @ rasterio.Affine.rotation(17.3)),
        "points": dict(transform=None, crs="EPSG:4326", gcps=[
            GroundControlPoint(row=r, col=c, x=10 + c / 100, y=50 - r / 100, z=0.0) for r, c in points
        ]),
        "rational": dict(transform=None, crs=None, rpcs=rational),
    }[how]  # fmt: skip
    path = sf.write(tmp_path / "scene.tif", values, **given)
    sf.map_one(path, tmp_path / "map.tif")
    with rasterio.open(path) as scene, rasterio.open(tmp_path / "map.tif") as made:
        assert made.transform == scene.transform
        assert [p.asdict() | {"id": 0} for p in made.gcps[0]] == [p.asdict() | {"id": 0} for p in scene.gcps[0]]
        assert made.gcps[1] == scene.gcps[1] and made.rpcs == scene.rpcs
        assert (how == "points") == bool(made.gcps[0]) and (how == "rational") == (made.rpcs is not None)


def test_what_lies_beside(tmp_path):
    values = sf.smooth(300, 270)
    values[:100, :100] = 0
    path = sf.write(tmp_path / "scene.tif", values, nodata=0)
    wanted = dict(probabilities=True, confidence=True, overlay=True, polygonize=True)
    sf.map_one(path, tmp_path / "map.tif", **wanted)
    labels = sf.read(tmp_path / "map.tif")
    probabilities, confidence = sf.read(tmp_path / "map_probabilities.tif"), sf.read(tmp_path / "map_confidence.tif")
    there = labels != 255
    assert there.any() and not there.all()
    assert (probabilities[:, ~there] == 255).all() and (confidence[~there] == 255).all()
    np.testing.assert_allclose(probabilities[:, there].sum(0, dtype=int), 254, atol=2)
    np.testing.assert_array_equal(probabilities.max(0)[there], confidence[there])
    with rasterio.open(tmp_path / "map_probabilities.tif") as file:
        assert file.descriptions == ("class 0", "class 1", "class 2") and file.scales == (1 / 254,) * 3
        assert file.transform == sf.UTM and file.nodata == 255
    overlay = np.asarray(Image.open(tmp_path / "map_overlay.png"))
    assert overlay.shape == (300, 270, 3) and (overlay[~there] == 0).all() and overlay[there].any(-1).all()

    pyogrio, shapely = pytest.importorskip("pyogrio"), pytest.importorskip("shapely")
    about, _, geometry, (numbers, names) = pyogrio.raw.read(tmp_path / "map.gpkg")
    assert about["crs"] == "EPSG:32633" and set(names) == {"class 0", "class 1", "class 2"}
    areas = shapely.area(shapely.from_wkb(geometry))
    for k in range(3):
        assert areas[numbers == k].sum() == pytest.approx(900 * (labels == k).sum())


def test_polygons_are_made_window_by_window(tmp_path, monkeypatch):
    pyogrio, shapely = pytest.importorskip("pyogrio"), pytest.importorskip("shapely")
    monkeypatch.setattr("ktda_jax.prediction.polygons.SIDE", 64)
    values = np.full((100, 100, 3), (9, 0, 0), np.uint8)
    values[:, 64:] = 0
    sf.map_one(sf.write(tmp_path / "scene.tif", values, nodata=0, crs=None), tmp_path / "map.tif", polygonize=True)
    about, _, geometry, (numbers, _) = pyogrio.raw.read(tmp_path / "map.gpkg")
    assert about["crs"] is None or "Undefined" in about["crs"]
    assert len(geometry) == 2 and set(numbers) == {0}
    assert shapely.area(shapely.from_wkb(geometry)).sum() == pytest.approx(900 * 6400)


@pytest.mark.parametrize("portion", [100_000, 300])
def test_polygons_follow_ground_control_points(tmp_path, monkeypatch, portion):
    pyogrio, shapely = pytest.importorskip("pyogrio"), pytest.importorskip("shapely")
    monkeypatch.setattr("ktda_jax.prediction.polygons.PORTION", portion)
    corners = (0, 0), (0, 80), (70, 0), (70, 80)
    points = [GroundControlPoint(row=r, col=c, x=5e5 + 10 * c + r, y=4e6 - 10 * r, z=0.0) for r, c in corners]
    path = sf.write(tmp_path / "scene.tif", sf.smooth(70, 80), transform=None, gcps=points)
    sf.map_one(path, tmp_path / "map.tif", polygonize=True)
    about, _, geometry, _ = pyogrio.raw.read(tmp_path / "map.gpkg")
    found = shapely.from_wkb(geometry)
    np.testing.assert_allclose(shapely.total_bounds(found), (5e5, 4e6 - 700, 5e5 + 870, 4e6), atol=1e-3)
    assert about["crs"] == "EPSG:32633" and shapely.area(found).sum() == pytest.approx(70 * 80 * 100)
    with pytest.raises(UserError, match="--polygonize: 2 ground control points do not give places"):
        polygons.by_points(points[:2], np.zeros((1, 2)))


def test_a_new_map_inherits_nothing_and_leaves_nothing(tmp_path):
    """Files of an older map beside it, and hidden ones: a CRS that GeoTIFF cannot hold goes to such a file."""
    pole = "+proj=ob_tran +o_proj=longlat +o_lat_p=39.25 +o_lon_p=0 +lon_0=18 +R=6371229 +no_defs"
    path = sf.write(tmp_path / "scene.tif", sf.smooth(300, 300), crs=rasterio.crs.CRS.from_proj4(pole))
    maps = tmp_path / "maps"
    maps.mkdir()
    for ending in (".ovr", ".msk", ".aux.xml"):
        (maps / f"map.tif{ending}").write_bytes(b"old")
        (maps / f"map_confidence.tif{ending}").write_bytes(b"old")
    for cog in (False, True):
        sf.map_one(path, maps / "map.tif", cog=cog, confidence=True)
        assert {p.name for p in maps.iterdir()} - {"map_confidence.tif.aux.xml"} == {
            "map.tif", "map.tif.aux.xml", "map_confidence.tif",
        }  # fmt: skip
        assert all(b"old" not in p.read_bytes()[:3] for p in maps.iterdir())


def test_a_cloud_optimized_map_is_valid(tmp_path):
    path = sf.write(tmp_path / "scene.tif", sf.smooth(1200, 1100))
    sf.map_one(path, tmp_path / "map.tif", cog=True, probabilities=True, tile=256)
    for name in ("map.tif", "map_probabilities.tif"):
        with rasterio.open(tmp_path / name) as made:
            assert made.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and made.transform == sf.UTM
            assert made.overviews(1) == [2, 4] and made.block_shapes[0] == (512, 512) and made.nodata == 255
            # The overviews' directories and then their pixels come before those of the full size.
            first = [int(made.get_tag_item("IFD_OFFSET", "TIFF", bidx=1, ovr=k)) for k in range(2)]
            pixels = int(made.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))
            smaller = [int(made.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1, ovr=k)) for k in range(2)]
            assert int(made.get_tag_item("IFD_OFFSET", "TIFF", bidx=1)) < first[0] < first[1] < smaller[1]
            assert smaller[1] < smaller[0] < pixels
    with rasterio.open(tmp_path / "map.tif") as made:
        assert made.colormap(1)[255] == (0, 0, 0, 0) and set(np.unique(made.read(1))) == {0, 1, 2}
        assert made.tags()["CLASS_0"] == "class 0"
        assert set(np.unique(made.read(1, out_shape=(300, 275)))) == {0, 1, 2}
    assert "<Category>class 2</Category>" in (tmp_path / "map.tif.aux.xml").read_text()


def test_a_picture_gives_a_picture(tmp_path):
    values = sf.smooth(90, 70)
    Image.fromarray(values).save(tmp_path / "photo.png")
    assert sf.map_one(tmp_path / "photo.png", tmp_path / "map.png") == [
        f"{tmp_path / 'photo.png'}: 90 x 70 -> {tmp_path / 'map.png'}"
    ]
    with Image.open(tmp_path / "map.png") as made:
        assert made.mode == "P"
        np.testing.assert_array_equal(np.asarray(made), values.argmax(-1))
    sf.map_one(tmp_path / "photo.png", tmp_path / "again.PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.PNG", "map.png", "photo.png"]
    path = sf.write(tmp_path / "plane.tif", values, crs=None)  # in some plane, of no CRS
    sf.map_one(path, tmp_path / "map.png")
    with rasterio.open(tmp_path / "map.png") as made:
        assert made.transform.almost_equals(sf.UTM)
    sf.map_one(tmp_path / "photo.png", tmp_path / "map.png")
    assert not (tmp_path / "map.png.aux.xml").exists()


@pytest.mark.parametrize("count", [2, 8, 17, 40])
def test_colours_without_a_palette_differ(count):
    palette = np.array(Legend.of(count).palette, int)
    distances = np.abs(palette[:, None] - palette).sum(-1)[~np.eye(count, dtype=bool)]
    assert distances.min() > {2: 300, 8: 90, 17: 60, 40: 25}[count]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "maps").mkdir()
    for name in ("a.tif", "b.png", "b.tif", "notes.txt", ".hidden.tif"):
        (tmp_path / name).touch()
    return tmp_path


def test_which_files_and_what_they_become(folder):
    found = files.expand(str(folder))
    assert [path.name for path in found] == ["a.tif", "b.png", "b.tif"]
    assert [path.name for path in files.expand(f"{folder}/*.tif")] == ["a.tif", "b.tif"]
    made = files.name_outputs(found[:2], f"{folder}/maps", one=False, overlay=True, polygonize=True)
    assert [path.name for path in made[0].wanted()] == ["a.tif", "a_overlay.png", "a.gpkg"]
    assert [path.name for path in made[1].wanted()] == ["b.png", "b_overlay.png", "b.gpkg"]
    (one,) = files.name_outputs(found[:1], f"{folder}/new/map.tif", one=True)
    assert one.wanted() == [folder / "new" / "map.tif"]
    for text, message in (
        ("nowhere.tif", "there is no file"),
        ("*.jpg", "no file matches"),
        ("maps", "no scene in the"),
    ):
        with pytest.raises(UserError, match=message):
            files.expand(f"{folder}/{text}")
    for output, options, message in (
        ("", {}, r"a.tif would be written over the input .*a.tif; choose another --output"),
        ("/maps", dict(overlay=True), r"b.png and .*b.tif would both be mapped to .*b_overlay.png"),
        ("/map.tif", {}, "is one file for 3 inputs; give a folder"),
        ("/maps", dict(cog=True), "--cog makes GeoTIFF"),
    ):
        with pytest.raises(UserError, match=message):
            files.name_outputs(found, f"{folder}{output}", one=False, **options)
    with pytest.raises(UserError, match="must end in .tif, .tiff, .png, or be a folder"):
        files.name_outputs(found[:1], f"{folder}/map.jpg", one=True)
    with pytest.raises(UserError, match="cannot write to the folder /proc/maps"):
        files.make_folders(files.name_outputs(found[:1], "/proc/maps/map.tif", one=True))
    with pytest.raises(UserError, match="--cog makes GeoTIFF"):
        files.name_outputs(found[:1], f"{folder}/map.PNG", one=True, cog=True)
    with pytest.raises(UserError, match="the file name l*.tif is too long"):
        files.name_outputs(found[:1], f"{folder}/{'l' * 245}.tif", one=True)


def test_what_a_scene_is_made_of_is_not_written_over(tmp_path):
    values, name = sf.smooth(70, 90), "l" * 235
    source = sf.write(tmp_path / f"{name}.tif", values)
    rasterio.shutil.copy(source, tmp_path / "scene.vrt", driver="VRT")
    scene = open_scene(tmp_path / "scene.vrt", Reading(), 3)
    with pytest.raises(UserError, match=r"l.tif would be written over what is read by the input .*scene.vrt"):
        files.check_sources({scene.path: scene.files}, files.name_outputs([scene.path], str(source), one=True))
    (tmp_path / "maps").mkdir()
    sf.map_one(source, tmp_path / "maps" / f"{name}.tif")
    np.testing.assert_array_equal(sf.read(tmp_path / "maps" / f"{name}.tif"), values.argmax(-1))


FULL = """
import pathlib, resource, sys
sys.path[:0] = [{tests!r}]
import scene_files as sf
from ktda_jax import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    sf.map_one(pathlib.Path({path!r}), {output!r}, **{wanted})
except UserError as error:
    print(error)
"""


@pytest.mark.parametrize("wanted", ["{}", "dict(cog=True)", "dict(polygonize=True)"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, wanted):
    """A limit on the size of files fails as a full disk does: late, in GDAL's own buffers."""
    side = 200 if "polygonize" in wanted else 600
    path = sf.write(tmp_path / "scene.tif", np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8))
    output = tmp_path / "maps" / "map.tif"
    output.parent.mkdir()
    limit = 150_000 if "polygonize" in wanted else 40_000
    here = pathlib.Path(__file__).parent
    code = FULL.format(tests=str(here), limit=limit, path=str(path), output=str(output), wanted=wanted)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=here.parent)
    assert done.stdout.startswith(f"cannot write in {output.parent}: "), done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 1 and "Traceback" not in done.stderr, done.stderr
    assert not list(output.parent.iterdir())
