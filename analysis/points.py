"""The table of runs -> the points of a suite: runs that differ in the seed only, with the facts they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.collect import rows_of_suite
from analysis.compare import Paired, paired
from analysis.errors import UserError
from analysis.fits import REFERENCE, SAME_RHO
from analysis.study import ALLOCATION, CODE_AND_DATA, SAME, alike, names_of, plain, same_origin

SUITES = (
    "allocation",
    "sparsity",
    "horizon",
    "infinite-memory",
    "layers",
    "ablation",
    "baselines",
    "noise",
    "lr",
)
LENGTH_VARIES = ("horizon",)
PLACE = ["arm", "variant", "mode", "rho", "train_tokens"]

ONE_MINUTE_STEPS = 100
"""A run of fewer optimiser steps has learnt next to nothing: it shows that the pipeline works."""


@dataclass(frozen=True, eq=False)
class Point:
    """One point of a suite."""

    arm: str
    variant: str | None
    mode: str
    rho: float | None
    facts: dict[str, Any]
    """A row of it; missing values are None."""
    losses: dict[int, float]
    """Seed -> validation loss of the runs that finished, nats per token."""
    run_ids: dict[int, str]
    """Seed -> run, those that diverged included."""
    diverged: tuple[int, ...]
    """Seeds that diverged."""
    seconds: float | None
    """Mean wall-clock time of the finished runs."""

    @property
    def name(self) -> str:
        """Arm, variant and rho, as far as they say something: unique within a suite."""
        words = [self.variant] if self.arm in ("ablation", "engram") and self.variant else [self.arm]
        if self.variant and self.variant not in words:
            words.append(self.variant)
        if self.mode == "strict":
            words.append("strict")
        if self.rho is not None and self.arm in (ALLOCATION, "random-ids", "over-encoding"):
            words.append(f"rho {self.rho:.2f}")
        return ", ".join(words)

    @property
    def is_pure(self) -> bool:
        """Whether it is the mixture of experts of rho = 1, without memory."""
        return self.arm == ALLOCATION and self.rho is not None and abs(self.rho - REFERENCE) <= SAME_RHO


@dataclass(frozen=True, eq=False)
class SuiteRuns:
    """A suite's runs on one budget, on equal data by equal code."""

    name: str
    """The budget, and what tells it from other groups of that budget."""
    budget: str
    suite: str
    rows: pd.DataFrame
    """All of them, those that diverged and those that repeat another included."""
    points: tuple[Point, ...]
    replicates: tuple[tuple[int, float], ...]
    """Seed and loss of the runs that repeat another."""

    def find(self, **wanted: Any) -> tuple[Point, ...]:
        """Points whose attributes are those given."""
        return tuple(p for p in self.points if all(getattr(p, key) == value for key, value in wanted.items()))

    @property
    def pure(self) -> Point | None:
        """The mixture of experts of rho = 1 that the points are compared with."""
        return next((point for point in self.points if point.is_pure), None)

    @property
    def n_seeds(self) -> int:
        """Seeds that some point has finished."""
        return len({seed for point in self.points for seed in point.losses})

    @property
    def is_one_minute(self) -> bool:
        """Whether even its longest run is so short that no conclusion may be drawn from it."""
        return bool(self.rows.loc[self.rows["status"] == "final", "steps"].max() < ONE_MINUTE_STEPS)

    def paired(self, points: Iterable[Point] | None = None) -> Paired | None:
        """Losses by point name over shared seeds; points without a finished run are left out."""
        chosen = self.points if points is None else points
        return paired({point.name: point.losses for point in chosen if point.losses})


def read_suites(table: pd.DataFrame, suite: str, budget: str | None = None) -> list[SuiteRuns]:
    """Group a suite's finished runs: one group for each budget, data and code.

    Args:
        table: from `read_table`.
        suite: its name.
        budget: only this one; None takes all.

    Raises:
        UserError: two runs claim one place.
    """
    rows = rows_of_suite(table, suite)
    rows = rows if budget is None else rows[rows["budget"] == budget]
    same = CODE_AND_DATA if suite in LENGTH_VARIES else SAME
    found = []
    for name in sorted(set(rows["budget"])):
        of_budget = rows[rows["budget"] == name]
        final = of_budget[of_budget["status"] == "final"]
        groups = alike(final, same)
        for place, group in zip(names_of(name, groups, table[table["budget"] == name]), groups, strict=True):
            stopped = of_budget[(of_budget["status"] == "diverged") & same_origin(of_budget, group)]
            found.append(_suite_runs(place, name, suite, group, stopped))
    return found


def by_level(runs: SuiteRuns, number: Callable[[str], float]) -> list[tuple[float, str, pd.DataFrame]]:
    """Split a suite whose variants are levels, such as `sparsity-10`, into its sweeps over rho.

    Returns:
        Number, variant and rows of every level, numbers rising.
    """
    levels = [(number(str(variant)), str(variant), rows) for variant, rows in runs.rows.groupby("variant")]
    return sorted(levels, key=lambda level: level[0])


def _suite_runs(name: str, budget: str, suite: str, final: pd.DataFrame, stopped: pd.DataFrame) -> SuiteRuns:
    replicate = final["replicate"].notna()
    again = tuple(zip(final["seed"][replicate].tolist(), final["valid_loss"][replicate].tolist(), strict=True))
    groups = final[~replicate].groupby(PLACE, dropna=False, sort=True)
    points = tuple(_point(rows, stopped) for _, rows in groups)
    return SuiteRuns(name, budget, suite, pd.concat([final, stopped]), points, again)


def _point(rows: pd.DataFrame, stopped: pd.DataFrame) -> Point:
    facts = plain(rows.iloc[0])
    if rows["seed"].duplicated().any():
        twins = rows[rows["seed"].duplicated(keep=False)]
        raise UserError(
            f"runs {', '.join(twins['run_id'])} are of one place ({facts['arm']}, {facts['variant'] or 'no variant'}, "
            f"seed {twins['seed'].iloc[0]}) and differ in settings that the table does not show: move those you do not "
            "want out of the runs directory and collect again"
        )
    place = [column for column in PLACE if column != "train_tokens"]
    here = (stopped[place].isna() & rows[place].iloc[0].isna()) | (stopped[place] == rows[place].iloc[0])
    lost = stopped[here.fillna(False).all(axis=1) & ~stopped["seed"].isin(rows["seed"])]
    both = pd.concat([rows, lost])
    return Point(
        arm=facts["arm"],
        variant=facts["variant"],
        mode=facts["mode"],
        rho=facts["rho"],
        facts=facts,
        losses=dict(zip(rows["seed"].tolist(), rows["valid_loss"].tolist(), strict=True)),
        run_ids=dict(zip(both["seed"].tolist(), both["run_id"].tolist(), strict=True)),
        diverged=tuple(sorted(set(lost["seed"].tolist()))),
        seconds=float(rows["seconds"].mean()) if rows["seconds"].notna().any() else None,
    )
