"""Claims about the memory itself: its size, its place, its parts (sections 3.2 and 6.2), and Table 1 (section 4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from analysis.compare import Comparison, against, contrast
from analysis.dossier import Dossier
from analysis.errors import UserError
from analysis.loglinear import Scaling, scaling
from analysis.points import Point, SuiteRuns
from analysis.rules import Answer, Claim, Verdict, better, no_difference, words

LINEAR_R2 = 0.97
"""What the paper calls log-linear: OverEncoding's line in its Figure 3 explains 0.971 of the variance."""


def log_linear(dossier: Dossier) -> Answer | None:
    """Engram's line over log10 slots: reproduced if the interval of its slope lies below zero and the line explains at
    least 0.97 of the variance of the mean losses; contradicted if the slope's interval lies above zero, or if the
    line explains less and the interval of a quadratic term excludes zero; else undecided."""
    runs = dossier.suites.get("infinite-memory")
    fit = None if runs is None else fit_slots(runs)
    if runs is None or fit is None:
        return None
    line = fit.lines[0]
    slope, bend = line.slope, line.curvature
    verdict: Verdict = "undecided"
    if slope.low is not None and slope.high is not None:
        bent = bend is not None and bend.low is not None and bend.high is not None and not bend.low <= 0 <= bend.high
        if slope.high < 0 and line.r2 >= LINEAR_R2:
            verdict = "reproduced"
        elif slope.low > 0 or (line.r2 < LINEAR_R2 and bent):
            verdict = "contradicted"
    measured = f"{words(slope)} for ten times the slots, R^2 {line.r2:.3f}, {line.n_sizes} sizes"
    return Answer(verdict, measured, slope, runs.n_seeds)


def engram_over_over_encoding(dossier: Dossier) -> Answer | None:
    """OverEncoding's loss minus Engram's, averaged over the sizes that both have: the rule `better`."""
    if (runs := dossier.suites.get("infinite-memory")) is None:
        return None
    both = [
        (engram, other)
        for engram in runs.find(arm="engram")
        for other in runs.find(arm="over-encoding", variant=engram.variant)
        if engram.losses and other.losses
    ]
    table = runs.paired(point for pair in both for point in pair)
    if table is None:
        return None
    weights = {e.name: -1 / len(both) for e, _ in both} | {o.name: 1 / len(both) for _, o in both}
    gain = contrast(table, weights)
    measured = f"{words(gain)} below OverEncoding over {len(both)} sizes"
    ratio = fit.ratio if (fit := fit_slots(runs)) is not None else None
    if ratio is not None and ratio.low is not None and ratio.high is not None:  # else a line may as well be flat
        bounds = f"({ratio.low:.3g} to {ratio.high:.3g})"
        measured += f"; OverEncoding needs {ratio.value:.3g} {bounds} times the slots for an equal loss"
    return Answer(better(gain), measured, gain, len(table.seeds))


def layer_2_is_best(dossier: Dossier) -> Answer | None:
    """Loss of a single Engram in every other layer minus that in layer 2 (counted from 1), Dunnett's intervals:
    reproduced if all lie above zero, contradicted if one lies below, else undecided."""
    runs = dossier.suites.get("layers")
    if runs is None or not (second := runs.find(variant="layer-2")):
        return None
    others = [p for p in _singles(runs) if p.variant != "layer-2"]
    family = _family(runs, second[0], others)
    if not family:
        return None
    nearest = min(family, key=lambda c: c.difference.value)
    measured = f"the best other one is {_layer(nearest.name)}: {words(nearest.difference)} against layer 2"
    return Answer(_all_better(family), measured, nearest.difference, _seeds(runs, [second[0], *others]))


