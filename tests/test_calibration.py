"""Counts of confidence against a plain loop, and a temperature that is known because the labels were drawn with it."""

import numpy as np
import pytest

from ktda_jax.metrics import calibration


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def drawn(temperature, number=40_000, classes=5, seed=0):
    """Logits float64 (N, C), and labels drawn from softmax(logits / temperature)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(number, classes)) * 3
    below = softmax(logits / temperature).cumsum(1) > rng.random((number, 1))
    return logits, below.argmax(1)


def loss(logits, labels, temperature):
    return -np.log(softmax(logits / temperature)[np.arange(len(labels)), labels]).mean()


def same(one, other):
    np.testing.assert_array_equal(one.count, other.count)
    np.testing.assert_array_equal(one.hits, other.hits)
    np.testing.assert_allclose(one.confidence, other.confidence, rtol=1e-12)


def test_errors_equal_a_plain_loop():
    rng = np.random.default_rng(0)
    confidence = rng.random(3000).astype(np.float32)
    hit = rng.random(3000) < confidence**2
    counts = calibration.reliability(confidence, hit)
    gaps, pixels = [], []
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        assert counts.count[k] == inside.sum() and counts.hits[k] == hit[inside].sum()
        gaps.append(abs(hit[inside].mean() - confidence[inside].mean(dtype=np.float64)))
        pixels.append(inside.sum())
    assert calibration.expected_calibration_error(counts) == pytest.approx(100 * np.average(gaps, weights=pixels))
    assert calibration.maximum_calibration_error(counts) == pytest.approx(100 * max(gaps))


def test_counts_add_up_and_keep_their_types():
    rng = np.random.default_rng(1)
    confidence, hit = rng.random(1001).astype(np.float32), rng.random(1001) < 0.5
    whole = calibration.reliability(confidence, hit)
    parts = [calibration.reliability(confidence[k], hit[k]) for k in (slice(0, 400), slice(400, 400), slice(400, 1001))]
    same(sum(parts, calibration.nothing()), whole)
    assert (whole.count.dtype, whole.confidence.dtype, whole.hits.dtype) == (np.int64, np.float64, np.int64)
    assert whole.count.sum() == 1001 and whole.hits.sum() == hit.sum()


def test_edges_of_bins_and_hand_computed_errors():
    confidence = np.array([0, 0.2, 1 / 15, 1, 1.0000001], np.float32)
    counts = calibration.reliability(confidence, np.array([False, True, False, True, False]))
    assert np.flatnonzero(counts.count).tolist() == [0, 2, 14] and counts.count[[0, 2, 14]].tolist() == [2, 1, 2]
    one = calibration.reliability(np.array([0.9, 0.9, 0.5], np.float32), np.array([True, False, True]))
    assert calibration.expected_calibration_error(one) == pytest.approx(100 * (2 * 0.4 + 0.5) / 3, rel=1e-6)
    assert calibration.maximum_calibration_error(one) == pytest.approx(50, rel=1e-6)


def test_nothing_has_no_error(recwarn):
    empty = calibration.reliability(np.zeros(0, np.float32), np.zeros(0, bool))
    same(empty, calibration.nothing())
    assert np.isnan(calibration.expected_calibration_error(empty))
    assert np.isnan(calibration.maximum_calibration_error(empty))
    assert not recwarn.list


@pytest.mark.parametrize("bad", [np.nan, -0.1, 1.1, 255])
def test_what_is_no_probability_is_refused(bad):
    with pytest.raises(ValueError, match=r"0\.\.1"):
        calibration.reliability(np.array([0.5, bad], np.float32), np.ones(2, bool))
    with pytest.raises(ValueError, match=r"should both be"):
        calibration.reliability(np.zeros(3, np.float32), np.ones(2, bool))


@pytest.mark.parametrize("temperature", [0.2, 0.7, 1, 1.8, 5])
def test_a_known_temperature_is_found(temperature):
    logits, labels = drawn(temperature)
    log_probabilities = np.log(softmax(logits)).astype(np.float32)
    found = calibration.fit_temperature(log_probabilities, labels)
    assert found == pytest.approx(temperature, rel=0.04)
    best = loss(logits, labels, found)  # and it is the minimum of these pixels
    assert best <= min(loss(logits, labels, found * factor) for factor in (0.999, 1.001))
    assert calibration.fit_temperature(logits, labels.astype(np.uint8)) == pytest.approx(found, rel=1e-4)


def test_a_fit_mends_the_calibration():
    logits, labels = drawn(2.5)
    probabilities = softmax(logits).T.astype(np.float32)
    found = calibration.fit_temperature(np.log(probabilities.T), labels)
    errors = []
    for p in (probabilities, calibration.tempered(probabilities, found)):
        counts = calibration.reliability(p.max(0), p.argmax(0) == labels)
        errors.append(calibration.expected_calibration_error(counts))
    assert errors[0] > 15 and errors[1] < 1.5


def test_more_pixels_than_one_part(monkeypatch):
    logits, labels = drawn(1.5, number=1000)
    whole = calibration.fit_temperature(logits, labels)
    monkeypatch.setattr(calibration, "_ROWS", 300)
    assert calibration.fit_temperature(logits, labels) == pytest.approx(whole, rel=1e-9)


def test_fits_at_the_ends(recwarn):
    sure = np.log(np.array([[0.9, 0.1], [0.2, 0.8]], np.float32))
    assert calibration.fit_temperature(sure, np.array([0, 1])) == calibration.LOWEST  # all right
    assert calibration.fit_temperature(sure, np.array([1, 0])) == calibration.HIGHEST  # all wrong
    with np.errstate(divide="ignore"):
        certain = np.log(np.eye(3, dtype=np.float32))  # -inf off the diagonal
    assert calibration.fit_temperature(certain, np.arange(3)) == calibration.LOWEST
    assert calibration.fit_temperature(certain, np.array([1, 2, 0])) == calibration.HIGHEST
    assert calibration.fit_temperature(np.zeros((0, 3)), np.zeros(0, int)) == 1
    assert calibration.fit_temperature(np.zeros((4, 1)), np.zeros(4, int)) == 1  # one class: T changes nothing
    assert calibration.fit_temperature(np.full((4, 3), -1.1), np.array([0, 1, 2, 0])) == 1  # nor here
    assert not recwarn.list


def test_mostly_certain_pixels_do_not_derail_the_fit():
    """Of confident models: 3 in 100 pixels wrong with a probability of 2e-22, where the slope is far from a line."""
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 3, 5000)
    answers = np.where(rng.random(5000) < 0.03, (labels + 1) % 3, labels)
    z = np.full((5000, 3), -50.0)
    z[np.arange(5000), answers] = 0
    found = calibration.fit_temperature(z, labels)
    # All z are 0 or -50: the best T makes the mean confidence the share of the right ones.
    confidence = softmax(z / found).max(1).mean()
    assert confidence == pytest.approx((answers == labels).mean(), rel=1e-5)


@pytest.mark.parametrize("labels", [[0, 3], [-1, 0]])
def test_fits_refuse_what_is_no_class_and_nan(labels):
    with pytest.raises(ValueError, match="of 3 classes"):
        calibration.fit_temperature(np.zeros((2, 3)), np.array(labels))
    with pytest.raises(ValueError, match="NaN"):
        calibration.fit_temperature(np.full((2, 3), np.nan), np.array([0, 1]))
    with pytest.raises(ValueError, match=r"\(N, C\)"):
        calibration.fit_temperature(np.zeros((2, 3)), np.array([0]))


@pytest.mark.parametrize("temperature", [0.05, 0.5, 1, 1.0001, 3, 20])
def test_tempered_never_changes_the_argmax(temperature):
    rng = np.random.default_rng(0)
    p = softmax(rng.normal(size=(4000, 5)) * 4).T.astype(np.float32).reshape(5, 40, 100)
    p[1, :10] = p[3, :10] = p[:, :10].max(0)  # ties: the first of the two wins
    p[1, 10:20] = p[:, 10:20].max(0)
    p[4, 10:20] = np.nextafter(p[1, 10:20], np.float32(2))  # the last is the best, by as little as there is
    p[:, 20:30] = 0.2  # of all five
    p[:, 31] = 0
    out = calibration.tempered(p, temperature)
    assert out.dtype == np.float32 and out.shape == p.shape
    np.testing.assert_array_equal(out.argmax(0), p.argmax(0))
    assert not out[:, 31].any()
    if temperature != 1:
        sums = out.sum(0)[np.arange(40) != 31]
        np.testing.assert_allclose(sums, 1, rtol=1e-5)


def test_tempered_values():
    p = np.array([[0.5, 0, 1e-30], [0.3, 1, 1e-36], [0.2, 0, 0]], np.float32)
    got = calibration.tempered(p, 2)
    np.testing.assert_allclose(got[:, 0], np.sqrt(p[:, 0]) / np.sqrt(p[:, 0]).sum(), rtol=1e-6)
    assert got[:, 1].tolist() == [0, 1, 0]
    np.testing.assert_allclose(got[:, 2], [1000 / 1001, 1 / 1001, 0], rtol=1e-5)
    assert calibration.tempered(p, 1) is p
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0"):
            calibration.tempered(p, bad)


def test_sample_is_spread_over_the_labelled_pixels():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 4, (64, 64)).astype(np.uint8)
    label[:, 48:], label[5, 5] = 255, 17
    p = softmax(rng.normal(size=(4096, 4))).T.astype(np.float32).reshape(4, 64, 64)
    p[0] = np.linspace(0, 1, 4096, dtype=np.float32).reshape(64, 64)  # tells where a pixel is from
    z, labels = calibration.sample(label, p, 256)
    assert z.shape == (256, 4) and z.dtype == np.float32 and labels.dtype == np.int64
    places = np.rint(np.exp(z[:, 0].astype(np.float64)) * 4095).astype(int)
    rows, columns = np.divmod(places, 64)
    np.testing.assert_array_equal(labels, label[rows, columns])
    assert labels.max() < 4 and len(set(places)) == 256
    blocks = np.bincount(rows // 16 * 3 + columns // 16, minlength=12)  # 4 x 3 of them
    assert blocks.min() > 0.7 * 256 / 12 and blocks.max() < 1.3 * 256 / 12
    again = calibration.sample(label, p, 256)
    np.testing.assert_array_equal(z, again[0])


def test_sample_makes_no_columns():
    """64 of 64 x 64 is one a row: always the same column would be a poor sample."""
    p = np.broadcast_to(np.linspace(0.1, 1, 64, dtype=np.float32), (1, 64, 64))
    z, _ = calibration.sample(np.zeros((64, 64), np.uint8), p, 64)
    assert np.bincount(np.searchsorted(p[0, 0], np.exp(z[:, 0]) - 1e-4) // 8).tolist() == pytest.approx([8] * 8, abs=1)


def test_sample_of_few_pixels_and_of_none():
    label = np.full((8, 8), 255, np.uint8)
    p = np.zeros((3, 8, 8), np.float32)
    z, labels = calibration.sample(label, p, 10)
    assert z.shape == (0, 3) and labels.shape == (0,)
    label[2, 3], label[7, 7] = 2, 1
    z, labels = calibration.sample(label, p, 10)
    assert labels.tolist() == [2, 1] and (z == np.float32(calibration.FLOOR)).all()  # of probabilities of 0
    assert calibration.sample(label, p, 0)[1].shape == (0,)
    with pytest.raises(ValueError, match="not those"):
        calibration.sample(label[1:], p, 10)
