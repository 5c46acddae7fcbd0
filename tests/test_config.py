"""Settings are checked one by one, and a workdir keeps to the settings it was begun with."""

import dataclasses
import importlib.metadata
import json
import pathlib
import runpy

import jax.numpy as jnp
import numpy as np
import pytest
import runs

from ktda_jax import UserError
from ktda_jax.config import checks
from ktda_jax.config import workdir as records
from ktda_jax.config.data import listed
from ktda_jax.config.model import compute_dtype, model_of
from ktda_jax.config.settings import Settings
from ktda_jax.data import reading
from ktda_jax.models.ktda import KTDAConfig


def tiny(**overrides):
    return runs.config(pathlib.Path("tiles"), overrides)


@pytest.mark.parametrize(
    "setting, value, message",
    [
        ("batch_size", 0, "config.batch_size is 0; give at least 1"),
        ("grad_accum", -1, "config.grad_accum is -1; give at least 1"),
        ("data.crop", (64, 16), r"config.data.crop is \(64, 16\); give \(height, width\) of at least 32"),
        ("data.crop", ("a", "b"), r"config.data.crop is \('a', 'b'\); give whole numbers: height and width"),
        ("data.crop", (48.5, 48), r"config.data.crop is \(48.5, 48\); give whole numbers"),
        ("loss.class_weights", (), r"config.loss.class_weights is \(\); give numbers from 0, not all 0"),
        ("model.teacher.image_size", (0, 0), r"config.model.teacher.image_size is \(0, 0\); give whole numbers of at"),
        (
            "model.student.channels",
            (0, 8, 8, 8),
            r"config.model.student.channels is \(0, 8, 8, 8\); give whole numbers",
        ),
        ("model.teacher.taps", (True, 1, 2, 3), r"config.model.teacher.taps is \(True, 1, 2, 3\)"),
        ("optimizer.lr", float("inf"), "config.optimizer.lr is inf; give a number above 0"),
        ("checkpoint_every", -3, "config.checkpoint_every is -3; give at least 0"),
        ("data.source", "zip", "config.data.source is 'zip'; choose 'tfds' or 'folder'"),
        ("data.name", "gras", "unknown data set 'gras': known are grass, l8_biome, meadow"),
        ("loss.class_weights", (1.0, 2.0), "config.loss.class_weights has 2 values for 5 classes"),
        ("loss.kl_axis", "height", "config.loss.kl_axis is 'height'; choose one of width, channel, position"),
        ("ema", 1.5, "config.ema is 1.5; give a decay between 0 and 1"),
        ("model.fam", False, "config.distill needs the FAM"),
        ("clip_norm", -1.0, "config.clip_norm is -1.0; give a number above 0"),
        ("optimizer.student_lr_mult", -1.0, "config.optimizer.student_lr_mult is -1.0; give at least 0"),
        ("optimizer.b1", 1.5, "config.optimizer.b1 is 1.5; give a number from 0 to below 1"),
        ("data.flip", 7.0, "config.data.flip is 7.0; give a probability"),
        ("data.num_threads", -1, "config.data.num_threads is -1; give at least 0"),
        ("loss.temperature", 0.0, "config.loss.temperature is 0.0; give a number above 0"),
        ("data.zoom", (2.0, 1.0), r"config.data.zoom is .2.0, 1.0.; give .low, high., low first and above 0"),
        ("loss.dice", -1.0, "config.loss.dice is -1.0; give at least 0"),
        ("loss.hard_share", 1.0, "config.loss.hard_share is 1.0; give a share between 0 and 1"),
        ("loss.cross_entropy", 0.0, "config.loss.cross_entropy, dice, focal and lovasz are all 0, .* one of them w"),
        ("model.dropout", 1.0, "config.model.dropout is 1.0; give a number from 0 to below 1"),
        ("model.fmm.heads", 0, "config.model.fmm.heads is 0; give at least 1"),
        ("model.teacher.depth", 2, "config.model.teacher.depth is 2; give at least 4"),
        ("model.aux_channels", -1, "config.model.aux_channels is -1; give at least 0; 0 leaves"),
        ("data.bands", (0, 1, 2), r"config.data.bands is \(0, 1, 2\); give different band numbers, counted from 1"),
        ("data.rgb", (3, 2, 4), r"config.data.rgb is \(3, 2, 4\); give three of config.data.bands \(1, 2, 3\)"),
        ("data.scale", (3000, 0), r"config.data.scale is \(3000, 0\); give \(low, high\), or one such pair for each"),
        ("data.scale", ((0, 1), (0, 2)), "one such pair for each of the 3 bands"),
        ("data.label_map", ((128, 5),), "config.data.label_map turns 128 into 5; give a class from 0 to 4, or 255"),
        ("data.label_map", ((128, 0), ((0, 0, 0), 1)), "either whole numbers or .red, green, blue. triples, not both"),
        ("data.label_map", ((128, 0), (128, 1)), "config.data.label_map maps 128 twice; leave one of them"),
        ("data.label_map", ((1.5, 0),), "config.data.label_map maps 1.5; give a whole number, or a colour"),
        ("data.label_map", (((300, 0, 0), 0),), r"config.data.label_map maps \(300, 0, 0\); give a whole number, or"),
        ("data.label_map", ((0, "background"),), "config.data.label_map turns 0 into 'background'; give a class"),
        ("data.bands", (1, "b"), r"config.data.bands is \(1, 'b'\); give whole numbers or None"),
        ("data.scale", (0, "a"), r"config.data.scale is \(0, 'a'\); give \(low, high\)"),
        ("data.nodata", float("nan"), "config.data.nodata is nan; leave it None"),
        ("data.label_map", (128, 0), r"config.data.label_map is \(128, 0\); give \(\(stored value, class\), ...\)"),
    ],
)
def test_a_bad_value_is_named_with_what_would_do(setting, value, message):
    with pytest.raises(UserError, match=message):
        checks.resolve(tiny(**{setting: value}))


