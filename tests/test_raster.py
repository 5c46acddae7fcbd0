"""Maps as files: place, colours, nodata, beside files; and every odd or broken scene gives a right map or one line."""

import pathlib
import subprocess
import sys

import numpy as np
import pytest
import rasterio
import scene_files as sf
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.rpc import RPC

from ktda_jax.data.images import DataError
from ktda_jax.scenes import files
from ktda_jax.scenes.raster import Reading, RowReader, open_scene


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
    monkeypatch.setattr("ktda_jax.scenes.polygons.SIDE", 64)
    values = np.full((100, 100, 3), (9, 0, 0), np.uint8)
    values[:, 64:] = 0
    sf.map_one(sf.write(tmp_path / "scene.tif", values, nodata=0, crs=None), tmp_path / "map.tif", polygonize=True)
    about, _, geometry, (numbers, _) = pyogrio.raw.read(tmp_path / "map.gpkg")
    assert about["crs"] is None or "Undefined" in about["crs"]
    assert len(geometry) == 2 and set(numbers) == {0}
    assert shapely.area(shapely.from_wkb(geometry)).sum() == pytest.approx(900 * 6400)


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
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.png", "photo.png"]


def alpha(values):
    holes = np.full((*values.shape[:2], 1), 255, np.uint8)
    holes[10:50, 20:60] = 0
    rgba = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)
    return np.concatenate([values, holes], -1), dict(colorinterp=rgba), None


def declared(values):
    values[10:50, 20:60] = 7
    return values, dict(nodata=7), None


def given(values):
    values[10:50, 20:60] = 7
    return values, {}, Reading(nodata=7)


def not_numbers(values):
    values = values.astype(np.float32)
    values[10:50, 20:60] = np.nan
    values[5, 5, 0] = np.nan  # one band alone: the pixel has data
    return values, {}, Reading(scale=(0, 255))


@pytest.mark.parametrize("how", [alpha, declared, given, not_numbers])
def test_where_the_scene_has_no_data_the_map_has_none(tmp_path, how):
    values, profile, reading = how(sf.smooth(130, 140) | 8)
    sf.map_one(sf.write(tmp_path / "scene.tif", values, **profile), tmp_path / "map.tif", reading=reading or Reading())
    missing = np.zeros((130, 140), bool)
    missing[10:50, 20:60] = True
    np.testing.assert_array_equal(sf.read(tmp_path / "map.tif") == 255, missing)


def test_a_mask_within_the_file(tmp_path):
    path, missing = tmp_path / "scene.tif", np.zeros((130, 140), bool)
    missing[10:50, 20:60] = True
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        sf.write(path, sf.smooth(130, 140))
        with rasterio.open(path, "r+") as file:
            file.write_mask(~missing)
    sf.map_one(path, tmp_path / "map.tif")
    np.testing.assert_array_equal(sf.read(tmp_path / "map.tif") == 255, missing)


def test_near_infrared_is_no_alpha(tmp_path):
    """GDAL calls every fourth band of 8 bits alpha; as a band of the model it is data, also where it is 0."""
    values = sf.smooth(100, 100, bands=4)
    path = sf.write(tmp_path / "scene.tif", values)
    with rasterio.open(path) as file:
        assert file.colorinterp[3] == ColorInterp.alpha
    sf.map_one(path, tmp_path / "four.tif", stub=sf.model(bands=4, classes=4), reading=Reading(bands=(1, 2, 3, 4)))
    np.testing.assert_array_equal(sf.read(tmp_path / "four.tif"), values.argmax(-1))
    sf.map_one(path, tmp_path / "three.tif")
    np.testing.assert_array_equal(sf.read(tmp_path / "three.tif"), values[..., :3].argmax(-1))


def test_palette_and_grey_are_read_as_colours(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (256, 3), np.uint8)
    numbers = sf.smooth(90, 100, bands=1)
    path = tmp_path / "palette.png"
    picture = Image.fromarray(numbers[..., 0], "P")
    picture.putpalette(colours.tobytes())
    picture.save(path)
    sf.map_one(path, tmp_path / "map.tif")
    np.testing.assert_array_equal(sf.read(tmp_path / "map.tif"), colours[numbers[..., 0]].argmax(-1))
    with RowReader(open_scene(sf.write(tmp_path / "grey.tif", numbers), Reading(), 3)) as reader:
        np.testing.assert_array_equal(reader.rows(0, 90)[0], np.repeat(numbers[..., 0][None], 3, 0))


def test_bands_and_stretch_are_those_of_training(tmp_path):
    values = np.random.default_rng(0).integers(0, 5000, (80, 90, 5)).astype(np.uint16)
    path = sf.write(tmp_path / "scene.tif", values)
    reading = Reading(bands=(4, 2, 5), scale=((0, 4000), (100, 3000), (0, 5000)))
    from ktda_jax.data.images import read_bands

    expected, _ = read_bands(str(path), reading.bands, reading.scale, None)
    with RowReader(open_scene(path, reading, 3)) as reader:
        np.testing.assert_array_equal(reader.rows(0, 80)[0], np.moveaxis(expected, -1, 0))


