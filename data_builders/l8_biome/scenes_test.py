"""Tiles cut from scenes: exact pixels, labels and places; scenes apart between splits."""

import pathlib
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import rasterio
from rasterio.env import get_gdal_config

from data_builders.l8_biome.scene_cases import ORIGIN, random_scene, scene_id, write_scene
from data_builders.l8_biome.scene_folders import Scene, biome_of, scene_folders, split_scenes
from data_builders.l8_biome.scene_tiles import percentile_limits
from ktda_jax import UserError
from ktda_jax.data import tfds_source
from ktda_jax.data.gdal import rasterio_for
from ktda_jax.data.stretch import stretch
from ktda_jax.data.tfds_source import TfdsSource, prepare

REPO = pathlib.Path(__file__).parents[2]
HEIGHT, WIDTH, SIZE = 150, 130, 64
FORMS = [
    {"stacked": False, "mask_suffix": ".img"},
    {"stacked": False, "mask_suffix": ".TIF"},
    {"stacked": True, "mask_suffix": ".TIF"},
    {"stacked": True, "mask_suffix": ".img"},
]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """(folder, {scene id: (biome, pixels, mask)}): ten scenes in two biomes and all four file forms."""
    root, known = tmp_path_factory.mktemp("scenes"), {}
    for number in range(10):
        biome = ("urban", "snow_ice")[number % 2]
        pixels, mask = random_scene(number, HEIGHT, WIDTH)
        write_scene(root / biome, scene_id(number), pixels, mask, **FORMS[number % 4])
        known[scene_id(number)] = biome, pixels, mask
    return root, known


def records(name, data_dir):
    """{split: [(tile of TfdsSource, all features of the record)]}"""
    found = {}
    for path in sorted(pathlib.Path(tfds_source.find_built(name, data_dir)).glob("*.array_record*")):
        split = path.name.split("-")[1].split(".")[0]
        if split not in found:
            source = TfdsSource(name, split, data_dir=data_dir, num_classes=4)
            found[split] = [(source[index], source._open()[index]) for index in range(len(source))]
    return found


def expected_tiles(known, limits, fill):
    """{name: (image, label, metadata)} by the plainest route: the whole scene in memory, loops over pixels' classes."""
    tiles = {}
    for scene, (biome, pixels, mask) in known.items():
        padded = np.zeros((192, 192, 3), np.uint16)
        padded[:HEIGHT, :WIDTH] = pixels
        values = np.zeros((192, 192), np.uint8)
        values[:HEIGHT, :WIDTH] = mask
        label = np.full(values.shape, fill, np.uint8)
        for value, index in ((128, 0), (64, 1), (192, 2), (255, 3)):
            label[values == value] = index
        for row in range(0, 192, SIZE):
            for column in range(0, 192, SIZE):
                at = np.s_[row : row + SIZE, column : column + SIZE]
                if values[at].any():
                    image = stretch(padded[at], *limits(padded[at], pixels, mask))
                    place = (scene, biome, row, column, ORIGIN[0] + 30 * column, ORIGIN[1] - 30 * row)
                    tiles[f"{biome}_{scene}_patch_{row}_{column}"] = image, label[at], place
    return tiles


LIMITS = {
    "minmax": lambda tile, pixels, mask: (tile.min(), tile.max()),
    "percentile": lambda tile, pixels, mask: np.percentile(pixels[mask > 0], (1, 99), method="inverted_cdf"),
    "reflectance": lambda tile, pixels, mask: (5000, 55000),
}


@pytest.mark.parametrize(
    ("name", "kind", "fill"),
    [
        ("scenes_64px", "minmax", 255),
        ("scenes_clear_64px", "minmax", 0),
        ("scenes_percentile_64px", "percentile", 255),
        ("scenes_reflectance_clear_64px", "reflectance", 0),
    ],
)
def test_exact(scenes, tmp_path, name, kind, fill):
    root, known = scenes
    expected = expected_tiles(known, LIMITS[kind], fill)
    assert len(expected) < 9 * len(known)  # the corner of each scene that is all fill is left out
    assert prepare(f"l8_biome/{name}", tmp_path, root) == f"{tmp_path}/l8_biome/{name}/1.0.0"
    found = records(f"l8_biome/{name}", tmp_path)
    assert {split: len({record["scene"] for _, record in tiles}) for split, tiles in found.items()} == {
        "train": 7,
        "val": 2,
        "test": 1,
    }
    everything = [pair for tiles in found.values() for pair in tiles]
    assert sorted(tile["name"] for tile, _ in everything) == sorted(expected)  # so no scene is in two splits
    for tile, record in everything:
        image, label, (scene, biome, row, column, easting, northing) = expected[tile["name"]]
        np.testing.assert_array_equal(tile["image"], image)
        np.testing.assert_array_equal(tile["label"], label)
        assert (record["scene"].decode(), record["biome"].decode()) == (scene, biome)
        assert (record["row"], record["column"]) == (row, column)
        assert (record["easting"], record["northing"]) == (easting, northing)
        assert record["northing"].dtype == np.float64
        assert record["crs"] == b"EPSG:32647"


