"""The table of runs -> studies: runs that may be compared, arranged as a sweep and its other arms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.collect import rows_of_suite
from analysis.errors import UserError
from analysis.fits import REFERENCE, SAME_RHO, Difference, Sweep, against_reference, offsets, pair
from analysis.verdict import Verdict, judge

ALLOCATION = "allocation"
CODE_AND_DATA = ["data", "schema", "budget_hash"]
SAME = [*CODE_AND_DATA, "train_tokens", "steps"]
"""What runs of one budget must share to be compared: equal text, code, backbone, training and length."""
PLACE = ["arm", "mode", "rho", "seed"]


@dataclass(frozen=True, eq=False)
class Arm:
    """Runs that differ in the seed only."""

    arm: str
    mode: str
    rho: float | None
    seeds: tuple[int, ...]
    """Seeds with a final run."""
    loss: tuple[float, ...]
    """Validation loss of those seeds, nats per token."""
    side_by_side: tuple[float, ...]
    """Of these the losses of seeds that every rho has finished, or all if there is none: a mean over other seeds than a
    neighbour's would differ from it by the seeds."""
    bpb: float | None
    """Mean bits per byte, over the same seeds."""
    n_diverged: int
    first: dict[str, Any]
    """One of the rows, for what all of them share; missing values are None."""
    difference: Difference | None
    """Loss minus the loss at rho = 1 over shared seeds; None if there are none."""

    @property
    def on_sweep(self) -> bool:
        return self.arm == ALLOCATION and self.mode == "paper"


@dataclass(frozen=True, eq=False)
class Study:
    """One budget's sweep over rho, the verdict on it, and all arms with their distance to rho = 1."""

    name: str
    """The budget, and what tells it from other studies of that budget."""
    sweep: Sweep
    verdict: Verdict
    arms: tuple[Arm, ...]
    reference: dict[str, Any]
    """A row at rho = 1: totals that hold for the whole sweep."""


def split(table: pd.DataFrame, budget: str | None = None) -> dict[str, pd.DataFrame]:
    """Split a table into the runs of each study, by name; runs that belong to no sweep over rho are left out.

    Raises:
        UserError: the budget is not in the table, or there is no sweep.
    """
    budgets = sorted(set(table["budget"]))
    if budget is not None and budget not in budgets:
        raise UserError(f"no finished runs of budget {budget}: the table holds {', '.join(budgets) or 'none'}")
    chosen = budgets if budget is None else [budget]
    found: dict[str, pd.DataFrame] = {}
    lost = []
    for name in chosen:
        of_budget = table[table["budget"] == name]
        rows = rows_of_suite(of_budget, ALLOCATION)
        final, diverged = rows[rows["status"] == "final"], rows[rows["status"] == "diverged"]
        lost += [name] if len(diverged) and final.empty else []
        sweeps = [group for group in alike(final, SAME) if (group["arm"] == ALLOCATION).any()]
        for place, group in zip(names_of(name, sweeps, of_budget), sweeps, strict=True):
            found[place] = pd.concat([group, _gaps(diverged, group)])
    if not found:
        if lost:
            raise UserError(f"all runs of the allocation sweep of {', '.join(lost)} diverged: lower train.optim.lr")
        raise UserError(f"no allocation sweep among the runs of {', '.join(chosen)}: train one with `make sweep`")
    return found


def alike(rows: pd.DataFrame, columns: Sequence[str]) -> list[pd.DataFrame]:
    """Groups of rows that agree in these columns; no value agrees with no value."""
    return [group for _, group in rows.groupby(list(columns), dropna=False)]


def names_of(name: str, groups: Sequence[pd.DataFrame], budget: pd.DataFrame) -> list[str]:
    """The budget's name, and after it what tells each group from the others.

    Args:
        name: the budget's.
        groups: of one suite.
        budget: all rows of the budget. What tells its data and code apart is named in every suite alike, so that suites
            find each other; length only where that does not tell.
    """
    first = [{c: "none" if pd.isna(v := group[c].iloc[0]) else str(v) for c in SAME} for group in groups]
    telling = [c for c in CODE_AND_DATA if budget[c].nunique(dropna=False) > 1]
    if len({tuple(values[c] for c in telling) for values in first}) < len(groups):
        telling += [c for c in SAME if c not in CODE_AND_DATA and len({values[c] for values in first}) > 1]
    return ["_".join([name, *(f"{c}-{values[c][:12]}" for c in telling)]) for values in first]


