"""One function per figure: numbers in, matplotlib Figure out. Nothing here fits or decides."""

from __future__ import annotations

import io
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from analysis import style
from analysis.canvas import compare_scales
from analysis.collect import write_atomically
from analysis.errors import BadFile
from analysis.fits import Difference, Parabola, offsets
from analysis.study import ALLOCATION, Arm, Study

PAPER = Path(__file__).parent.parent / "results" / "paper" / "fig3_left_allocation.csv"
"""The paper's Figure 3, left, read from its vector drawing commands."""
MARKS_OF_CONTROLS = {"module-only": "^", "random-ids": "v", "over-encoding": "D"}


def read_paper(path: Path = PAPER) -> pd.DataFrame:
    """Read the paper's points: columns flops_budget, rho, val_loss.

    Raises:
        BadFile: the file lacks a column.
    """
    points = pd.read_csv(path, dtype={"flops_budget": "string"})
    if missing := {"flops_budget", "rho", "val_loss"} - set(points.columns):
        raise BadFile(f"{path} lacks the columns {', '.join(sorted(missing))}")
    return points


def allocation(study: Study, paper: pd.DataFrame, warning: str = "") -> Figure:
    """Draw loss over rho: absolute with fits and controls (a), as offsets from rho = 1 (b), and the paper's (c).

    Args:
        study: One budget's runs.
        paper: The paper's points, from `read_paper`.
        warning: What must stand below runs that are too small to say anything.
    """
    with mpl.rc_context(style.RC):
        figure = Figure(figsize=(12, 6.2), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=[1.5, 1], height_ratios=[1.15, 1])
        left = figure.add_subplot(grid[:, 0])
        above = figure.add_subplot(grid[0, 1], sharex=left)
        below = figure.add_subplot(grid[1, 1], sharex=left)
        _absolute(left, study)
        _ours(above, study)
        _papers(below, paper)
        compare_scales(above, below, "(b)")
        _controls(left, study)  # last, as they reach to the edge of the axis that all panels share
        above.tick_params(labelbottom=False)
        left.set_xlabel(style.RHO_LABEL)
        below.set_xlabel("rho")
        figure.align_ylabels([above, below])
        legend = figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=3, alignment="left")
        if warning:
            legend.set_title(warning, prop=FontProperties(size=8.5))
            legend.get_title().set_color(style.BROWN)
        figure.suptitle(_title(study), x=0.01, ha="left", fontsize=11.5, fontweight="bold")
        return figure


def caption(study: Study) -> dict[str, Any]:
    """Collect the numbers behind the figure, for the JSON file beside it."""
    arms = [
        {"arm": a.arm, "mode": a.mode, "rho": a.rho, "seeds": a.seeds, "loss": a.loss, "minus_reference": _fields(a)}
        for a in study.arms
    ]
    return {
        "study": study.name,
        "dropped_seeds": study.sweep.dropped_seeds,
        "dropped_rhos": study.sweep.dropped_rhos,
        **asdict(study.verdict),
        "arms": arms,
    }


