"""Areas of classes, corrected by a sample in which the map's errors were counted, and how sure they are.

Olofsson et al., Good practices for estimating area and assessing accuracy of land change, Remote Sensing of
Environment 148, 2014: the stratified estimator, its map classes being the strata. Of each class that was mapped the
sample says which share of it is what; these shares, weighted by the mapped areas, are the areas. Standard errors are
those of units drawn at random within each stratum (`stratified`), or of whole tiles (`clustered`), whose pixels are
alike: Taylor's linearisation of the same estimator, with tiles as clusters (Särndal et al., Model Assisted Survey
Sampling, 1992, sections 5.5 and 4.2).

Counts are (..., C, C) with map classes as rows and reference classes as columns, as in the paper; `confusion` has them
the other way round. Accuracies are fractions. NaN stands where the sample says nothing: a class that was mapped and
never sampled leaves all areas unknown.
"""

import dataclasses

import numpy as np
from scipy import special

TWO_SIDED = 0.975  # of 95 % intervals


@dataclasses.dataclass(frozen=True)
class Estimate:
    """float64 (C,) each, areas in the unit of those mapped; `_error` is a standard error."""

    area: np.ndarray
    area_error: np.ndarray
    users: np.ndarray  # of what was mapped as a class, the share that is one
    users_error: np.ndarray
    producers: np.ndarray  # of what is a class, the share that was mapped as one
    producers_error: np.ndarray
    overall: float
    overall_error: float
    quantile: float  # by which an error is half of a 95 % interval
    total: float

    @property
    def interval(self) -> tuple[np.ndarray, np.ndarray]:
        """95 %, of the areas; no area is below 0 or above all that was mapped."""
        half = self.quantile * self.area_error
        return np.clip(self.area - half, 0, self.total), np.clip(self.area + half, 0, self.total)


def stratified(mapped: np.ndarray, counts: np.ndarray) -> Estimate:
    """mapped: areas of the map classes (C,); counts: sampled units (C, C). Equations 1, 2, 4 to 7 and 9 to 11."""
    weights, n, shares = _parts(mapped, counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        variances = shares * (1 - shares) / (n - 1)[:, None]  # of the shares
        parts = _weighted(weights[:, None] ** 2, variances)
        right = np.diag(parts)
        found = _scores(weights, shares)
        producers_variance = (
            (1 - found["producers"]) ** 2 * right + found["producers"] ** 2 * (parts.sum(0) - right)
        ) / found["share"] ** 2
    quantile = float(special.ndtri(TWO_SIDED))
    variances = parts.sum(0), np.diag(variances), producers_variance, right.sum()
    return _estimate(mapped, found, variances, quantile)


def clustered(mapped: np.ndarray, by_tile: np.ndarray) -> Estimate:
    """by_tile: sampled pixels of each tile (n, C, C). Intervals are by Student's t, as tiles may be few."""
    by_tile = by_tile[by_tile.any((1, 2))].astype(np.float64)
    weights, n, shares = _parts(mapped, by_tile.sum(0))
    tiles = len(by_tile)
    with np.errstate(divide="ignore", invalid="ignore"):
        # What each tile adds to the shares' deviation, and so on: sums over tiles are 0.
        deviations = (by_tile - shares * by_tile.sum(2, keepdims=True)) / n[:, None]
        parts = _weighted(weights[:, None], deviations)
        found = _scores(weights, shares)
        area, right = parts.sum(1), np.diagonal(parts, axis1=1, axis2=2)
        producers = (right - found["producers"] * area) / found["share"]
        users = np.diagonal(deviations, axis1=1, axis2=2)
        more = tiles / (tiles - 1) if tiles > 1 else np.nan
        variances = [more * (values**2).sum(0) for values in (area, users, producers, right.sum(1))]
    quantile = float(special.stdtrit(tiles - 1, TWO_SIDED)) if tiles > 1 else float("nan")
    return _estimate(mapped, found, variances, quantile)


def _parts(mapped, counts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of the strata, sampled units of each, and their shares by reference class."""
    mapped, counts = np.asarray(mapped, np.float64), np.asarray(counts, np.float64)
    if counts.shape != (len(mapped),) * 2 or (counts < 0).any() or (mapped < 0).any():
        raise ValueError(f"areas (C,) and counts (C, C), none negative; got {mapped.shape} and {counts.shape}")
    n = counts.sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return mapped / mapped.sum(), n, counts / n[:, None]


def _weighted(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Their product; a stratum without area adds nothing, whatever is not known of it."""
    return np.where(weights > 0, weights * values, 0)


def _scores(weights: np.ndarray, shares: np.ndarray) -> dict:
    parts = _weighted(weights[:, None], shares)
    share, right = parts.sum(0), np.diag(parts)
    return {"share": share, "users": np.diag(shares), "producers": right / share, "overall": float(right.sum())}


def _estimate(mapped, found: dict, variances, quantile: float) -> Estimate:
    total = float(np.sum(mapped))
    area, users, producers, overall = (np.sqrt(variance) for variance in variances)
    return Estimate(
        total * found["share"], total * area, found["users"], users, found["producers"], producers, found["overall"],
        float(overall), quantile, total,
    )  # fmt: skip
