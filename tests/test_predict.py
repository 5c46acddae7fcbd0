"""`python -m ktda_jax.predict`: a trained model and scenes give maps; what does not fit is said in one line."""

import pathlib
import re
import signal

import jax
import numpy as np
import pytest
import rasterio
import rasterio.shutil
import runs
import scene_files as sf
from PIL import Image

import ktda_jax
from ktda_jax import UserError, predict
from ktda_jax.config import workdir as records
from ktda_jax.config.settings import Settings
from ktda_jax.data.datasets import dataset_info
from ktda_jax.data.images import Reading
from ktda_jax.prediction import mapping, segmenter
from ktda_jax.tiling import blend, device
from ktda_jax.training.checkpoint import Checkpoints
from ktda_jax.training.program import build

TILES = pathlib.Path(__file__).parents[2] / "shared" / "real_samples" / "l8_biome_256"


def trained(workdir, **settings) -> pathlib.Path:
    """A workdir as a training leaves it, with random weights."""
    workdir.mkdir(exist_ok=True)
    config = runs.config(workdir, {k.replace("__", "."): v for k, v in settings.items()})
    program = build(Settings.of(config))
    records.write(workdir, Settings.of(config))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        checkpoints.save(1, runs.random_state(program), {}, {"mIoU": 1.0})
    return workdir


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(workdir):
    return ktda_jax.load_pretrained(workdir)


@pytest.fixture(scope="module")
def step(model):
    """Compiled once for all tests here."""
    return device.Step(device.of_segmenter(model), (64, 64), 8)


@pytest.fixture
def run(workdir, model, step, monkeypatch, tmp_path, capsys):
    """predict.run on a scene or folder; returns what it printed."""
    load = segmenter.load_pretrained
    known = {str(workdir): model}
    monkeypatch.setattr(segmenter, "load_pretrained", lambda path, **given: known.get(path) or load(path))
    monkeypatch.setattr(device, "Step", lambda model, tile, batch: step)

    def go(input, output="map.tif", checkpoint=workdir, **flags) -> str:
        predict.run(str(checkpoint), str(input), str(tmp_path / output), **flags)
        return capsys.readouterr().out

    return go


def test_a_scene_of_one_tile_is_what_the_model_says(run, model, tmp_path):
    values = sf.smooth(64, 64)
    path = sf.write(tmp_path / "scene.tif", values)
    said = run(path, probabilities=True)
    assert "1 scene, tiles of 64 x 64 overlapping by 16, 8 at once on 8 x cpu" in said
    assert f"{path}: 64 x 64 -> {tmp_path / 'map.tif'}" in said and "Mpixel/s" in said
    expected = model.predict(values)
    assert (sf.read(tmp_path / "map.tif") == expected.labels).mean() > 0.999
    found = sf.read(tmp_path / "map_probabilities.tif") / blend.CERTAIN
    np.testing.assert_allclose(found, np.moveaxis(expected.probabilities, -1, 0), atol=0.003)
    with rasterio.open(tmp_path / "map.tif") as file:
        info = dataset_info("grass")
        assert [file.colormap(1)[k][:3] for k in range(5)] == list(info.palette)
        assert [file.tags()[f"CLASS_{k}"] for k in range(5)] == list(info.classes)


def test_a_folder_and_what_is_there_already(run, tmp_path):
    folder = tmp_path / "scenes"
    folder.mkdir()
    sf.write(folder / "a.tif", sf.smooth(70, 90))
    Image.fromarray(sf.smooth(40, 300)).save(folder / "b.jpg")
    said = run(folder, "maps", overlay=True, view=True)
    assert {p.name for p in (tmp_path / "maps").iterdir()} == {
        "a.tif", "a.tif.aux.xml", "a_overlay.png", "a.html", "b.png", "b_overlay.png", "b.html",
    }  # fmt: skip
    assert sf.read(tmp_path / "maps" / "b.png").shape == (40, 300) and "2 scenes" in said
    (tmp_path / "maps" / "a.html").unlink()
    before = (tmp_path / "maps" / "b.png").stat().st_mtime_ns
    said = run(folder, "maps", overlay=True, view=True, skip_existing=True)
    assert "1 of 2 scenes are mapped already" in said and "a.tif" in said and "b.jpg" not in said
    assert (tmp_path / "maps" / "a.html").exists()
    assert (tmp_path / "maps" / "b.png").stat().st_mtime_ns == before
    assert "2 of 2 scenes are mapped already" in run(folder, "maps", overlay=True, skip_existing=True)


