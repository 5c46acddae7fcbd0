"""Features that anybody has written: what is written is read, and cut with the tiles; what is wrong is a line."""

import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import runs

from ktda_jax import UserError
from ktda_jax.data import geometry
from ktda_jax.data.augment import Augmentation
from ktda_jax.data.foreign_features import ForeignFeatures
from ktda_jax.data.foreign_writer import ForeignWriter, view
from ktda_jax.data.pipeline import train_iterator
from ktda_jax.data.remembered import Checks

PATCH, NAMES, LEVELS = 16, ("a", "b", "c"), (0, 0, None, 1)
MADE = dict(name="somebody's", taps=("early", "late"), patch=PATCH)


class Tiles:
    """Three tiles of noise."""

    num_classes, bands = 3, 3

    def __init__(self, size):
        self.images = np.random.default_rng(0).integers(0, 256, (3, *size, 3), np.uint8)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": self.images[index, ..., 0] % 3, "name": NAMES[index]}


def corners(image):
    """A teacher that sees of every patch its upper left pixel: two taps."""
    seen = image[::PATCH, ::PATCH].astype(np.float32)
    return [seen, 2 * seen]


def write(folder, images, views=1, teach=corners, **options):
    with ForeignWriter(folder, **{**MADE, **options}, views=views) as writer:
        for name, image in zip(NAMES, images, strict=True):
            writer.write(name, *(teach(view(image, number)) for number in range(views)))
    return folder


def test_the_writer_needs_numpy_alone(tmp_path):
    """Imported, and copied to some other place."""
    path = runs.REPOSITORY / "ktda_jax" / "data" / "foreign_writer.py"
    (tmp_path / "copied.py").write_text(path.read_text())
    for module, place in (("ktda_jax.data.foreign_writer", runs.REPOSITORY), ("copied", tmp_path)):
        look = f"import sys, {module}; print([m for m in ('jax', 'flax', 'cv2', 'grain', 'torch') if m in sys.modules])"
        out = subprocess.run([sys.executable, "-c", look], cwd=place, capture_output=True, text=True)
        assert out.stdout.strip() == "[]", out.stderr


def test_its_views_are_those_of_training():
    image = np.random.default_rng(0).integers(0, 256, (6, 4, 3), np.uint8)
    for number in range(geometry.VIEWS):
        np.testing.assert_array_equal(view(image, number), geometry.view(image, number))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("views", [2, 8])
def test_what_is_written_is_read(tmp_path, dtype, views):
    tiles = Tiles((64, 96))
    features = ForeignFeatures(write(tmp_path / "f", tiles.images, views, dtype=dtype), NAMES[::-1], LEVELS)
    assert (len(features), features.patch, features.views, features.levels) == (3, PATCH, views, list(LEVELS))
    assert features.source == "somebody's (3 channels; the levels learn from early, early, none, late)"
    for reader in (features, pickle.loads(pickle.dumps(features))):
        for index in range(3):
            for number in range(views):
                found = reader.read(index, number)
                assert found.dtype == dtype
                np.testing.assert_array_equal(found, corners(view(tiles.images[2 - index], number)))
        np.testing.assert_array_equal(reader.read(0, False), reader.read(0, 0))  # as reports ask for it
    told = json.loads((tmp_path / "f" / "manifest.json").read_text())
    assert told["grid"] == [4, 6] and told["width"] == 3 and list(told["files"]) == list(NAMES)


def test_of_one_view_the_others_are_made(tmp_path):
    """Of maps that are even over their patch they are exact."""
    tiles = Tiles((64, 64))
    tiles.images = np.kron(tiles.images[:, ::PATCH, ::PATCH], np.ones((1, PATCH, PATCH, 1), np.uint8))
    features = ForeignFeatures(write(tmp_path / "f", tiles.images), NAMES, LEVELS)
    assert features.views == 8
    for number in range(8):
        np.testing.assert_array_equal(features.read(1, number), corners(view(tiles.images[1], number)))