def two_layers(dossier: Dossier) -> Answer | None:
    """Loss of every single Engram minus that of the same size split over two layers, Dunnett's intervals: reproduced if
    all lie above zero, contradicted if one lies below, else undecided."""
    if (runs := dossier.suites.get("layers")) is None:
        return None
    split = [p for p in runs.points if p.variant and "+" in p.variant]
    singles = _singles(runs)
    if not split or not (family := _family(runs, split[0], singles)):
        return None
    nearest = min(family, key=lambda c: c.difference.value)
    measured = (
        f"the best single one, {_layer(nearest.name)}: {words(nearest.difference)} against {_layer(split[0].name)}"
    )
    return Answer(_all_better(family), measured, nearest.difference, _seeds(runs, [split[0], *singles]))


def matters(variant: str) -> Callable[[Dossier], Answer | None]:
    """A claim that leaving a part out costs something."""

    def judge(dossier: Dossier) -> Answer | None:
        """Loss of the variant minus that of the reference: the rule `better`, Dunnett's interval over all variants."""
        found = _ablated(dossier, variant)
        if found is None:
            return None
        comparison, n_seeds = found
        return Answer(better(comparison.difference), _effect(comparison), comparison.difference, n_seeds)

    return judge


def does_not_matter(variant: str) -> Callable[[Dossier], Answer | None]:
    """A claim that a change makes no difference."""

    def judge(dossier: Dossier) -> Answer | None:
        """Loss of the variant minus that of the reference: the rule `no difference`, Dunnett's interval over all
        variants."""
        found = _ablated(dossier, variant)
        if found is None:
            return None
        comparison, n_seeds = found
        return Answer(no_difference(comparison.difference), _effect(comparison), comparison.difference, n_seeds)

    return judge


def order(lower: tuple[str, str], higher: tuple[str, str]) -> Callable[[Dossier], Answer | None]:
    """A claim that one of Table 1's models is better than another; each is (kind, name in words)."""

    def judge(dossier: Dossier) -> Answer | None:
        """Difference of the losses: the rule `better`, Bonferroni's interval over the three neighbours of Table 1."""
        runs = dossier.suites.get("baselines")
        models = {} if runs is None else table_1(runs)
        if runs is None or lower[0] not in models or higher[0] not in models:
            return None
        table = runs.paired(models.values())
        if table is None:
            return None
        gain = contrast(table, {models[higher[0]].name: 1, models[lower[0]].name: -1}, family=3)
        return Answer(better(gain), f"{lower[1]} {words(gain)} below {higher[1]}", gain, len(table.seeds))

    return judge


def fit_slots(runs: SuiteRuns) -> Scaling | None:
    """Lines of loss over log10 slots for Engram and OverEncoding; None if Engram has fewer than three sizes."""
    rows = [
        (point.arm, float(point.facts["n_slots"]), seed, loss)
        for arm in ("engram", "over-encoding")
        for point in runs.find(arm=arm)
        for seed, loss in point.losses.items()
    ]
    if not rows:
        return None
    try:
        return scaling(*(list(column) for column in zip(*rows, strict=True)))
    except UserError:
        return None


def ablations(runs: SuiteRuns) -> tuple[Comparison, ...]:
    """Every variant against the reference; empty if that has not finished."""
    reference = runs.find(arm="ablation", variant="reference")
    others = [p for p in runs.find(arm="ablation") if p.variant != "reference"]
    return _family(runs, reference[0], others) if reference else ()


def table_1(runs: SuiteRuns) -> dict[str, Point]:
    """The four models of `baselines`: dense, moe, engram and engram-large, as far as they have finished."""
    found = {}
    for point in runs.points:
        kind = point.arm if point.arm in ("dense", "engram-large") else "moe" if point.is_pure else "engram"
        if point.losses and point.mode == "paper" and point.arm in ("dense", "engram-large", "allocation"):
            found[kind] = point
    return {kind: found[kind] for kind in ("dense", "moe", "engram", "engram-large") if kind in found}


def _singles(runs: SuiteRuns) -> list[Point]:
    return [p for p in runs.find(arm="engram") if p.variant and "+" not in p.variant and p.losses]