def same_origin(rows: pd.DataFrame, group: pd.DataFrame) -> pd.Series:
    """Which rows have the data, the code and the budget's content of a group."""
    one = group[CODE_AND_DATA].iloc[0]
    return ((rows[CODE_AND_DATA] == one) | (rows[CODE_AND_DATA].isna() & one.isna())).fillna(False).all(axis=1)


def _gaps(diverged: pd.DataFrame, final: pd.DataFrame) -> pd.DataFrame:
    """Choose the diverged runs that explain a gap. They stopped early, so their length does not tell their study."""
    same = same_origin(diverged, final)
    taken = pd.MultiIndex.from_frame(diverged[PLACE]).isin(pd.MultiIndex.from_frame(final[PLACE]))
    return diverged[same & ~taken]


def read_study(name: str, rows: pd.DataFrame) -> Study:
    """Arrange the runs of one study and judge its sweep.

    Raises:
        UserError: rho = 1 is missing, no seed is complete, or two runs claim one place.
    """
    rows = _share_reference(rows)
    _refuse_twins(rows)
    on_sweep = rows[(rows["arm"] == ALLOCATION) & (rows["mode"] == "paper")]
    losses = on_sweep["valid_loss"].where(on_sweep["status"] == "final")
    sweep = pair(on_sweep["rho"].tolist(), on_sweep["seed"].tolist(), losses.tolist())
    pure = ((on_sweep["rho"] - REFERENCE).abs() <= SAME_RHO) & losses.notna()
    reference = plain(on_sweep[pure].iloc[0])
    curve = dict(zip(sweep.rho.tolist(), offsets(sweep), strict=True))
    groups = rows.groupby(["arm", "mode", "rho"], dropna=False, sort=True)
    arms = tuple(_arm(group, sweep, curve) for _, group in groups)
    return Study(name, sweep, judge(sweep, float(reference["P_act"])), arms, reference)


def _share_reference(rows: pd.DataFrame) -> pd.DataFrame:
    """Count the pure mixture of experts as `paper`: it pays for no memory, so both modes are one model and one run."""
    pure = (rows["arm"] == ALLOCATION) & ((rows["rho"] - REFERENCE).abs() <= SAME_RHO)
    return rows.assign(mode=rows["mode"].mask(pure, "paper"))


def _refuse_twins(rows: pd.DataFrame) -> None:
    for (arm, _, rho, seed), twins in rows.groupby(PLACE, dropna=False):
        if len(twins) > 1:
            raise UserError(
                f"runs {', '.join(twins['run_id'])} are all {arm}, rho {rho:.4g}, seed {seed}, and differ in settings "
                "that the table does not show: move those you do not want out of the runs directory and collect again"
            )


def _arm(rows: pd.DataFrame, sweep: Sweep, curve: dict[float, Difference]) -> Arm:
    final = rows[(rows["status"] == "final") & rows["valid_loss"].notna()]
    shared = final[final["seed"].isin(sweep.seeds)]
    shared = final if shared.empty else shared
    first = plain(rows.iloc[0])
    seeds, losses = tuple(final["seed"].tolist()), tuple(final["valid_loss"].tolist())
    if first["arm"] == ALLOCATION and first["mode"] == "paper":
        difference = curve.get(first["rho"])
    else:
        difference = against_reference(sweep, seeds, losses)
    return Arm(
        arm=first["arm"],
        mode=first["mode"],
        rho=first["rho"],
        seeds=seeds,
        loss=losses,
        side_by_side=tuple(shared["valid_loss"].tolist()),
        bpb=float(shared["valid_bpb"].mean()) if shared["valid_bpb"].notna().any() else None,
        n_diverged=int((rows["status"] == "diverged").sum()),
        first=first,
        difference=difference,
    )


def plain(row: pd.Series) -> dict[str, Any]:
    """A row as a dictionary, missing values as None."""
    return {str(key): None if pd.isna(value) else value for key, value in row.items()}
