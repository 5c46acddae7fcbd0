"""Teacher features on disk: what is written is read, refused when it is not what is wanted, and cut with the tiles."""

import dataclasses
import json
import pickle

import numpy as np
import pytest

from ktda_jax import UserError
from ktda_jax.data import teacher_features
from ktda_jax.data.augment import Augmentation
from ktda_jax.data.geometry import Rare, view
from ktda_jax.data.pipeline import train_iterator
from ktda_jax.data.teacher_features import DTYPES, FeatureWriter, TeacherFeatures

MADE_FROM = {"teacher": "dinov2", "tiles": "a" * 64, "sha256": "b" * 64, "split": "train", "patch": 14, "width": 8}
MADE_FROM |= {"rgb": [0, 1, 2], "depth": 12}
PLAIN = Augmentation((64, 64), photometric=False)


def taps(tile: int, mirrored: bool, size=(3, 5)):
    return np.random.default_rng([tile, mirrored]).normal(size=(4, *size, 8))


@pytest.fixture(params=["bfloat16", "float16"])
def folder(request, tmp_path):
    """Three tiles in two shards, as two processes with batches of one row each write them."""
    path = tmp_path / "features"
    path.mkdir()
    shards = {"first": [0, 2], "second": [1]}
    for name, tiles in shards.items():
        writer = FeatureWriter(path / name, request.param)
        for tile in tiles:
            writer.write(f"t{tile}", [taps(tile, m).astype(DTYPES[request.param]) for m in (False, True)])
        writer.close()
    manifest = {"format": 1, "made_from": MADE_FROM, "dtype": request.param, "computed_in": "float32"}
    manifest["shards"] = {name: (path / name).stat().st_size for name in shards}
    (path / "manifest.json").write_text(json.dumps(manifest))
    np.save(path / "records.npy", [[0, 0, 3, 5], [1, 0, 3, 5], [0, 1, 3, 5]])
    return path


def test_what_is_written_is_read(folder):
    features = TeacherFeatures(folder, MADE_FROM)
    dtype = DTYPES[json.loads((folder / "manifest.json").read_text())["dtype"]]
    assert len(features) == 3 and features.patch == 14
    for reader in (features, pickle.loads(pickle.dumps(features))):
        for tile in range(3):
            for mirrored in (False, True):
                found = reader.read(tile, mirrored)
                assert found.dtype == dtype
                np.testing.assert_array_equal(found, taps(tile, mirrored).astype(dtype))


@pytest.mark.parametrize(
    "key, value, message",
    [
        ("tiles", "c" * 64, r"of other tiles \(aaaaaaaaaaaa..., wanted cccccccccccc...\)"),
        ("sha256", "c" * 64, "of another teacher's weights"),
        ("split", "val", r"of another split \(train, wanted val\)"),
        ("patch", 16, r"of a teacher of another patch \(14, wanted 16\)"),
        ("rgb", [2, 1, 0], "of other bands"),
    ],
)
def test_other_features_are_refused_by_name(folder, key, value, message):
    with pytest.raises(UserError, match=f"{folder} are {message}.*: extract them again by python -m ktda_jax.extract"):
        TeacherFeatures(folder, MADE_FROM | {key: value})
    TeacherFeatures(folder, MADE_FROM | {key: None})  # what is not asked for is not compared


def test_random_features_are_no_substitute_for_a_teacher(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["made_from"]["sha256"] = None
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"another teacher's weights \(random ones, wanted bbbbbbbbbbbb...\)"):
        TeacherFeatures(folder, MADE_FROM)


def test_damage_is_one_line(folder):
    features = TeacherFeatures(folder, MADE_FROM)
    (folder / "second").write_bytes((folder / "second").read_bytes()[:100])
    with pytest.raises(UserError, match=r"cannot read the teacher features of tile 1 in .*features: extract them"):
        features.read(1, False)
    with pytest.raises(UserError, match="second has 100 bytes, not the .* that were written: extract them again"):
        TeacherFeatures(folder, MADE_FROM)
    (folder / "first").unlink()
    with pytest.raises(UserError, match="lack .*first: extract them again"):
        TeacherFeatures(folder, MADE_FROM)
    (folder / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="cannot read .*manifest.json"):
        TeacherFeatures(folder, MADE_FROM)
    with pytest.raises(UserError, match="no teacher features in .*extract them by python -m ktda_jax.extract"):
        TeacherFeatures(folder / "nowhere", MADE_FROM)


def test_values_too_large_for_float16_are_refused(tmp_path):
    writer = FeatureWriter(tmp_path / "x", "float16")
    with pytest.raises(UserError, match="tile t7 are not finite as float16: set config.teacher.dtype='bfloat16'"):
        with np.errstate(over="ignore"):
            writer.write("t7", [np.full((4, 1, 1, 8), 1e6).astype(np.float16)] * 2)
    writer.close()


# In step with the tiles -------------------------------------------------------------------------------------------

PATCH = 14


class Tiles:
    """Six tiles of noise, whose second band is their number."""

    num_classes = 3

    def __init__(self, size):
        rng = np.random.default_rng(0)
        self.images = rng.integers(0, 256, (6, *size, 3), np.uint8)
        self.images[..., 1] = np.arange(6)[:, None, None]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "label": self.images[index, ..., 0] % 3, "name": f"t{index}"}

    def __repr__(self):
        return "Tiles()"


