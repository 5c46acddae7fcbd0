"""Batches: a function of (seed, position) alone, whatever the threads, processes and interruptions."""

import collections
import itertools

import cv2
import numpy as np
import pytest
from absl import logging
from orbax.checkpoint import v1 as ocp
from PIL import Image

from ktda_jax import UserError
from ktda_jax.data.augment import Augmentation
from ktda_jax.data.pipeline import eval_batches, train_iterator
from ktda_jax.data.sources import FolderSource

HOW = Augmentation((16, 16))
PLAIN = Augmentation((16, 16), photometric=False)


def make_tiles(root, sizes):
    """Tile number i: noise whose first channel is i everywhere, label i % 3; RGB TIFF and grey PNG files."""
    rng = np.random.default_rng(0)
    for kind in ("img_dir", "ann_dir"):
        (root / kind / "train").mkdir(parents=True)
    for number, size in enumerate(sizes):
        image = rng.integers(0, 256, (*size, 3), np.uint8)
        image[..., 0] = number
        Image.fromarray(image).save(root / "img_dir" / "train" / f"t{number:02}.tif")
        label = np.full(size, number % 3, np.uint8)
        Image.fromarray(label).save(root / "ann_dir" / "train" / f"t{number:02}.png")
    return FolderSource(root, "train", num_classes=3)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Ten tiles of 24 x 28."""
    return make_tiles(tmp_path_factory.mktemp("tiles"), [(24, 28)] * 10)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for key in batch:
            np.testing.assert_array_equal(batch[key], other[key])


def tiles_of(batches):
    """The tile numbers, in order; only for batches without colour changes."""
    return [int(image[0, 0, 0]) for batch in batches for image in batch["image"]]


def test_a_training_batch(source):
    batch = next(train_iterator(source, augmentation=HOW, batch_size=4, seed=0))
    assert batch["image"].shape == (4, 16, 16, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (4, 16, 16) and batch["label"].dtype == np.uint8
    assert batch["mask"].tolist() == [True] * 4 and batch["mask"].dtype == bool
    assert batch["skipped"] == 0


def test_epochs_are_permutations_that_differ_and_run_on(source):
    numbers = tiles_of(take(train_iterator(source, augmentation=PLAIN, batch_size=4, seed=0), 10))
    epochs = [numbers[start : start + 10] for start in range(0, 40, 10)]  # 4 does not divide 10
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_fewer_tiles_than_rows(tmp_path):
    source = make_tiles(tmp_path, [(16, 16)] * 3)
    numbers = tiles_of(take(train_iterator(source, augmentation=PLAIN, batch_size=8, seed=0), 3))
    assert collections.Counter(numbers) == {0: 8, 1: 8, 2: 8}


def test_the_seed_decides(source):
    def run(seed):
        return take(train_iterator(source, augmentation=HOW, batch_size=4, seed=seed), 4)

    assert_same(run(42), run(42))
    assert any((a["image"] != b["image"]).any() for a, b in zip(run(42), run(43), strict=True))


def test_the_same_tile_is_augmented_anew_in_every_epoch(tmp_path):
    source = make_tiles(tmp_path, [(16, 16)])
    images = [batch["image"][0] for batch in take(train_iterator(source, augmentation=HOW, batch_size=1, seed=0), 12)]
    assert len({image.tobytes() for image in images}) > 6


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_threads_do_not_matter(source, threads):
    expected = take(train_iterator(source, augmentation=HOW, batch_size=4, seed=3), 6)
    assert_same(take(train_iterator(source, augmentation=HOW, batch_size=4, seed=3, num_threads=threads), 6), expected)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_global_batch_does_not_depend_on_the_processes(source, processes):
    whole = take(train_iterator(source, augmentation=HOW, batch_size=4, seed=7), 6)
    parts = [
        take(
            train_iterator(
                source, augmentation=HOW, batch_size=4, seed=7, process_index=index, process_count=processes
            ),
            6,
        )
        for index in range(processes)
    ]
    for batch, rows in zip(whole, zip(*parts, strict=True), strict=True):
        for key in ("image", "label", "mask"):
            np.testing.assert_array_equal(np.concatenate([row[key] for row in rows]), batch[key])


def test_resume_continues_exactly(source):
    def fresh():
        return train_iterator(source, augmentation=HOW, batch_size=4, seed=5)

    iterator = fresh()
    take(iterator, 7)
    state = iterator.get_state()
    expected = take(iterator, 5)
    resumed = fresh()
    resumed.set_state(state)
    assert_same(take(resumed, 5), expected)


def test_resume_reads_nothing_of_what_is_past(source):
    class Counting:
        reads = 0

        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            self.reads += 1
            return source[index]

    counting = Counting()
    iterator = train_iterator(counting, augmentation=HOW, batch_size=4, seed=5, num_threads=0)
    iterator.set_state({"next_index": 10**9})
    next(iterator)
    assert counting.reads == 4


def test_position_goes_through_orbax(source, tmp_path):
    def fresh():
        return train_iterator(source, augmentation=HOW, batch_size=4, seed=5)

    iterator = fresh()
    take(iterator, 3)
    ocp.save_checkpointables(tmp_path / "step", {"data": iterator})
    expected = take(iterator, 3)
    resumed = fresh()
    ocp.load_checkpointables(tmp_path / "step", {"data": resumed})
    assert_same(take(resumed, 3), expected)


@pytest.fixture
def damaged(tmp_path):
    """Six tiles, of which t02 and t03 are cut short."""
    source = make_tiles(tmp_path, [(16, 16)] * 6)
    for name in ("t02", "t03"):
        path = tmp_path / "img_dir" / "train" / f"{name}.tif"
        path.write_bytes(path.read_bytes()[:200])
    return source


def test_a_corrupt_tile_stops_training_by_name(damaged):
    with pytest.raises(UserError, match=r"cannot read .*t0[23]\.tif.*on_corrupt='skip'") as caught:
        take(train_iterator(damaged, augmentation=HOW, batch_size=2, seed=0), 3)
    assert "\n" not in str(caught.value)


def test_a_corrupt_tile_is_skipped_named_once_and_counted(damaged, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warnings.append(text % args))

    def run(threads):
        return take(
            train_iterator(
                damaged,
                augmentation=PLAIN,
                batch_size=2,
                seed=0,
                on_corrupt="skip",
                num_threads=threads,
            ),
            6,
        )

    batches = run(0)
    assert len(warnings) == 2 and any("t02.tif" in text for text in warnings)
    assert collections.Counter(tiles_of(batches)) == {0: 2, 1: 2, 4: 6, 5: 2}  # t04 stands in for both
    assert sum(batch["skipped"] for batch in batches) == 4  # two tiles, two epochs
    assert_same(run(4), batches)


def test_nothing_readable_is_an_error_even_when_skipping(tmp_path):
    source = make_tiles(tmp_path, [(16, 16)] * 2)
    for path in (tmp_path / "img_dir" / "train").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no readable tile"):
        next(train_iterator(source, augmentation=HOW, batch_size=2, seed=0, on_corrupt="skip"))


def test_bad_settings(source):
    def start(**changes):
        return train_iterator(source, **{"augmentation": HOW, "batch_size": 4, "seed": 0, **changes})

    with pytest.raises(UserError, match="batch_size 4 does not divide among 3 process"):
        start(process_count=3)
    with pytest.raises(UserError, match="on_corrupt is 'ignore'"):
        start(on_corrupt="ignore")
    with pytest.raises(UserError, match="seed is -1"):
        start(seed=-1)
    with pytest.raises(UserError, match=r"tile t\d\d: tile of 24 x 28 is smaller than the crop of 64 x 64"):
        next(start(augmentation=Augmentation((64, 64))))


def test_evaluation_sees_every_tile_once_and_pads_the_last_batch(source):
    batches = eval_batches(source, crop=(24, 28), batch_size=4)
    assert len(batches) == 3 and batches.sizes == ((24, 28),)
    *_, last = full = list(batches)
    assert len(full) == 3
    assert [name for batch in full for name in batch["name"]] == [f"t{i:02}" for i in range(10)] + ["", ""]
    assert last["mask"].tolist() == [True, True, False, False] and last["index"].tolist() == [8, 9, -1, -1]
    np.testing.assert_array_equal(last["image"][1], source[9]["image"])  # already at size: untouched
    assert not last["image"][2:].any() and (last["label"][2:] == 255).all()
    assert_same(list(batches), full)  # again, from the start


def test_evaluation_resizes_the_image_and_not_the_label(source):
    batch = next(iter(eval_batches(source, crop=16, batch_size=2)))
    expected = cv2.resize(source[1]["image"], (16, 16), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(batch["image"][1], expected)
    assert batch["label"].shape == (2, 24, 28) and batch["original"].tolist() == [[24, 28]] * 2


@pytest.mark.parametrize("processes", [2, 4])
def test_evaluation_deals_rows_to_processes(source, processes):
    whole = list(eval_batches(source, crop=16, batch_size=4))
    parts = [
        list(eval_batches(source, crop=16, batch_size=4, process_index=index, process_count=processes))
        for index in range(processes)
    ]
    assert all(len(part) == len(whole) for part in parts)
    for batch, rows in zip(whole, zip(*parts, strict=True), strict=True):
        for key in batch:
            np.testing.assert_array_equal(np.concatenate([row[key] for row in rows]), batch[key])


def test_evaluation_groups_label_sizes(tmp_path):
    source = make_tiles(tmp_path, [(24, 24), (16, 16), (24, 24), (16, 20), (24, 24)])
    batches = eval_batches(source, crop=16, batch_size=2, num_threads=1)
    assert batches.sizes == ((16, 16), (16, 20), (24, 24))
    assert batches.plan.tolist() == [[1, -1], [3, -1], [0, 2], [4, -1]]
    for batch, indices in zip(batches, batches.plan, strict=True):
        assert batch["index"].tolist() == indices.tolist()
        assert batch["label"].shape[1:] == source[int(indices[0])]["label"].shape


def test_evaluation_stops_at_a_corrupt_tile(damaged):
    with pytest.raises(UserError, match=r"t02\.tif"):
        list(eval_batches(damaged, crop=16, batch_size=2))