@pytest.mark.parametrize(
    "profile",
    [dict(), dict(tiled=True, blockxsize=16, blockysize=32), dict(tiled=True, blockxsize=128, blockysize=128),
     dict(blockysize=300), dict(interleave="band", blockysize=7)],
)  # fmt: skip
def test_rows_however_the_file_is_laid_out(tmp_path, profile, monkeypatch):
    monkeypatch.setattr("ktda_jax.scenes.raster.CHUNK", 3000)
    monkeypatch.setattr("ktda_jax.scenes.raster.TALLEST_BLOCK", 128)
    values = sf.smooth(300, 210)
    path = sf.write(tmp_path / "scene.tif", values, **profile)
    with RowReader(open_scene(path, Reading(), 3)) as reader:
        for first in (0, 48, 96, 144, 192, 236):
            pixels, present = reader.rows(first, first + 64)
            np.testing.assert_array_equal(np.moveaxis(pixels, 0, -1), values[first : first + 64])
            assert present.shape == (64, 210) and present.all()


def test_a_scene_without_data_and_one_without_a_place(tmp_path):
    path = sf.write(tmp_path / "scene.tif", np.zeros((100, 90, 3), np.uint8), nodata=0, crs=None)
    said = sf.map_one(path, tmp_path / "map.tif")
    assert said[:2] == [
        f"warning: {path}: no CRS; their maps will have none either",
        f"warning: {path} holds no data at all; its map is all 255",
    ]
    assert (sf.read(tmp_path / "map.tif") == 255).all()


def two_bands(path):
    sf.write(path, sf.smooth(60, 60, bands=2), photometric="MINISBLACK")
    return Reading(), 3, "has 2 bands, and the model takes red, green and blue; name them, such as --bands=1,2,3"


def too_few(path):
    sf.write(path, sf.smooth(60, 60))
    return Reading(bands=(2, 3, 4, 8)), 4, "has 3 band.*, and the model wants band 4 .*; give --bands"


def bands_unknown(path):
    sf.write(path, sf.smooth(60, 60, bands=4))
    return Reading(), 4, "the model takes 4 bands; give --bands"


def sixteen_bits(path):
    sf.write(path, sf.smooth(60, 60).astype(np.uint16))
    return Reading(), 3, "holds uint16, and the model was trained on 8-bit images; give --scale=LOW,HIGH"


def complex_numbers(path):
    sf.write(path, sf.smooth(60, 60).astype(np.complex64))
    return Reading(scale=(0, 1)), 3, "holds complex64; only whole and floating numbers"


def no_raster(path):
    path.write_bytes(b"not a raster" * 100)
    return Reading(), 3, "cannot read .*scene.tif: .*not recognized"


def empty(path):
    path.write_bytes(b"")
    return Reading(), 3, "cannot read .*scene.tif: "


def truncated(path):
    sf.write(path, np.random.default_rng(0).integers(0, 256, (400, 400, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:200_000])
    return Reading(), 3, "cannot read .*scene.tif: "


@pytest.mark.parametrize(
    "spoil", [two_bands, too_few, bands_unknown, sixteen_bits, complex_numbers, no_raster, empty, truncated]
)
def test_a_scene_that_cannot_be_mapped_is_named_and_leaves_nothing(tmp_path, spoil):
    path = tmp_path / "scene.tif"
    reading, bands, message = spoil(path)
    with pytest.raises(DataError, match=message) as error:
        sf.map_one(path, tmp_path / "maps" / "map.tif", stub=sf.model(bands=bands), reading=reading)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    assert not list(tmp_path.glob("maps/*"))


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
        with pytest.raises(DataError, match=message):
            files.expand(f"{folder}/{text}")
    for output, options, message in (
        ("", {}, r"a.tif would be written over the input .*a.tif; choose another --output"),
        ("/maps", dict(overlay=True), r"b.png and .*b.tif would both be mapped to .*b_overlay.png"),
        ("/map.tif", {}, "is one file for 3 inputs; give a folder"),
        ("/maps", dict(cog=True), "--cog makes GeoTIFF"),
    ):
        with pytest.raises(DataError, match=message):
            files.name_outputs(found, f"{folder}{output}", one=False, **options)
    with pytest.raises(DataError, match="must end in .tif, .tiff, .png, or be a folder"):
        files.name_outputs(found[:1], f"{folder}/map.jpg", one=True)
    with pytest.raises(DataError, match="cannot write to the folder /proc/maps"):
        files.make_folders(files.name_outputs(found[:1], "/proc/maps/map.tif", one=True))


FULL = """
import pathlib, resource, sys
sys.path[:0] = [{tests!r}]
import scene_files as sf
from ktda_jax.data.images import DataError
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    sf.map_one(pathlib.Path({path!r}), {output!r}, **{wanted})
except DataError as error:
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
