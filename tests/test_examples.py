"""The scripts in examples/, run as a reader would run them, one after the other."""

import os
import subprocess
import sys

import numpy as np
import pytest
import runs
from PIL import Image

FOLDER = runs.REPOSITORY / "examples"


def example(name: str, *arguments) -> subprocess.CompletedProcess:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    command = [sys.executable, FOLDER / name, *map(str, arguments)]
    return subprocess.run(command, cwd=runs.REPOSITORY, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The first script's workdir: two classes, which brightness tells apart."""
    root, rng = tmp_path_factory.mktemp("tiles"), np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 2)):
        for number in range(count):
            label = np.kron(rng.integers(0, 2, (2, 2)), np.ones((32, 32))).astype(np.uint8)
            runs.write_tile(root, split, f"t{number}", label[..., None] * 150 + rng.integers(0, 60, (64, 64, 3)), label)
    workdir = root / "run"
    done = example("train_on_folder.py", root, workdir, "--tiny", "--steps=2", "--crop=64")
    assert done.returncode == 0, done.stderr
    assert f"the model is in {workdir}" in done.stdout
    return root, workdir


def test_train_then_use_in_python(trained, tmp_path):
    root, workdir = trained
    tile = root / "img_dir" / "val" / "t0.png"
    done = example("use_in_python.py", workdir, tile, tmp_path / "labels.png")
    assert done.returncode == 0, done.stderr
    drawn = Image.open(tmp_path / "labels.png")
    assert drawn.size == (64, 64) and drawn.mode == "P" and drawn.getpalette()[:6] == [60, 60, 60, 230, 180, 40]
    named = {line.split()[0] for line in done.stdout.splitlines()}
    assert named == {("background", "object")[k] for k in np.unique(drawn)}


def test_map_a_scene(trained, tmp_path):
    rasterio = pytest.importorskip("rasterio")
    scene = np.random.default_rng(0).integers(0, 256, (3, 100, 150), np.uint8)
    transform = rasterio.transform.from_origin(500_000, 4_000_000, 10, 10)
    form = dict(driver="GTiff", height=100, width=150, count=3, dtype="uint8", crs="EPSG:32633", transform=transform)
    with rasterio.open(tmp_path / "scene.tif", "w", **form) as file:
        file.write(scene)
    done = example("map_scene.py", trained[1], tmp_path / "scene.tif", tmp_path / "map.tif")
    assert done.returncode == 0, done.stderr
    with rasterio.open(tmp_path / "map.tif") as found:
        assert found.shape == (100, 150) and found.transform == transform and found.crs.to_epsg() == 32633
        assert set(np.unique(found.read(1))) <= {0, 1}
    assert "15,000 pixels" in done.stdout or ("background" in done.stdout and "object" in done.stdout)
    assert (tmp_path / "map_overlay.png").exists() and "map_overlay.png" in done.stdout


@pytest.mark.parametrize("name, count", [("train_on_folder.py", 2), ("use_in_python.py", 3)])
def test_what_is_not_there_is_one_line(tmp_path, name, count):
    done = example(name, *[tmp_path / "nowhere"] * count)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_they_are_short():
    assert {path.name for path in FOLDER.glob("*.py")} == {"train_on_folder.py", "map_scene.py", "use_in_python.py"}
    assert all(len(path.read_text().splitlines()) < 60 for path in FOLDER.glob("*.py"))
