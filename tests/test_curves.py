"""Precision, recall and average precision against a sort of the pixels, and the corner cases by hand."""

import numpy as np
import pytest

from ktda_jax.metrics import curves


def by_hand(levels, positive):
    """The definition on sorted pixels: the sum of (R_n - R_{n-1}) P_n over descending thresholds, one a value."""
    order = np.argsort(-levels, kind="stable")
    levels, positive = levels[order], positive[order]
    average = before = 0.0
    for end in range(1, len(levels) + 1):
        if end < len(levels) and levels[end] == levels[end - 1]:
            continue  # a threshold finds all pixels of a value or none
        hits = positive[:end].sum()
        recall, precision = hits / positive.sum(), hits / end
        average += (recall - before) * precision
        before = recall
    return average


def scene(seed=0, shape=(40, 50), classes=4):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, shape).astype(np.uint8)
    z = rng.normal(size=(classes, *shape)) * 2 + 2 * (label == np.arange(classes)[:, None, None])
    p = np.exp(z)
    return label, (p / p.sum(0)).astype(np.float32)


def test_equals_a_sort_of_the_pixels():
    label, p = scene()
    label[:5] = 255
    precision, recall, average = curves.precision_recall(curves.histograms(label, p))
    counted = label != 255
    for index in range(4):
        levels = np.rint(p[index][counted] * 255).astype(int)
        positive = label[counted] == index
        assert average[index] == pytest.approx(by_hand(levels, positive), rel=1e-12)
        for k in (0, 1, 100, 254):
            found = levels >= k
            assert precision[index, k] == pytest.approx((found & positive).sum() / found.sum())
            assert recall[index, k] == pytest.approx((found & positive).sum() / positive.sum())


def test_distinct_levels_equal_the_sort_of_the_probabilities():
    rng = np.random.default_rng(1)
    p = (rng.permutation(256) / 255).astype(np.float32)[None]
    p = np.concatenate((p, 1 - p))
    label = (rng.random(256) > p[0]).astype(np.int64)
    _, _, average = curves.precision_recall(curves.histograms(label, p))
    for index in range(2):
        assert average[index] == pytest.approx(by_hand(p[index], label == index), rel=1e-12)


def test_halves_add_up():
    label, p = scene(2)
    label[7, :20] = 255
    whole = curves.histograms(label, p)
    halves = curves.histograms(label[:17], p[:, :17]) + curves.histograms(label[17:], p[:, 17:])
    np.testing.assert_array_equal(halves, whole)
    assert whole.dtype == np.int64 and whole.shape == (4, 2, 256)
    assert (whole.sum((1, 2)) == (label != 255).sum()).all()
    np.testing.assert_array_equal(whole[:, 1].sum(1), np.bincount(label[label != 255], minlength=4))


def test_corner_cases(recwarn):
    label = np.array([[0, 0, 1, 255]], np.uint8)
    p = np.array([[[1, 1, 0, 1]], [[0, 0, 1, 0]], [[0, 0, 0, 0]]], np.float32)
    counts = curves.histograms(label, p)
    assert counts[0, 1, 255] == 2 and counts[0, 0, 0] == 1 and counts[0].sum() == 3
    precision, recall, average = curves.precision_recall(counts)
    assert average[:2].tolist() == [1, 1] and np.isnan(average[2])  # no pixel is labelled 2
    assert np.isnan(recall[2]).all() and precision[2, 0] == 0 and np.isnan(precision[2, 1:]).all()
    assert precision[0, 0] == pytest.approx(2 / 3) and precision[0, 1] == 1 and (recall[0] == 1).all()
    ignored = curves.histograms(np.full((1, 4), 255, np.uint8), np.full_like(p, np.nan))  # not counted, not looked at
    assert not ignored.any() and np.isnan(curves.precision_recall(ignored)[2]).all()
    one = curves.histograms(np.zeros((2, 2), np.uint8), np.ones((1, 2, 2), np.float32))
    assert curves.precision_recall(one)[2].tolist() == [1]
    assert not recwarn.list


def test_an_answer_that_knows_nothing_has_the_share_of_the_class():
    label = (np.arange(1000) % 10 == 0).astype(np.uint8)
    p = np.full((2, 1000), 0.5, np.float32)
    assert curves.precision_recall(curves.histograms(label, p))[2].tolist() == pytest.approx([0.9, 0.1])


@pytest.mark.parametrize("bad", [np.nan, -0.1, 254])
def test_what_is_no_probability_is_refused(bad):
    label, p = scene()
    p[2, 3, 3] = bad
    with pytest.raises(ValueError, match=r"0\.\.1"):
        curves.histograms(label, p)
    with pytest.raises(ValueError, match="not those"):
        curves.histograms(label[1:], p)
