"""Comparisons of arms over shared seeds: differences, contrasts and families of them. Numpy and scipy only.

The model is that of `analysis.fits` with arms in place of rho: loss[arm, seed] = mu[arm] + a[seed] + eps, one variance
of eps for all arms, (A - 1)(S - 1) degrees of freedom. Losses are in nats per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.special import stdtr, stdtrit

from analysis.fits import DRAWS, LEVEL, Difference, Floats, two_way_residuals


@dataclass(frozen=True, eq=False)
class Paired:
    """Losses of the seeds that every arm has finished."""

    names: tuple[str, ...]
    seeds: tuple[int, ...]
    loss: Floats
    """[A, S]"""
    dropped_seeds: tuple[int, ...] = ()
    """Seeds that some arm lacks."""

    @property
    def df(self) -> int:
        return (len(self.names) - 1) * (len(self.seeds) - 1)

    @property
    def sigma(self) -> float | None:
        """Standard deviation of eps; None for one seed or one arm."""
        return float(np.sqrt(np.sum(two_way_residuals(self.loss) ** 2) / self.df)) if self.df > 0 else None

    def mean(self, name: str) -> float:
        return float(self.loss[self.names.index(name)].mean())


@dataclass(frozen=True)
class Comparison:
    """One arm of a family against the family's reference."""

    name: str
    difference: Difference
    """Arm minus reference; the interval holds for the whole family at once."""
    p: float | None
    """Two-sided, for this comparison alone."""
    p_holm: float | None
    """The same, corrected for the family by Holm's method."""


def paired(losses: Mapping[str, Mapping[int, float]]) -> Paired | None:
    """Arrange losses, arm -> seed -> loss, over the seeds that all arms share; None if there is no such seed."""
    finished = {name: {s for s, v in of.items() if np.isfinite(v)} for name, of in losses.items()}
    if not finished or not (shared := set.intersection(*finished.values())):
        return None
    seeds = tuple(sorted(shared))
    table = np.array([[losses[name][s] for s in seeds] for name in losses])
    dropped = tuple(sorted(set.union(*finished.values()) - shared))
    return Paired(tuple(losses), seeds, table, dropped)


def contrast(table: Paired, weights: Mapping[str, float], family: int = 1) -> Difference:
    """A weighted sum of mean losses with its t interval.

    Args:
        table: paired losses.
        weights: arm -> weight; they add up to zero, so that the seed's effect drops out.
        family: how many such contrasts are looked at together; Bonferroni widens the interval accordingly.
    """
    w = np.array([weights.get(name, 0.0) for name in table.names])
    assert abs(w.sum()) < 1e-12, f"weights must add up to zero: {dict(weights)}"
    value = float(w @ table.loss.mean(axis=1))
    if table.sigma is None:
        return Difference(value, None, None)
    t = float(stdtrit(table.df, 1 - (1 - LEVEL) / 2 / family))
    half = t * table.sigma * float(np.sqrt(np.sum(w**2) / len(table.seeds)))
    return Difference(value, value - half, value + half)


def against(table: Paired, reference: str, names: Sequence[str]) -> tuple[Comparison, ...]:
    """Compare arms with a reference: Dunnett's simultaneous intervals, and p values corrected by Holm's method."""
    if table.sigma is None:
        return tuple(Comparison(n, contrast(table, {n: 1, reference: -1}), None, None) for n in names)
    se = table.sigma * float(np.sqrt(2 / len(table.seeds)))
    half = many_to_one(len(names), table.df) * se
    values = [table.mean(name) - table.mean(reference) for name in names]
    p = [2 * float(stdtr(table.df, -abs(value) / se)) for value in values]
    return tuple(
        Comparison(name, Difference(value, value - half, value + half), one, corrected)
        for name, value, one, corrected in zip(names, values, p, holm(p), strict=True)
    )


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction: the j-th smallest of n times (n - j + 1), kept rising and at most 1."""
    corrected = [0.0] * len(p)
    least = 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        least = max(least, min(1.0, p[i] * (len(p) - rank)))
        corrected[i] = least
    return corrected


@lru_cache
def many_to_one(n_arms: int, df: int) -> float:
    """The 95 percent quantile of the largest |t| of `n_arms` comparisons with one reference, by simulation."""
    rng = np.random.default_rng(0)
    means = rng.standard_normal((DRAWS, n_arms + 1))
    scale = np.sqrt(2 * rng.chisquare(df, DRAWS) / df)
    return float(np.quantile(np.abs(means[:, 1:] - means[:, :1]).max(axis=1) / scale, LEVEL))