def _family(runs: SuiteRuns, reference: Point, others: Sequence[Point]) -> tuple[Comparison, ...]:
    """Others minus reference; the variance is pooled over all points of the suite."""
    table = runs.paired()
    if table is None or reference.name not in table.names:
        return ()
    return against(table, reference.name, [p.name for p in others if p.name in table.names])


def _seeds(runs: SuiteRuns, points: Sequence[Point]) -> int:
    table = runs.paired()
    return 0 if table is None or not points else len(table.seeds)


def _all_better(family: Sequence[Comparison]) -> Verdict:
    verdicts = [better(comparison.difference) for comparison in family]
    if "contradicted" in verdicts:
        return "contradicted"
    return "reproduced" if set(verdicts) == {"reproduced"} else "undecided"


def _ablated(dossier: Dossier, variant: str) -> tuple[Comparison, int] | None:
    if (runs := dossier.suites.get("ablation")) is None:
        return None
    found = [c for c in ablations(runs) if c.name == variant]
    if not found and variant == "no-fusion" and int(runs.rows["n_streams"].max()) == 1:
        raise UserError("the backbone has one residual stream: there is nothing to fuse")
    table = runs.paired()
    return (found[0], len(table.seeds)) if found and table is not None else None


def _effect(comparison: Comparison) -> str:
    p = "" if comparison.p_holm is None else f", p {comparison.p_holm:.2g} (Holm)"
    return f"{words(comparison.difference)} against the reference{p}"


def _layer(name: str) -> str:
    return name.replace("layer-", "layer ").replace("+", " and ")


def _part(key: str, text: str, paper: str, judge: Callable[[Dossier], Answer | None]) -> Claim:
    return Claim(key, text, "section 6.2, Fig. 5", paper, "ablation", judge)


def _rank(key: str, text: str, paper: str, judge: Callable[[Dossier], Answer | None]) -> Claim:
    return Claim(key, text, "section 4.2, Table 1", paper, "baselines", judge)


MEMORY = (
    Claim(
        "log-linear",
        "The loss falls linearly with the logarithm of the number of slots.",
        "section 3.2, Fig. 3 right",
        "-0.0284 for ten times the slots, R^2 0.994",
        "infinite-memory",
        log_linear,
    ),
    Claim(
        "over-encoding",
        "Engram is better than OverEncoding with equally many slots.",
        "section 3.2, Fig. 3 right",
        "0.0108 to 0.0142 below at its two shared sizes; 2.4 to 4 times fewer slots",
        "infinite-memory",
        engram_over_over_encoding,
    ),
    Claim(
        "layer-2",
        "Layer 2 is the best place for a single Engram.",
        "section 6.2, Fig. 5",
        "1.7705, next layer 1 with +0.0025",
        "layers",
        layer_2_is_best,
    ),
    Claim(
        "two-layers",
        "The same memory in two layers is better than in any one.",
        "section 6.2, Fig. 5",
        "layers 2 and 6: 0.0026 below layer 2",
        "layers",
        two_layers,
    ),
    _part("fusion", "Fusion with every residual stream matters.", "+0.0064 without", matters("no-fusion")),
    _part("compression", "Token compression matters.", "+0.0057 without", matters("no-compression")),
    _part("gate", "The gate matters.", "+0.0046 without", matters("no-gate")),
    _part("convolution", "The convolution makes little difference.", "+0.0005 without", does_not_matter("no-conv")),
    _part("4-grams", "4-grams make little difference.", "+0.0017 with", does_not_matter("plus-4-grams")),
    _rank(
        "moe-over-dense",
        "At equal P_act the mixture of experts is better than the dense model.",
        "0.134 below",
        order(("moe", "MoE"), ("dense", "dense")),
    ),
    _rank(
        "engram-over-moe",
        "At equal P_tot and P_act Engram is better than the mixture of experts.",
        "0.012 below",
        order(("engram", "Engram"), ("moe", "MoE")),
    ),
    _rank(
        "larger-memory",
        "A larger memory at equal P_act is better still.",
        "0.012 below",
        order(("engram-large", "the larger Engram"), ("engram", "Engram")),
    ),
)
