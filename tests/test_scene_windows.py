"""Windows of images without labels: where they lie, what is read of them, which are held out."""

import concurrent.futures
import pickle

import numpy as np
import pytest
from PIL import Image
from scene_files import smooth, write
from test_gdal import save_turned
from test_images import error_of

from ktda_jax.data import pipeline, scene_windows
from ktda_jax.data.images import read_bands, read_image
from ktda_jax.data.scene_windows import Axis
from ktda_jax.data.unlabelled import open_unlabelled

STORED = {
    "tiled.tif": lambda p: write(p, smooth(150, 200), tiled=True, blockxsize=64, blockysize=32),
    "striped.tif": lambda p: write(p, smooth(150, 200), blockysize=7),
    "deflate.tif": lambda p: write(p, smooth(150, 200), compress="deflate", interleave="band"),
    "a.png": lambda p: Image.fromarray(smooth(150, 200)).save(p),
    "palette.png": lambda p: Image.fromarray(smooth(150, 200)).quantize(20).save(p),
    "grey.png": lambda p: Image.fromarray(smooth(150, 200)[..., 0]).save(p),
    "a.jpg": lambda p: Image.fromarray(smooth(150, 200)).save(p, quality=90),
    "progressive.jpg": lambda p: Image.fromarray(smooth(150, 200)).save(p, quality=90, progressive=True),
}


def place(window) -> tuple[int, int]:
    return tuple(map(int, window["name"].rsplit(" @ ", 1)[1].split(",")))


def starts(source, draws=0) -> list[tuple[int, int]]:
    """Of all fixed windows, or of so many drawn of each."""
    if not draws:
        return [place(source[k]) for k in range(len(source))]
    return [place(source.draw(k, np.random.default_rng([k, n]))) for k in range(len(source)) for n in range(draws)]


def scene(path, height=150, width=200, seed=0, **profile):
    return str(write(path, smooth(height, width, seed=seed) | 1, **profile))  # nothing is black


@pytest.mark.parametrize("name", STORED)
def test_windows_are_cut_from_what_training_reads_of_a_tile(tmp_path, name):
    STORED[name](tmp_path / name)
    source, summary = open_unlabelled([str(tmp_path / name)], crop=64)
    whole = read_image(str(tmp_path / name))
    assert summary.windows == len(source) == 6 and summary.files == 1 and not summary.warnings
    assert starts(source) == [(0, 0), (0, 68), (0, 136), (86, 0), (86, 68), (86, 136)]
    for k in range(6):
        for window in (source[k], source.draw(k, np.random.default_rng(k))):
            row, column = place(window)
            assert window["name"].startswith(f"{name} @ ")
            assert window["label"].shape == (64, 64) and (window["label"] == 255).all()
            assert window["image"].dtype == np.uint8 and window["image"].flags.c_contiguous
            np.testing.assert_array_equal(window["image"], whole[row : row + 64, column : column + 64])
    assert source.bands == 3 and source.crop == source.label_size(0) == (64, 64)
    assert source.describe(1) == f"{tmp_path / name} @ 0,68"


def test_summary_is_of_the_fixed_windows(tmp_path):
    scene(tmp_path / "a.tif", 128, 128)
    source, summary = open_unlabelled([str(tmp_path / "a.tif")], crop=(64, 128))
    values = read_image(str(tmp_path / "a.tif")).reshape(-1, 3).astype(float)
    np.testing.assert_allclose(summary.mean, values.mean(0))
    np.testing.assert_allclose(summary.std, values.std(0))
    assert summary.saturated == pytest.approx(np.isin(values, (0, 255)).mean())
    assert len(source) == 2 and source[0]["image"].shape == (64, 128, 3)


@pytest.mark.parametrize("length", [64, 65, 95, 97, 160, 200, 1000, 1003])
def test_places_along_an_axis(length):
    """The shares of the windows are all places, once each, and about equally many."""
    count = max(1, round(length / 64))
    axis = Axis(0, length - 64, count)
    fixed = [axis.fixed(k) for k in range(count)]
    assert fixed == sorted(set(fixed)) and fixed[0] + fixed[-1] in (length - 64, length - 65)  # one: in the middle
    assert count == 1 or (fixed[0], fixed[-1]) == (0, length - 64)

    class Ends:
        def __init__(self):
            self.seen = []

        def integers(self, low, high):
            self.seen.append((low, high))
            return low

    ends = Ends()
    for k in range(count):
        axis.drawn(k, ends)
    assert ends.seen[0][0] == 0 and ends.seen[-1][1] == length - 63
    assert all(first[1] == second[0] for first, second in zip(ends.seen, ends.seen[1:], strict=False))
    sizes = [high - low for low, high in ends.seen]
    assert max(sizes) - min(sizes) <= 1


