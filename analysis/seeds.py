"""How much one run's loss moves with its seed, and with nothing at all: the error bar of everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import chdtri, stdtrit

from analysis.fits import LEVEL, Difference


@dataclass(frozen=True)
class Noise:
    """Spread of the loss over seeds of one spec, in nats per token."""

    n: int
    mean: float
    sd: Difference
    """Standard deviation with its chi-square interval."""
    detectable: float
    """Smallest difference of two single runs of different seeds that a 95 percent interval would tell from zero."""
    replicates: tuple[float, ...]
    """Loss of a repeated run minus that of its first, seed by seed: 0 where runs are deterministic."""


def noise(losses: Mapping[int, float], replicates: Sequence[tuple[int, float]] = ()) -> Noise | None:
    """Measure the spread; None with fewer than two seeds.

    Args:
        losses: seed -> validation loss.
        replicates: seed and loss of runs that repeat one of those.
    """
    if len(losses) < 2:
        return None
    values = np.array(list(losses.values()))
    df, sd = len(values) - 1, float(values.std(ddof=1))
    tail = (1 - LEVEL) / 2
    # chdtri inverts the upper tail.
    low, high = sd * float(np.sqrt(df / chdtri(df, tail))), sd * float(np.sqrt(df / chdtri(df, 1 - tail)))
    detectable = float(stdtrit(df, 1 - tail)) * sd * float(np.sqrt(2))
    again = tuple(value - losses[seed] for seed, value in replicates if seed in losses)
    return Noise(len(values), float(values.mean()), Difference(sd, low, high), detectable, again)
