"""What a claim is, and the rules that claims share, written down before the runs.

They were written after the curve over rho of `results/reference/runs.csv` had been seen, and before all other runs.

A claim is a function from a budget's runs to an Answer; its docstring is its rule. Intervals are 95 percent, and
simultaneous where several arms are looked at together. Everything is in nats per token of validation loss unless a
claim says otherwise. The rules they share:

* better: "reproduced" if the interval of the gain lies above zero, "contradicted" if below, else "undecided".
* no difference: "reproduced" if the interval lies within MARGIN of zero, "contradicted" if it lies beyond MARGIN on one
  side, else "undecided".
* One seed allows no interval: "undecided". A claim whose runs are missing is "not run".
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from analysis.dossier import Dossier
from analysis.fits import Difference

Verdict = Literal["reproduced", "contradicted", "undecided", "not run"]

MARGIN = 0.0025
"""Losses closer than this count as equal: half of the smallest effect that the paper calls one (the gate, 0.0046)."""


@dataclass(frozen=True)
class Answer:
    """What the runs say about a claim."""

    verdict: Verdict
    measured: str
    """Ours in words, with the interval."""
    value: Difference | None
    """The number behind it; None if not run, or if the claim is about a shape."""
    n_seeds: int


@dataclass(frozen=True)
class Claim:
    """A statement that runs can decide."""

    key: str
    text: str
    source: str
    """Section and figure of the paper, or `ours`."""
    paper: str
    """The paper's number."""
    suite: str
    """Whose runs decide it."""
    judge: Callable[[Dossier], Answer | None]

    @property
    def rule(self) -> str:
        """How it is judged."""
        return inspect.cleandoc(self.judge.__doc__ or "")


def not_run(why: str) -> Answer:
    """The answer of a claim that has no runs."""
    return Answer("not run", why, None, 0)


def better(gain: Difference) -> Verdict:
    """The rule `better`."""
    if gain.low is None or gain.high is None:
        return "undecided"
    return "reproduced" if gain.low > 0 else "contradicted" if gain.high < 0 else "undecided"


def no_difference(difference: Difference) -> Verdict:
    """The rule `no difference`."""
    return within(difference, -MARGIN, MARGIN)


def within(value: Difference, low: float, high: float) -> Verdict:
    """Reproduced if the interval lies between the bounds, contradicted if it lies beyond one, else undecided."""
    if value.low is None or value.high is None:
        return "undecided"
    if low <= value.low and value.high <= high:
        return "reproduced"
    return "contradicted" if value.low > high or value.high < low else "undecided"


def words(difference: Difference, digits: int = 4, sign: Literal["+", ""] = "+") -> str:
    """A number with its interval: `+0.0139 (+0.0091 to +0.0183)`."""
    form = f"{sign}.{digits}f"
    text = format(difference.value, form)
    if difference.low is None or difference.high is None:
        return f"{text} (one seed: no interval)"
    return f"{text} ({format(difference.low, form)} to {format(difference.high, form)})"