def test_an_unknown_head_is_named():
    with pytest.raises(UserError, match="config.model.head is 'fcn'; choose 'uper' or 'linear'"):
        model_of(Settings.of(tiny(**{"model.head": "fcn"})))


def test_every_config_passes_its_own_check():
    for name in ("grass", "grass:tiny", "cloud", "cloud:tiny,upstream", "custom", "custom:tiny", "demo", "demo:tiny"):
        file, _, argument = name.partition(":")
        config = runpy.run_path(str(runs.REPOSITORY / "configs" / f"{file}.py"))["get_config"](argument)
        assert len(checks.resolve(config).data.info.classes) >= 2


def test_own_classes_need_a_palette():
    config = tiny()
    with config.unlocked():
        config.data.classes, config.data.palette = ("a", "b"), ((0, 0, 0),)
    with pytest.raises(UserError, match="2 classes but 1 palette colours"):
        checks.resolve(config)


def test_colours_are_checked_before_a_figure_needs_them():
    config = tiny()
    with config.unlocked():
        config.data.classes, config.data.palette = ("a", "b"), ((0, 0, 0), (230, 180, 300))
    with pytest.raises(UserError, match=r"the colour of 'b' is \(230, 180, 300\); give red, green and blue"):
        checks.resolve(config)


def test_tiny_configs_take_a_preset():
    """Their own sizes are a preset too, so that another one replaces all of them."""
    config = runpy.run_path(str(runs.REPOSITORY / "configs" / "grass.py"))["get_config"]("tiny")
    config.update_from_flattened_dict({"model.teacher.preset": "small", "model.student.preset": "v2_atto"})
    built = KTDAConfig.from_dict({**config.model, "num_classes": 5})
    assert (built.teacher.width, built.teacher.depth) == (384, 12) and built.student.v2


def test_bands_and_their_colours():
    assert reading.bands_of(tiny().data) == (3, (0, 1, 2))
    assert reading.bands_of(tiny(**{"data.bands": (2, 3, 4, 8), "data.rgb": (4, 3, 2)}).data) == (4, (2, 1, 0))
    assert reading.bands_of(tiny(**{"data.bands": (8, 4, 3, 2)}).data) == (4, (0, 1, 2))
    assert reading.bands_of(tiny(**{"data.bands": (5,)}).data) == (1, (0, 0, 0))


def test_tfds_sets_are_read_as_they_are():
    with pytest.raises(UserError, match="config.data.bands, scale, nodata and label_map are for folders"):
        checks.resolve(tiny(**{"data.source": "tfds", "data.scale": (0, 9)}))


def test_float64_needs_x64():
    with pytest.raises(UserError, match="only with JAX_ENABLE_X64=1"):
        compute_dtype(tiny(dtype="float64").dtype)


def test_compute_dtype():
    assert compute_dtype(tiny().dtype) == jnp.float32  # auto, on CPU
    assert compute_dtype(tiny(dtype="bfloat16").dtype) == jnp.bfloat16
    with pytest.raises(UserError, match="config.dtype is 'half'; choose auto, float32 or bfloat16"):
        checks.resolve(tiny(dtype="half"))


def begun(workdir, config):
    """A workdir with a checkpoint."""
    (workdir / "checkpoints" / "3" / "state").mkdir(parents=True)
    records.write(workdir, Settings.of(config))
    return workdir


def test_the_saved_config_is_json_and_agrees_with_itself(tmp_path):
    records.compare(begun(tmp_path, tiny()), Settings.of(tiny()))
    assert json.loads((tmp_path / "config.json").read_text())["data"]["crop"] == [64, 64]


def test_another_computation_is_refused_and_told_apart(tmp_path):
    begun(tmp_path, tiny())
    with pytest.raises(UserError) as error:
        records.compare(tmp_path, Settings.of(tiny(seed=7, **{"model.head_channels": 32})))
    assert "model.head_channels (saved 16, now 32), seed (saved 42, now 7); use another" in str(error.value)


