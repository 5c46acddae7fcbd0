"""Images without labels: which are found, what identifies them, and the one line that says what is wrong."""

import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image
from scene_files import smooth, write
from test_images import error_of

from ktda_jax import UserError
from ktda_jax.data.unlabelled import UnlabelledSummary, compare, open_unlabelled
from ktda_jax.prediction import files


def scene(path, height=150, width=200, seed=0, **profile):
    return str(write(path, smooth(height, width, seed=seed) | 1, **profile))  # nothing is black


def test_fingerprint(tmp_path):
    """Of names and pixels: not of the place, the threads or the form of storage."""
    here, there = tmp_path / "here", tmp_path / "moved" / "there"
    here.mkdir()
    for k in range(3):
        scene(here / f"{k}.tif", seed=k)
    shutil.copytree(here, there)
    write(there / "0.tif", smooth(150, 200, seed=0) | 1, tiled=True, compress="deflate")
    prints = [
        open_unlabelled(paths, crop=64, num_threads=threads)[1].fingerprint
        for paths, threads in (
            ([str(here)], 1), ([str(here)], 5), ([f"{there}/*.tif"], 3),
            ([f"{there}/2.tif", f"{there}/1.tif", f"{there}/0.tif"], 2),
        )
    ]  # fmt: skip
    assert len(set(prints)) == 1
    values = smooth(150, 200, seed=2) | 1
    values[149, 199, 2] ^= 2
    write(there / "2.tif", values)
    assert open_unlabelled([str(there)], crop=64)[1].fingerprint != prints[0]
    (here / "2.tif").rename(here / "3.tif")
    assert open_unlabelled([str(here)], crop=64)[1].fingerprint != prints[0]
    assert open_unlabelled([str(here)], crop=32)[1].fingerprint != prints[0]


def test_which_files_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a/x.tif", "a/.hidden.tif", "a/deep/y.tif", "b/x.tif", "b/z.img"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        scene(tmp_path / name, 64, 64)
    (tmp_path / "a" / "notes.txt").write_text("text")
    (tmp_path / "a" / "folder.tif").mkdir()
    (tmp_path / "b" / "x.tif.aux.xml").write_text("<PAMDataset></PAMDataset>")
    (tmp_path / "a" / "again.tif").symlink_to(tmp_path / "a" / "x.tif")

    def names(*paths):
        source, summary = open_unlabelled(paths, crop=64)
        assert summary.files == len(source)
        return [source[k]["name"].removesuffix(" @ 0,0") for k in range(len(source))]

    assert names("~/a") == ["again.tif"]  # is x.tif
    assert names(str(tmp_path / "a" / "x.tif"), "~/a", f"{tmp_path}/a/../a/x.tif") == ["x.tif"]
    assert names("~/b/*") == ["x.tif", "z.img"]  # whatever GDAL opens
    assert [path.name for path in files.expand("~/a")] == ["again.tif", "x.tif"]  # so does prediction
    assert [path.name for path in files.expand("~/b/*")] == ["x.tif", "z.img"]
    assert names("~/b/z.img", "~/**/y.tif", "~/b/x.tif", "~/a/x.tif") == ["a/x.tif", "b/x.tif", "y.tif", "z.img"]


