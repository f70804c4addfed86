"""Figures about the memory itself: how many slots (Fig. 3 right), in which layer and with which parts (Fig. 5)."""

from __future__ import annotations

import re
from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from analysis import style
from analysis.canvas import Drawn, as_numbers, bars, compare_scales, legend_above, log_ticks, new_figure, rows, seeds
from analysis.claims_memory import ablations, fit_slots
from analysis.compare import Comparison, against
from analysis.dossier import Dossier
from analysis.errors import BadFile
from analysis.figures import PAPER
from analysis.loglinear import Scaling, scaling
from analysis.points import SuiteRuns
from analysis.rules import words

AGAINST_PURE = "loss minus that without memory (nats per token)"
SLOTS = "slots: rows of each table"
METHODS = {
    "engram": ("Engram", style.BLUE, "o"),
    "over-encoding": ("OverEncoding", style.VERMILLION, "s"),
}
PAPERS_PARTS = {
    "no-fusion": "without_multi_branch",
    "no-compression": "without_token_compression",
    "no-gate": "without_gating",
    "no-conv": "without_short_conv",
    "plus-4-grams": "with_4gram",
}


def read_paper(name: str) -> pd.DataFrame:
    """Read one of the paper's figures or tables from `results/paper`, by the stem of its file.

    Raises:
        BadFile: there is no such file, or it is empty.
    """
    path = PAPER.with_name(f"{name}.csv")
    try:
        return pd.read_csv(path)
    except (OSError, ValueError) as error:
        raise BadFile(f"{path} cannot be read: {error}") from error


def infinite_memory(dossier: Dossier) -> Drawn | None:
    """Fig. 3 (right): loss against slots for Engram and OverEncoding, the paper's beside ours."""
    runs = dossier.suites.get("infinite-memory")
    if runs is None or not runs.find(arm="engram"):
        return None
    fit, family = fit_slots(runs), _against_pure(runs)
    if not family or runs.pure is None:
        return None
    with mpl.rc_context(style.RC):
        figure = new_figure(dossier, "loss against the number of slots", (11, 4.6))
        left, right = figure.subplots(1, 2, width_ratios=[1.2, 1])
        tables = _tables(runs)
        lines = {} if fit is None else {line.method: line for line in fit.lines}
        pure = float(np.mean(list(runs.pure.losses.values())))
        # Side by side, or the intervals would hide one another; a line moves with its points.
        for shift, (arm, (name, colour, mark)) in zip((0.97, 1.03), METHODS.items(), strict=True):
            points = [point for point in runs.find(arm=arm) if point.name in family]
            x = [shift * float(point.facts["n_slots"]) / (tables or 1) for point in points]
            bars(left, x, [family[point.name].difference for point in points], colour, mark, label=name)
            if (line := lines.get(arm)) is not None:
                at = np.geomspace(line.low_slots, line.high_slots, 50)
                left.plot(shift * at / (tables or 1), line(at) - pure, "--", color=colour, lw=1.3)
        left.axhline(0, color=style.BLACK, ls="-.", lw=1.4, label="no memory")
        left.set(xscale="log", xlabel=_slots_label(runs, tables), ylabel=AGAINST_PURE)
        log_ticks(left.xaxis)
        left.set_title(f"(a) {_seeds(family, runs)}")
        legend_above(left, "points and their lines in log slots, drawn 3% aside")
        _papers_slots(right)
        compare_scales(left, right, "(a)")
    said = ""
    if fit is not None:
        said = " ".join(f"{METHODS[s.method][0]}: {words(s.slope)} for ten times the slots." for s in fit.lines)
    return Drawn(figure, said, {**_points(family), **({} if fit is None else _scaling_numbers(fit))})


