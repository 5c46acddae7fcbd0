"""Scenes read in place behind URLs, from a real server that counts what it sends, and what goes wrong there."""

import json
import os
import pathlib
import re
import shutil
import zipfile

import numpy as np
import pytest
import range_server
import rasterio
import rasterio.shutil
import scene_files as sf
from PIL import Image
from test_images import error_of

from ktda_jax import UserError, evaluate, predict
from ktda_jax.data import addresses, buckets, remote, unlabelled
from ktda_jax.data.gdal import rasterio_for
from ktda_jax.data.images import Reading, read_image
from ktda_jax.data.paths import image, place
from ktda_jax.data.raster import open_scene

READING = Reading()
SIDE, BLOCK = 20_000, 512
CHUNK = 1 << 14  # bytes, of which GDAL asks for whole numbers around what is not a block of pixels


@pytest.fixture(scope="module", autouse=True)
def impatient():
    """As users may set it; before GDAL looks at it for the first time."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"LOW_SPEED_TIME": "1", "MAX_RETRY": "1", "RETRY_DELAY": "0.05"}.items():
            patch.setenv(f"GDAL_HTTP_{name}", value)
        yield


@pytest.fixture(scope="module")
def values():
    return sf.smooth(200, 300)


@pytest.fixture(scope="module")
def files(tmp_path_factory, values) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("files")
    sf.write(folder / "a.tif", values, tiled=True, blockxsize=64, blockysize=64)
    Image.fromarray(values).save(folder / "p.png")
    Image.fromarray(values).save(folder / "j.jpg")
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(values).save(folder / "turned.tif", exif=exif)
    (folder / "half.png").write_bytes((folder / "p.png").read_bytes()[:60_000])
    (folder / "half.tif").write_bytes((folder / "a.tif").read_bytes()[:100_000])
    with zipfile.ZipFile(folder / "scenes.zip", "w") as archive:
        archive.write(folder / "a.tif", "in/a.tif")
    return folder


@pytest.fixture(scope="module")
def server(files):
    with range_server.serving(files) as server:
        yield server


def pixels(address) -> np.ndarray:
    """uint8 (H, W, bands), all rows as prediction reads them."""
    scene = open_scene(image(str(address)), READING, 3)
    with scene.reader() as reader:
        parts = [reader.rows(top, min(top + 64, scene.height))[0].copy() for top in range(0, scene.height, 64)]
    return np.moveaxis(np.concatenate(parts, 1), 0, -1)


def test_a_large_cog_gives_what_its_windows_hold_and_no_more(tmp_path):
    """Header and tiles by the file's own table of them; the overviews, a third more, are never asked for."""
    plain, cog = tmp_path / "plain.tif", tmp_path / "cog.tif"
    profile = dict(driver="GTiff", height=SIDE, width=SIDE, count=1, dtype="uint8", crs="EPSG:32633", transform=sf.UTM)
    with rasterio.open(plain, "w", tiled=True, sparse_ok=True, blockxsize=BLOCK, blockysize=BLOCK, **profile) as file:
        noise = np.random.default_rng(0).integers(1, 256, (4 * BLOCK, 4 * BLOCK), np.uint8)
        file.write(noise, 1, window=rasterio.windows.Window(16 * BLOCK, 16 * BLOCK, *noise.shape))
    rasterio.shutil.copy(plain, cog, driver="COG", compress="deflate", sparse_ok=True, overview_resampling="nearest")
    sizes = {}  # bytes of each tile at full resolution
    with rasterio.open(cog) as file:
        assert file.overviews(1)[0] == 2
        for row in range(15, 21):
            for column in range(15, 21):
                size = file.get_tag_item(f"BLOCK_SIZE_{column}_{row}", "TIFF", bidx=1)
                sizes[row, column] = int(size or 0)
    held = sum(sizes.values())
    assert held > noise.size * 0.99 and cog.stat().st_size > 1.2 * held

    with range_server.serving(tmp_path) as server:
        address = f"{server.address}/cog.tif"
        with open_scene(addresses.parse(address), READING, 3).reader() as reader:
            header = server.taken()
            assert header <= 6 * CHUNK  # 1,600 tiles of 16 bytes each, and as many again in the overviews
            for row in range(14, 22):  # the others hold nothing
                rows = reader.rows(row * BLOCK, (row + 1) * BLOCK)[0]
                expected = noise[(row - 16) * BLOCK :][:BLOCK] if 16 <= row < 20 else 0
                assert (rows[0, :, 16 * BLOCK : 20 * BLOCK] == expected).all()
        assert held <= server.taken() <= held + 16 * CHUNK  # each tile once

        scene = open_scene(addresses.parse(address), READING, 3)
        crop = BLOCK, BLOCK
        found = unlabelled._look("cog", scene.path, READING, 3, crop)
        source = unlabelled.UnlabelledSource([found], np.zeros((1, 3), np.int32), READING, 3, crop, False)
        server.taken()
        window = source._read(found, 17 * BLOCK - 100, 17 * BLOCK - 100)[0]["image"]
        inside = slice(BLOCK - 100, 2 * BLOCK - 100)
        assert np.array_equal(window[..., 0], noise[inside, inside])
        touched = sum(sizes[row, column] for row in (16, 17) for column in (16, 17))
        assert server.taken() <= touched + 8 * CHUNK


