"""Crops, views and pasted parts of images from above: image and label stay together, and draws are what they say."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from ktda_jax.data import geometry
from ktda_jax.data.augment import Augmentation
from ktda_jax.data.geometry import VIEWS, Rare
from ktda_jax.data.pipeline import train_iterator

IMAGE = np.arange(4 * 6 * 2, dtype=np.uint8).reshape(4, 6, 2)


def test_the_views_are_the_eight_of_a_square():
    square = np.arange(9, dtype=np.uint8).reshape(3, 3)
    views = [geometry.view(square, k) for k in range(VIEWS)]
    assert len({v.tobytes() for v in views}) == VIEWS
    np.testing.assert_array_equal(views[1], square[:, ::-1])
    np.testing.assert_array_equal(views[2], [[2, 5, 8], [1, 4, 7], [0, 3, 6]])  # a quarter turn to the left
    for number in range(VIEWS):
        found = geometry.view(IMAGE, number)
        assert found.shape == ((6, 4, 2) if geometry.turned(number) else (4, 6, 2)) and found.flags.c_contiguous
        for bands in (1, 3, 5, 13, 32, 40):
            image = np.random.default_rng(0).integers(0, 256, (5, 7, bands), np.uint8)
            expected = np.rot90(image[:, ::-1] if number % 2 else image, number // 2)
            np.testing.assert_array_equal(geometry.view(image, number), expected)


def test_zoomed_windows_are_of_log_uniform_size_within_the_tile():
    rng, crop = np.random.default_rng(0), (64, 32)
    sizes = [geometry.draw_size((200, 200), crop, (0.5, 2.0), rng) for _ in range(4000)]
    factors = np.array([64 / height for height, _ in sizes])
    assert factors.min() >= 0.49 and factors.max() <= 2.04 and abs(np.median(factors) - 1) < 0.05
    assert all(abs(height - 2 * width) <= 1 for height, width in sizes)
    assert max(h for h, _ in [geometry.draw_size((70, 90), crop, (0.5, 2.0), rng) for _ in range(200)]) == 70
    before = rng.bit_generator.state
    assert geometry.draw_size((70, 90), crop, None, rng) == crop and rng.bit_generator.state == before


def test_resized_labels_keep_their_values_and_images_their_bands():
    rng = np.random.default_rng(1)
    for size, bands in itertools.product(((40, 20), (10, 5), (20, 10)), (1, 3, 13)):
        image, label = rng.integers(0, 256, (*size, bands), np.uint8), rng.choice([0, 3, 255], size).astype(np.uint8)
        small, truth = geometry.resized(image, label, (20, 10))
        one = geometry.resized(image[..., :1], label, (20, 10))[0]
        assert small.shape == (20, 10, bands) and np.abs(small[..., 0].astype(int) - one[..., 0]).max() <= 1
        assert truth.shape == (20, 10) and set(np.unique(truth)) <= {0, 3, 255}


def test_rare_classes_are_drawn_by_their_inverse_frequency():
    by_tile = np.array([[90, 0, 0, 0], [0, 9, 0, 0], [10, 0, 1, 0]])
    rare, rng = Rare.of(by_tile), np.random.default_rng(0)
    np.testing.assert_allclose(rare.shares, np.array([1 / 100, 1 / 9, 1, 0]) / (1 / 100 + 1 / 9 + 1))
    drawn = collections.Counter(rare.draw(rng) for _ in range(3000))
    assert set(drawn) == {(0, 0), (0, 2), (1, 1), (2, 2)}
    assert abs(drawn[2, 2] / 3000 - rare.shares[2]) < 0.03


def test_a_window_lies_around_a_pixel_of_the_class_within_the_tile():
    label, rng = np.zeros((50, 60), np.uint8), np.random.default_rng(0)
    label[2, 3] = label[40, 30] = 1
    found = {geometry.around(label, 1, (16, 16), rng) for _ in range(50)}
    assert found == {(0, 0), (32, 22)}
    assert geometry.around(label, 2, (16, 16), rng) is None


@pytest.mark.parametrize("patch", [1, 14])
def test_pasted_parts_have_a_uniform_area_and_lie_at_whole_patches(patch):
    rng, size, shares = np.random.default_rng(0), (256, 200), []
    for _ in range(2000):
        parts = geometry.rectangle(size, patch, rng)
        for part, length in zip(parts, size, strict=True):
            assert 0 <= part.start <= part.stop <= length and part.start % patch == 0
            assert part.stop % patch == 0 or part.stop == length
        shares.append(np.prod([part.stop - part.start for part in parts]) / np.prod(size))
    assert 0.25 < np.mean(shares) < 0.4 and max(shares) > 0.8  # a half, less what would lie outside


class Numbered:
    """Five tiles; the first band is the tile's number, the second the row, the third the column, and so the label."""

    num_classes = 5

    def __len__(self):
        return 5

    def __getitem__(self, index):
        rows, columns = np.mgrid[:40, :40].astype(np.uint8)
        image = np.stack([np.full_like(rows, index), rows, columns], -1)
        return {"image": image, "label": np.full((40, 40), index, np.uint8), "name": f"t{index}"}

    def __repr__(self):
        return "Numbered()"


