"""Claims about the curve over rho: its shape, where its minimum lies, and what the gain comes from (section 3.1)."""

from __future__ import annotations

from analysis.compare import contrast
from analysis.dossier import Dossier, Level, interior, rho_name
from analysis.fits import Difference
from analysis.rules import MARGIN, Answer, Claim, Verdict, better, not_run, within, words
from analysis.trend import Trend, trend

PAPERS_OPTIMUM = (0.75, 0.80)
NARROW = 0.15
"""An interval of the optimum that is wider says nothing about a claim that is 0.05 wide."""
STABLE = 0.1
"""Change of the best rho over a factor of ten that still counts as none: twice the width of the paper's claim."""
NEAR = 0.05
"""How far from rho = 0.40 a grid's point may lie to stand for it."""


def u_shape(dossier: Dossier) -> Answer | None:
    """The rule of `analysis.verdict`: reproduced is its "U", contradicted its "no U"."""
    if (study := dossier.study) is None:
        return None
    verdict = study.verdict
    answers: dict[str, Verdict] = {"U": "reproduced", "no U": "contradicted", "undecided": "undecided"}
    best = verdict.best
    measured = "no rho between the ends of the grid"
    if best is not None:
        measured = (
            f"rho = {best.rho:.2f}: {words(best.over_reference)} below rho = 1, "
            f"{words(best.over_smallest)} below rho = {study.sweep.rho[0]:.2f}"
        )
    return Answer(answers[verdict.answer], measured, best.over_reference if best else None, verdict.n_seeds)


def optimum_place(dossier: Dossier) -> Answer | None:
    """Reproduced if the bootstrap interval of the best rho is at most 0.15 wide and shares a point with 0.75 to 0.80;
    contradicted if it shares none; else undecided. A minimum on an edge of the grid is never reproduced."""
    if (study := dossier.study) is None:
        return None
    place, (low, high) = study.verdict.optimum, PAPERS_OPTIMUM
    value = Difference(place.rho, place.low, place.high)
    verdict: Verdict = "undecided"
    if place.low is not None and place.high is not None:
        if place.low > high or place.high < low:
            verdict = "contradicted"
        elif place.high - place.low <= NARROW and place.edge is None:
            verdict = "reproduced"
    edge = f", on the {place.edge} rho of the grid" if place.edge else ""
    return Answer(verdict, f"rho = {words(value, digits=2, sign='')}{edge}", value, len(study.sweep.seeds))


def optimum_stable(dossier: Dossier) -> Answer | None:
    """The line of the best rho over log10 FLOPs through this budget and all others of the table that have one curve of
    equal corpus and code: reproduced if the interval of its slope lies within 0.1 for ten times the FLOPs, contradicted
    if beyond, else undecided; not run with one budget. Undecided too if a budget's lowest loss is on an edge of its
    grid."""
    return _moves(dossier.across, "FLOPs")


def optimum_over_sparsity(dossier: Dossier) -> Answer | None:
    """As for compute, over log10 of P_tot / P_act at a fixed P_act."""
    return _moves(dossier.levels("sparsity"), "P_tot / P_act")


def optimum_over_horizon(dossier: Dossier) -> Answer | None:
    """As for compute, over log10 of the tokens per parameter of P_tot at a fixed backbone."""
    return _moves(dossier.levels("horizon"), "tokens per parameter")


def no_worse_at_40(dossier: Dossier) -> Answer | None:
    """The grid's point nearest to rho = 0.40, which must lie within 0.05 of it. Gain over rho = 1: reproduced if its
    interval lies above -MARGIN, contradicted if below, else undecided."""
    table, study = dossier.curve(), dossier.study
    if table is None or study is None:
        return None
    rho = min((float(r) for r in study.sweep.rho[:-1]), key=lambda r: abs(r - 0.4), default=1.0)
    if abs(rho - 0.4) > NEAR:
        return None
    gain = contrast(table, {rho_name(1.0): 1, rho_name(rho): -1})
    shifted = Difference(
        gain.value + MARGIN,
        None if gain.low is None else gain.low + MARGIN,
        None if gain.high is None else gain.high + MARGIN,
    )
    return Answer(better(shifted), f"rho = {rho:.2f}: {words(gain)} below rho = 1", gain, len(table.seeds))


def first_step_is_most(dossier: Dossier) -> Answer | None:
    """Gain over rho = 1 of the largest rho below 1, minus half of the gain of the best rho: the rule `better`. The
    best is chosen after looking, so the interval is Bonferroni's over all rho between the ends; and undecided unless
    the best rho's own gain is above zero."""
    study = dossier.study
    if study is None or len(study.sweep.rho) < 4:
        return None
    return _more_than_half(dossier, rho_name(float(study.sweep.rho[-2])), (), f"rho = {study.sweep.rho[-2]:.2f}")


