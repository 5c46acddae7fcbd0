"""Augmentation: the colour operations equal mmseg's to the bit; geometry keeps image and label together."""

import pathlib

import numpy as np
import pytest

from ktda_jax.data import augment

GOLDEN = np.load(pathlib.Path(__file__).parent / "goldens" / "photometric.npz")


@pytest.mark.parametrize("case", [case for case in GOLDEN.files if case != "bgr"])
def test_colour_operations_equal_the_golden_ones(case):
    operation, strength = case.split("/")
    rgb = np.ascontiguousarray(GOLDEN["bgr"][..., ::-1])
    before = rgb.copy()
    result = getattr(augment, f"adjust_{operation}")(rgb, float(strength))
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result[..., ::-1], GOLDEN[case])
    np.testing.assert_array_equal(rgb, before)  # pure: the input is left alone


@pytest.mark.parametrize("alpha, beta", [(0.5, 0.0), (1.4999, 0.0), (0.83, 0.0), (1.0, -31.97), (1.0, 7.5)])
def test_table_lookup_equals_the_arithmetic(alpha, beta):
    values = np.arange(256, dtype=np.uint8)[None]
    expected = np.clip(values.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)
    np.testing.assert_array_equal(augment._affine(values, alpha, beta), expected)


class Script:
    """A Generator stand-in that plays back chosen draws and notes the ranges that were asked for."""

    def __init__(self, *draws):
        self.draws, self.ranges = list(draws), []

    def integers(self, *arguments):
        self.ranges.append(arguments)
        return self.draws.pop(0)

    uniform = integers


@pytest.mark.parametrize("contrast_first", [0, 1])
def test_distortion_applies_the_operations_in_the_published_order(contrast_first):
    image = np.ascontiguousarray(GOLDEN["bgr"][..., ::-1])
    contrast = [1, 0.83]
    rest = [1, 1.2, 1, -3]  # saturation, hue
    rng = Script(1, 20.0, contrast_first, *(contrast + rest if contrast_first else rest + contrast))
    expected = augment.adjust_brightness(image, 20.0)
    if contrast_first:
        expected = augment.adjust_contrast(expected, 0.83)
    expected = augment.adjust_hue(augment.adjust_saturation(expected, 1.2), -3)
    if not contrast_first:
        expected = augment.adjust_contrast(expected, 0.83)
    np.testing.assert_array_equal(augment.photometric_distortion(image, rng), expected)
    assert not rng.draws
    assert rng.ranges.count((2,)) == 5  # four coins and the order
    assert {(-32, 32), (0.5, 1.5), (-18, 18)} <= set(rng.ranges)


def test_distortion_can_leave_the_image_alone():
    image = GOLDEN["bgr"]
    assert augment.photometric_distortion(image, Script(0, 0, 0, 0, 0)) is image


def test_crop_takes_one_window_from_both():
    rows, columns = np.mgrid[:20, :30].astype(np.uint8)
    image, label = np.stack([rows, columns, rows], -1), rows * 7 + columns
    corners = set()
    for seed in range(400):
        crop, cut = augment.random_crop(image, label, (16, 24), np.random.default_rng(seed))
        assert crop.shape == (16, 24, 3) and cut.shape == (16, 24)
        np.testing.assert_array_equal(cut, crop[..., 0] * 7 + crop[..., 1])
        corners.add((int(crop[0, 0, 0]), int(crop[0, 0, 1])))
    assert corners == {(top, left) for top in range(5) for left in range(7)}  # the last position included


def test_crop_refuses_what_does_not_fit():
    image, label = np.zeros((20, 30, 3), np.uint8), np.zeros((20, 30), np.uint8)
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="20 x 30 is smaller than the crop of 24 x 24"):
        augment.random_crop(image, label, 24, rng)
    with pytest.raises(ValueError, match="image is 20 x 30 but its label 20 x 20"):
        augment.random_crop(image, label[:, :20], 16, rng)


def test_flip_mirrors_both_or_neither():
    rng = np.random.default_rng(1)
    image, label = rng.integers(0, 256, (8, 9, 3), np.uint8), rng.integers(0, 5, (8, 9), np.uint8)
    flipped, mirrored = augment.random_flip(image, label, rng, 1.0)
    np.testing.assert_array_equal(flipped, image[:, ::-1])
    np.testing.assert_array_equal(mirrored, label[:, ::-1])
    assert augment.random_flip(image, label, rng, 0.0)[0] is image
    count = sum(augment.random_flip(image, label, rng)[0] is not image for _ in range(1000))
    assert 430 < count < 570