@pytest.mark.parametrize(
    "paths, wanted",
    [
        (["nowhere.tif"], "there is no file nowhere.tif of config.data.unlabelled"),
        (["x*.jpg"], "no file matches x*.jpg of config.data.unlabelled"),
        (["docs"], "no image in the folder docs of config.data.unlabelled; its files must end in .tif, .tiff, .png"),
        (["outer"], "name them"),
        (["tiles"], "is a folder of tiles and labels; name its images: tiles/img_dir/train"),
        ([], "config.data.unlabelled names nothing"),
    ],
)  # fmt: skip
def test_what_is_no_image(tmp_path, monkeypatch, paths, wanted):
    monkeypatch.chdir(tmp_path)
    for name in ("docs", "outer/inner", "tiles/img_dir/train"):
        pathlib.Path(name).mkdir(parents=True)
    pathlib.Path("docs/read.me").touch()
    assert wanted in error_of(open_unlabelled, paths, crop=64)


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    scene(tmp_path / "good.tif")
    for k in range(5):
        scene(tmp_path / f"small{k}.tif", 40, 300 + k % 2)
    write(tmp_path / "deep1.tif", np.ones((64, 64, 3), np.uint16))
    write(tmp_path / "six.tif", np.ones((64, 64, 6), np.uint8))
    (tmp_path / "web.png").write_text("<html>")
    whole = pathlib.Path(scene(tmp_path / "cut.tif", 128, 128, compress="deflate")).read_bytes()
    (tmp_path / "cut.tif").write_bytes(whole[: len(whole) // 2])
    text = error_of(open_unlabelled, [str(tmp_path)], crop=64)
    assert text.startswith("config.data.unlabelled (read as the tiles with labels are): ")
    for part in (
        "5 of 10 files have images that cannot be used", "small0.tif has only 40 x 300 pixels", "and 2 more",
        "the crop is 64 x 64: set a smaller config.data.crop, or leave them out",
        "deep1.tif holds uint16 from 1 to 1, not 8-bit values; set config.data.scale=(low, high)",
        "six.tif has 6 bands, of which none is named red, green or blue; choose some with config.data.bands",
        "2 of 10 files cannot be read: ", "web.png (", "cut.tif (", "repair or remove them",
    ):  # fmt: skip
        assert part in text, part
    assert text.count("/cut.tif") == 1

    source, summary = open_unlabelled([str(tmp_path)], crop=64, on_corrupt="skip")
    assert len(summary.warnings) == 4 and all("skipped: " in line for line in summary.warnings)
    read = {source[k]["name"].split(" @ ")[0] for k in range(len(source))}
    assert "good.tif" in read and read <= {"good.tif", "cut.tif"} and 6 <= len(source) < 10
    for k in range(len(source)):
        for n in range(20):
            source.draw(k, np.random.default_rng(n))  # what cannot be read is replaced
    assert "web.png" in error_of(open_unlabelled, [str(tmp_path / "web.png")], crop=64, on_corrupt="skip")


def test_other_bands_and_kinds(tmp_path):
    write(tmp_path / "a.tif", np.full((64, 64, 3), 9, np.uint8))
    text = error_of(open_unlabelled, [str(tmp_path)], crop=64, bands=(1, 5), scale=(0, 9))
    assert "a.tif has 3 band(s), and bands (1, 5) are wanted; set config.data.bands" in text
    text = error_of(open_unlabelled, [str(tmp_path)], crop=64, bands=(5,), setting="config.data.unlabelled_val")
    assert text.startswith("config.data.unlabelled_val (read as")


def summary(mean, std, saturated=0.0):
    return UnlabelledSummary(1, 1, 0, "", np.array(mean, float), np.array(std, float), saturated, [])


def test_images_of_another_range_are_refused_or_doubted():
    tiles = np.array([100.0, 110, 120]), np.array([40.0, 40, 40])
    assert compare(summary([120, 90, 150], [20, 30, 60], 0.4), *tiles, 0.01) == []
    assert compare(summary([120, 90, 150], [60, 60, 60], 0.99), *tiles, 0.95) == []  # so are the tiles
    text = error_of(compare, summary([250, 250, 250], [30, 30, 30], 0.98), *tiles, 0.01)
    assert "98% of the values are 0 or 255, and 1% of those of the tiles" in text and "config.data.bands, scale" in text
    text = error_of(compare, summary([3, 3, 4], [1, 2, 3]), *tiles, 0.01)
    assert "vary less than a tenth as much" in text and "1.0 2.0 3.0 and 40.0 40.0 40.0" in text
    (line,) = compare(summary([100, 110, 120], [40, 3, 40]), *tiles, 0.01)
    assert "the values of band 2 vary less than a tenth" in line
    (line,) = compare(summary([190, 110, 39], [40, 40, 40]), *tiles, 0.01)
    assert "the mean of band 1, 3 is more than 2 standard deviations away" in line and "\n" not in line
    with pytest.raises(UserError):
        compare(summary([3], [0]), [100], [30], 0)


def test_labels_in_place_of_images_are_refused(tmp_path):
    """A folder too many in a path: masks hold few values, of whatever kind they are."""
    labels = np.random.default_rng(0).integers(0, 6, (70, 90)).astype(np.uint8)
    labels[:9] = 255
    for kind in ("grey", "colour"):
        (tmp_path / kind).mkdir()
    Image.fromarray(labels).save(tmp_path / "grey" / "a.png")
    write(tmp_path / "colour" / "a.tif", np.stack([40 * labels, labels, labels // 2], -1))
    with pytest.raises(UserError, match="hold is the values 1, 2, 3, .* as if they were labels; name the images"):
        open_unlabelled([str(tmp_path / "grey")], crop=64)
    with pytest.raises(UserError, match="as if they were labels"):
        open_unlabelled([str(tmp_path / "colour")], crop=64)


def test_what_reads_slowly_is_named(tmp_path):
    """A window of a file in strips decodes them to the other end of the image, in one piece all of it."""
    wide = np.zeros((64, 300_000, 3), np.uint8)
    wide[..., ::2, :] = 9
    wide[:40, 0, 0] = range(40)  # more values than labels have
    write(tmp_path / "wide.tif", wide, compress="deflate", blockysize=32)
    _, seen = open_unlabelled([str(tmp_path / "wide.tif")], crop=(64, 60_000))
    assert seen.windows == 5 and seen.warnings == []
    _, seen = open_unlabelled([str(tmp_path / "wide.tif")], crop=64, num_threads=2)
    (line,) = seen.warnings
    assert "19.2 million pixels" in line and "wide.tif" in line and "gdal_translate -co TILED=YES" in line
    write(tmp_path / "wide.tif", wide, tiled=True, compress="deflate")
    assert open_unlabelled([str(tmp_path / "wide.tif")], crop=64, num_threads=2)[1].warnings == []
