"""The loss curve over rho: paired model, parabolas, optimum and differences with intervals. Numpy and scipy only.

The model of the data is loss[rho, seed] = mu[rho] + a[seed] + eps. Runs of one seed share initial weights and data
order (common random numbers), so a[seed] moves a whole curve and drops out of differences between rho. What is left,
eps, has one variance for all rho, estimated with (R - 1)(S - 1) degrees of freedom. Losses are in nats per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from analysis.errors import UserError

Floats = npt.NDArray[np.float64]

LEVEL = 0.95
REFERENCE = 1.0
"""rho of the pure mixture of experts."""
SAME_RHO = 1e-9
RESAMPLES = 4000
DRAWS = 40_000
"""Draws behind a simultaneous quantile: its Monte Carlo error is below one percent."""


@dataclass(frozen=True)
class Difference:
    """A difference of losses and its interval; no interval where one seed leaves no residuals."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Gain:
    """How far one interior rho lies below both ends of the grid; positive is better. Intervals are simultaneous."""

    rho: float
    over_reference: Difference
    """Loss at rho = 1 minus loss here: at the best interior rho, the depth of the U."""
    over_smallest: Difference
    """Loss at the smallest rho minus loss here."""


@dataclass(frozen=True)
class Parabola:
    """Least squares a rho^2 + b rho + c, and its minimum where that is an optimum."""

    a: float
    b: float
    c: float
    rms: float
    """Root mean square of the residuals."""
    n: int
    optimum: float | None
    """rho of the vertex; None if the parabola opens downward or its vertex lies outside the fitted points."""
    value: float | None
    why_not: str
    """Why there is no optimum; empty if there is one."""

    def __call__(self, rho: Floats) -> Floats:
        return self.a * rho**2 + self.b * rho + self.c


@dataclass(frozen=True)
class Optimum:
    """Where the mean curve is lowest. With an `edge` it is the edge of the grid, and not an optimum."""

    rho: float
    loss: float
    edge: Literal["smallest", "largest"] | None
    low: float | None
    """95 percent bootstrap interval of rho."""
    high: float | None
    edge_share: float | None
    """Share of the resamples whose minimum lies on an edge of the grid."""


def two_way_residuals(loss: Floats) -> Floats:
    """[A, S] losses of A arms over S seeds, less the means of both: what neither the arm nor the seed explains."""
    return np.asarray(loss - loss.mean(axis=1, keepdims=True) - loss.mean(axis=0) + loss.mean())


@dataclass(frozen=True, eq=False)
class Sweep:
    """Losses of the seeds that finished at every rho."""

    rho: Floats
    """[R], rising; the last is the reference, 1."""
    seeds: tuple[int, ...]
    loss: Floats
    """[R, S]"""
    dropped_seeds: tuple[int, ...] = ()
    """Seeds left out because a run is missing or diverged at some rho."""
    dropped_rhos: tuple[float, ...] = ()
    """Ratios left out because no seed finished there."""

    @property
    def mean(self) -> Floats:
        return np.asarray(self.loss.mean(axis=1))

    @property
    def residuals(self) -> Floats:
        """[R, S]: what neither rho nor the seed explains."""
        return two_way_residuals(self.loss)

    @property
    def df(self) -> int:
        return (len(self.rho) - 1) * (len(self.seeds) - 1)

    @property
    def sigma(self) -> float | None:
        """Standard deviation of eps, one run's noise after its seed's main effect; None for one seed."""
        return float(np.sqrt(np.sum(self.residuals**2) / self.df)) if self.df > 0 else None


