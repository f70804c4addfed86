"""The jump at rho = 1: what having the module at all gains, apart from how capacity is split.

The paper's curve is a parabola whose right end jumps up. The jump is the loss at rho = 1 minus the parabola through all
other points, continued to rho = 1. Losses are in nats per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from analysis.fits import LEVEL, Difference, Sweep


@dataclass(frozen=True)
class Jump:
    """How far the loss at rho = 1 lies above the curve that leads to it."""

    height: Difference
    """A t interval, exact if the other points lie on a parabola."""
    continued: float
    """The parabola's value at rho = 1."""
    share: float | None
    """Height over the gain of the lowest point over rho = 1; None if there is no gain."""


def jump(sweep: Sweep) -> Jump | None:
    """Measure the jump; None with fewer than four points besides rho = 1, which a parabola would only interpolate."""
    inside, mean = sweep.rho[:-1], sweep.mean
    if len(inside) < 4:
        return None
    # The height is a weighted sum of the means, so its variance is known.
    design = np.vander(inside, 3)
    at_one = np.vander(np.array([sweep.rho[-1]]), 3)[0] @ np.linalg.pinv(design)
    weights = np.append(-at_one, 1.0)
    height, gain = float(weights @ mean), float(mean[-1] - mean.min())
    share = height / gain if gain > 0 else None
    low = high = None
    if sweep.sigma is not None:
        half = float(stdtrit(sweep.df, (1 + LEVEL) / 2)) * sweep.sigma
        half *= float(np.sqrt(np.sum(weights**2) / len(sweep.seeds)))
        low, high = height - half, height + half
    return Jump(Difference(height, low, high), float(at_one @ mean[:-1]), share)
