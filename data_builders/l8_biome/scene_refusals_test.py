"""What is wrong with a scene is said in one line before anything is written."""

import sys

import numpy as np
import pytest

from data_builders.l8_biome.scene_cases import random_scene, scene_id, write_raster, write_scene
from ktda_jax import UserError
from ktda_jax.data.tfds_source import prepare

HEIGHT, WIDTH = 150, 130


def _remove(pattern):
    def damage(folder):
        for path in folder.glob(pattern):
            path.unlink()

    return damage


def _write(suffix, *bands, **place):
    return lambda folder: write_raster(folder / f"{folder.name}{suffix}", list(bands), **place)


def _unknown_values(folder):
    mask = np.full((HEIGHT, WIDTH), 128, np.uint8)
    mask[100, 100], mask[100, 101] = 7, 191
    write_raster(folder / f"{folder.name}_fixedmask.img", [mask])


def _cut(suffix, size):
    def damage(folder):
        path = folder / f"{folder.name}{suffix}"
        path.write_bytes(path.read_bytes()[:size])

    return damage


def _second_copy(folder):
    (folder.parent.parent / "water").mkdir()
    (folder.parent.parent / "water" / folder.name).symlink_to(folder)


def _all_fill(folder):
    write_raster(folder / f"{folder.name}_fixedmask.img", [np.zeros((HEIGHT, WIDTH), np.uint8)])


BAND = np.ones((HEIGHT, WIDTH), np.uint16)


def _second_mask(folder):
    for path in folder.glob("*_fixedmask*"):
        path.unlink()
    write_raster(folder / f"{folder.name}_fixedmask.TIF", [np.full(BAND.shape, 128, np.uint8)], origin=(0, 0))


REFUSALS = {
    "no mask": (_remove("*fixedmask*"), r"scene LC8\S+ in .*urban\S* has no mask: add LC8\S+_fixedmask.img"),
    "no header": (_remove("*.hdr"), r"_fixedmask.img has no header: add \S+_fixedmask.hdr"),
    "no band": (_remove("*_B[34].TIF"), r"lacks LC8\S+_B4.TIF, LC8\S+_B3.TIF: add the files or remove the scene"),
    "size": (_write("_B3.TIF", BAND[1:]), r"_B3.TIF is 149 x 130 pixels, its mask \S+ 150 x 130: replace one"),
    "type": (_write("_B2.TIF", BAND.astype(np.uint8)), r"_B2.TIF has 1 bands of uint8, not 1 of uint16: replace"),
    "count": (_write("_B2.TIF", BAND, BAND), r"_B2.TIF has 2 bands of uint16, not 1 of uint16: replace"),
    "place": (_write("_B2.TIF", BAND, origin=(0, 0)), r"_B4.TIF, \S+_B3.TIF, \S+_B2.TIF, \S+ do not lie on the same"),
    "mask's place": (_second_mask, r"_fixedmask.TIF do not lie on the same ground"),
    "values": (_unknown_values, r"scene LC8\S+: mask \S+_fixedmask.img holds 7, 191, where only 0 \(fill\), 64"),
    "all fill": (_all_fill, r"_fixedmask.img is all fill \(0\): replace it"),
    "no raster": (_cut("_B4.TIF", 3), r"cannot read \S+_B4.TIF: .*Cannot read TIFF header; download the scene again"),
    "cut band": (_cut("_B4.TIF", 9000), r"cannot read \S+_B4.TIF: .*; download the scene again"),
    "cut mask": (_cut("_fixedmask.img", 900), r"_fixedmask.img has 900 bytes, its header promises 19500: download"),
    "twice": (_second_copy, r"scene LC8\S+ is there twice: .*urban\S+ and .*water\S+; remove one"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case, tmp_path, capfd):
    damage, message = REFUSALS[case]
    write_scene(tmp_path / "s" / "barren", scene_id(1), *random_scene(1, HEIGHT, WIDTH))
    damage(write_scene(tmp_path / "s" / "urban", scene_id(2), *random_scene(2, HEIGHT, WIDTH)))
    with pytest.raises(UserError, match=message) as error:
        prepare("l8_biome/scenes_64px", tmp_path / "data", tmp_path / "s")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "data").rglob("*"))
    assert capfd.readouterr().err == ""  # GDAL has nothing to add


def test_stack_of_other_bands(tmp_path):
    folder = write_scene(tmp_path / "s", scene_id(1), *random_scene(2, HEIGHT, WIDTH), stacked=True)
    write_raster(folder / f"{folder.name}.TIF", [BAND] * 7)
    with pytest.raises(UserError, match=r"LGN00.TIF has 7 bands of uint16, not 11 of uint16"):
        prepare("l8_biome/scenes", tmp_path / "data", tmp_path / "s")


def test_no_scenes(tmp_path):
    (tmp_path / "s" / "img_dir").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no Landsat scenes in .*, which holds img_dir: give the folder"):
        prepare("l8_biome/scenes", tmp_path / "data", tmp_path / "s")
    with pytest.raises(UserError, match="give manual_dir, the folder with the Landsat scenes"):
        prepare("l8_biome/scenes", tmp_path / "data")


def test_without_rasterio(tmp_path, monkeypatch):
    write_scene(tmp_path / "s", scene_id(1), *random_scene(2, HEIGHT, WIDTH))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    with pytest.raises(UserError, match=r"Landsat scenes: reading images takes rasterio .*; pip install rasterio"):
        prepare("l8_biome/scenes", tmp_path / "data", tmp_path / "s")
