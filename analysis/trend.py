"""Does the best rho move with compute, with P_tot / P_act, with tokens per parameter? Numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from analysis.fits import LEVEL, RESAMPLES, Difference, Floats, Optimum, Sweep, optimum, optimum_draws


@dataclass(frozen=True)
class Trend:
    """The line of the optimum over the logarithm of what varies."""

    x: tuple[float, ...]
    optima: tuple[Optimum, ...]
    slope: Difference
    """Change of the best rho for ten times x; no interval where some level has one seed."""
    at_edge: tuple[float, ...]
    """Levels whose lowest loss is on an edge of the grid: there the slope is about the grid as well."""


def trend(x: Sequence[float], sweeps: Sequence[Sweep]) -> Trend | None:
    """Fit rho*[level] = a + b log10(x[level]) to the optima of several sweeps at once.

    The interval is the bootstrap's: every level's optimum is resampled as in `analysis.fits.optimum`, and a line is put
    through each set of draws. Levels count as independent.

    Args:
        x: what varies, above 0.
        sweeps: one for each.

    Returns:
        None with fewer than two different x.
    """
    logs = np.log10(np.array(x, dtype=float))
    if len(set(x)) < 2:
        return None
    optima = tuple(optimum(sweep) for sweep in sweeps)
    value = float(_slope(logs, np.array([[place.rho for place in optima]]))[0])
    slope = Difference(value, None, None)
    if all(sweep.df > 0 for sweep in sweeps):
        rng = np.random.default_rng(0)
        draws = np.stack([optimum_draws(sweep, RESAMPLES, rng) for sweep in sweeps], axis=1)
        tail = (1 - LEVEL) / 2
        low, high = (float(q) for q in np.quantile(_slope(logs, draws), [tail, 1 - tail]))
        slope = Difference(value, low, high)
    at_edge = tuple(float(v) for v, place in zip(x, optima, strict=True) if place.edge is not None)
    return Trend(tuple(float(v) for v in x), optima, slope, at_edge)


def _slope(logs_L: Floats, rho_NL: Floats) -> Floats:
    """Least-squares slopes of N rows over the L levels."""
    centred = logs_L - logs_L.mean()
    return np.asarray(rho_NL @ centred / np.sum(centred**2))