def test_drawn_windows_cover_the_image_and_nothing_else(tmp_path):
    source, _ = open_unlabelled([scene(tmp_path / "a.tif", 40, 44)], crop=16)
    drawn = starts(source, 300)
    assert {row for row, _ in drawn} == set(range(25)) and {column for _, column in drawn} == set(range(29))
    counts = np.bincount([row for row, _ in drawn], minlength=25)
    assert counts.min() > counts.mean() / 2 and counts.max() < counts.mean() * 2
    one, two = (source.draw(3, np.random.default_rng(5)) for _ in range(2))
    assert one["name"] == two["name"]


@pytest.mark.parametrize("height", [160, 167, 200, 131, 96])
def test_the_lowest_tenth_is_held_out_and_shares_no_pixel(tmp_path, height):
    path = scene(tmp_path / "a.tif", height, 70)
    (out, _), (rest, _), (every, _) = (open_unlabelled([path], crop=32, held_out=held) for held in (True, False, None))
    assert len(out) == 2 and len(out) + len(rest) == len(every)
    assert min(starts(out)) == (height - 32, 0) and set(starts(out, 20)) <= {(height - 32, k) for k in range(39)}
    below = [row + 32 for row, _ in starts(rest) + starts(rest, 100)]
    assert max(below) <= height - 32
    assert max(below) > height - 36  # and nothing is wasted


def test_a_tenth_of_many_rows_is_more_than_one(tmp_path):
    path = scene(tmp_path / "a.tif", 16 * 30, 20)
    out, _ = open_unlabelled([path], crop=16, held_out=True)
    rest, _ = open_unlabelled([path], crop=16, held_out=False)
    assert [row for row, _ in starts(out)] == [432, 448, 464]
    assert len(rest) == 27 and max(row for row, _ in starts(rest, 40)) == 416


def test_of_ten_files_every_tenth_is_held_out(tmp_path):
    for k in range(21):
        scene(tmp_path / f"{k:02}.tif", 40, 20, seed=k)
    names = []
    for held in (True, False):
        source, summary = open_unlabelled([str(tmp_path)], crop=16, held_out=held)
        names.append({source[k]["name"].split(" @ ")[0] for k in range(len(source))})
        assert summary.files == len(names[-1])
    assert names[0] == {"09.tif", "19.tif"} and len(names[1]) == 19 and not names[0] & names[1]


def test_of_images_that_cannot_be_divided_the_last_is_held_out(tmp_path):
    """Also where two rows of windows overlap: the one would hold pixels of the other."""
    for k in range(3):
        scene(tmp_path / f"{k}.tif", (20, 31, 16)[k], 40)
    out, _ = open_unlabelled([str(tmp_path)], crop=16, held_out=True)
    rest, _ = open_unlabelled([str(tmp_path)], crop=16, held_out=False)
    assert {out[k]["name"][:5] for k in range(len(out))} == {"2.tif"}
    assert {rest[k]["name"][:5] for k in range(len(rest))} == {"0.tif", "1.tif"}
    for held in (True, False):
        text = error_of(open_unlabelled, [str(tmp_path / "1.tif")], crop=16, held_out=held)
        assert f"{tmp_path}/1.tif has 31 rows of pixels" in text and "config.data.unlabelled_val" in text
    scene(tmp_path / "3.tif", 32, 40)  # this one can
    out, _ = open_unlabelled([str(tmp_path)], crop=16, held_out=True)
    assert {out[k]["name"].split(",")[0] for k in range(len(out))} == {"3.tif @ 16"}


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_bands_of_sensors(tmp_path, kind):
    values = np.random.default_rng(0).integers(1, 4000, (60, 80, 6)).astype(kind)
    path = str(write(tmp_path / "a.tif", values, compress="deflate"))
    reading = dict(bands=(4, 3, 6, 1), scale=((0, 3000), (0, 3000), (100, 4000), (0, 4000)), nodata=77)
    source, summary = open_unlabelled([path], crop=32, **reading)
    whole, _ = read_bands(path, *reading.values())
    assert source.bands == 4 and summary.mean.shape == (4,)
    for k in range(len(source)):
        window = source.draw(k, np.random.default_rng(k))
        row, column = place(window)
        np.testing.assert_array_equal(window["image"], whole[row : row + 32, column : column + 32])
    alone, _ = open_unlabelled([path], crop=32, bands=(2,), scale=(0, 4000))
    assert alone[0]["image"].shape == (32, 32, 1)


