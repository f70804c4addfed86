"""Does loss predict benchmarks across rho? Benchmark scores against rho beside loss against rho, in one figure."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.figure import Figure

from analysis import style
from analysis.baselines_table import title_of
from analysis.benchmarks import SAME, rank_correlation
from analysis.study import ALLOCATION

_MARKS = "os^vDPX<>p*"
_COLOURS = (style.BLUE, style.VERMILLION, style.GREEN, style.ORANGE, style.PURPLE, style.BROWN, style.BLACK, style.GREY)


def points(runs: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """The results of a study's sweep, with each run's rho, seed and loss; empty if none were evaluated."""
    sweep = runs[(runs["arm"] == ALLOCATION) & (runs["mode"] == "paper") & (runs["status"] == "final")]
    return results.merge(sweep[["run_id", "rho", "seed", "valid_loss"]].drop_duplicates("run_id"), on="run_id")


def numbers(name: str, chosen: pd.DataFrame) -> dict[str, Any]:
    """Behind the figure: every point, and each benchmark's rank correlation with the loss over runs.

    A good benchmark falls where the loss rises: -1 is perfect prediction, +1 for measures where less is better, such as
    bits per byte. Runs of one rho or one seed resemble each other, so that intervals are somewhat too narrow.
    """
    found = []
    for _, rows in chosen.groupby(SAME, dropna=False):
        correlation = rank_correlation(rows["valid_loss"].tolist(), rows["value"].tolist())
        found.append(
            {
                "benchmark": title_of(rows),
                "chance": None if pd.isna(rows["chance"].iloc[0]) else float(rows["chance"].iloc[0]),
                "rank_correlation": None
                if correlation is None
                else dict(zip(("r", "low", "high"), correlation, strict=True)),
                "points": rows[["rho", "seed", "valid_loss", "value"]].sort_values(["rho", "seed"]).to_dict("records"),
            }
        )
    return {"study": name, "benchmarks": found}


def draw(name: str, chosen: pd.DataFrame) -> Figure:
    """Draw loss over rho (a), scores over rho as distances from chance or from their own mean (b), and both (c)."""
    with mpl.rc_context(style.RC):
        figure = Figure(figsize=(12, 4.6), layout="constrained")
        loss, scores, both = figure.subplots(1, 3)
        runs = chosen.drop_duplicates("run_id")
        loss.plot(runs["rho"], runs["valid_loss"], "o", color=style.BLUE, ms=4, alpha=0.5)
        loss.plot(runs.groupby("rho")["valid_loss"].mean(), "-", color=style.BLUE)
        loss.set(title="(a) loss over rho", xlabel="rho", ylabel=style.LOSS_LABEL)
        for i, (_, rows) in enumerate(chosen.groupby(SAME, dropna=False)):
            colour, mark = _COLOURS[i % len(_COLOURS)], _MARKS[i % len(_MARKS)]
            chance = rows["chance"].iloc[0]
            above = rows["value"] - (rows["value"].mean() if pd.isna(chance) else chance)
            found = rank_correlation(rows["valid_loss"].tolist(), rows["value"].tolist())
            words = "too few runs" if found is None else f"r {found[0]:+.2f} ({found[1]:+.2f} to {found[2]:+.2f})"
            label = f"{rows['benchmark'].iloc[0]}: {words}"
            scores.plot(rows["rho"], above, mark, color=colour, ms=4, alpha=0.5)
            scores.plot(above.groupby(rows["rho"]).mean(), "-", color=colour)
            both.plot(rows["valid_loss"], above, mark, color=colour, ms=4.5, label=label)
        scores.axhline(0, color=style.GREY, lw=1)
        both.axhline(0, color=style.GREY, lw=1)
        scores.set(title="(b) scores over rho", xlabel="rho", ylabel="score minus chance (without one: minus mean)")
        both.set(title="(c) scores over loss, rank correlation", xlabel=style.LOSS_LABEL)
        figure.legend(*both.get_legend_handles_labels(), loc="outside lower left", ncols=3)
        figure.suptitle(f"{name}: does loss predict benchmarks?", x=0.01, ha="left", fontsize=11.5, fontweight="bold")
        return figure
