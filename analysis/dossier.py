"""All suites of one budget together: what a report is about and what claims are judged on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd

from analysis.collect import rows_of_suite
from analysis.compare import Paired, paired
from analysis.errors import UserError
from analysis.fits import Sweep
from analysis.points import SUITES, SuiteRuns, by_level, read_suites
from analysis.study import ALLOCATION, Study, read_study, split
from analysis.verdict import TINY_P_ACT


@dataclass(frozen=True, eq=False)
class Level:
    """One sweep over rho among several that differ in one number."""

    number: float
    label: str
    study: Study


@dataclass(frozen=True, eq=False)
class Dossier:
    """One budget's suites on equal data by equal code."""

    name: str
    suites: dict[str, SuiteRuns]
    study: Study | None
    """The curve over rho with its verdict; None if that suite has not been run, or not at rho = 1."""
    troubles: tuple[str, ...] = ()
    """Why a suite that has runs could not be read."""
    across: tuple[Level, ...] = field(default=(), repr=False)
    """By training FLOPs at rho = 1, this curve and that of each other budget that has one of equal corpus and code."""

    @property
    def rows(self) -> pd.DataFrame:
        """Every row once per suite, in the suites' order."""
        return pd.concat([runs.rows for runs in self.suites.values()], ignore_index=True)

    @property
    def of_one_backbone(self) -> pd.DataFrame:
        """Rows of `allocation` and `baselines`, each run once: they may be compared, whichever suite trained them."""
        parts = [runs.rows for suite, runs in self.suites.items() if suite in (ALLOCATION, "baselines")]
        return pd.concat(parts, ignore_index=True).drop_duplicates("run_id") if parts else self.rows[:0]

    @property
    def n_seeds(self) -> int:
        return max(runs.n_seeds for runs in self.suites.values())

    @property
    def is_one_minute(self) -> bool:
        """Whether some of its runs are too short to draw any conclusion from."""
        return any(runs.is_one_minute for runs in self.suites.values())

    @property
    def warning(self) -> str:
        """What stands wherever a number of this dossier is shown; empty for runs of a size that says something."""
        if self.is_one_minute:
            return (
                "One-minute runs: they show that the pipeline works from training to this page, and nothing else. "
                "No conclusion is drawn from them."
            )
        P_act = float(self.rows["P_act"].max())
        if P_act < TINY_P_ACT:
            return f"Tiny models (P_act at most {P_act / 1e6:.3g}M): says little about the paper's scale."
        return ""

    def levels(self, suite: str) -> tuple[Level, ...]:
        """The sweeps over rho of `sparsity` (by P_tot / P_act) or `horizon` (by tokens per parameter of P_tot).

        Raises:
            UserError: a level has no complete seed, or no run at rho = 1.
        """
        runs = self.suites.get(suite)
        if runs is None:
            return ()
        column = {"sparsity": "P_tot_per_P_act", "horizon": "tokens_per_P_tot"}[suite]
        found = []
        for _, variant, rows in by_level(runs, lambda text: float(text.rpartition("-")[2].rstrip("x"))):
            study = read_study(f"{self.name} {variant}", rows)
            found.append(Level(float(study.reference[column]), variant, study))
        return tuple(found)

    def curve(self, *controls: str) -> Paired | None:
        """Losses of the curve over rho, named `rho 0.750`, and of controls, over the seeds that all of them share.

        Raises:
            UserError: a control was run at several rho.
        """
        if self.study is None:
            return None
        sweep = self.study.sweep
        losses = {
            rho_name(float(rho)): dict(zip(sweep.seeds, row.tolist(), strict=True))
            for rho, row in zip(sweep.rho, sweep.loss, strict=True)
        }
        for name in controls:
            arms = [a for a in self.study.arms if a.arm == name and a.mode == "paper" and a.loss]
            arms = arms or [a for a in self.study.arms if a.mode == name and a.loss]  # `strict`
            if not arms:
                return None
            if len(arms) > 1:
                places = ", ".join(f"{arm.rho:.2f}" for arm in arms)
                raise UserError(f"{name} was run at rho = {places}, and which one counts is not said: keep one of them")
            losses[name] = dict(zip(arms[0].seeds, arms[0].loss, strict=True))
        return paired(losses)


def rho_name(rho: float) -> str:
    return f"rho {rho:.3f}"


def interior(sweep: Sweep) -> list[str]:
    """Names of the points of `Dossier.curve` that are no end of the grid."""
    return [rho_name(float(rho)) for rho in sweep.rho[1:-1]]


def read_dossiers(table: pd.DataFrame, budget: str | None = None) -> list[Dossier]:
    """Arrange a table of runs by budget.

    Args:
        table: from `analysis.collect.read_table`.
        budget: only this one; None takes all.

    Raises:
        UserError: the budget is not in the table, or no run has finished.
    """
    known = sorted(set(table["budget"]))
    if budget is not None and budget not in known:
        raise UserError(f"no finished runs of budget {budget}: the table holds {', '.join(known) or 'none'}")
    troubles: dict[str, list[str]] = {}
    by_name: dict[str, dict[str, SuiteRuns]] = {}
    for suite in SUITES:
        for name in known:
            try:
                for runs in read_suites(table, suite, name):
                    by_name.setdefault(runs.name, {})[suite] = runs
            except UserError as error:
                troubles.setdefault(name, []).append(f"{suite}: {error}")
    curves: dict[str, Study] = {}
    for name in known:
        if (rows_of_suite(table, ALLOCATION)["budget"] == name).any():
            try:
                curves |= {place: read_study(place, rows) for place, rows in split(table, name).items()}
            except UserError as error:
                troubles.setdefault(name, []).append(f"{ALLOCATION}: {error}")
    found = []
    for place, suites in sorted(by_name.items()):
        of = next(iter(suites.values())).budget
        if budget is None or of == budget:
            found.append(Dossier(place, suites, curves.get(place), tuple(troubles.get(of, ())), _across(curves, place)))
    if not found:
        why = "; ".join(t for all_ in troubles.values() for t in all_)
        if diverged := int((table["status"] == "diverged").sum()):
            why = f"all {diverged} runs diverged" if diverged == len(table) else f"{diverged} runs diverged; {why}"
        raise UserError(f"no finished runs: {why or 'the table is empty'}")
    return found


def _across(curves: Mapping[str, Study], place: str) -> tuple[Level, ...]:
    """A curve among those of other budgets. Corpus and code are equal in all, so that only size tells them apart.

    A budget with several such curves, of other lengths say, is left out: which of them counts is not said.
    """
    if place not in curves:
        return ()
    own = curves[place].reference
    alike = {
        name: study
        for name, study in curves.items()
        if all(study.reference[key] == own[key] for key in ("corpus", "schema"))
    }
    budgets = [study.reference["budget"] for study in alike.values()]
    chosen = [
        Level(_flops(study), name, study)
        for name, study in alike.items()
        if name == place
        or (study.reference["budget"] != own["budget"] and budgets.count(study.reference["budget"]) == 1)
    ]
    return tuple(sorted(chosen, key=lambda level: level.number))


def _flops(study: Study) -> float:
    return float(study.reference["flops_per_token"]) * float(study.reference["train_tokens"])