def test_what_is_read_is_what_the_file_holds(server, files, values):
    for name in (
        "a.tif",
        "p.png",
        "j.jpg",
        "turned.tif",
        "signed/a.tif?sv=1&sig=se%2Fcret",
        "signed/p.png?sig=se%2Fcret",
    ):
        local = files / name.rpartition("/")[2].partition("?")[0]
        assert np.array_equal(pixels(f"{server.address}/{name}"), pixels(local)), name
    assert pixels(f"{server.address}/turned.tif").shape == (300, 200, 3)
    for archive in (files, f"/vsicurl/{server.address}"):
        assert np.array_equal(pixels(f"/vsizip/{archive}/scenes.zip/in/a.tif"), values)
    assert np.array_equal(read_image(f"{server.address}/p.png"), values)
    item = {"type": "Feature", "stac_version": "1.0.0", "assets": {"visual": {"href": f"{server.address}/a.tif"}}}
    (files / "item.json").write_text(json.dumps(item))
    href = json.loads((files / "item.json").read_text())["assets"]["visual"]["href"]
    server.taken()
    assert np.array_equal(pixels(href), values)
    asked = [line for line in server.requests if "a.tif" not in line.split()[1]]
    assert not asked, "something was looked for beside it"


FAULTS = {
    "none.tif": r"there is nothing at this address \(HTTP 404\); correct it",
    "403/a.tif": r"the server refuses \(HTTP 403\); sign the address anew, or give GDAL credentials",
    "signed/a.tif?sig=old&x=y": r"the server refuses \(HTTP 403\); sign the address anew",
    "503/a.tif": r"the server is not able to answer \(HTTP 503\); give it again when the server answers",
    "whole/a.tif": "the server gives no parts of files; download it, and give the file",
    "silent/a.tif": "the server is too slow; give it again when the server answers, or download it",
    "cut/a.tif": r"it did not come whole, or is damaged \(.*\); give it again, or download it and look",
    "half.tif": r"it did not come whole, or is damaged \(.*\); give it again, or download it and look",
    "cut/p.png": "it did not come whole, or is damaged",
    "half.png": "it did not come whole, or is damaged",
    "scenes.zip": "it is no image that GDAL knows; give the address of an image",
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_goes_wrong_is_one_line(server, name):
    line = error_of(pixels, f"{server.address}/{name}")
    shown = f"{server.address}/{name.partition('?')[0]}"
    assert re.match(f"cannot read {re.escape(shown)}: {FAULTS[name]}", line) and "old" not in line, line


def test_nobody_is_there():
    for host, words in (("127.0.0.1:1", "Failed to connect"), ("nobody.invalid", "Could not resolve host")):
        line = error_of(pixels, f"http://{host}/a.tif?sig=secret")
        assert (
            line.startswith(f"cannot read http://{host}/a.tif: cannot reach the server ({words}")
            and "secret" not in line
        )


def test_gdals_settings_are_for_what_is_remote_and_the_users_come_first(monkeypatch):
    signed, archive = addresses.parse("https://h/a.tif?sig=1"), addresses.parse("/vsizip/a.zip/a.tif")
    monkeypatch.setenv("GDAL_DISABLE_READDIR_ON_OPEN", "TRUE")  # ours
    ours = {"GDAL_NUM_THREADS": "1", "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"}
    assert remote.options(signed) == ours | {"CPL_VSIL_CURL_USE_HEAD": "NO"}
    assert remote.options(addresses.parse("s3://b/a.tif")) == ours
    assert remote.options(archive) == {}
    monkeypatch.setenv("GDAL_DISABLE_READDIR_ON_OPEN", "YES")
    monkeypatch.setenv("CPL_VSIL_CURL_USE_HEAD", "YES")
    assert remote.options(signed) == {"GDAL_NUM_THREADS": "1"}
    rasterio_for("x")
    assert os.environ["GDAL_HTTP_LOW_SPEED_TIME"] == "1"  # of this module, not our 30


# The verbs --------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(monkeypatch):
    """In place of a trained one: each pixel's brightest band."""
    sf.install(monkeypatch)


def test_what_can_be_mapped_is_and_no_signature_is_told(model, server, files, values, tmp_path, capsys):
    lines = [f"signed/{name}?sig=se%2Fcret" for name in ("a.tif", "p.png")] + ["403/x.tif?sig=old", "cut/half.tif"]
    (tmp_path / "list.txt").write_text("\n".join(f"{server.address}/{line}" for line in lines))
    maps = tmp_path / "maps"
    with pytest.raises(UserError) as caught:
        predict.run("x", str(tmp_path / "list.txt"), str(maps), overlay=True, view=True)
    assert str(caught.value).startswith("2 of 4 scenes could not be mapped:\n  cannot read ")
    pictures = {f"{name}{ending}" for name in "ap" for ending in (".html", "_overlay.png")}
    assert {path.name for path in maps.iterdir()} == {"a.tif", "a.tif.aux.xml", "p.png"} | pictures
    assert np.array_equal(sf.read(maps / "a.tif"), values.argmax(-1))
    said = capsys.readouterr().out + str(caught.value)
    assert f"{server.address}/signed/a.tif: 200 x 300 -> {maps / 'a.tif'}" in said
    stored = b"".join(path.read_bytes() for path in maps.iterdir())
    assert not any(word in said or word.encode() in stored for word in ("cret", "sig=", "=old"))
    server.taken()
    with pytest.raises(UserError, match="^2 of 2 scenes could not"):
        predict.run("x", str(tmp_path / "list.txt"), str(maps), overlay=True, skip_existing=True)
    assert not any("a.tif" in line or "p.png" in line for line in server.requests)


def test_of_several_processes_each_reads_its_own_scenes(model, server, files, tmp_path):
    """And of the others' their headers, to know who maps what."""
    size, paths = (files / "a.tif").stat().st_size, [files / "c.tif", files / "d.tif"]
    for path in paths:
        shutil.copy(files / "a.tif", path)
    (tmp_path / "list.txt").write_text("".join(f"{server.address}/{path.name}\n" for path in paths))
    server.taken()
    predict.run("x", str(tmp_path / "list.txt"), str(tmp_path / "maps"), process=(1, 2), coordinator="x:1")
    assert size <= server.taken() <= size + 4 * CHUNK
    assert {path.name for path in (tmp_path / "maps").glob("*.tif")} == {"d.tif"}


def test_images_and_a_label_behind_urls_are_scored(model, server, files, values, tmp_path, capsys):
    Image.fromarray(values.argmax(-1).astype(np.uint8)).save(files / "label.png")
    found = evaluate.run(
        "x", f"{server.address}/a.tif", f"{server.address}/label.png?sig=se%2Fcret", str(tmp_path / "s")
    )
    assert found.confusion.trace() == found.confusion.sum() == 60_000 and "cret" not in capsys.readouterr().out
    line = error_of(evaluate.run, "x", f"{server.address}/a.tif", str(files / "label.png"), "gs://bucket/x")
    assert line.startswith("gs://bucket/x is in a bucket, and this must be a local path")


def test_images_without_labels_are_read_behind_urls(server, files):
    ours, seen = unlabelled.open_unlabelled([f"{server.address}/signed/a.tif?sig=se%2Fcret"], crop=64)
    theirs, expected = unlabelled.open_unlabelled([str(files / "a.tif")], crop=64)
    assert seen.fingerprint == expected.fingerprint and len(ours) == len(theirs)
    assert ours[0]["name"] == "a.tif @ 0,0" and np.array_equal(ours[3]["image"], theirs[3]["image"])
    assert "cret" not in f"{ours!r} {ours.describe(0)} {ours.image_paths}"
    line = error_of(unlabelled.open_unlabelled, [f"{server.address}/cut/a.tif"], crop=64)
    assert f"1 of 1 files cannot be read: {server.address}/cut/a.tif (it did not come whole, or is damaged" in line
    same = [f"{server.address}/{name}" for name in ("a.tif", "signed/a.tif?sig=se%2Fcret")]
    source = unlabelled.open_unlabelled(same, crop=64)[0]
    assert {source[k]["name"].partition(" @ ")[0] for k in range(len(source))} == {"a.tif", "signed/a.tif"}


def test_scenes_of_a_bucket(bucket, model, files, values, tmp_path):
    for name in ("a.tif", "p.png"):
        buckets.upload(files / name, place(f"gs://bucket/scenes/{name}"))
    predict.run("x", "gs://bucket/scenes", str(tmp_path / "maps"))
    assert np.array_equal(sf.read(tmp_path / "maps/a.tif"), values.argmax(-1))
    predict.run("x", "gs://bucket/scenes/a.tif", str(tmp_path / "one.tif"))
    assert (tmp_path / "one.tif").read_bytes() == (tmp_path / "maps/a.tif").read_bytes()
    source = unlabelled.open_unlabelled(["gs://bucket/scenes/*.tif"], crop=64)[0]
    assert source[0]["name"] == "a.tif @ 0,0"
