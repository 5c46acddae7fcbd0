"""Names and options of the forms of l8_biome: for TFDS, for prepare, for what was built."""

import json
import pathlib

import numpy as np
import pytest

from data_builders.l8_biome.l8_biome_dataset_builder import Builder
from data_builders.l8_biome.scene_cases import random_scene, scene_id, write_scene
from data_builders.l8_biome.variants import VARIANTS, variant
from ktda_jax import UserError
from ktda_jax.data import tfds_source
from ktda_jax.data.tfds_source import TfdsSource, prepare


def test_variants():
    assert list(VARIANTS) == [
        "tiles",
        "scenes",
        "scenes_clear",
        "scenes_percentile",
        "scenes_percentile_clear",
        "scenes_reflectance",
        "scenes_reflectance_clear",
    ]
    both = variant("scenes_percentile_clear_256px")
    assert (both.stretch, both.fill, both.tile_size) == ("percentile", "clear", 256)
    for name in ("scenes_contrast", "scenes_clear_percentile", "tile", "scenes/1"):
        with pytest.raises(UserError, match="l8_biome has no configuration .*: known are tiles, scenes, scenes_clear,"):
            variant(name)
    for options, message in (
        ({"name": "scenes_p", "stretch": "p"}, "stretch is 'p', not minmax or percentile or reflectance"),
        ({"name": "scenes", "fill": 0}, "fill is 0, not ignore or clear"),
        ({"name": "scenes", "tile_size": 0}, "tile_size is 0, not a whole number"),
        ({"name": "mine", "stretch": "percentile"}, "is called 'scenes_percentile', not 'mine'"),
        ({"name": "tiles", "fill": "clear"}, "is called 'scenes_clear', not 'tiles'"),
    ):
        with pytest.raises(UserError, match=message):
            Builder.builder_config_cls(**options)


def test_as_the_tfds_command_makes_it(tmp_path):
    """By name, by JSON that repeats the options, and without --config, which must not build the scenes."""
    assert [config.name for config in Builder.BUILDER_CONFIGS] == ["tiles"]
    by_json = Builder.builder_config_cls(**json.loads('{"name": "scenes_percentile", "stretch": "percentile"}'))
    for config, name in ((None, "tiles"), ("scenes_clear", "scenes_clear"), (by_json, "scenes_percentile")):
        builder = Builder(data_dir=tmp_path, config=config)
        assert builder.info.full_name == f"l8_biome/{name}/1.0.0"
        assert ("scene" in builder.info.features) == (name != "tiles")
        assert "public domain" in builder.info.as_proto.redistribution_info.license
    assert builder.info.features["row"].np_dtype == np.int32
    assert builder.info.features["easting"].np_dtype == np.float64
    with pytest.raises(UserError, match="no configuration 'scene'"):
        Builder(data_dir=tmp_path, config="scene")


def test_names_of_built_sets(tmp_path):
    root = tmp_path / "scenes"
    write_scene(root, scene_id(1), *random_scene(1, 150, 130))
    with pytest.raises(UserError, match=r"'l8_biome/scenes' is not built.*source l8_biome/scenes .*_WITH_SCENES"):
        TfdsSource("l8_biome/scenes", "train", data_dir=tmp_path, num_classes=4)
    tiles = prepare("l8_biome", tmp_path, pathlib.Path(__file__).parent / "dummy_data")
    cut = prepare("l8_biome/scenes", tmp_path, root)
    assert prepare("l8_biome/scenes/1.0.0", tmp_path) == cut == f"{tmp_path}/l8_biome/scenes/1.0.0"
    for name, folder in (
        ("l8_biome", tiles),
        ("l8_biome/tiles", tiles),
        ("l8_biome/scenes", cut),
        ("l8_biome/scenes/1.0.0", cut),
    ):
        assert tfds_source.find_built(name, tmp_path) == folder
    with pytest.raises(UserError, match=r"cannot build l8_biome/scenes/3.0.0: .*1.0.0"):
        prepare("l8_biome/scenes/3.0.0", tmp_path, root)
    with pytest.raises(UserError, match="'grass/tiles': grass has no configurations; call it grass"):
        prepare("grass/tiles", tmp_path, root)
    with pytest.raises(UserError, match="l8_biome has no configuration 'scene'"):
        prepare("l8_biome/scene", tmp_path, root)
    bad = write_scene(tmp_path / "bad", scene_id(2), *random_scene(2, 150, 130))
    (bad / f"{bad.name}_B2.TIF").unlink()
    with pytest.raises(UserError, match="lacks"):
        prepare("l8_biome/scenes_clear", tmp_path, tmp_path / "bad")
    assert sorted(path.name for path in (tmp_path / "l8_biome").iterdir()) == [".config", "scenes", "tiles"]
