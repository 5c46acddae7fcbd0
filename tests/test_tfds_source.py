"""TfdsSource and prepare: exact pixels without TensorFlow, from threads and pickles, with clear refusals."""

import concurrent.futures
import json
import multiprocessing
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest

from data_builders.meadow import generate
from data_builders.meadow import meadow_dataset_builder as meadow_builder
from ktda_jax import UserError
from ktda_jax.data import tfds_source
from ktda_jax.data.check import check_split
from ktda_jax.data.datasets import DATASETS, DatasetInfo, dataset_info
from ktda_jax.data.sources import FolderSource
from ktda_jax.data.tfds_source import TfdsSource, prepare

REPO = pathlib.Path(__file__).parents[1]
SAMPLES = REPO.parent / "shared" / "real_samples"


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("tfds")
    prepare("meadow", path)
    return path


@pytest.fixture(scope="module")
def source(data_dir):
    return TfdsSource("meadow", "val", data_dir=data_dir, num_classes=5)


def test_pixels_are_those_of_the_generator(source):
    assert len(source) == 40
    for index in (0, 7, 39):
        tile, (image, label) = source[index], generate.generate_tile(0, index, split="val")
        assert tile["name"] == f"val_{index:04d}"
        assert tile["image"].dtype == tile["label"].dtype == np.uint8
        np.testing.assert_array_equal(tile["image"], image)
        np.testing.assert_array_equal(tile["label"], label)
        assert source.label_size(index) == label.shape


def test_order_and_iteration(source):
    assert [tile["name"] for tile in source] == [f"val_{i:04d}" for i in range(40)]
    with pytest.raises(IndexError, match="no tile 40"):
        source[40]


def test_threads_and_pickle(source):
    clone = pickle.loads(pickle.dumps(source))
    assert repr(clone) == repr(source) == "TfdsSource('meadow/1.0.0', 'val', tiles=40)"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for index, tile in zip([*range(40)] * 3, pool.map(clone.__getitem__, [*range(40)] * 3), strict=True):
            assert tile["name"] == f"val_{index:04d}"
    np.testing.assert_array_equal(clone[3]["image"], source[3]["image"])


def _name_of(source, index):
    return source[index]["name"]


def test_another_process_reads_it(source):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_name_of, (source, 5)) == "val_0005"


def test_slices_and_folders(data_dir):
    assert len(TfdsSource("meadow/1.0.0", "train[:25%]", data_dir=data_dir, num_classes=5)) == 40
    assert len(TfdsSource(data_dir / "meadow" / "1.0.0", "train", num_classes=5)) == 160
    assert len(TfdsSource(str(data_dir / "meadow"), "train", num_classes=5)) == 160


def test_highest_version_wins(data_dir, tmp_path):
    for version in ("1.9.0", "1.10.0", "junk"):
        (tmp_path / "grass" / version).mkdir(parents=True)
        (tmp_path / "grass" / version / "dataset_info.json").write_text("{}")
    assert tfds_source.find_built("grass", tmp_path).endswith("grass/1.10.0")