def test_bands_and_scale_are_those_of_the_training(tmp_path, run):
    """And others are a warning by name; a scene of another kind is an error before anything is computed."""
    four = trained(tmp_path / "four", data__bands=(4, 1, 2, 3), data__scale=(0, 3000))
    scene = sf.write(tmp_path / "rgb.tif", sf.smooth(64, 64))
    with pytest.raises(ValueError, match=r"rgb.tif has 3 band\(s\), and bands \(4, 1, 2, 3\) are wanted"):
        run(scene, checkpoint=four)
    deep = sf.write(tmp_path / "deep.tif", sf.smooth(64, 64, bands=5).astype(np.uint16) * 10)
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            mapping, "map_scenes", lambda scenes, *_, **__: seen.extend(scenes) or dict(pixels=1, seconds=1.0)
        )
        assert "warning" not in run(deep, checkpoint=four)
        said = run(deep, checkpoint=four, bands=[1, 2, 3, 5], scale=[0, 100])
        eight = run(sf.write(tmp_path / "eight.tif", sf.smooth(64, 64, bands=4)), checkpoint=four)
    assert seen[0].reading == Reading((4, 1, 2, 3), (0, 3000), None, by_band=True)
    assert seen[1].reading == Reading((1, 2, 3, 5), (0, 100), None, by_band=True)
    assert "warning: --bands is (1, 2, 3, 5), in training it was (4, 1, 2, 3)" in said
    assert "warning: --scale is (0, 100), in training it was (0, 3000)" in said
    assert re.search(r"warning: .*eight.tif: 8-bit values, and --scale reaches to more", eight)


def test_a_training_that_is_unknown_differs_from_nothing(run, model, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "data", None)
    scene = sf.write(tmp_path / "scene.tif", sf.smooth(64, 64))
    assert "warning" not in run(scene, bands=[3, 2, 1])


@pytest.mark.parametrize("error", [MemoryError(), jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GiB\nmore")])
def test_too_little_memory_is_one_line(run, tmp_path, monkeypatch, error):
    def short(*_, **__):
        raise error

    monkeypatch.setattr(mapping, "map_scenes", short)
    with pytest.raises(ValueError, match=r"^(out of memory|RESOURCE_EXHAUSTED: 9 GiB); a smaller --batch_size or") as e:
        run(sf.write(tmp_path / "scene.tif", sf.smooth(64, 64)))
    assert "\n" not in str(e.value)


def test_a_source_of_a_vrt_is_not_written_over(run, tmp_path):
    source = sf.write(tmp_path / "source.tif", sf.smooth(64, 64))
    rasterio.shutil.copy(source, tmp_path / "scene.vrt", driver="VRT")
    with pytest.raises(ValueError, match="source.tif would be written over what is read by the input .*scene.vrt"):
        run(tmp_path / "scene.vrt", "source.tif")


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(checkpoint="nowhere"), "nowhere"),
        (dict(input="nowhere.tif"), "there is no file --input=.*nowhere.tif"),
        (dict(output="scene.tif"), "scene.tif would be written over the input .*scene.tif"),
        (dict(output="map.jpg"), "must end in"),
        (dict(bands=[1, 2]), "--bands=1,2: the model takes 3 different bands"),
        (dict(scale=[5, 2]), "--scale=5,2: give LOW,HIGH with LOW below HIGH"),
        (dict(tile=16), "--tile is 16 x 16; give 32 to 2048 pixels"),
        (dict(overlap=40), "--overlap is 40; give 0 to half of the tile, 32 pixels"),
    ],
)
def test_flags_that_will_not_do(run, tmp_path, flags, message):
    sf.write(tmp_path / "scene.tif", sf.smooth(64, 64))
    with pytest.raises(ValueError, match=message):
        run(**{"input": tmp_path / flags.pop("input", "scene.tif"), **flags})
    assert [p.name for p in tmp_path.iterdir()] == ["scene.tif"]


