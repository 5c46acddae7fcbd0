"""Intervals of the mIoU: draws as `summarize` scores them, and they hold the truth about as often as they say."""

import numpy as np
import pytest

from ktda_jax.metrics import bootstrap
from ktda_jax.metrics.confusion import summarize


def tiles(number, classes=4, seed=0):
    """Confusion matrices of tiles that differ in their classes and in how good they are."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.ones(classes), number)
    right = rng.beta(8, 2, number)
    out = np.empty((number, classes, classes), np.int64)
    for index in range(number):
        chances = np.full((classes, classes), (1 - right[index]) / (classes - 1))
        np.fill_diagonal(chances, right[index])
        out[index] = rng.multinomial(4096, (shares[index][:, None] * chances).ravel()).reshape(classes, classes)
    return out


def by_hand(confusions, samples, seed):
    rng, n = np.random.default_rng(seed), len(confusions)
    return [summarize(confusions[rng.integers(n, size=n)].sum(0)) for _ in range(samples)]


def test_draws_are_scored_as_summarize_does():
    confusions = tiles(12)
    confusions[1:, 3], confusions[1:, :, 3] = 0, 0  # class 3 in one tile only: NaN in a third of the draws
    confusions[5:, 2] = 0  # sometimes predicted and not labelled: IoU 0
    scores = by_hand(confusions, 300, 7)
    got = bootstrap.resampled_iou(bootstrap.counts(confusions), samples=300, seed=7)
    np.testing.assert_allclose(got, [score.per_class["IoU"] for score in scores], rtol=1e-12)
    assert 50 < np.isnan(got[:, 3]).sum() < 200
    want = np.percentile([score.summary["mIoU"] for score in scores], (2.5, 97.5))
    np.testing.assert_allclose(bootstrap.interval(bootstrap.counts(confusions), samples=300, seed=7), want, rtol=1e-12)
    classes = bootstrap.class_intervals(bootstrap.counts(confusions), samples=300, seed=7)
    np.testing.assert_allclose(classes, np.nanpercentile(got, (2.5, 97.5), axis=0).T)


def test_parts_of_the_draws_are_those_of_one_go(monkeypatch):
    confusions = tiles(50)
    whole = bootstrap.resampled_iou(bootstrap.counts(confusions), samples=100)
    monkeypatch.setattr(bootstrap, "_CELLS", 350)  # 7 draws at once, and 2 at the end
    np.testing.assert_array_equal(bootstrap.resampled_iou(bootstrap.counts(confusions), samples=100), whole)


def test_the_seed_decides():
    confusions = tiles(30)
    assert bootstrap.interval(bootstrap.counts(confusions)) == bootstrap.interval(
        bootstrap.counts(confusions), samples=1000, seed=0
    )
    assert bootstrap.interval(bootstrap.counts(confusions)) != bootstrap.interval(bootstrap.counts(confusions), seed=1)
    low, high = bootstrap.interval(bootstrap.counts(confusions))
    assert low < summarize(confusions.sum(0)).summary["mIoU"] < high


def test_more_tiles_make_it_narrower():
    widths = [np.diff(bootstrap.interval(bootstrap.counts(tiles(number))))[0] for number in (25, 400)]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.5)  # the root of 16


def test_it_holds_the_truth_about_as_often_as_it_says():
    truth = summarize(tiles(20_000, classes=3, seed=99).sum(0)).summary["mIoU"]
    held = 0
    for seed in range(200):
        low, high = bootstrap.interval(bootstrap.counts(tiles(60, classes=3, seed=seed)), samples=300, seed=seed)
        held += low <= truth <= high
    assert 0.89 <= held / 200 <= 0.99


def test_too_few_tiles_and_absent_classes(recwarn):
    for number in (0, 1):
        assert np.isnan(bootstrap.interval(bootstrap.counts(tiles(number)))).all()
        assert np.isnan(bootstrap.class_intervals(bootstrap.counts(tiles(number)))).all()
    one = tiles(3)
    one[1:] = 0  # tiles without a labelled pixel tell nothing
    assert np.isnan(bootstrap.interval(bootstrap.counts(one))).all()
    same = tiles(1).repeat(5, 0)
    same[:, 1], same[:, :, 1] = 0, 0
    low, high = bootstrap.interval(bootstrap.counts(same))
    assert low == pytest.approx(high) == pytest.approx(summarize(same[0]).summary["mIoU"])
    classes = bootstrap.class_intervals(bootstrap.counts(same))
    assert classes.shape == (4, 2) and np.isnan(classes[:, 0]).tolist() == [False, True, False, False]
    assert bootstrap.interval(np.full((4, 2, 1), 9)) == (100, 100)  # one class
    assert not recwarn.list
    with pytest.raises(ValueError, match=r"\(n, 2, C\)"):
        bootstrap.interval(np.zeros((3, 3), np.int64))