def pair(rho: Sequence[float], seed: Sequence[int], loss: Sequence[float]) -> Sweep:
    """Arrange runs as a table of rho by seed; a run without a finite loss counts as missing.

    Raises:
        UserError: there is no run at rho = 1, or no seed finished everywhere.
    """
    cells: dict[tuple[float, int], float] = {}
    for r, s, value in zip(rho, seed, loss, strict=True):
        assert (r, s) not in cells, f"two runs at rho {r}, seed {s}"
        cells[r, s] = value
    finished = {place for place, value in cells.items() if np.isfinite(value)}
    rhos = sorted({r for r, _ in finished})
    if not rhos or abs(rhos[-1] - REFERENCE) > SAME_RHO:
        raise UserError("no finished run at rho = 1: every difference is taken from it, so train that run first")
    seeds = sorted({s for _, s in cells})
    complete = [s for s in seeds if all((r, s) in finished for r in rhos)]
    if not complete:
        holes = ", ".join(f"rho {r:.4g} seed {s}" for s in seeds for r in rhos if (r, s) not in finished)
        raise UserError(f"no seed has finished at every rho: {holes} missing or diverged")
    return Sweep(
        rho=np.array(rhos),
        seeds=tuple(complete),
        loss=np.array([[cells[r, s] for s in complete] for r in rhos]),
        dropped_seeds=tuple(s for s in seeds if s not in complete),
        dropped_rhos=tuple(sorted({r for r, _ in cells} - set(rhos))),
    )


def parabola(rho: Floats, loss: Floats) -> Parabola | None:
    """Fit a parabola by least squares; None below four points, where it would only interpolate."""
    if len(rho) < 4:
        return None
    a, b, c = (float(v) for v in np.polyfit(rho, loss, 2))
    rms = float(np.sqrt(np.mean((np.polyval([a, b, c], rho) - loss) ** 2)))
    vertex = -b / (2 * a) if a != 0 else float("inf")
    why_not = ""
    if a <= 0:
        why_not = "opens downward"
    elif not rho.min() < vertex < rho.max():
        why_not = f"vertex at rho = {vertex:.2f}, outside the fitted points"
    optimum = None if why_not else vertex
    value = None if why_not else c - b**2 / (4 * a)
    return Parabola(a, b, c, rms, len(rho), optimum, value, why_not)


def optimum(sweep: Sweep, resamples: int = RESAMPLES) -> Optimum:
    """Find the minimum of the mean curve and its bootstrap interval from paired seeds.

    A resample adds to the means the average of S residuals drawn with replacement. Residuals are scaled up for the
    degrees of freedom that the two-way fit took; each resample also divides by a draw of sqrt(chi2 / df), because
    sigma itself is an estimate. Without that, 2 seeds and 7 rhos covered 85 to 93 percent; with it, 94 to 99.
    """
    mean, n_rho = sweep.mean, len(sweep.rho)
    where, value = (float(v[0]) for v in _lowest(sweep.rho, mean[None]))
    best = int(np.argmin(mean))
    edge: Literal["smallest", "largest"] | None = "smallest" if best == 0 else "largest" if best == n_rho - 1 else None
    if sweep.df == 0:
        return Optimum(where, value, edge, None, None, None)
    places = optimum_draws(sweep, resamples, np.random.default_rng(0))
    tail = (1 - LEVEL) / 2
    low, high = (float(q) for q in np.quantile(places, [tail, 1 - tail]))
    return Optimum(where, value, edge, low, high, float(np.isin(places, sweep.rho[[0, -1]]).mean()))


def optimum_draws(sweep: Sweep, resamples: int, rng: np.random.Generator) -> Floats:
    """[N] minima of resampled mean curves, as `optimum` describes them; needs more than one seed."""
    assert sweep.df > 0, "one seed leaves no residuals to draw from"
    n_rho, n_seeds = len(sweep.rho), len(sweep.seeds)
    pool = (sweep.residuals * np.sqrt(n_rho * n_seeds / sweep.df)).ravel()
    noise = pool[rng.integers(0, pool.size, (resamples, n_rho, n_seeds))].mean(axis=2)
    noise /= np.sqrt(rng.chisquare(sweep.df, (resamples, 1)) / sweep.df)
    return _lowest(sweep.rho, sweep.mean + noise)[0]


def gains(sweep: Sweep) -> tuple[Gain, ...]:
    """Compare every interior rho with both ends of the grid, with simultaneous intervals (see `_half_width`)."""
    mean, half = sweep.mean, _half_width(sweep)
    return tuple(
        Gain(float(sweep.rho[i]), _difference(mean[-1] - mean[i], half), _difference(mean[0] - mean[i], half))
        for i in range(1, len(sweep.rho) - 1)
    )