def broken(path, *, at: float) -> pathlib.Path:
    """A scene of several rows of tiles of which only that share is there; it opens, and fails while it is read."""
    sf.write(path, sf.smooth(1400, 70, seed=3), blockysize=16)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * at)])
    return path


def test_the_rest_of_a_folder_is_mapped_though_some_files_are_broken(run, model, tmp_path, capsys):
    """Files that cannot be opened, or that end early; their neighbours share batches with them and are right."""
    folder, maps = tmp_path / "scenes", tmp_path / "maps"
    folder.mkdir()
    good = {name: sf.smooth(50 + 30 * k, 90, seed=k) for k, name in enumerate(("a", "c", "e", "g", "z"))}
    for name, values in good.items():
        sf.write(folder / f"{name}.tif", values)
        run(folder / f"{name}.tif", f"alone/{name}.tif")
    (folder / "b.tif").write_bytes(b"II*\0")
    broken(folder / "d.tif", at=0.5)
    broken(folder / "f.tif", at=0.95)
    sf.write(folder / "h.tif", sf.smooth(64, 64).astype(np.uint16))  # its scale is not known
    with pytest.raises(UserError) as caught:
        run(folder, "maps", overlay=True, confidence=True)
    first, *lines = str(caught.value).splitlines()
    assert first == "4 of 9 scenes could not be mapped:" and len(lines) == 4
    for name, line in zip("bhdf", lines, strict=True):
        assert str(folder / f"{name}.tif") in line
    said = capsys.readouterr().out
    assert "5 scenes" not in said and "7 scenes" in said and said.count("warning: left out: ") == 4
    assert {path.name.partition(".")[0].partition("_")[0] for path in maps.iterdir()} == set(good)
    for name in good:
        np.testing.assert_array_equal(sf.read(maps / f"{name}.tif"), sf.read(tmp_path / "alone" / f"{name}.tif"))

    with pytest.raises(UserError, match="4 of 4 scenes could not be mapped"):  # and again, only these are tried
        run(folder, "maps", overlay=True, confidence=True, skip_existing=True)


def test_what_none_of_the_scenes_allows_is_said_before_anything_is_computed(run, tmp_path, monkeypatch, capsys):
    for k in range(7):
        sf.write(tmp_path / f"{k}.tif", sf.smooth(64, 64).astype(np.uint16))
    monkeypatch.setattr(mapping, "map_scenes", None)
    with pytest.raises(
        UserError, match="7 of 7 scenes could not be mapped:\n.*0.tif holds uint16.*set --scale="
    ) as caught:
        run(tmp_path / "*.tif", "maps")
    assert str(caught.value).count("\n") == 7  # all are named
    assert "warning" not in capsys.readouterr().out

    monkeypatch.setattr(segmenter, "load_pretrained", None)
    for k in range(7):
        (tmp_path / f"{k}.tif").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"0\.tif"):
        run(tmp_path / "0.tif", "other/")
    with pytest.raises(UserError, match="7 of 7"):
        run(tmp_path / "*.tif", "other/")
    assert not (tmp_path / "other").exists()


def test_one_scene_that_ends_early_is_an_error_and_leaves_nothing(run, tmp_path):
    with pytest.raises(UserError, match=r"^cannot read .*d\.tif"):
        run(broken(tmp_path / "d.tif", at=0.5), "maps/", probabilities=True)
    assert not list((tmp_path / "maps").iterdir())