@pytest.mark.parametrize("how", [{}, {"rotate": True, "cutmix": 0.5}])
def test_crops_take_their_window(tmp_path, how):
    tiles = Tiles((80, 96))
    features = ForeignFeatures(write(tmp_path / "f", tiles.images, 8), NAMES, LEVELS)
    features.check([(80, 96)] * 3)
    augmentation = dataclasses.replace(Augmentation((48, 48), photometric=False), **how)
    iterator = train_iterator(tiles, augmentation=augmentation, batch_size=4, seed=0, features=features)
    for _ in range(6):
        batch = next(iterator)
        assert batch["taps"][2] is None and batch["taps"][0].shape == (4, 3, 3, 3)
        for row, image in enumerate(batch["image"]):
            for level, tap in ((0, 0), (1, 0), (3, 1)):
                np.testing.assert_array_equal(batch["taps"][level][row], corners(image)[tap])


def test_whole_tiles_need_no_patch(tmp_path):
    """5 x 5 tokens of 64 px, as of a teacher that resizes what it is given."""

    def means(image):
        return [image[::13, ::13], image[::13, ::13] / 2]

    tiles = Tiles((64, 64))
    lying = ForeignFeatures(write(tmp_path / "lying", Tiles((64, 90)).images, 8, means, patch=None), NAMES, LEVELS)
    assert lying.check([(64, 90)] * 3) and lying.manifest.grid == (5, 7)  # of turned views 7 x 5
    features = ForeignFeatures(write(tmp_path / "f", tiles.images, 8, means, patch=None), NAMES, LEVELS)
    features.check([(64, 64)] * 3)
    augmentation = Augmentation((64, 64), photometric=False, rotate=True)
    batch = next(train_iterator(tiles, augmentation=augmentation, batch_size=8, seed=0, features=features))
    for row, image in enumerate(batch["image"]):
        np.testing.assert_array_equal(batch["taps"][3][row], means(image)[1])


@pytest.mark.parametrize(
    "calls, message",
    [
        ([("a", [np.ones((2, 3, 4))] * 3)], r"a, view 0: 3 tap\(s\), not the 2 that were named"),
        ([("a", [np.ones((2, 3, 4)), np.ones((2, 3, 5))])], r"a, view 0: maps of the shapes .*give \(h, w, C\)"),
        ([("a", [np.ones((6, 4))] * 2)], r"maps of the shapes \[\(6, 4\), \(6, 4\)\]"),
        ([("a", [np.ones((2, 3, 4))] * 2), ("b", [np.ones((2, 3, 5))] * 2)], "b, view 0: 5 channels, the .* have 4"),
        ([("a", [np.full((2, 3, 4), 1e6)] * 2)], "too large for float16; set dtype='float32'"),
        ([("a", [np.full((2, 3, 4), np.nan)] * 2)], "a, view 0: NaN or infinite"),
        ([("train/a", [np.ones((2, 3, 4))] * 2)], "'train/a'; give the name of its file without folder"),
        ([("a", [np.ones((2, 3, 4))] * 2)] * 2, "a was written already"),
        ([("a", [np.ones((2, 3, 4))] * 2, [np.ones((2, 3, 4))] * 2)], r"a: 2 view\(s\), not the 1 that were promised"),
        ([], "no tile was written"),
    ],
)
def test_what_cannot_be_written(tmp_path, calls, message):
    with pytest.raises(ValueError, match=message) as error, ForeignWriter(tmp_path / "f", **MADE) as writer:
        for call in calls:
            writer.write(*call)
    assert "\n" not in str(error.value) and not (tmp_path / "f" / "manifest.json").exists()


def test_nothing_is_overwritten(tmp_path):
    write(tmp_path / "f", Tiles((64, 64)).images)
    with pytest.raises(ValueError, match="f holds features already; choose another folder, or remove it"):
        ForeignWriter(tmp_path / "f", **MADE)
    for wrong in (dict(views=3), dict(dtype="bfloat16"), dict(patch=0), dict(taps=())):
        with pytest.raises(ValueError, match="give|name"):
            ForeignWriter(tmp_path / "g", **{**MADE, **wrong})


def changed(folder, **values):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def rewritten(folder, name="b", **arrays):
    """A file anew, as long as the manifest says."""
    np.savez(folder / f"{name}.npz", **arrays)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    changed(folder, files={**files, name: (folder / f"{name}.npz").stat().st_size})


