"""What a sweep shows, decided by a rule that was fixed before any run, and said in one sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from analysis.fits import Difference, Gain, Optimum, Parabola, Sweep, gains, optimum, parabola

TINY_P_ACT = 50e6
"""Below this many active parameters a curve says little about the paper's models (568M and 993M)."""


@dataclass(frozen=True)
class Verdict:
    """A sweep's numbers, and the answer they allow."""

    answer: Literal["U", "no U", "undecided"]
    sentence: str
    n_seeds: int
    sigma: float | None
    """One run's noise in nats per token, after its seed's main effect."""
    optimum: Optimum
    best: Gain | None
    """The interior rho with the lowest mean loss; `best.over_reference` is the depth of the U."""
    gains: tuple[Gain, ...]
    quadratic: Parabola | None
    quadratic_without_reference: Parabola | None


def judge(sweep: Sweep, p_act: float) -> Verdict:
    """Decide whether the loss over rho is a U.

    The rule. All intervals are 95 percent and simultaneous over the comparisons of every rho with both ends of the
    grid (rho = 1 and the smallest rho), so that choosing the best point after looking does not flatter it.

    * "U": some interior rho beats both ends, with both lower bounds above zero.
    * "no U": one end beats every interior rho, with every bound beyond zero; or the lowest point is an end and the
      optimum's bootstrap interval holds nothing but that end.
    * "undecided": anything else; always with one seed, which allows no interval.

    Args:
        sweep: Losses over rho and seeds.
        p_act: Active parameters of a run; small ones add a warning to the sentence.
    """
    interior = gains(sweep)
    place = optimum(sweep)
    best = max(interior, key=lambda gain: gain.over_reference.value, default=None)
    answer = _answer(sweep, interior, place)
    return Verdict(
        answer=answer,
        sentence=_sentence(sweep, answer, place, best, p_act),
        n_seeds=len(sweep.seeds),
        sigma=sweep.sigma,
        optimum=place,
        best=best,
        gains=interior,
        quadratic=parabola(sweep.rho, sweep.mean),
        quadratic_without_reference=parabola(sweep.rho[:-1], sweep.mean[:-1]),
    )


def _answer(sweep: Sweep, interior: tuple[Gain, ...], place: Optimum) -> Literal["U", "no U", "undecided"]:
    if not interior or sweep.sigma is None:
        return "undecided"
    if any(_above(gain.over_reference) and _above(gain.over_smallest) for gain in interior):
        return "U"
    if all(_below(gain.over_reference) for gain in interior) or all(_below(gain.over_smallest) for gain in interior):
        return "no U"
    if place.edge is not None and place.low == place.high:
        return "no U"
    return "undecided"


def _above(difference: Difference) -> bool:
    return difference.low is not None and difference.low > 0


def _below(difference: Difference) -> bool:
    return difference.high is not None and difference.high < 0


def _sentence(sweep: Sweep, answer: str, place: Optimum, best: Gain | None, p_act: float) -> str:
    smallest = float(sweep.rho[0])
    parts = [_where(sweep, place)]
    if best is not None:
        parts.append(
            f"the best interior rho, {best.rho:.2f}, lies {_over(best.over_reference)} rho = 1 "
            f"and {_over(best.over_smallest)} rho = {smallest:.2f}"
        )
    else:
        parts.append("the grid has no interior rho")
    parts.append(_seeds(sweep))
    if p_act < TINY_P_ACT:
        parts.append(f"tiny models (P_act {p_act / 1e6:.3g}M): says little about the paper's scale")
    return f"{answer[0].upper()}{answer[1:]}: {'; '.join(parts)}."


def _where(sweep: Sweep, place: Optimum) -> str:
    if place.edge is not None:
        text = f"the loss is lowest on the {place.edge} rho of the grid, {place.rho:.2f}, which is no optimum"
        share = "" if place.edge_share is None else f" ({place.edge_share:.0%} of resamples end on an edge)"
        return text + share
    text = f"the loss is lowest near rho = {place.rho:.2f}"
    if place.low is None:
        return text
    return f"{text} (95% bootstrap interval {place.low:.2f} to {place.high:.2f})"


def _over(difference: Difference) -> str:
    """A signed distance in words: `0.0137 (0.0091 to 0.0183) below`."""
    sign, side = (1, "below") if difference.value >= 0 else (-1, "above")
    text = f"{sign * difference.value:.4f}"
    if difference.low is not None and difference.high is not None:
        low, high = sorted((sign * difference.low, sign * difference.high))
        text += f" ({low:.4f} to {high:.4f})"
    return f"{text} {side}"


def _seeds(sweep: Sweep) -> str:
    n = len(sweep.seeds)
    text = "one seed, so no intervals" if n == 1 else f"{n} seeds, 95% simultaneous intervals in nats per token"
    if sweep.dropped_seeds:
        text += f", {len(sweep.dropped_seeds)} more left out for missing or diverged runs"
    if sweep.dropped_rhos:
        text += ", no run finished at rho " + ", ".join(f"{rho:.2f}" for rho in sweep.dropped_rhos)
    return text