def test_no_data_where_the_mask_speaks(tmp_path):
    """Its word stands in the label; the percentiles leave such pixels out."""
    pixels, mask = np.full((64, 64, 3), 7_000, np.uint16), np.full((64, 64), 128, np.uint8)
    pixels[32:] = 9_000
    pixels[:30, :, 0], mask[:30] = 0, 255
    write_scene(tmp_path / "s", scene_id(1), pixels, mask)
    prepare("l8_biome/scenes_percentile_64px", tmp_path / "data", tmp_path / "s")
    ((tile, record),) = records("l8_biome/scenes_percentile_64px", tmp_path / "data")["train"]
    assert (tile["label"][:30] == 3).all() and (tile["label"][30:] == 0).all()
    assert (tile["image"][:30, :, 1] == 0).all() and (tile["image"][32:] == 255).all()
    assert record["biome"] == b"unknown"


def test_gdal_keeps_its_cache(scenes, tmp_path):
    """It is the process's own: without it all that is read later is decoded anew for every window."""
    rasterio_for("Landsat scenes")
    before = get_gdal_config("GDAL_CACHEMAX")
    with scene_folders(scenes[0], tmp_path) as found:
        percentile_limits(found[0], SIZE)
    assert get_gdal_config("GDAL_CACHEMAX") == before > 1 << 20


def test_dealt_by_scene():
    scenes = [
        Scene(scene_id(number), ("urban", "water", "forest")[number % 3], split=None, bands=(), mask=pathlib.Path())
        for number in range(600)
    ]
    splits = {scene.id: split for split, found in split_scenes(scenes).items() for scene in found}
    shares = {split: list(splits.values()).count(split) / len(scenes) for split in ("train", "val", "test")}
    assert len(splits) == len(scenes) and shares == pytest.approx({"train": 0.6, "val": 0.2, "test": 0.2}, abs=0.04)
    for split, found in split_scenes(scenes[::-7]).items():  # whichever others are there
        assert all(splits[scene.id] == split for scene in found)
    with pytest.raises(UserError, match="none of the 2 scenes is for train by their ids: put some below a folder"):
        split_scenes([scene for scene in scenes if splits[scene.id] == "val"][:2])


def test_folders_decide_the_splits(tmp_path):
    store, root = tmp_path / "store", tmp_path / "scenes"
    for number, split in ((1, "train"), (2, "test"), (3, "test")):
        folder = write_scene(store, scene_id(number), *random_scene(number, 70, 70))
        (root / split / "water").mkdir(parents=True, exist_ok=True)
        (root / split / "water" / folder.name).symlink_to(folder)  # the cheap way to arrange them
    (root / "train" / "loop").symlink_to(root)
    with scene_folders(root, tmp_path) as found:
        splits = split_scenes(found)
    assert {split: [scene.id for scene in part] for split, part in splits.items()} == {
        "train": [scene_id(1)],
        "test": [scene_id(2), scene_id(3)],
    }
    assert {scene.biome for scene in found} == {"water"}
    write_scene(root, scene_id(4), *random_scene(4, 70, 70))
    with pytest.raises(UserError, match="1 of 4 scenes lie outside the folders train, val and test"):
        prepare("l8_biome/scenes_64px", tmp_path / "data", root)


def test_biomes():
    assert biome_of(("scenes", "Grass-Crops", scene_id(1))) == "grass_crops"
    assert biome_of(("water", "Wetland", "x")) == "wetlands"
    assert biome_of(("Snow/Ice",)) == biome_of(("SnowIce",)) == "snow_ice"
    assert biome_of(("downloads",)) == "unknown"


def test_archives(scenes, tmp_path):
    """One per scene as the USGS has them, one per biome as torchgeo has them; unpacked ones are not read twice."""
    root, _ = scenes
    (tmp_path / "download" / "urban").mkdir(parents=True)
    with tarfile.open(tmp_path / "download" / "snow_ice.tar.gz", "w:gz") as file:
        file.add(root / "snow_ice", "snow_ice")
    for folder in (root / "urban").iterdir():
        with tarfile.open(tmp_path / "download" / "urban" / f"{folder.name}.tar.gz", "w:gz") as file:
            for path in folder.iterdir():
                file.add(path, path.name)
    (tmp_path / "download" / "urban" / scene_id(0)).symlink_to(root / "urban" / scene_id(0))
    plain = prepare("l8_biome/scenes_64px", tmp_path / "plain", root)
    packed = prepare("l8_biome/scenes_64px", tmp_path / "packed", tmp_path / "download")
    for path in pathlib.Path(plain).glob("*.array_record*"):
        assert path.read_bytes() == (pathlib.Path(packed) / path.name).read_bytes()
    assert not [path for path in pathlib.Path(packed).iterdir() if path.is_dir()]


def test_needs_no_tensorflow(scenes, tmp_path):
    root, _ = scenes
    code = f"""
import sys
from ktda_jax.data.tfds_source import TfdsSource, prepare
prepare("l8_biome/scenes_64px", {str(tmp_path)!r}, {str(root)!r})
source = TfdsSource("l8_biome/scenes_64px", "val", data_dir={str(tmp_path)!r}, num_classes=4)
print(source[0]["image"].shape, "tensorflow" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "(64, 64, 3) False\n")


def test_cases_have_the_real_form(tmp_path):
    folder = write_scene(tmp_path, scene_id(3), *random_scene(3, HEIGHT, WIDTH))
    with rasterio.open(folder / f"{scene_id(3)}_fixedmask.img") as mask:
        assert (mask.driver, mask.dtypes, mask.shape) == ("ENVI", ("uint8",), (HEIGHT, WIDTH))
    assert {path.name.removeprefix(scene_id(3)) for path in folder.iterdir()} >= {
        "_B2.TIF",
        "_B3.TIF",
        "_B4.TIF",
        "_fixedmask.img",
        "_fixedmask.hdr",
        "_MTL.txt",
    }
