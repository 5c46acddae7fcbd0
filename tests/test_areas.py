"""Areas with their uncertainty against the published example, a bootstrap over tiles, and simulated samples."""

import numpy as np
import pytest

from ktda_jax.metrics import areas

# Olofsson et al. 2014, section 5: deforestation, forest gain, stable forest, stable non-forest; Landsat pixels.
MAPPED = np.array([200_000, 150_000, 3_200_000, 6_450_000])
COUNTS = np.array([[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]])


def test_the_published_example():
    """As the text says of tables 8 and 9: the area of deforestation, accuracies with half of their intervals."""
    found = areas.stratified(MAPPED, COUNTS)
    half = found.quantile * found.area_error
    assert found.area[0] == pytest.approx(235_086, abs=1) and half[0] == pytest.approx(68_418, rel=1e-4)
    assert 0.09 * found.area[0] == pytest.approx(21_158, abs=1) and 0.09 * half[0] == pytest.approx(6_158, abs=1)
    assert found.area.sum() == pytest.approx(MAPPED.sum())
    for values, errors, expected in (
        (found.users, found.users_error, ((0.88, 0.07), (0.73, 0.10), (0.93, 0.04), (0.96, 0.02))),
        (found.producers[:1], found.producers_error[:1], ((0.75, 0.21),)),
        ([found.overall], [found.overall_error], ((0.95, 0.02),)),
    ):
        got = [(round(v, 2), round(found.quantile * e, 2)) for v, e in zip(values, errors, strict=True)]
        assert got == list(expected)
    np.testing.assert_allclose(found.producers, [0.7487, 0.8472, 0.9345, 0.9616], atol=5e-5)
    low, high = found.interval
    np.testing.assert_allclose(low, found.area - half)
    np.testing.assert_allclose(high, found.area + half)


def test_every_error_is_that_of_a_ratio_of_single_units():
    """Stehman 2014 (Int. J. Remote Sensing 35), equations 27 and 28, on the sampled units one by one."""
    found, at = areas.stratified(MAPPED, COUNTS), np.arange(4)
    stratum, reference = (np.repeat(index.ravel(), COUNTS.ravel()) for index in np.indices((4, 4)))

    def ratio(y, x) -> tuple[float, float]:
        """Of two values of every unit."""
        means = [np.array([v[stratum == h].mean() for h in at]) for v in (y, x)]
        totals = [MAPPED @ mean for mean in means]
        value, variance = totals[0] / totals[1], 0.0
        for h in at:
            rest = (y - value * x)[stratum == h]
            variance += MAPPED[h] ** 2 * rest.var(ddof=1) / len(rest)
        return value, variance**0.5 / totals[1]

    one = np.ones(len(stratum))
    for k in at:
        mapped, is_one = (stratum == k) * one, (reference == k) * one
        share, error = ratio(is_one, one)
        assert (found.area[k], found.area_error[k]) == pytest.approx((1e7 * share, 1e7 * error))
        assert (found.producers[k], found.producers_error[k]) == pytest.approx(ratio(mapped * is_one, is_one))
        assert (found.users[k], found.users_error[k]) == pytest.approx(ratio(mapped * is_one, mapped))
    assert (found.overall, found.overall_error) == pytest.approx(ratio((stratum == reference) * one, one))


def clusters(tiles: int, seed: int, pixels=400) -> np.ndarray:
    """Tiles with a character of their own: (tiles, 3, 3), map classes are rows."""
    rng = np.random.default_rng(seed)
    truth = rng.dirichlet((0.8, 1.5, 2), tiles)
    wrong = rng.beta(2, 12, tiles)
    out = np.zeros((tiles, 3, 3), np.int64)
    for k in range(tiles):
        reference = rng.multinomial(pixels, truth[k])
        for j, count in enumerate(reference):
            chances = np.full(3, wrong[k] / 2)
            chances[j] = 1 - wrong[k]
            out[k, :, j] = rng.multinomial(count, chances)
    return out


def test_tiles_of_one_pixel_are_a_simple_sample():
    """Then both ways are one, but for n instead of n - 1 in each stratum."""
    singles = np.repeat(np.eye(16, dtype=np.int64).reshape(16, 4, 4), COUNTS.ravel(), 0)
    simple, found = areas.stratified(MAPPED, COUNTS), areas.clustered(MAPPED, singles)
    for name in ("area", "users", "producers", "overall"):
        np.testing.assert_allclose(getattr(found, name), getattr(simple, name))
        error, expected = getattr(found, f"{name}_error"), getattr(simple, f"{name}_error")
        np.testing.assert_allclose(error, expected, rtol=0.01)
    assert 1.96 < found.quantile < 1.97


def test_errors_of_tiles_are_those_of_a_bootstrap_over_them():
    sample, mapped = clusters(150, seed=1), np.array([30.0, 50.0, 20.0])
    found, rng, draws = areas.clustered(mapped, sample), np.random.default_rng(0), []
    for _ in range(1500):
        counts = sample[rng.integers(150, size=150)].sum(0)
        shares = counts / counts.sum(1, keepdims=True)
        area = mapped @ shares
        draws.append([*area, *np.diag(shares), *(mapped * np.diag(shares) / area), mapped @ np.diag(shares) / 100])
    errors = [*found.area_error, *found.users_error, *found.producers_error, found.overall_error]
    np.testing.assert_allclose(errors, np.std(draws, 0, ddof=1), rtol=0.12)
    independent = areas.stratified(mapped, sample.sum(0))
    np.testing.assert_allclose(independent.area, found.area)
    assert (found.area_error > 3 * independent.area_error).all()  # what counting pixels as independent hides


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Tiles drawn from a region of 20,000, whose mapped areas are known."""
    region = clusters(20_000, seed=2)
    mapped, truth = region.sum((0, 2)), region.sum((0, 1))
    rng, inside = np.random.default_rng(3), {"tiles": [], "pixels": []}
    for _ in range(400):
        sample = region[rng.choice(len(region), 40, replace=False)]
        for name, found in (
            ("tiles", areas.clustered(mapped, sample)),
            ("pixels", areas.stratified(mapped, sample.sum(0))),
        ):
            low, high = found.interval
            inside[name].append((low <= truth) & (truth <= high))
    rates = {name: np.mean(values, 0) for name, values in inside.items()}
    assert (np.abs(rates["tiles"] - 0.95) < 0.045).all(), rates
    assert (rates["pixels"] < 0.7).all(), rates


def test_what_the_sample_does_not_say_is_not_said():
    counts = COUNTS.copy()
    counts[1] = 0
    unknown = areas.stratified(MAPPED, counts)
    assert np.isnan(unknown.area).all() and np.isnan(unknown.users[1]) and unknown.users[0] == 0.88
    assert np.isnan(unknown.overall)
    without = areas.stratified(MAPPED * [1, 0, 1, 1], counts)  # nor was it mapped: then it does not matter
    assert np.isfinite(without.area).all() and np.isfinite(without.area_error).all()
    one = areas.clustered(MAPPED, COUNTS[None])
    np.testing.assert_allclose(one.area, areas.stratified(MAPPED, COUNTS).area)
    assert np.isnan(one.area_error).all() and np.isnan(one.interval).all()
    assert areas.stratified([1.0, 0.0], [[1, 0], [0, 0]]).area_error[0] != 0  # of a single unit nobody knows
    few = areas.stratified(np.array([1.0, 9.0]), np.array([[1, 2], [1, 2]])).interval
    assert few[0].min() == 0 and few[1].max() == 10
    with pytest.raises(ValueError, match="areas"):
        areas.stratified(MAPPED, COUNTS[:3])