def layers(dossier: Dossier) -> Drawn | None:
    """Fig. 5, the curve: loss over the layer of a single Engram, and of the same memory in two layers."""
    runs = dossier.suites.get("layers")
    family = {} if runs is None else _against_pure(runs)
    if runs is None or not family:
        return None
    found = [p for p in runs.find(arm="engram") if p.variant and p.name in family]
    singles = sorted((p for p in found if "+" not in str(p.variant)), key=lambda p: _layer(str(p.variant)))
    with mpl.rc_context(style.RC):
        figure = new_figure(dossier, "where the memory stands", (11, 4.6))
        left, right = figure.subplots(1, 2)
        places = [_layer(str(point.variant)) for point in singles]
        bars(left, places, [family[p.name].difference for p in singles], style.BLUE, line="-", label="one layer")
        for point in (p for p in found if "+" in str(p.variant)):
            both = [int(text) for text in str(point.variant).removeprefix("layer-").split("+")]
            label = f"layers {both[0]} and {both[1]}"
            difference = family[point.name].difference
            bars(left, [sum(both) / 2], [difference], style.VERMILLION, "s", label=label)
            left.hlines(difference.value, both[0], both[1], color=style.VERMILLION, ls="--", lw=1.3)
        left.axhline(0, color=style.BLACK, ls="-.", lw=1.4, label="no memory")
        left.set(xlabel="layer of the memory, counted from 1", ylabel=AGAINST_PURE)
        left.set_title(f"(a) {_seeds(family, runs)}")
        left.set_xticks(places)
        legend_above(left)
        _papers_layers(right)
        compare_scales(left, right, "(a)")
    said = "The same memory in every single layer, and split over two."
    return Drawn(figure, said, _points(family))


def ablation(dossier: Dossier) -> Drawn | None:
    """Fig. 5, the markers, and what the paper left out: loss of every variant minus that of the reference."""
    runs = dossier.suites.get("ablation")
    family = () if runs is None else ablations(runs)
    if runs is None or not family:
        return None
    paper = read_paper("fig5_ablation").set_index("variant")["val_loss"]
    names = [c.name for c in family]
    order = sorted(family, key=lambda c: (c.name not in PAPERS_PARTS, -c.difference.value))
    theirs = [
        float(paper[PAPERS_PARTS[c.name]] - paper["reference"]) if c.name in PAPERS_PARTS else None for c in order
    ]
    with mpl.rc_context(style.RC):
        figure = new_figure(dossier, "what each part of the memory is worth", (9, 1.6 + 0.34 * len(names)))
        axes = figure.subplots()
        colours = [style.BLUE if c.name in PAPERS_PARTS else style.GREEN for c in order]
        rows(axes, [c.name for c in order], [c.difference for c in order], paper=theirs, colours=colours)
        n = 1 if family[0].p is None else runs.n_seeds
        axes.set(xlabel="loss minus that of the reference (nats per token); to the right is worse")
        axes.set_title(f"{seeds(n)} that hold for all variants at once")
        axes.legend(loc="best")
    said = (
        "Blue: the paper's ablations. Green: ours. Diamonds: the paper's own numbers, one run each, at its own scale."
    )
    numbers = [{"variant": c.name, **(as_numbers(c.difference) or {}), "p": c.p, "p_holm": c.p_holm} for c in order]
    return Drawn(figure, said, {"against_reference": numbers})


def _against_pure(runs: SuiteRuns) -> dict[str, Comparison]:
    """Every point with memory against the mixture of experts without, by name; empty if that has not finished."""
    table = runs.paired()
    if table is None or runs.pure is None or runs.pure.name not in table.names:
        return {}
    others = [name for name in table.names if name != runs.pure.name]
    return {comparison.name: comparison for comparison in against(table, runs.pure.name, others)}


def _seeds(family: Mapping[str, Comparison], runs: SuiteRuns) -> str:
    single = all(comparison.p is None for comparison in family.values())
    return seeds(1) if single else f"{seeds(runs.n_seeds)} that hold for all points at once"


