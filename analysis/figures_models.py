"""Figures of single comparisons: where the gain comes from, Table 1's models, noise over seeds, learning rates."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np

from analysis import style
from analysis.canvas import COLOURS, MARKS, Drawn, as_numbers, new_figure, rows, seeds, spread
from analysis.claims_memory import table_1
from analysis.compare import against
from analysis.dossier import Dossier, interior, rho_name
from analysis.figures_memory import read_paper
from analysis.fits import Difference
from analysis.jump import jump
from analysis.points import Point
from analysis.rules import words
from analysis.seeds import noise

CONTROLS = {
    "module-only": "module without memory",
    "random-ids": "random lookups",
    "strict": "equal P_act (strict)",
    "dense": "dense of equal P_act",
}


def gain(dossier: Dossier) -> Drawn | None:
    """Ours: what the gain over rho = 1 is made of, from the allocation suite's curve and controls."""
    if (study := dossier.study) is None:
        return None
    table = None
    present = list(CONTROLS)
    while (table := dossier.curve(*present)) is None and present:  # controls that were not run are left out
        present = [name for name in present if dossier.curve(name) is not None]
    if table is None or not interior(study.sweep):
        return None
    pure = rho_name(1.0)
    best = min(interior(study.sweep), key=table.mean)
    first = rho_name(float(study.sweep.rho[-2]))
    names = list(dict.fromkeys([best, first, *present]))
    # The best is chosen after looking, so the intervals hold for every rho, shown or not.
    everything = against(table, pure, [name for name in table.names if name != pure])
    family = [comparison for name in names for comparison in everything if comparison.name == name]
    said = {best: f"best: {best}", first: f"first step: {first}"} | CONTROLS
    if best == first:
        said[best] = f"best and first step: {best}"
    step = jump(study.sweep)
    with mpl.rc_context(style.RC):
        figure = new_figure(dossier, "what the gain over rho = 1 is made of", (9, 1.7 + 0.36 * (len(names) + 1)))
        axes = figure.subplots()
        labels, values = [said[c.name] for c in family], [c.difference for c in family]
        colours = [style.BLUE if c.name.startswith("rho") else style.PURPLE for c in family]
        if step is not None:
            height = step.height
            labels.append("the jump at rho = 1")
            values.append(Difference(-height.value, height.high and -height.high, height.low and -height.low))
            colours.append(style.GREEN)
        rows(axes, labels, values, colours=colours)
        axes.set(xlabel="loss minus that at rho = 1 (nats per token); to the left is better")
        itself = "" if step is None else "; the green one is for itself"
        axes.set_title(f"{seeds(len(table.seeds))} that hold for all at once{itself}")
    numbers = {"against_rho_1": [{"arm": c.name, **(as_numbers(c.difference) or {})} for c in family]}
    text = f"Best rho: {words(family[0].difference)} against rho = 1."
    if step is not None:
        share = "" if step.share is None else f", {round(100 * step.share)}% of the best point's gain"
        text += f" The jump at rho = 1, over the curve that leads to it: {words(step.height)}{share}."
        numbers["jump"] = [{**(as_numbers(step.height) or {}), "continued": step.continued, "share": step.share}]
    return Drawn(figure, text, numbers)


def baselines(dossier: Dossier) -> Drawn | None:
    """Table 1: dense, MoE, Engram and a larger Engram at equal P_act, as distances from the MoE; the paper's beside."""
    runs = dossier.suites.get("baselines")
    models = {} if runs is None else table_1(runs)
    table = None if runs is None else runs.paired(models.values())
    if runs is None or table is None or "moe" not in models or len(models) < 2:
        return None
    benchmarks = read_paper("table1_benchmarks").set_index("benchmark")
    losses = {column: float(benchmarks[column]["Validation set"]) for column in benchmarks.columns[2:]}
    paper = {"dense": "dense_4b", "engram": "engram_27b", "engram-large": "engram_40b"}
    others = [kind for kind in models if kind != "moe"]
    family = against(table, models["moe"].name, [models[kind].name for kind in others])
    theirs = [losses[paper[kind]] - losses["moe_27b"] for kind in others]
    with mpl.rc_context(style.RC):
        figure = new_figure(dossier, "four models of equal P_act", (9, 2.9))
        axes = figure.subplots()
        labels = [f"{kind}: P_tot {style.count(models[kind].facts['P_tot'])}" for kind in others]
        rows(axes, labels, [c.difference for c in family], paper=theirs)
        axes.set(xlabel="loss minus that of the mixture of experts (nats per token); to the left is better")
        axes.set_title(f"{seeds(len(table.seeds))}; MoE of P_tot {style.count(models['moe'].facts['P_tot'])}")
        axes.legend(loc="best")
    numbers = [
        {"model": kind, **(as_numbers(c.difference) or {}), "p_holm": c.p_holm}
        for kind, c in zip(others, family, strict=True)
    ]
    said = "Diamonds: the paper's 27B family, one run each, at its own scale."
    return Drawn(figure, said, {"against_moe": numbers})