@pytest.mark.parametrize("how", ["declared", "configured", "black", "alpha", "mask"])
def test_windows_without_data(tmp_path, how, monkeypatch):
    """A corner without data: its window is left out, and drawn windows are never mostly of it."""
    values = smooth(96, 96) | 1
    values[:48, :40] = 0 if how == "black" else 9
    profile = dict(nodata=9) if how == "declared" else {}
    if how == "alpha":
        alpha = np.full((96, 96, 1), 255, np.uint8)
        alpha[:48, :40] = 0
        values, profile = np.concatenate([values, alpha], -1), dict(photometric="RGB", alpha="yes")
    if how == "mask":
        import rasterio

        monkeypatch.setenv("GDAL_TIFF_INTERNAL_MASK", "YES")
        path = str(write(tmp_path / "a.tif", values))
        with rasterio.open(path, "r+") as file:
            inside = np.ones((96, 96), bool)
            inside[:48, :40] = False
            file.write_mask(inside)
    else:
        path = str(write(tmp_path / "a.tif", values, **profile))
    source, summary = open_unlabelled([path], crop=32, nodata=9 if how == "configured" else None)
    assert (summary.windows, summary.empty, len(source)) == (8, 1, 8)  # (32, 0) has data in exactly half
    assert (0, 0) not in starts(source) and (32, 0) in starts(source)
    for row, column in starts(source, 100):
        assert np.clip(48 - row, 0, 32) * np.clip(40 - column, 0, 32) <= 512
    assert summary.mean.min() > 60  # of the pixels with data
    if how != "configured":
        np.testing.assert_array_equal(source[2]["image"], values[32:64, :32, :3])  # as stored


def test_a_file_without_data_is_named(tmp_path):
    scene(tmp_path / "a.tif")
    write(tmp_path / "b.tif", np.zeros((64, 64, 3), np.uint8))
    source, summary = open_unlabelled([str(tmp_path)], crop=64)
    assert len(source) == 6 and summary.empty == 1
    (line,) = summary.warnings
    assert (
        line.startswith("config.data.unlabelled: left out, without a window of 64 x 64 with data") and "b.tif" in line
    )
    text = error_of(open_unlabelled, [str(tmp_path / "b.tif")], crop=64)
    assert "none of the 1 windows of 64 x 64 has data in half of its pixels" in text and "b.tif" in text
    other_unit = write(tmp_path / "c.tif", np.random.default_rng(0).uniform(0.01, 1, (64, 64, 3)).astype(np.float32))
    text = error_of(open_unlabelled, [str(other_unit)], crop=64, scale=(100, 3000))
    assert "1 are 0 after config.data.scale=(100, 3000)" in text and "unit" in text


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg"])
def test_windows_of_an_image_that_lies_on_its_side(tmp_path, name, number):
    save_turned(tmp_path / name, smooth(50, 70), number)
    whole = read_image(str(tmp_path / name))
    source, _ = open_unlabelled([str(tmp_path / name)], crop=(24, 16))
    assert len(source) == (8 if number < 5 else 9)
    for k in range(len(source)):
        for window in (source[k], source.draw(k, np.random.default_rng(k))):
            row, column = place(window)
            np.testing.assert_array_equal(window["image"], whole[row : row + 24, column : column + 16])


def test_threads_and_pickles_read_the_same(tmp_path):
    """More files than a thread keeps open, and more threads than files."""
    for k in range(scene_windows.KEPT_OPEN + 3):
        scene(tmp_path / f"{k}.tif", seed=k, compress="deflate")
    Image.fromarray(smooth(150, 200)).save(tmp_path / "x.jpg")
    source, _ = open_unlabelled([str(tmp_path)], crop=64)
    alone = [source.draw(k, np.random.default_rng(k)) for k in range(len(source))]
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 20_000 and repr(copy) == repr(source) and str(tmp_path) not in repr(source)
    for each in (source, copy):
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for _ in range(3):
                drawn = pool.map(lambda k, each=each: each.draw(k, np.random.default_rng(k)), range(len(each)))
                for one, other in zip(alone, drawn, strict=True):
                    assert one["name"] == other["name"]
                    np.testing.assert_array_equal(one["image"], other["image"])


def test_files_are_kept_open_and_closed_again(tmp_path, monkeypatch):
    for k in range(6):
        scene(tmp_path / f"{k}.tif", 64, 64)
    source, _ = open_unlabelled([str(tmp_path)], crop=64)
    made = []
    monkeypatch.setattr(
        scene_windows, "open_file", lambda path, real=scene_windows.open_file: made.append(real(path)) or made[-1]
    )
    for k in (0, 1, 2, 3, 0, 0, 3, 1):
        source[k]
    assert len(made) == 4
    source[4], source[5]
    assert sum(not file.closed for file in made) == scene_windows.KEPT_OPEN


def test_evaluation_reads_windows(tmp_path):
    source, _ = open_unlabelled([scene(tmp_path / "a.tif")], crop=64)
    batches = pipeline.eval_batches(source, crop=None, batch_size=4, num_threads=2)
    names = [name for batch in batches for name in batch["name"]]
    assert batches.sizes == ((64, 64),) and names == [source[k]["name"] for k in range(6)] + ["", ""]