GOOD = np.zeros((2, 4, 4, 3), np.float16)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda f: (f / "b.npz").unlink(), "1 of 3 files: b.npz is not there: write them again"),
        (
            lambda f: (f / "b.npz").write_bytes((f / "b.npz").read_bytes()[:-9]),
            "b.npz has .* bytes, not the .* written",
        ),
        (lambda f: rewritten(f, view0=GOOD[:1]), r"b.npz: view0 has 1 tap\(s\), not 2"),
        (lambda f: rewritten(f, view0=GOOD[..., :2]), "b.npz: view0 has 2 channels, not 3"),
        (lambda f: rewritten(f, view0=GOOD[0]), r"b.npz: view0 has the shape \(4, 4, 3\), not \(taps, h, w, C\)"),
        (lambda f: rewritten(f, view0=GOOD.astype(np.float64)), "b.npz: view0 is float64, not float16"),
        (lambda f: rewritten(f, view0=np.array([{}])), "b.npz: view0 is object, not float16"),
        (lambda f: rewritten(f, view1=GOOD), r"b.npz has no view0, and 1 view\(s\) are promised"),
        (
            lambda f: rewritten(f, view0=GOOD[:, :3, :3]),
            r"view0 has 3x3 tokens, and a tile of 64x64 px, in patches of 16 px, has 4x4 \(made from crops, or",
        ),
        (lambda f: (f / "manifest.json").unlink(), r"no teacher features in .*f \(no manifest.json\)"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot read .*manifest.json"),
        (lambda f: changed(f, format="foreign-2"), "have format foreign-2, not foreign-1"),
        (lambda f: changed(f, views=3), "cannot read .*manifest.json: its views cannot be"),
        (lambda f: changed(f, width="3"), "its width, patch or grid cannot be"),
        (lambda f: changed(f, patch=None, grid=None), "its patch and grid, which are both null, cannot be"),
        (lambda f: changed(f, dtype="bfloat16"), "its dtype cannot be"),
        (lambda f: changed(f, taps="late"), "its taps cannot be"),
        (lambda f: changed(f, files={"a": 1}), "lack 2 of 3 tiles: b, c; they hold a: write one file for each tile"),
    ],
)
def test_what_is_wrong_is_found_beforehand(tmp_path, damage, message):
    folder = write(tmp_path / "f", Tiles((64, 64)).images)
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        ForeignFeatures(folder, NAMES, LEVELS).check([(64, 64)] * 3)
    assert "\n" not in str(error.value)


def test_other_values_are_other_features(tmp_path):
    """The digest is of the contents, wherever they lie; of what else lies there it knows nothing."""
    images = Tiles((64, 64)).images
    one, same, other = (write(tmp_path / name, x) for name, x in zip("123", (images, images, images + 1), strict=True))
    np.savez(same / "more.npz", view0=GOOD)
    digests = [ForeignFeatures(folder, NAMES, LEVELS).check([(64, 64)] * 3) for folder in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("savez", [np.savez, np.savez_compressed])
def test_damaged_values_are_found_by_reading_them_once(tmp_path, savez):
    """As many bytes as were written, one of them another; and NaN, which our writer would have refused."""
    folder = write(tmp_path / "f", Tiles((64, 64)).images)
    values = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float16)
    savez(folder / "b.npz", view0=values)
    data = bytearray((folder / "b.npz").read_bytes())
    data[len(data) // 2] ^= 1
    changed(folder, files={**dict.fromkeys("ac", (folder / "a.npz").stat().st_size), "b": len(data)})
    features = ForeignFeatures(folder, NAMES, LEVELS)
    features.check([(64, 64)] * 3)
    features.read_all()
    (folder / "b.npz").write_bytes(data)
    for read in (features.read_all, lambda: features.read_all((1, 3)), lambda: features.read(1, 0)):
        with pytest.raises(UserError, match=r"b.npz cannot be read|cannot read .*b.npz"):
            read()
    features.read_all((0, 3))  # of another process
    values[1, 2, 3, 0] = np.nan
    rewritten(folder, view0=values)
    with pytest.raises(UserError, match="1 of 3 files: b.npz holds values that are NaN or infinite: write them again"):
        ForeignFeatures(folder, NAMES, LEVELS).read_all()


def test_the_reading_is_remembered(tmp_path, monkeypatch):
    folder, read = write(tmp_path / "f", Tiles((64, 64)).images), []
    monkeypatch.setattr("ktda_jax.data.remembered.YOUNG", 0)
    for of, times in (("x", 1), ("x", 1), ("y", 2)):
        known = Checks(tmp_path / "checked.json")
        known.features(folder, of, lambda: read.append(1))
        known.save()
        assert len(read) == times
    rewritten(folder, view0=GOOD)
    Checks(tmp_path / "checked.json").features(folder, "x", lambda: read.append(1))
    assert len(read) == 3