def noise_over_seeds(dossier: Dossier) -> Drawn | None:
    """Ours: the spread of one spec over seeds, and what a repeated run gives."""
    runs = dossier.suites.get("noise")
    points = [] if runs is None else [point for point in runs.points if point.losses]
    found = noise(points[0].losses, runs.replicates) if runs is not None and points else None
    if runs is None or found is None:
        return None
    losses = points[0].losses
    with mpl.rc_context(style.RC):
        figure = new_figure(dossier, "one run's noise", (9, 3.6))
        axes = figure.subplots()
        axes.plot(list(losses), list(losses.values()), "o", color=style.BLUE, ms=6.5, label="one run")
        again = [(seed, loss) for seed, loss in runs.replicates]
        if again:
            axes.plot(
                *zip(*again, strict=True), "s", mfc="none", mec=style.VERMILLION, ms=11, label="the same seed again"
            )
        axes.axhline(found.mean, color=style.BLUE, lw=1.2, label="mean")
        low, high = found.mean - found.sd.value, found.mean + found.sd.value
        axes.axhspan(low, high, color=style.BLUE, alpha=0.1, lw=0, label="one standard deviation either side")
        axes.set(xlabel="seed", ylabel=style.LOSS_LABEL)
        axes.set_xticks(list(losses))
        sd = _plain(found.sd.value, found.sd.low, found.sd.high)
        axes.set_title(f"{found.n} seeds: mean {found.mean:.4f}, standard deviation {sd} nats per token")
        # Beside the points: the band leaves no room among them.
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
    said = f"Two single runs of different seeds must differ by {found.detectable:.4f} nats to be told apart."
    if found.replicates:
        largest = max(abs(value) for value in found.replicates)
        said += (
            " A repeated run gave the same loss to the last bit."
            if largest == 0
            else (f" A repeated run of the same seed differs by up to {largest:.2g}.")
        )
    numbers = {
        "n": found.n,
        "mean": found.mean,
        "sd": as_numbers(found.sd),
        "detectable": found.detectable,
        "replicates": found.replicates,
    }
    return Drawn(figure, said, numbers)


def lr(dossier: Dossier) -> Drawn | None:
    """Ours: loss against the learning rate on both sides of the curve."""
    runs = dossier.suites.get("lr")
    points = [] if runs is None else [p for p in runs.points if p.losses and p.facts["lr"] is not None]
    if runs is None or not points:
        return None
    rhos = sorted({point.rho for point in points if point.rho is not None}, reverse=True)
    best: dict[str, float] = {}
    with mpl.rc_context(style.RC):
        figure = new_figure(dossier, "the learning rate on both sides", (8, 4.2))
        axes = figure.subplots()
        for i, rho in enumerate(rhos):
            here = sorted((p for p in points if p.rho == rho), key=lambda p: float(p.facts["lr"]))
            for point in here:
                spread(axes, float(point.facts["lr"]), list(point.losses.values()), COLOURS[i % 6], MARKS[i % 6])
            means = [float(np.mean(list(p.losses.values()))) for p in here]
            x = [float(p.facts["lr"]) for p in here]
            axes.plot(x, means, MARKS[i % 6] + "-", color=COLOURS[i % 6], lw=1.3, ms=6.5, label=_side(rho, here))
            best[f"rho {rho:.2f}"] = x[int(np.argmin(means))]
        axes.set(xscale="log", xlabel="peak learning rate", ylabel=style.LOSS_LABEL)
        axes.set_xticks(sorted({float(p.facts["lr"]) for p in points}))
        axes.set_xticklabels([f"{x:.3g}" for x in sorted({float(p.facts["lr"]) for p in points})])
        axes.minorticks_off()
        axes.set_title(f"{runs.n_seeds} seed{'s' * (runs.n_seeds > 1)} (dots) and their mean")
        axes.legend(loc="best")
    said = "Lowest mean loss at " + ", ".join(f"{rate:.3g} for {name}" for name, rate in best.items()) + "."
    return Drawn(figure, said, {"best": best})


def _side(rho: float, points: Sequence[Point]) -> str:
    """`rho 0.81: P_act 49.6k`: a memory adds a little to what is active, unless the mode is strict."""
    sizes = [style.count(size) for size in sorted({float(point.facts["P_act"]) for point in points})]
    return f"rho {rho:.2f}: P_act " + " to ".join(dict.fromkeys((sizes[0], sizes[-1])))


def _plain(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.4f}" if low is None or high is None else f"{value:.4f} (95%: {low:.4f} to {high:.4f})"