def _points(family: Mapping[str, Comparison]) -> dict[str, object]:
    return {
        "minus_no_memory": [
            {"point": c.name, **(as_numbers(c.difference) or {}), "p": c.p, "p_holm": c.p_holm} for c in family.values()
        ]
    }


def _tables(runs: SuiteRuns) -> int | None:
    """How many tables Engram's rows lie in, as the paper counts the rows of each; None if the table does not tell.

    `slots-10x` gives each table ten times the vocabulary.
    """
    found = set()
    for point in runs.find(arm="engram"):
        named = re.fullmatch(r"slots-([\d.]+)x", point.variant or "")
        vocabulary = point.facts["vocab_size"]
        if named is None or not vocabulary:
            return None
        found.add(round(float(point.facts["n_slots"]) / (float(named[1]) * float(vocabulary))))
    return found.pop() if len(found) == 1 and min(found) > 0 else None


def _slots_label(runs: SuiteRuns, tables: int | None) -> str:
    if tables is None:
        return "rows of all tables"
    # OverEncoding is one layer, and so holds as many rows in fewer tables than an Engram of several.
    several = any(" " in str(point.facts["engram_layers"]) for point in runs.find(arm="engram"))
    return f"{SLOTS} (OverEncoding: as many in all)" if several else SLOTS


def _papers_slots(axes: Axes) -> None:
    points = read_paper("fig3_right_infinite_memory")
    pure = float(points.loc[points["method"] == "moe", "val_loss"].iloc[0])
    both = points[points["method"] != "moe"]
    fit = scaling(both["method"].tolist(), both["slots"].tolist(), [0] * len(both), both["val_loss"].tolist())
    for line, (name, colour, mark) in zip(fit.lines, METHODS.values(), strict=True):
        rows_ = both[both["method"] == line.method]
        axes.plot(rows_["slots"], rows_["val_loss"] - pure, mark, color=colour, ms=6, label=name)
        x = np.geomspace(line.low_slots, line.high_slots, 50)
        axes.plot(x, line(x) - pure, "--", color=colour, lw=1.3)
    axes.axhline(0, color=style.BLACK, ls="-.", lw=1.4, label="no memory")
    axes.set(xscale="log", xlabel=SLOTS)
    log_ticks(axes.xaxis)
    axes.set_title("(b) the paper, 3B MoE, one run a point")
    axes.legend(loc="lower left")


def _papers_layers(axes: Axes) -> None:
    sweep, parts = read_paper("fig5_layer_sweep"), read_paper("fig5_ablation").set_index("variant")["val_loss"]
    pure = float(parts["moe_baseline"])
    axes.plot(
        sweep["layer_1based"], sweep["val_loss"] - pure, "o-", color=style.BLUE, lw=1.3, ms=5.5, label="one layer"
    )
    both = float(parts["reference"]) - pure
    axes.plot([4], [both], "s", color=style.VERMILLION, ms=5.5, label="layers 2 and 6")
    axes.hlines(both, 2, 6, color=style.VERMILLION, ls="--", lw=1.3)
    axes.axhline(0, color=style.BLACK, ls="-.", lw=1.4, label="no memory")
    axes.set(xlabel="layer of the memory, counted from 1")
    axes.set_title("(b) the paper, 12 layers, one run a point")
    axes.legend(loc="best")


def _layer(variant: str) -> int:
    return int(variant.removeprefix("layer-"))


def _scaling_numbers(fit: Scaling) -> dict[str, object]:
    lines = [
        {
            "method": line.method,
            "intercept": line.intercept,
            "slope": as_numbers(line.slope),
            "curvature": as_numbers(line.curvature),
            "r2": line.r2,
            "n_sizes": line.n_sizes,
        }
        for line in fit.lines
    ]
    return {"lines": lines, "slots_ratio_at_equal_loss": as_numbers(fit.ratio), "at_loss": fit.at_loss}
