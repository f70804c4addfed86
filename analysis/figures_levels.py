"""Figures of several curves over rho: does the best split move, and what does a gain cost in tokens, FLOPs and time?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from analysis import style
from analysis.canvas import COLOURS, MARKS, Drawn, as_numbers, bars, legend_above, log_ticks, new_figure, seeds
from analysis.dossier import Dossier, Level
from analysis.fits import offsets
from analysis.rules import words
from analysis.trend import Trend, trend

WHAT = {
    "sparsity": ("P_tot / P_act", "P_tot / P_act at rho = 1"),
    "horizon": ("tokens per parameter", "training tokens per parameter of P_tot"),
    "compute": ("FLOPs", "training FLOPs at rho = 1"),
}


def sparsity(dossier: Dossier) -> Drawn | None:
    """Does the best rho move with P_tot / P_act? Ours: the paper holds the ratio near 10."""
    return _moving(dossier, "sparsity", dossier.levels("sparsity"))


def horizon(dossier: Dossier) -> Drawn | None:
    """Does the best rho move with training length? Ours: the paper trains on about 10 tokens per parameter."""
    return _moving(dossier, "horizon", dossier.levels("horizon"))


def compute(dossier: Dossier) -> Drawn | None:
    """Does the best rho move with compute? All budgets of the table that have a curve; None with fewer than two."""
    return _moving(dossier, "compute", dossier.across)


def cost(dossier: Dossier) -> Drawn | None:
    """Loss of every rho against tokens, FLOPs and wall time, from the runs of `horizon`, each with a whole schedule.

    A gain per token that is lost per hour is worth knowing. Times are those of the machine that trained.
    """
    levels = dossier.levels("horizon")
    if not levels:
        return None
    runs = dossier.suites["horizon"]
    rhos = sorted({point.rho for point in runs.points if point.rho is not None and point.losses}, reverse=True)
    axes_of = (("train_tokens", "training tokens"), ("flops", "training FLOPs"), ("seconds", "seconds of wall time"))
    with mpl.rc_context(style.RC):
        figure = new_figure(dossier, "what a loss costs", (11, 4.4))
        panels = figure.subplots(1, 3, sharey=True)
        for axes, (column, label) in zip(panels, axes_of, strict=True):
            for i, rho in enumerate(rhos):
                points = sorted(runs.find(rho=rho), key=lambda p: int(p.facts["train_tokens"]))
                points = [p for p in points if p.losses and (column != "seconds" or p.seconds is not None)]
                x = [float(p.seconds or 0) if column == "seconds" else float(p.facts[column]) for p in points]
                y = [float(np.mean(list(p.losses.values()))) for p in points]
                for point, at in zip(points, x, strict=True):
                    axes.plot([at] * len(point.losses), list(point.losses.values()), ".", color=COLOURS[i % 6], ms=3.5)
                mark = MARKS[i % 6] + "-"
                axes.plot(x, y, mark, color=COLOURS[i % 6], lw=1.3, ms=5.5, label=f"rho {rho:.2f}")
            axes.set(xscale="log", xlabel=label)
            log_ticks(axes.xaxis)
        panels[0].set_ylabel(style.LOSS_LABEL)
        panels[0].set_title(f"means of {runs.n_seeds} seeds, dots are seeds")
        panels[-1].legend(loc="best")
    points_out = [
        {
            "variant": p.variant,
            "rho": p.rho,
            "train_tokens": int(p.facts["train_tokens"]),
            "flops": float(p.facts["flops"]),
            "seconds": p.seconds,
            "loss": p.losses,
        }
        for p in runs.points
    ]
    said = (
        "Loss of every rho against what it cost: tokens, FLOPs, and wall time on the machine that trained. Differences "
        "between rho with their intervals stand in the figure of the best rho against tokens per parameter."
    )
    return Drawn(figure, said, {"points": points_out})


def _moving(dossier: Dossier, kind: str, levels: Sequence[Level]) -> Drawn | None:
    found = trend([level.number for level in levels], [level.study.sweep for level in levels])
    if found is None:
        return None
    short, long = WHAT[kind]
    n = min(len(level.study.sweep.seeds) for level in levels)
    with mpl.rc_context(style.RC):
        figure = new_figure(dossier, f"the best rho against {short}", (11, 4.8))
        left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
        for i, level in enumerate(levels):
            points = offsets(level.study.sweep)
            # Side by side, or the intervals would hide one another.
            shift = 0.006 * (i - (len(levels) - 1) / 2)
            label = style.count(level.number)
            x = [float(rho) + shift for rho in level.study.sweep.rho[:-1]]
            bars(left, x, points[:-1], COLOURS[i % 6], MARKS[i % 6], line="-", label=label)
        left.axhline(0, color=style.GREY, lw=1)
        left.plot([1], [0], "o", color=style.BLACK, ms=6, zorder=4)
        left.set(title=f"(a) {seeds(n)}", xlabel=style.RHO_LABEL, ylabel=style.OFFSET_LABEL)
        legend_above(left, f"{short} at rho = 1, drawn side by side")
        _optima(right, found)
        right.set(title="(b) where the loss is lowest", xlabel=long, ylabel="best rho")
    said = f"The best rho changes by {words(found.slope, digits=2)} for ten times the {short}."
    if found.at_edge:
        said += f" {len(found.at_edge)} of {len(levels)} minima are on an edge of the grid (open circles)."
    return Drawn(figure, said, {"levels": [level.label for level in levels], **_numbers(found)})


def _optima(axes: Axes, found: Trend) -> None:
    """Draw the best rho of every level and the line through them, with a legend in room of its own above rho = 1."""
    kinds = (("lowest mean loss", style.BLUE, False), ("lowest on the grid's edge: no optimum", "white", True))
    for name, face, at_edge in kinds:
        places = [(x, p.rho) for x, p in zip(found.x, found.optima, strict=True) if (p.edge is not None) == at_edge]
        if places:
            axes.plot(*zip(*places, strict=True), "o", color=style.BLUE, mfc=face, ms=7, zorder=3, label=name)
    barred = [(x, p.low, p.high) for x, p in zip(found.x, found.optima, strict=True) if p.low is not None]
    if barred:
        axes.vlines(*zip(*barred, strict=True), color=style.BLUE, lw=1.6, zorder=2, label="95% bootstrap")
    logs = np.log10(np.array(found.x))
    ends = np.array([logs.min(), logs.max()])
    mean = float(np.mean([place.rho for place in found.optima]))
    line = f"line through them: {found.slope.value:+.2f} for ten times"
    axes.plot(10**ends, mean + found.slope.value * (ends - logs.mean()), "--", color=style.GREY, lw=1.2, label=line)
    axes.axhspan(0.75, 0.80, color=style.ORANGE, alpha=0.25, lw=0, label="the paper: 0.75 to 0.80")
    axes.set_xscale("log")
    axes.margins(x=0.15)
    axes.set_xticks(found.x, [style.count(x) for x in found.x])
    axes.minorticks_off()
    axes.set(ylim=(-0.05, 1.5), yticks=(0, 0.2, 0.4, 0.6, 0.8, 1))
    axes.legend(loc="upper left")


def _numbers(found: Trend) -> dict[str, object]:
    return {
        "x": found.x,
        "optima": [asdict(place) for place in found.optima],
        "slope": as_numbers(found.slope),
        "at_edge": found.at_edge,
    }