def test_default_data_dir(data_dir, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert prepare("meadow").startswith(str(data_dir))
    assert len(TfdsSource("meadow", "val", num_classes=5)) == 40


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no real samples")
@pytest.mark.parametrize(("name", "split"), [("grass", "train"), ("grass", "val"), ("l8_biome", "test")])
def test_real_tiles_equal_their_files(name, split, tmp_path):
    info = dataset_info(name)
    prepare(name, tmp_path, SAMPLES / name)
    built = TfdsSource(name, split, data_dir=tmp_path, num_classes=info.num_classes)
    files = FolderSource(SAMPLES / name, split, num_classes=info.num_classes)
    # The fingerprint is over names and pixels in order, so it says all; the loop says where.
    for ours, theirs in zip(built, files, strict=True):
        assert ours["name"] == theirs["name"]
        np.testing.assert_array_equal(ours["image"], theirs["image"])
        np.testing.assert_array_equal(ours["label"], theirs["label"])
    assert check_split(built).fingerprint == check_split(files).fingerprint


def test_not_built(tmp_path):
    with pytest.raises(UserError, match=r"not built.*python -m ktda_jax.data.tfds_source meadow --data_dir="):
        TfdsSource("meadow", "train", data_dir=tmp_path, num_classes=5)
    with pytest.raises(UserError, match="--manual_dir="):
        TfdsSource("grass", "train", data_dir=tmp_path, num_classes=5)


def test_unknown_name(data_dir):
    with pytest.raises(UserError, match=r"'medow' is not built.*holds meadow"):
        TfdsSource("medow", "train", data_dir=data_dir, num_classes=5)
    with pytest.raises(UserError, match="unknown data set 'medow': known are grass, l8_biome, meadow"):
        prepare("medow", data_dir)


def test_missing_split_and_wrong_classes(data_dir):
    with pytest.raises(UserError, match="no split 'test': it has train, val"):
        TfdsSource("meadow", "test", data_dir=data_dir, num_classes=5)
    with pytest.raises(UserError, match=r"5 classes .*the configuration 4"):
        TfdsSource("meadow", "train", data_dir=data_dir, num_classes=4)


def test_manual_dir(tmp_path):
    with pytest.raises(UserError, match="give manual_dir"):
        prepare("grass", tmp_path)
    with pytest.raises(UserError, match="is not a directory"):
        prepare("grass", tmp_path, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is empty: put the published img_dir and ann_dir, or their archives there"):
        prepare("grass", tmp_path / "data", tmp_path / "empty")
    assert not any((tmp_path / "empty").iterdir()) and not (tmp_path / "data").exists()


def test_the_data_dir_goes_before_the_working_directory(data_dir, tmp_path, monkeypatch):
    (tmp_path / "meadow" / "9.0.0").mkdir(parents=True)
    (tmp_path / "meadow" / "9.0.0" / "dataset_info.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert tfds_source.find_built("meadow", data_dir) == f"{data_dir}/meadow/1.0.0"
    assert tfds_source.find_built("meadow", tmp_path / "nothing") == "meadow/9.0.0"


def test_empty_folder_in_the_way(tmp_path):
    (tmp_path / "meadow" / "1.0.0").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no data set: remove it"):
        prepare("meadow", tmp_path)


def test_damaged_records(data_dir, tmp_path):
    folder = tmp_path / "meadow" / "1.0.0"
    folder.mkdir(parents=True)
    for file in (data_dir / "meadow" / "1.0.0").iterdir():
        data = file.read_bytes()
        (folder / file.name).write_bytes(data[: len(data) // 2] if "train" in file.name else data)
    with pytest.raises(UserError, match="train"):
        source = TfdsSource("meadow", "train", data_dir=tmp_path, num_classes=5)
        for index in range(len(source)):
            source[index]
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match="cannot read the data set"):
        TfdsSource("meadow", "val", data_dir=tmp_path, num_classes=5)


def test_two_builds_at_once(tmp_path, monkeypatch):
    """While one build is writing, another process finishes: the slower one takes over what is there."""
    monkeypatch.setattr(meadow_builder.Builder, "TILES", {"train": 2, "val": 1})
    encode_tile, results = meadow_builder.tiles.encode_tile, []

    def slow_tile(*args):
        monkeypatch.setattr(meadow_builder.tiles, "encode_tile", encode_tile)
        results.append(prepare("meadow", tmp_path))
        return encode_tile(*args)

    monkeypatch.setattr(meadow_builder.tiles, "encode_tile", slow_tile)
    results.append(prepare("meadow", tmp_path))
    assert results == [str(tmp_path / "meadow" / "1.0.0")] * 2
    assert [child.name for child in (tmp_path / "meadow").iterdir()] == ["1.0.0"]
    assert check_split(TfdsSource("meadow", "train", data_dir=tmp_path, num_classes=5)).tiles == 2


def test_command_line(data_dir, tmp_path, capsys):
    tfds_source.main(["meadow", f"--data_dir={data_dir}"])
    out, err = capsys.readouterr()
    assert out == f"{data_dir}/meadow/1.0.0\n" and err.startswith("it was there already")
    with pytest.raises(SystemExit, match="error: grass is not built"):
        tfds_source.main(["grass", f"--data_dir={tmp_path}"])


def test_needs_no_tensorflow_and_imports_tfds_late(tmp_path):
    code = f"""
import json, sys
from ktda_jax.data.tfds_source import TfdsSource, prepare
early = 'tensorflow_datasets' in sys.modules
from data_builders.meadow import meadow_dataset_builder
meadow_dataset_builder.Builder.TILES = {{'train': 1}}
prepare('meadow', {str(tmp_path)!r})
tile = TfdsSource('meadow', 'train', data_dir={str(tmp_path)!r}, num_classes=5)[0]
print(json.dumps([early, tile['image'].shape, [m for m in ('tensorflow', 'jax') if m in sys.modules]]))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout) == [False, [128, 128, 3], []]


def test_dataset_infos():
    for name, info in DATASETS.items():
        assert info.name == name
        assert info.license
        assert len(set(info.palette)) == info.num_classes
        np.testing.assert_array_equal(info.colours()[: info.num_classes], info.palette)
        assert not info.colours()[255].any()
    assert dataset_info("l8_biome/scenes/1.0.0") is DATASETS["l8_biome"]
    with pytest.raises(ValueError, match="unknown data set 'scenes/l8_biome'"):
        dataset_info("scenes/l8_biome")
    with pytest.raises(ValueError, match="2 classes but 1"):
        DatasetInfo("x", ("a", "b"), ((0, 0, 0),), 64, ("train",))
