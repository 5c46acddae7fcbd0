"""The published folders are found however they were downloaded and nothing unpacked stays, or one line says why not."""

import io
import os
import pathlib
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from data_builders import archives
from ktda_jax import UserError
from ktda_jax.data.check import check_split
from ktda_jax.data.sources import FolderSource
from ktda_jax.data.tfds_source import TfdsSource, prepare

DUMMY = {name: pathlib.Path(__file__).parent / name / "dummy_data" for name in ("grass", "l8_biome")}
CLASSES = {"grass": 5, "l8_biome": 4}


def pack(archive: pathlib.Path, folder: pathlib.Path, prefix: str = "", parts=("img_dir", "ann_dir")) -> pathlib.Path:
    """Archives `folder`'s `parts` below `prefix`, with the junk that macOS adds."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    files = {path: path.relative_to(folder) for part in parts for path in sorted((folder / part).rglob("*.*"))}
    junk = [f"__MACOSX/{prefix}img_dir/train/._1.tif", f"{prefix}img_dir/train/._1.tif", f"{prefix}.DS_Store"]
    if archive.suffix.lower() == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            for path, name in files.items():
                file.write(path, prefix + name.as_posix())
            for name in junk:
                file.writestr(name, b"junk")
    else:
        with tarfile.open(archive, "w:gz" if archive.suffix.lower() in (".gz", ".tgz") else "w") as file:
            for path, name in files.items():
                file.add(path, prefix + name.as_posix())
            for name in junk:
                file.addfile(tarfile.TarInfo(name), io.BytesIO())
    return archive


def _top(root):
    shutil.copytree(DUMMY["grass"], root)


def _deeper(root):
    for name, folder in DUMMY.items():
        shutil.copytree(folder, root / "data" / name)


def _junk_beside(root):
    _deeper(root)
    shutil.copytree(DUMMY["grass"], root / "__MACOSX" / "grass")


def _snapshot(root):
    """As huggingface_hub leaves it: the archives of both data sets, links to blobs."""
    for name, folder in DUMMY.items():
        blob = pack(root.parent / "blobs" / f"{name}.zip", folder, f"{name}/")
        (root / "snapshot").mkdir(parents=True, exist_ok=True)
        (root / "snapshot" / f"{name}.zip").symlink_to(blob)


def _two_parts(root):
    pack(root / "img_dir.zip", DUMMY["grass"], parts=("img_dir",))
    pack(root / "ann_dir.zip", DUMMY["grass"], parts=("ann_dir",))


def _two_parts_without_prefix(root):
    for part in ("img_dir", "ann_dir"):
        pack(root / "grass" / f"{part}.tar", DUMMY["grass"] / part, parts=("train", "val"))


def _one_archive_of_both(root):
    root.mkdir()
    with tarfile.open(root / "ktda-datasets.tgz", "w:gz") as file:
        for name, folder in DUMMY.items():
            file.add(folder, f"ktda/{name}")


LAYOUTS = [_top, _deeper, _junk_beside, _snapshot, _two_parts, _two_parts_without_prefix, _one_archive_of_both]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    layout(tmp_path / "download")
    before = sorted((tmp_path / "download").rglob("*"))
    folder = pathlib.Path(prepare("grass", tmp_path / "data", tmp_path / "download"))
    for split in ("train", "val"):
        ours = TfdsSource("grass", split, data_dir=tmp_path / "data", num_classes=5)
        theirs = FolderSource(DUMMY["grass"], split, num_classes=5)
        assert check_split(ours).fingerprint == check_split(theirs).fingerprint
    assert not [path for path in folder.iterdir() if path.is_dir()]  # what was unpacked is gone
    assert [path.name for path in folder.parent.iterdir()] == ["1.0.0"]
    assert sorted((tmp_path / "download").rglob("*")) == before


@pytest.mark.parametrize("suffix", archives.SUFFIXES)
@pytest.mark.parametrize("name", DUMMY)
def test_archive_forms(name, suffix, tmp_path):
    pack(tmp_path / "download" / f"{name.upper()}{suffix.upper()}", DUMMY[name], "some/folder/")
    prepare(name, tmp_path / "data", tmp_path / "download")
    for split in ("train", "val"):
        ours = TfdsSource(name, split, data_dir=tmp_path / "data", num_classes=CLASSES[name])
        theirs = FolderSource(DUMMY[name], split, num_classes=CLASSES[name])
        assert check_split(ours).fingerprint == check_split(theirs).fingerprint


def _truncated_zip(root):
    path = pack(root / "grass.zip", DUMMY["grass"])
    path.write_bytes(path.read_bytes()[:-200])
    return r"cannot unpack .*grass.zip: File is not a zip file; .*download it again"


def _truncated_gz(root):
    path = pack(root / "grass.tar.gz", DUMMY["grass"])
    path.write_bytes(path.read_bytes()[:2000])
    return r"cannot unpack .*grass.tar.gz: Compressed file ended .*download it again"


def _truncated_tar(root):
    path = pack(root / "grass.tar", DUMMY["grass"])
    path.write_bytes(path.read_bytes()[:3000])
    return r"cannot unpack .*grass.tar: it ends too early; .*download it again"


def _damaged_zip(root):
    path = pack(root / "grass.zip", DUMMY["grass"])
    data = bytearray(path.read_bytes())
    data[200:220] = bytes(20)
    path.write_bytes(data)
    return r"cannot unpack .*grass.zip: .*download it again"


def _pointer(root):
    root.mkdir()
    (root / "grass.tar.gz").write_text("version https://git-lfs.github.com/spec/v1\n")
    return r"cannot unpack .*grass.tar.gz: file could not be opened successfully; .*download it again"


def _no_folders(root):
    pack(root / "grass.zip", DUMMY["grass"], parts=())
    return r"no img_dir and no ann_dir of grass in .*archives \(.*grass.zip\): it holds grass.zip; give"


def _half(root):
    pack(root / "grass.zip", DUMMY["grass"], parts=("img_dir",))
    return r"no ann_dir of grass in .*grass.zip"


def _other_set(root):
    pack(root / "l8_biome.zip", DUMMY["l8_biome"])
    return r"no img_dir and no ann_dir of grass in .*archives of it: it holds l8_biome.zip"


def _other_folder(root):
    shutil.copytree(DUMMY["l8_biome"], root / "l8_biome")
    return r"no img_dir and no ann_dir of grass in .*it holds l8_biome;"


def _two_folders(root):
    for name in ("grass_v1", "grass_v2"):
        shutil.copytree(DUMMY["grass"], root / name)
    return r"several folders that may be grass: .*grass_v1, .*grass_v2; give"


def _two_archives(root):
    for name in ("grass.zip", "grass.tar"):
        pack(root / name, DUMMY["grass"], "grass/")
    return r"two candidates for grass: .*grass.tar/grass and .*grass.zip/grass both hold img_dir/train/1.tif; leave"


def _way_out(root):
    root.mkdir()
    with zipfile.ZipFile(root / "grass.zip", "w") as file:
        file.writestr("../img_dir/train/1.tif", b"")
    return r"'../img_dir/train/1.tif', a path that leads out of the archive"


def _bad_tile(root):
    copy = root.parent / "copy"
    shutil.copytree(DUMMY["grass"], copy)
    Image.fromarray(np.full((16, 16), 9, np.uint8)).save(copy / "ann_dir" / "val" / "4.png")
    pack(root / "grass.zip", copy)
    return r"ann_dir/val/4.png .values 9"


REFUSALS = [
    _truncated_zip,
    _truncated_gz,
    _truncated_tar,
    _damaged_zip,
    _pointer,
    _no_folders,
    _half,
    _other_set,
    _other_folder,
    _two_folders,
    _two_archives,
    _way_out,
    _bad_tile,
]


@pytest.mark.parametrize("damage", REFUSALS)
def test_refusals(damage, tmp_path):
    message = damage(tmp_path / "download")
    with pytest.raises(UserError, match=message) as error:
        prepare("grass", tmp_path / "data", tmp_path / "download")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "data").rglob("*"))


def test_many_tiles(tmp_path, monkeypatch):
    """Written file by file in the order of the names, not sorted by TFDS, which past 1 GB takes TensorFlow for it."""
    monkeypatch.setattr("tensorflow_datasets.core.shuffle.Shuffler", None)
    monkeypatch.setattr("data_builders.tiles.SHARD", 2)
    folder = pathlib.Path(prepare("grass", tmp_path, DUMMY["grass"]))
    assert [path.name for path in sorted(folder.glob("*train*"))] == [
        "grass-train.array_record-00000-of-00002",
        "grass-train.array_record-00001-of-00002",
    ]
    assert [tile["name"] for tile in TfdsSource("grass", "train", data_dir=tmp_path, num_classes=5)] == ["1", "2", "3"]


def test_small_disk(tmp_path, monkeypatch):
    pack(tmp_path / "download" / "grass.zip", DUMMY["grass"])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10))
    with pytest.raises(UserError, match=r"unpacking grass takes .* GB, but .* has 0.0 GB free: make room"):
        prepare("grass", tmp_path / "data", tmp_path / "download")


def test_links_in_archives_are_left_out(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as file:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
        file.addfile(tarfile.TarInfo("plain"), io.BytesIO())
    archives.unpack(tmp_path / "a.tar", lambda path: tmp_path / "out" / path)
    assert os.listdir(tmp_path / "out") == ["plain"]