def module_only(dossier: Dossier) -> Answer | None:
    """Half of the best rho's gain over rho = 1, minus the gain of the module whose tables have one row: the rule
    `better`, with Bonferroni's interval over all rho between the ends; undecided unless the best rho gains."""
    return _more_than_half(dossier, "module-only", ("module-only",), "the module alone", less=True)


def random_ids(dossier: Dossier) -> Answer | None:
    """As for the module alone: lookups that ignore the text gain less than half of what the best rho gains."""
    return _more_than_half(dossier, "random-ids", ("random-ids",), "random lookups", less=True)


def equal_compute(dossier: Dossier) -> Answer | None:
    """Gain over rho = 1 of the `strict` arm, whose P_act and FLOPs are those of rho = 1: the rule `better`."""
    table = dossier.curve("strict")
    if table is None:
        return None
    gain = contrast(table, {rho_name(1.0): 1, "strict": -1})
    return Answer(better(gain), f"{words(gain)} below rho = 1", gain, len(table.seeds))


def _moves(levels: tuple[Level, ...], what: str) -> Answer | None:
    found: Trend | None = trend([level.number for level in levels], [level.study.sweep for level in levels])
    if found is None:
        return not_run(f"{len(levels)} of at least two levels of {what}") if levels else None
    verdict = "undecided" if found.at_edge else within(found.slope, -STABLE, STABLE)
    measured = f"{words(found.slope, digits=2)} in rho for ten times the {what}, {len(levels)} levels"
    if found.at_edge:
        measured += f", {len(found.at_edge)} with the minimum on an edge of the grid"
    return Answer(verdict, measured, found.slope, min(len(level.study.sweep.seeds) for level in levels))


def _more_than_half(
    dossier: Dossier, name: str, controls: tuple[str, ...], said: str, *, less: bool = False
) -> Answer | None:
    """Whether `name` gains more (or less) than half of what the best rho between the ends of the grid gains."""
    table, study = dossier.curve(*controls), dossier.study
    if table is None or study is None or not (inside := interior(study.sweep)):
        return None
    best, pure = min(inside, key=table.mean), rho_name(1.0)
    whole = contrast(table, {pure: 1, best: -1}, len(inside))
    weights = {pure: 1.0, name: -1.0}
    for point, weight in ((pure, -0.5), (best, 0.5)):
        weights[point] = weights.get(point, 0.0) + weight
    sign = -1 if less else 1
    over_half = contrast(table, {key: sign * weight for key, weight in weights.items()}, len(inside))
    share = contrast(table, {pure: 1, name: -1}).value / whole.value if whole.value else 0.0
    decided = better(whole) == "reproduced"
    side = "short of" if less else "beyond"
    measured = f"{said} gains {round(100 * share) + 0}% of {words(whole)}; {words(over_half)} {side} half"
    return Answer(better(over_half) if decided else "undecided", measured, over_half, len(table.seeds))


CURVE = (
    Claim(
        "u-shape",
        "The loss over rho is a U: some rho between the ends is better than both.",
        "section 3.1, Fig. 3 left",
        "0.0139 below rho = 1 at 6e20 FLOPs, near rho = 0.80",
        "allocation",
        u_shape,
    ),
    Claim(
        "optimum",
        "The best rho lies at 0.75 to 0.80.",
        "section 3.1",
        "0.75 to 0.80 in the text; the lowest points of its Fig. 3 are at 0.85",
        "allocation",
        optimum_place,
    ),
    Claim(
        "stable",
        "The best rho does not move with compute.",
        "section 3.1",
        "stable from 2e20 to 6e20 FLOPs",
        "allocation",
        optimum_stable,
    ),
    Claim(
        "rho-40",
        "Even rho = 0.40 is no worse than the pure mixture of experts.",
        "section 3.1",
        "0.0001 and 0.0018 below rho = 1",
        "allocation",
        no_worse_at_40,
    ),
    Claim(
        "first-step",
        "The first few percent given to memory bring more than half of the whole gain.",
        "ours",
        "67% and 77% at rho = 0.95, read from its Fig. 3",
        "allocation",
        first_step_is_most,
    ),
    Claim(
        "module-only",
        "The module without memory brings less than half of the gain.",
        "ours",
        "not measured",
        "allocation",
        module_only,
    ),
    Claim(
        "random-ids",
        "Lookups that ignore the text bring less than half of the gain.",
        "ours",
        "not measured",
        "allocation",
        random_ids,
    ),
    Claim(
        "equal-compute",
        "The gain stays where P_act and FLOPs are equal as well.",
        "ours",
        "not measured",
        "allocation",
        equal_compute,
    ),
    Claim(
        "sparsity",
        "The best rho does not move with P_tot / P_act.",
        "ours",
        "not measured: always near 10",
        "sparsity",
        optimum_over_sparsity,
    ),
    Claim(
        "horizon",
        "The best rho does not move with tokens per parameter.",
        "ours",
        "not measured: always near 10",
        "horizon",
        optimum_over_horizon,
    ),
)