def offsets(sweep: Sweep) -> tuple[Difference, ...]:
    """Loss at each rho minus loss at rho = 1, with the same simultaneous intervals; the last is 0 without one."""
    half = _half_width(sweep)
    return (*(_difference(d, half) for d in sweep.mean[:-1] - sweep.mean[-1]), Difference(0.0, None, None))


def against_reference(sweep: Sweep, seeds: Sequence[int], loss: Sequence[float]) -> Difference | None:
    """Compare an arm that is not on the curve with rho = 1, seed by seed: arm minus reference.

    A t interval for this one comparison. The variance is pooled over the sweep's residuals and the arm's own, as if
    the arm were one more row of the two-way table: two seeds alone would leave one degree of freedom.

    Returns:
        None if the arm shares no finished seed with the sweep.
    """
    losses = {s: v for s, v in zip(seeds, loss, strict=True) if np.isfinite(v)}
    common = [i for i, s in enumerate(sweep.seeds) if s in losses]
    if not common:
        return None
    arm = np.array([losses[sweep.seeds[i]] for i in common])
    value = float(np.mean(arm - sweep.loss[-1, common]))
    n_rho, df = len(sweep.rho), sweep.df + len(common) - 1
    if df == 0:
        return Difference(value, None, None)
    beside = arm - sweep.loss[:, common].mean(axis=0)
    own = n_rho / (n_rho + 1) * float(np.sum((beside - beside.mean()) ** 2))
    sigma = np.sqrt((float(np.sum(sweep.residuals**2)) + own) / df)
    return _difference(value, float(stdtrit(df, (1 + LEVEL) / 2)) * sigma * np.sqrt(2 / len(common)))


def _difference(value: float, half: float | None) -> Difference:
    low, high = (None, None) if half is None else (float(value - half), float(value + half))
    return Difference(float(value), low, high)


def _lowest(rho_R: Floats, curves_NR: Floats) -> tuple[Floats, Floats]:
    """Minimum of each curve by a parabola through its lowest point and that point's two neighbours.

    Not by PCHIP: that is monotone between neighbouring points, so its minimum is always a grid point. Not by one
    parabola for all points: a jump at rho = 1, which the paper's curve has, drags its vertex.
    """
    at = np.argmin(curves_NR, axis=1)
    rows = np.arange(len(curves_NR))
    lowest = curves_NR[rows, at]
    if len(rho_R) < 3:
        return rho_R[at], lowest
    mid = np.clip(at, 1, len(rho_R) - 2)
    x0, x1, x2 = rho_R[mid - 1], rho_R[mid], rho_R[mid + 1]
    y0, y1, y2 = curves_NR[rows, mid - 1], curves_NR[rows, mid], curves_NR[rows, mid + 1]
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    bend = (right - left) / (x2 - x0)
    inside = (mid == at) & (bend > 0)
    vertex = (x0 + x1) / 2 - left / (2 * np.where(inside, bend, 1.0))
    depth = bend * (vertex - x1) ** 2
    return np.where(inside, vertex, rho_R[at]), np.where(inside, lowest - depth, lowest)


def _half_width(sweep: Sweep) -> float | None:
    """Half-width of all intervals between an end of the grid and another rho, at once at 95 percent.

    Dunnett's, with both ends as controls: a quantile of the largest |t| over the family, simulated with the pooled
    variance. So an interval still holds at whichever rho turns out best.
    """
    if sweep.sigma is None or len(sweep.rho) < 2:
        return None
    return _max_t(len(sweep.rho), sweep.df) * sweep.sigma * float(np.sqrt(2 / len(sweep.seeds)))


@lru_cache
def _max_t(n_rho: int, df: int) -> float:
    rng = np.random.default_rng(0)
    means = rng.standard_normal((DRAWS, n_rho))
    scale = np.sqrt(2 * rng.chisquare(df, DRAWS) / df)
    to_ends = np.maximum(np.abs(means - means[:, :1]), np.abs(means - means[:, -1:]))
    return float(np.quantile(to_ends.max(axis=1) / scale, LEVEL))
