"""The scripts in examples/, run as a reader would run them."""

import dataclasses
import os
import runpy
import subprocess
import sys
import types

import golden
import numpy as np
import pytest
import runs
from PIL import Image

import ktda_jax
from ktda_jax.data.datasets import dataset_info
from ktda_jax.weights import folder, sources

FOLDER = runs.REPOSITORY / "examples"


def example(name: str, *arguments) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "PYTHONPATH": str(runs.REPOSITORY),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": runs.xla_flags(1),
    }
    command = [sys.executable, FOLDER / name, *map(str, arguments)]
    return subprocess.run(command, cwd=runs.REPOSITORY, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder of weights with five classes."""
    found = sources.load(str(golden.GOLDENS / "grass_tiny.pth"), teacher_heads=2)
    info, path = dataset_info("grass"), tmp_path_factory.mktemp("weights") / "grass"
    folder.save(path, dataclasses.replace(found, classes=info.classes, palette=info.palette))
    return path


def test_use_in_python(model, tmp_path):
    known = golden.arrays("grass_tiny")
    tile = known["image_rgb_uint8"][0]
    Image.fromarray(tile).save(tmp_path / "tile.png")
    done = example("use_in_python.py", model, tmp_path / "tile.png", tmp_path / "labels.png")
    assert done.returncode == 0, done.stderr
    drawn, info = Image.open(tmp_path / "labels.png"), dataset_info("grass")
    assert drawn.mode == "P" and drawn.getpalette()[:15] == [value for colour in info.palette for value in colour]
    np.testing.assert_array_equal(np.asarray(drawn), known["eval/pred"][0])
    assert [line.split()[0] for line in done.stdout.splitlines()] == [info.classes[k] for k in np.unique(drawn)]


@pytest.mark.slow  # a minute of compiling
def test_train_on_a_folder(tmp_path):
    """Two classes, which brightness tells apart; what comes out is a model of them."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for number in range(count):
            label = np.kron(rng.integers(0, 2, (2, 2)), np.ones((32, 32))).astype(np.uint8)
            image = label[..., None] * 150 + rng.integers(0, 60, (64, 64, 3))
            runs.write_tile(tmp_path, split, f"t{number}", image, label)
    done = example("train_on_folder.py", tmp_path, tmp_path / "run", "--tiny", "--steps=2", "--crop=64")
    assert done.returncode == 0, done.stderr
    assert f"the model is in {tmp_path / 'run'}" in done.stdout
    assert ktda_jax.load_pretrained(tmp_path / "run").classes == ("background", "object")


@pytest.mark.slow  # test_predict.py has the verb's
def test_map_a_scene(model, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    pytest.importorskip("ktda_jax.predict")
    scene = np.random.default_rng(0).integers(0, 256, (3, 100, 150), np.uint8)
    transform = rasterio.transform.from_origin(500_000, 4_000_000, 10, 10)
    form = dict(driver="GTiff", height=100, width=150, count=3, dtype="uint8", crs="EPSG:32633", transform=transform)
    with rasterio.open(tmp_path / "scene.tif", "w", **form) as file:
        file.write(scene)
    done = example("map_scene.py", model, tmp_path / "scene.tif", tmp_path / "map.tif")
    assert done.returncode == 0, done.stderr
    with rasterio.open(tmp_path / "map.tif") as found:
        assert found.shape == (100, 150) and found.transform == transform and found.crs.to_epsg() == 32633
        labels, counts = np.unique(found.read(1), return_counts=True)
    names = dataset_info("grass").classes
    for label, count in zip(labels, counts, strict=True):
        assert f"{names[label]:24} {count:>14,} pixels" in done.stdout
    assert (tmp_path / "map_overlay.png").exists() and "map_overlay.png" in done.stdout


def test_what_is_not_there_or_cannot_be_saved_is_one_line(tmp_path, monkeypatch):
    def error(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["use_in_python.py", *map(str, arguments)])
        with pytest.raises(SystemExit, match="^error: ") as raised:
            runpy.run_path(FOLDER / "use_in_python.py", run_name="__main__")
        return str(raised.value)

    assert "nowhere" in error(*[tmp_path / "nowhere"] * 3)
    Image.new("RGB", (4, 4)).save(tmp_path / "tile.png")
    result = types.SimpleNamespace(labels=np.zeros((4, 4), np.uint8), probabilities=np.ones((4, 4, 1)))
    model = types.SimpleNamespace(classes=("a",), palette=None, predict=lambda image: result)
    monkeypatch.setattr(ktda_jax, "load_pretrained", lambda path: model)
    for name in ("labels.odd", "none/labels.png"):
        found = error("model", tmp_path / "tile.png", tmp_path / name)
        assert found.startswith(f"error: {tmp_path / name}: ") and "\n" not in found


def test_they_are_short():
    names = {"train_on_folder.py", "map_scene.py", "use_in_python.py"}
    names |= {"make_scene.py", "foreign_teacher.py"}  # of the tutorial; in test_foreign_teacher.py
    assert {path.name for path in FOLDER.glob("*.py")} == names
    assert all(len(path.read_text().splitlines()) < 60 for path in FOLDER.glob("*.py"))