def rows_of(count=40, rare=None, **how):
    augmentation = Augmentation((16, 16), photometric=False, **how)
    iterator = train_iterator(Numbered(), augmentation=augmentation, batch_size=4, seed=3, rare=rare)
    batches = [next(iterator) for _ in range(count)]
    return [pair for batch in batches for pair in zip(batch["image"], batch["label"], strict=True)]


def test_turned_crops_are_squares_of_the_tile_seen_from_all_sides():
    seen = set()
    for image, label in rows_of(rotate=True):
        assert (label == image[..., 0]).all()
        (down, right), corner = np.diff(image[:2, :2, 1:].astype(int), axis=0)[0, 0], image[0, 0, 1:]
        seen.add((int(down), int(right), int(np.sign(int(image[0, 1, 1]) - int(corner[0])))))
    assert {(down, right) for down, right, _ in seen} == {(1, 0), (-1, 0), (0, 1), (0, -1)}
    without = {tuple(np.diff(image[:2, :1, 1:].astype(int), axis=0)[0, 0]) for image, _ in rows_of()}
    assert without == {(1, 0)}  # left to right alone


def test_zoomed_crops_are_parts_of_the_tile_enlarged():
    extents = [int(image[..., 1].max()) - int(image[..., 1].min()) for image, _ in rows_of(zoom=(0.5, 2.0))]
    assert (
        min(extents) <= 9 and max(extents) >= 28 and all((im[..., 0] == lb).all() for im, lb in rows_of(zoom=(0.5, 2)))
    )


def test_pasted_parts_bring_their_labels():
    pairs = rows_of(cutmix=1.0)
    assert all((image[..., 0] == label).all() for image, label in pairs)
    assert sum(len(np.unique(label)) == 2 for _, label in pairs) > len(pairs) / 2
    assert max(len(np.unique(label)) for _, label in pairs) == 2


def test_rare_crops_are_a_share_and_the_rest_goes_through_all_tiles():
    rare = Rare.of(np.diag([1600, 1600, 1600, 1600, 1]))
    found = collections.Counter(int(label[0, 0]) for _, label in rows_of(rare=rare, rare_crops=0.5))
    assert found[4] > 0.5 * 160 and all(found[k] > 5 for k in range(4))


def test_threads_and_interruptions_change_nothing():
    how = Augmentation((16, 16), rotate=True, zoom=(0.5, 2.0), cutmix=0.5, rare_crops=0.5)
    made = dict(augmentation=how, batch_size=4, seed=3, rare=Rare.of(np.eye(5, dtype=int)))
    whole = train_iterator(Numbered(), **made, num_threads=4)
    batches = [next(whole) for _ in range(6)]
    first = train_iterator(Numbered(), **made, num_threads=0)
    for _ in range(3):
        next(first)
    resumed = train_iterator(Numbered(), **made, num_threads=2)
    resumed.set_state(first.get_state())
    for batch in batches[3:]:
        again = next(resumed)
        np.testing.assert_array_equal(batch["image"], again["image"])
        np.testing.assert_array_equal(batch["label"], again["label"])
    share = train_iterator(Numbered(), **made, process_index=1, process_count=2)
    np.testing.assert_array_equal(next(share)["image"], batches[0]["image"][2:])


def test_what_is_off_draws_nothing():
    """So that the rows of the published settings are those of before."""
    plain = rows_of()
    for name, off in {"rotate": False, "zoom": None, "cutmix": 0.0, "rare_crops": 0.0}.items():
        assert getattr(Augmentation((16, 16)), name) == off
    again = rows_of(**{f.name: f.default for f in dataclasses.fields(Augmentation) if f.name in ("rotate", "cutmix")})
    for (image, label), (other, truth) in zip(plain, again, strict=True):
        np.testing.assert_array_equal(image, other)
        np.testing.assert_array_equal(label, truth)