class Corners:
    """A teacher that sees of every patch its upper left pixel, at four brightnesses."""

    patch, levels, views = PATCH, [0, 1, 2, 3], 8

    def __init__(self, tiles):
        self.tiles = tiles

    def __len__(self):
        return len(self.tiles)

    def read(self, index, number):
        return corners(view(self.tiles.images[index], number))


def corners(image):
    return np.stack([image[::PATCH, ::PATCH].astype(np.float32) * (k + 1) for k in range(4)])


@pytest.mark.parametrize("size", [(64, 50), (96, 110), (64, 64)])
def test_crops_and_flips_take_their_window_of_the_features(size):
    """What the batch holds is what the teacher would say of the very image in it; colours unchanged."""
    tiles = Tiles(size)
    iterator = train_iterator(
        tiles, augmentation=Augmentation((64, 50), photometric=False), batch_size=4, seed=0, features=Corners(tiles)
    )
    places = set()
    for _ in range(12):
        batch = next(iterator)
        assert [taps.shape for taps in batch["taps"]] == [(4, 5, 4, 3)] * 4  # ceil(64 / 14), ceil(50 / 14)
        for row, image in enumerate(batch["image"]):
            seen = np.stack([taps[row] for taps in batch["taps"]])
            np.testing.assert_array_equal(seen, corners(image))
            np.testing.assert_array_equal(batch["label"][row], image[..., 0] % 3)
            places.add(image[0, 0].tobytes())
    windows = np.prod([(a - b) // PATCH + 1 for a, b in zip(size, (64, 50), strict=True)]) * 2
    assert len(places) > min(20, 0.8 * 6 * windows)


@pytest.mark.parametrize("size", [(96, 110), (64, 64)])
@pytest.mark.parametrize("how", [{"rotate": True}, {"cutmix": 1.0}, {"rotate": True, "cutmix": 0.7, "rare_crops": 0.5}])
def test_turned_and_pasted_crops_take_theirs_of_the_features(size, how):
    """The same of all eight views, of parts pasted at whole patches, and of crops around a rare class."""
    tiles = Tiles(size)
    rare = Rare.of(np.array([np.bincount(image[..., 0].ravel() % 3, minlength=3) for image in tiles.images]))
    made = dict(augmentation=dataclasses.replace(PLAIN, **how), batch_size=4, seed=0, rare=rare)
    iterator, plain = (train_iterator(tiles, **made, features=f) for f in (Corners(tiles), None))
    corners_seen, mixed = set(), 0
    for _ in range(16):
        batch = next(iterator)
        for row, image in enumerate(batch["image"]):
            np.testing.assert_array_equal(np.stack([taps[row] for taps in batch["taps"]]), corners(image))
            np.testing.assert_array_equal(batch["label"][row], image[..., 0] % 3)
            corners_seen.add(image[0, 0].tobytes())
            mixed += len(np.unique(image[..., 1])) > 1  # the second band is the tile's number
        batch = next(plain)
        for image, label in zip(batch["image"], batch["label"], strict=True):
            np.testing.assert_array_equal(label, image[..., 0] % 3)
    assert len(corners_seen) > 8 and (mixed > 20) == ("cutmix" in how)


def test_all_eight_views_are_asked_for_only_where_they_are_stored(folder):
    tiles = Tiles((64, 64))
    tiles.images = tiles.images[:3]
    features = TeacherFeatures(folder, MADE_FROM)
    assert features.views == 2  # as stored before there was a choice
    with pytest.raises(UserError, match=r"of 2 views of each tile, and config.data.rotate needs 8: extract them again"):
        train_iterator(
            tiles, augmentation=dataclasses.replace(PLAIN, rotate=True), batch_size=2, seed=0, features=features
        )


@pytest.mark.parametrize("how", [{}, {"rotate": True}])
def test_of_whole_tiles_the_rows_are_those_without_features(how):
    """Same draws, so that computed and precomputed training see the same images, colour changes included."""
    tiles = Tiles((70, 70))  # whole patches, at which parts are pasted
    options = dict(augmentation=Augmentation((70, 70), **how), batch_size=4, seed=5)
    with_features = train_iterator(tiles, **options, features=Corners(tiles))
    for plain, _ in zip(train_iterator(tiles, **options), range(6), strict=False):
        batch = next(with_features)
        np.testing.assert_array_equal(batch["image"], plain["image"])
        np.testing.assert_array_equal(batch["label"], plain["label"])


def test_a_stand_in_brings_its_own_features():
    class Damaged(Tiles):
        def __getitem__(self, index):
            if index == 2:
                raise OSError("bad block")
            return super().__getitem__(index)

    tiles = Damaged((64, 64))
    iterator = train_iterator(
        tiles, augmentation=PLAIN, batch_size=6, seed=0, on_corrupt="skip", features=Corners(tiles)
    )
    batch = next(iterator)
    assert batch["skipped"] == 1
    for row, image in enumerate(batch["image"]):
        np.testing.assert_array_equal(batch["taps"][0][row], corners(image)[0])


def test_features_of_fewer_tiles_are_refused(folder):
    with pytest.raises(UserError, match="3 tiles have teacher features, but Tiles.. has 6"):
        train_iterator(
            Tiles((64, 64)), augmentation=PLAIN, batch_size=2, seed=0, features=TeacherFeatures(folder, MADE_FROM)
        )


def test_the_check_is_a_function_of_the_manifest(tmp_path):
    teacher_features.check(tmp_path, {"made_from": MADE_FROM}, MADE_FROM)