def test_what_an_error_demanded_is_no_warning(run, tmp_path, monkeypatch):
    monkeypatch.setattr(mapping, "map_scenes", lambda *_, **__: dict(pixels=1, seconds=1.0))
    deep = sf.write(tmp_path / "deep.tif", sf.smooth(64, 64).astype(np.uint16))
    with pytest.raises(UserError, match="set --scale=LOW,HIGH"):
        run(deep)
    assert "warning" not in run(deep, scale=[0, 3000])
    five = sf.write(tmp_path / "five.tif", sf.smooth(64, 64, bands=5))
    with pytest.raises(UserError, match="choose some with --bands, such as --bands=1,2,3"):
        run(five)
    assert "warning" not in run(five, bands=[3, 2, 1])
    plain = sf.write(tmp_path / "plain.tif", sf.smooth(64, 64))  # which needs neither
    said = run(plain, scale=[0, 200], bands=[3, 2, 1])
    assert "warning: --scale is (0, 200)" in said and "warning: --bands is (3, 2, 1)" in said
    assert "warning: --scale is (0, 200)" in run(tmp_path / "*[en].tif", "maps", scale=[0, 200], bands=[3, 2, 1])
    # What a warning of our own advises is none either.
    scaled = trained(tmp_path / "scaled", data__bands=(1, 2, 3), data__scale=(0, 3000))
    assert "then give --scale=0,255" in run(plain, checkpoint=scaled)
    assert "warning" not in run(plain, checkpoint=scaled, scale=[0, 255])


def test_without_rasterio(run, tmp_path, monkeypatch):
    sf.write(tmp_path / "scene.tif", sf.smooth(64, 64))
    monkeypatch.setitem(__import__("sys").modules, "rasterio", None)
    with pytest.raises(ValueError, match="takes rasterio .*; pip install rasterio"):
        run(tmp_path / "scene.tif")


def test_the_command_and_its_interruption(workdir, tmp_path):
    """Nothing is left of a map that was stopped; the same command without the signal makes it."""
    scene, maps = tmp_path / "scene.tif", tmp_path / "maps"
    sf.write(scene, np.tile(sf.smooth(500, 500), (8, 8, 1)), compress="deflate")
    flags = f"--checkpoint={workdir}", f"--input={scene}", f"--output={maps}/", "--overlay", "--cog"
    process = runs.start(*flags, verb="predict")
    runs.wait_for(lambda: any(maps.glob(".*.tmp.tif")), process)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 143 and err == "error: stopped by a signal\n"
    assert "tiles of 64 x 64" in out and not list(maps.iterdir())

    sf.write(scene, sf.smooth(150, 200))
    out, err = runs.finish(runs.start(*flags, verb="predict"))
    assert {p.name for p in maps.iterdir()} == {"scene.tif", "scene.tif.aux.xml", "scene_overlay.png"} and err == ""
    process = runs.start(*flags, "--bands=1,x,3", verb="predict")
    assert process.communicate()[1] == "error: --bands=1,x,3 is not a list of whole numbers\n"


@pytest.mark.skipif(not TILES.exists(), reason="the real tiles are not here")
def test_a_mosaic_of_real_tiles(run, model, tmp_path):
    """24 tiles of Landsat 8 as one scene in UTM: every tile's middle is mapped as the model maps it alone."""
    paths = sorted(TILES.glob("img_dir/*/*.png"))
    rows = [np.concatenate([np.asarray(Image.open(p).convert("RGB")) for p in paths[k : k + 6]], 1) for k in (0, 6, 12)]
    values = np.concatenate(rows)
    scene = sf.write(tmp_path / "mosaic.tif", values, tiled=True, compress="deflate")
    run(scene, overlay=True, confidence=True)
    with rasterio.open(tmp_path / "map.tif") as made:
        labels = made.read(1)
        assert made.crs == "EPSG:32633" and made.transform == sf.UTM and made.shape == (768, 1536)
        assert made.xy(100, 200) == (sf.UTM @ (200.5, 100.5))
    assert labels.max() < 5 and len(np.unique(labels)) > 1
    step = device.Step(device.of_segmenter(model), (64, 64), 8)
    # Tiles begin every 48 pixels; the middle 32 of each are its own.
    cut = [(48 * k, 48 * (2 * k + 1)) for k in range(8)]
    images = np.stack([np.moveaxis(values[y : y + 64, x : x + 64], -1, 0) for y, x in cut])
    ones = np.ones((8, 64), np.float32)
    alone = np.asarray(step(images, ones, ones)).argmax(1)
    for (y, x), expected in zip(cut, alone, strict=True):
        assert (labels[y + 16 : y + 48, x + 16 : x + 48] == expected[16:48, 16:48]).mean() > 0.999
    with Image.open(tmp_path / "map_overlay.png") as overlay:
        assert overlay.size == (1536, 768)
