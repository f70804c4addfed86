"""Does loss predict benchmarks across rho? Benchmark scores against rho beside loss against rho, in one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import style
from analysis.baselines_table import title_of
from analysis.benchmarks import SAME, rank_correlation
from analysis.canvas import titled_figure
from analysis.study import ALLOCATION

_MARKS = "os^vDPX<>p*"
_COLOURS = (
    *(style.BLUE, style.VERMILLION, style.GREEN, style.ORANGE, style.PURPLE),
    *(style.BROWN, style.BLACK, style.GREY, style.SKY),
)
_DASHES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class _Kind:
    """Scores that may share an axis."""

    what: str
    axis: str
    perfect: int
    """The rank correlation with the loss of a measure that follows it exactly."""


_CHANCE = _Kind("scores", "score minus chance\n(share of items; higher is better)", -1)
_SCORE = _Kind("scores without chance", "score minus its mean over all runs\n(share of items; higher is better)", -1)
_BITS = _Kind("bits per byte", "bits per byte minus their mean\nover all runs (lower is better)", 1)
_KINDS = (_CHANCE, _SCORE, _BITS)


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


def draw(name: str, chosen: pd.DataFrame, warning: str) -> Figure:
    """Draw loss over rho and, in a row for each kind of score, scores over rho and over loss.

    Marks are runs. Lines join means over the seeds that every rho has: other seeds would bend them, as they shift all.

    Args:
        name: the study.
        chosen: its results, from `points`.
        warning: what must stand below runs that are too small to say anything; empty for others.
    """
    kinds = [(kind, groups) for kind in _KINDS if (groups := _of_kind(chosen, kind))]
    heights = [max(3.2, 0.9 + 0.2 * len(groups)) for _, groups in kinds]
    with mpl.rc_context(style.RC):
        figure = titled_figure(f"{name}: does loss predict benchmarks?", (15, 1.2 + sum(heights)), warning)
        grid = figure.add_gridspec(len(kinds), 3, height_ratios=heights)
        _losses(figure.add_subplot(grid[:, 0]), chosen.drop_duplicates("run_id"))
        letters, n_drawn = iter("bcdefg"), 0
        for row, (kind, groups) in enumerate(kinds):
            over_rho = figure.add_subplot(grid[row, 1])
            over_loss = figure.add_subplot(grid[row, 2], sharey=over_rho)
            for label, rows in zip(_names(groups), groups, strict=True):
                _scores(over_rho, over_loss, rows, label, n_drawn)
                n_drawn += 1
            over_rho.set(title=f"({next(letters)}) {kind.what} over rho", xlabel="rho", ylabel=kind.axis)
            over_loss.set(title=f"({next(letters)}) {kind.what} over loss", xlabel=style.LOSS_LABEL)
            for axes in (over_rho, over_loss):
                axes.axhline(0, color=style.GREY, lw=1)
            title = (
                f"r: rank correlation with the loss, 95% interval;\n{kind.perfect:+d} would be perfect prediction.\n"
                "Lines: means over the seeds that every rho has"
            )
            legend = over_loss.legend(loc="upper left", bbox_to_anchor=(1.01, 1), title=title, alignment="left")
            legend.get_title().set_fontsize(9)
        return figure


def _of_kind(chosen: pd.DataFrame, kind: _Kind) -> list[pd.DataFrame]:
    groups = [rows for _, rows in chosen.groupby(SAME, dropna=False)]
    return [rows for rows in groups if _kind_of(rows) is kind]


def _kind_of(rows: pd.DataFrame) -> _Kind:
    if rows["metric"].iloc[0] == "bits_per_byte":
        return _BITS
    return _SCORE if pd.isna(rows["chance"].iloc[0]) else _CHANCE


def _names(groups: Sequence[pd.DataFrame]) -> list[str]:
    """Benchmark and number of items; after them, where two would read alike, what tells them apart."""
    first = [rows.iloc[0] for rows in groups]
    names = [f"{row['benchmark']}, {row['n']:,} items" for row in first]
    for column in SAME[1:]:
        values = ["none" if pd.isna(row[column]) else str(row[column])[:8] for row in first]
        told = set(zip(names, values, strict=True))
        names = [
            f"{name}, {column} {value}" if sum(name == other for other, _ in told) > 1 else name
            for name, value in zip(names, values, strict=True)
        ]
    return names


def _line(rows: pd.DataFrame, values: pd.Series) -> tuple[pd.Series, int]:
    """Means over rho of the seeds that every rho has, and how many those are."""
    shared = set.intersection(*(set(part) for _, part in rows["seed"].groupby(rows["rho"])))
    kept = rows["seed"].isin(shared)
    return values[kept].groupby(rows["rho"][kept]).mean(), len(shared)


def _losses(axes: Axes, runs: pd.DataFrame) -> None:
    line, n = _line(runs, runs["valid_loss"])
    axes.plot(runs["rho"], runs["valid_loss"], "o", color=style.BLUE, ms=4, alpha=0.5)
    axes.plot(line, "-", color=style.BLUE)
    said = (
        f"line: mean\nof {'one seed' if n == 1 else f'{n} seeds'} that every rho has"
        if n
        else "no seed\nhas every rho: no line"
    )
    axes.set(title=f"(a) loss over rho; {said}", xlabel="rho", ylabel=style.LOSS_LABEL)


def _scores(over_rho: Axes, over_loss: Axes, rows: pd.DataFrame, name: str, number: int) -> None:
    colour, mark = _COLOURS[number % len(_COLOURS)], _MARKS[number % len(_MARKS)]
    dashes = _DASHES[number // len(_COLOURS) % len(_DASHES)]  # the colours begin anew
    chance = rows["chance"].iloc[0]
    above = rows["value"] - (rows["value"].mean() if pd.isna(chance) else chance)
    found = rank_correlation(rows["valid_loss"].tolist(), rows["value"].tolist())
    words = "too few runs" if found is None else f"r {found[0]:+.2f} ({found[1]:+.2f} to {found[2]:+.2f})"
    over_rho.plot(rows["rho"], above, mark, color=colour, ms=4, alpha=0.5)
    line, n = _line(rows, above)
    over_rho.plot(line, dashes, color=colour)
    over_loss.plot(rows["valid_loss"], above, mark, color=colour, ms=4.5)
    # One legend for both panels, though the line stands in the other.
    over_loss.plot(
        [], [], mark + (dashes if n else ""), color=colour, ms=4.5, label=f"{name}: {words}{'' if n else '; no line'}"
    )