def test_how_it_runs_may_change(tmp_path):
    records.compare(
        begun(tmp_path, tiny()), Settings.of(tiny(log_every=7, **{"mesh.fsdp": 2, "data.root": "elsewhere"}))
    )


def test_a_workdir_without_a_checkpoint_binds_nobody(tmp_path):
    """A run that failed before its first checkpoint, on a learning rate say, can be started again in place."""
    begun(tmp_path, tiny())
    (tmp_path / "checkpoints" / "3" / "state").rmdir()  # an empty folder is no checkpoint
    records.compare(tmp_path, Settings.of(tiny(seed=7)))


def test_a_broken_saved_config_is_named(tmp_path):
    begun(tmp_path, tiny())
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON .*; use another --workdir"):
        records.compare(tmp_path, Settings.of(tiny()))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", "4", "config.batch_size is '4'; give a whole number: images of a step"),
        ("distill", "False", "config.distill is 'False'; give True or False"),
        ("data", 5, "config.data is 5; give its settings: the tiles"),
        ("sed", 1, "config.sed is not a setting; known: seed, "),
    ],
)
def test_what_no_flag_can_say_is_refused_in_a_mapping(key, value, message):
    with pytest.raises(UserError, match=message):
        Settings.of({**tiny().to_dict(), key: value})


def test_numbers_of_numpy_are_numbers():
    config = {**tiny().to_dict(), "clip_norm": np.float32(0.5), "batch_size": np.int64(4)}
    config["data"] = {**config["data"], "scale": np.array([0.0, 4000.0], np.float32)}
    settings = checks.resolve(config)
    assert (
        settings.data.scale == (0.0, 4000.0) and type(settings.clip_norm) is float and type(settings.batch_size) is int
    )


def test_what_older_versions_took_is_taken():
    """Whoever wrote these has workdirs of them."""
    settings = checks.resolve(tiny(checkpoint_every=0, clip_norm=float("inf")))
    assert settings.checkpoint_every == 0 and settings.clip_norm == float("inf")


@pytest.mark.parametrize("reader, jpeg, refused", [(None, True, False), ("1.0", True, False), (None, False, True)])
def test_other_pixels_are_other_data_unless_jpegs_were_decoded_by_another_version(tmp_path, reader, jpeg, refused):
    """Workdirs of versions that read JPEG through Pillow go on; GDAL's own versions differ, too."""
    (tmp_path / "run.json").write_text(json.dumps({"data": {"train": "a"}, "versions": {"rasterio": reader}}))
    assert records.compare_data(tmp_path, {"train": "a"}, jpeg=jpeg) is None
    if refused:
        with pytest.raises(UserError, match="the train data are not those that .* was begun with; use another"):
            records.compare_data(tmp_path, {"train": "b"}, jpeg=jpeg)
    else:
        line = records.compare_data(tmp_path, {"train": "b"}, jpeg=jpeg)
        assert f"decoded otherwise (rasterio was {reader or 'not used'} then); going on" in line
    now = importlib.metadata.version("rasterio")
    (tmp_path / "run.json").write_text(json.dumps({"data": {"train": "a"}, "versions": {"rasterio": now}}))
    with pytest.raises(UserError):
        records.compare_data(tmp_path, {"train": "b"}, jpeg=jpeg)


def test_alpha_bands_that_a_former_version_took_for_data_are_no_other_tiles(tmp_path):
    masked = dict(jpeg=False, may_hide=lambda: True)
    (tmp_path / "run.json").write_text(json.dumps({"data": {"train": "a"}, "versions": {}}))
    assert records.compare_data(tmp_path, {"train": "a"}, **masked) is None
    line = records.compare_data(tmp_path, {"train": "b"}, **masked)
    assert line.endswith("was begun with, or an alpha band or a mask of theirs was not heeded then; going on")
    with pytest.raises(UserError, match="use another --workdir, or the former data"):
        records.compare_data(tmp_path, {"train": "b"}, jpeg=False, may_hide=lambda: False)
    records.write_run(tmp_path, runs.settings("unused"), {"train": "a"})  # by this version
    with pytest.raises(UserError, match="use another --workdir, or the former data"):
        records.compare_data(tmp_path, {"train": "b"}, **masked)


def test_classes_and_paths_as_one_gives_them_on_a_command_line():
    for text in ("a,b c, d", "('a', 'b c', \"d\")", "[a,b c,d]"):
        assert listed(text) == ("a", "b c", "d")
    data = dataclasses.replace(Settings.of(tiny()).data, classes="a,b,c")
    assert data.info.classes == ("a", "b", "c") and len(set(data.info.palette)) == 3
    with pytest.raises(UserError, match="classes names a twice"):
        _ = dataclasses.replace(data, classes="a,b,a").info