def save(figure: Figure, numbers: dict[str, Any], stem: Path) -> list[Path]:
    """Write PNG, PDF and the caption's numbers as JSON, each atomically; equal input gives equal bytes."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, metadata in ((".png", {}), (".pdf", {"CreationDate": None})):
        image = io.BytesIO()
        with mpl.rc_context(style.RC):
            figure.savefig(image, format=suffix[1:], dpi=style.DPI, metadata=metadata)
        path = stem.with_name(stem.name + suffix)
        sibling = path.with_name(f".{path.name}.{os.getpid()}")
        sibling.write_bytes(image.getvalue())
        os.replace(sibling, path)
        written.append(path)
    path = stem.with_name(stem.name + ".json")
    write_atomically(path, json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    return [*written, path]


def _title(study: Study) -> str:
    row, n = study.reference, len(study.sweep.seeds)
    sizes = f"P_tot {style.count(row['P_tot'])}, P_act {style.count(row['P_act'])}"
    seeds = "1 seed" if n == 1 else f"{n} seeds"
    return f"{study.name}: {sizes}, {style.count(row['train_tokens'])} tokens, {seeds}. Verdict: {study.verdict.answer}"


def _absolute(axes: Axes, study: Study) -> None:
    sweep, verdict = study.sweep, study.verdict
    _optimum(axes, study)
    for i in range(len(sweep.seeds)):
        label = "one seed" if i == 0 else None
        axes.plot(sweep.rho, sweep.loss[:, i], ".-", color=style.BLUE, alpha=0.4, lw=0.8, ms=5, label=label)
    inside = np.linspace(sweep.rho[0], sweep.rho[-1], 200)
    fits = ((verdict.quadratic, "quadratic", style.ORANGE, "-"),
            (verdict.quadratic_without_reference, "quadratic without rho = 1", style.GREEN, "--"))  # fmt: skip
    for fit, name, colour, line in fits:
        if fit is not None:
            axes.plot(inside, fit(inside), line, color=colour, lw=1.6, label=f"{name}: {_vertex(fit)}")
    axes.plot(sweep.rho, sweep.mean, "o", color=style.BLUE, ms=7, zorder=4, label=f"mean of seeds ({len(sweep.seeds)})")
    strict = [(float(arm.rho or 0), float(np.mean(arm.loss))) for arm in _strict(study)]
    if strict:
        label = "strict: equal P_act"
        axes.plot(*zip(*strict, strict=True), "s", mfc="white", mec=style.VERMILLION, ms=6, zorder=4, label=label)
    axes.set(title="(a) loss over rho, with controls", ylabel=style.LOSS_LABEL)


def _optimum(axes: Axes, study: Study) -> None:
    place = study.verdict.optimum
    if place.low is not None and place.high is not None:
        label = f"minimum, 95% bootstrap: {place.low:.2f} to {place.high:.2f}"
        if place.low < place.high:
            axes.axvspan(place.low, place.high, color=style.BLUE, alpha=0.10, lw=0, label=label)
        else:
            axes.axvline(place.low, color=style.BLUE, alpha=0.25, lw=5, label=label)
    if place.edge is None:
        axes.axvline(place.rho, color=style.BLUE, ls=":", lw=1.4, label=f"local parabola: min at {place.rho:.2f}")
    else:
        axes.plot(place.rho, place.loss, "o", mfc="none", mec=style.BLACK, ms=13, zorder=5,
                  label="lowest on the grid's edge: no optimum")  # fmt: skip


def _vertex(fit: Parabola) -> str:
    if fit.optimum is not None:
        return f"min at {fit.optimum:.2f}"
    return "opens downward" if fit.a <= 0 else "vertex off the grid"


def _strict(study: Study) -> list[Arm]:
    return [a for a in study.arms if a.arm == ALLOCATION and a.mode == "strict" and a.loss]


def _controls(axes: Axes, study: Study) -> None:
    """Draw the controls, with names in the right margin: one that has a rho stands there, a dense one is a line.

    One far above or below is only named, with its loss.
    """
    arms = [a for a in study.arms if a.arm in style.ARMS and a.loss]
    shown = [*study.sweep.loss.ravel().tolist(), *(float(np.mean(a.loss)) for a in _strict(study))]
    low, high = min(shown), max(shown)
    # A control may stretch the axis to twice the curve's own range; beyond that it would flatten the curve.
    room = max(high - low, 1e-4)
    near = [m for a in arms if low - room / 2 <= (m := float(np.mean(a.loss))) <= high + room / 2]
    low, high = min([low, *near]), max([high, *near])
    pad = 0.06 * max(high - low, 1e-4)
    axes.set_ylim(low - pad, high + pad)
    bottom, top = axes.get_ylim()
    left, right = axes.get_xlim()
    entries = []
    for arm in sorted(arms, key=lambda a: float(np.mean(a.loss))):
        name, colour = style.ARMS[arm.arm]
        mean = float(np.mean(arm.loss))
        if arm.rho is not None and arm.arm not in ("dense", "module-only"):
            name += f", rho {arm.rho:.2f}"
        name += ", strict" if arm.mode == "strict" else ""
        if not bottom <= mean <= top:
            name += f": {mean:.3f}, {'above' if mean > top else 'below'}"
        elif arm.rho is None or arm.arm == "dense":
            axes.axhline(mean, color=colour, lw=1.4, ls="-.", zorder=1.5)
        else:
            axes.plot([arm.rho, right], [mean, mean], ":", color=colour, lw=1, zorder=1.5)  # leads to its name
            axes.plot([arm.rho], [mean], MARKS_OF_CONTROLS[arm.arm], color=colour, mec="white", ms=8, zorder=5)
        entries.append((min(max((mean - bottom) / (top - bottom), 0.0), 1.0), name, colour))
    axes.set_xlim(left, right)
    for height, (_, name, colour) in zip(_apart([e[0] for e in entries], 0.05), entries, strict=True):
        axes.text(1.01, height, name, color=colour, transform=axes.transAxes, va="center", fontsize=9)


def _apart(heights: list[float], gap: float) -> list[float]:
    """Push rising heights apart to at least `gap`, and back below 1."""
    placed: list[float] = []
    for height in heights:
        placed.append(height if not placed else max(height, placed[-1] + gap))
    limit = 1.0
    for i in range(len(placed) - 1, -1, -1):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - gap
    return placed


def _ours(axes: Axes, study: Study) -> None:
    sweep = study.sweep
    axes.axhline(0, color=style.GREY, lw=1)
    per_seed = sweep.loss - sweep.loss[-1]
    for i in range(len(sweep.seeds)):
        axes.plot(sweep.rho[:-1], per_seed[:-1, i], ".", color=style.BLUE, alpha=0.4, ms=5)
    _offsets(axes, sweep.rho.tolist(), list(offsets(sweep)), "o-", style.BLUE)
    strict = [(float(a.rho or 0), a.difference) for a in _strict(study) if a.difference is not None]
    if strict:
        _offsets(axes, [rho for rho, _ in strict], [d for _, d in strict], "s--", style.VERMILLION)
    kind = "95% intervals" if sweep.sigma is not None else "one seed: no intervals"
    axes.set(title=f"(b) these runs, {kind}", ylabel=style.OFFSET_LABEL)


def _offsets(axes: Axes, rho: list[float], points: list[Difference], mark: str, colour: str) -> None:
    values = np.array([p.value for p in points])
    face = "white" if mark.startswith("s") else colour
    axes.plot(rho, values, mark, color=colour, mfc=face, ms=5.5, lw=1.3, zorder=3)
    barred = [(r, p) for r, p in zip(rho, points, strict=True) if p.low is not None]
    if barred:
        low = [float(p.low or 0) for _, p in barred]
        high = [float(p.high or 0) for _, p in barred]
        axes.vlines([r for r, _ in barred], low, high, color=colour, lw=1.3, zorder=2)


def _papers(axes: Axes, paper: pd.DataFrame) -> None:
    axes.axhline(0, color=style.GREY, lw=1)
    for (budget, points), colour, mark in zip(
        paper.groupby("flops_budget", sort=True), (style.BLACK, style.GREY), ("^-", "v-"), strict=True
    ):
        points = points.sort_values("rho")
        values = points["val_loss"] - points["val_loss"].iloc[-1]
        axes.plot(points["rho"], values, mark, color=colour, ms=4.5, lw=1, label=f"{budget} FLOPs")
    axes.set(title="(c) the paper's Figure 3, one run a point", ylabel=style.OFFSET_LABEL)
    axes.legend(loc="lower left")


def _fields(arm: Arm) -> dict[str, Any] | None:
    return None if arm.difference is None else asdict(arm.difference)
