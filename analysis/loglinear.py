"""Loss against the logarithm of the number of slots, for one or two methods (paper, section 3.2). Numpy and scipy only.

    loss[method, size, seed] = a[seed] + offset[method] + slope[method] * log10(slots) + eps

by least squares, all methods at once, since runs of one seed share a[seed]. The residuals hold both noise and what a
line does not describe, so a curve that is no line widens the intervals. Losses are in nats per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from analysis.errors import UserError
from analysis.fits import LEVEL, Difference, Floats

RESAMPLES = 20_000


@dataclass(frozen=True)
class Line:
    """One method's line."""

    method: str
    intercept: float
    """At one slot, for the mean seed."""
    slope: Difference
    """Nats per token for ten times the slots; negative is better."""
    curvature: Difference | None
    """Coefficient of log10(slots)^2 when such a term is added for every method; None below four sizes."""
    r2: float
    """Share of the variance of the mean losses that the line explains."""
    n_sizes: int
    low_slots: float
    high_slots: float

    def __call__(self, slots: Floats) -> Floats:
        return np.asarray(self.intercept + self.slope.value * np.log10(slots))


@dataclass(frozen=True)
class Scaling:
    """The lines of all methods, and how they compare."""

    lines: tuple[Line, ...]
    ratio: Difference | None
    """Slots of the second method over slots of the first at equal loss, at the middle of the second's sizes; None for
    one method, or where a slope is not negative. Its bounds are None where they are not finite."""
    at_loss: float | None
    """The loss at which the ratio is taken."""


def scaling(method: Sequence[str], slots: Sequence[float], seed: Sequence[int], loss: Sequence[float]) -> Scaling:
    """Fit every method's line.

    Args:
        method: of every run; the first that appears is the first of the ratio.
        slots: rows of all tables, above 0.
        seed: of every run.
        loss: validation loss.

    Raises:
        UserError: a method has fewer than three sizes, through which a line always goes almost.
    """
    methods, x, y = list(dict.fromkeys(method)), np.log10(np.array(slots, dtype=float)), np.array(loss, dtype=float)
    of = np.array([methods.index(m) for m in method])
    for m, name in enumerate(methods):
        if len(np.unique(x[of == m])) < 3:
            raise UserError(f"{name} has {len(np.unique(x[of == m]))} sizes: a line in log slots needs at least three")
    seeds = sorted(set(seed))
    dummies = np.array([[float(s == one) for one in seeds] for s in seed])
    offsets = np.stack([(of == m).astype(float) for m in range(1, len(methods))], axis=1)
    slopes = np.stack([(of == m) * x for m in range(len(methods))], axis=1)
    design = np.hstack([dummies, offsets, slopes])
    beta, cov, df = _least_squares(design, y)
    bendable = [m for m in range(len(methods)) if len(np.unique(x[of == m])) >= 4]
    squares = [((of == m) * (x - x.mean()) ** 2)[:, None] for m in bendable]  # centred, or it nearly repeats the slope
    bent, bent_cov, bent_df = _least_squares(np.hstack([design, *squares]), y)
    n_seeds, n_methods = len(seeds), len(methods)
    lines = []
    for m, name in enumerate(methods):
        at = n_seeds + n_methods - 1 + m
        intercept = float(beta[:n_seeds].mean() + (beta[n_seeds + m - 1] if m else 0.0))
        curvature = None
        if m in bendable:
            square = design.shape[1] + bendable.index(m)
            curvature = _interval(float(bent[square]), bent_cov[square, square], bent_df)
        sizes = 10 ** x[of == m]
        lines.append(
            Line(
                name,
                intercept,
                _interval(float(beta[at]), cov[at, at], df),
                curvature,
                _r2(x[of == m], y[of == m]),
                len(np.unique(sizes)),
                float(sizes.min()),
                float(sizes.max()),
            )
        )
    if n_methods < 2:
        return Scaling(tuple(lines), None, None)
    middle = float((x[of == 1].min() + x[of == 1].max()) / 2)
    ratio, at_loss = _ratio(beta, cov, df, n_seeds, n_methods, middle)
    return Scaling(tuple(lines), ratio, at_loss)


def _least_squares(design: Floats, y: Floats) -> tuple[Floats, Floats, int]:
    """Coefficients, their covariance (nan without a degree of freedom) and the degrees of freedom."""
    inverse = np.linalg.pinv(design.T @ design)
    beta = np.linalg.pinv(design) @ y
    df = len(y) - int(np.linalg.matrix_rank(design))
    variance = float(np.sum((y - design @ beta) ** 2)) / df if df > 0 else float("nan")
    return beta, np.asarray(inverse * variance, dtype=np.float64), df


def _interval(value: float, variance: float, df: int) -> Difference:
    if df <= 0:
        return Difference(value, None, None)
    half = float(stdtrit(df, (1 + LEVEL) / 2)) * float(np.sqrt(variance))
    return Difference(value, value - half, value + half)


def _r2(x: Floats, y: Floats) -> float:
    sizes = np.unique(x)
    means = np.array([y[x == size].mean() for size in sizes])
    total = float(np.sum((means - means.mean()) ** 2))
    rest = float(np.sum((means - np.polyval(np.polyfit(sizes, means, 1), sizes)) ** 2))
    return 1 - rest / total if total > 0 else 1.0


def _ratio(
    beta: Floats, cov: Floats, df: int, n_seeds: int, n_methods: int, middle: float
) -> tuple[Difference | None, float | None]:
    """10^(x2 - x1) where both lines reach one loss, with quantiles over coefficients drawn from their t distribution.

    Returns:
        The ratio and the loss; None for both where a slope is not negative.
    """

    def log_ratio(b: Floats) -> Floats:
        offset, first, second = b[..., n_seeds], b[..., n_seeds + n_methods - 1], b[..., n_seeds + n_methods]
        gap = offset + (second - first) * middle  # second minus first, at the middle
        return np.asarray(np.where(first < 0, -gap / np.where(first < 0, first, -1.0), np.inf))

    at_loss = float(beta[:n_seeds].mean() + beta[n_seeds] + beta[n_seeds + n_methods] * middle)
    value = float(log_ratio(beta))
    if not np.isfinite(value) or beta[n_seeds + n_methods] >= 0:
        return None, None
    if df <= 0:
        return Difference(10**value, None, None), at_loss
    rng = np.random.default_rng(0)
    noise = rng.multivariate_normal(np.zeros(len(beta)), cov, RESAMPLES, method="svd")
    draws = log_ratio(beta + noise / np.sqrt(rng.chisquare(df, (RESAMPLES, 1)) / df))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(draws, [tail, 1 - tail], method="nearest")
    bounds = [float(10**q) if np.isfinite(q) else None for q in (low, high)]
    return Difference(10**value, bounds[0], bounds[1]), at_loss
