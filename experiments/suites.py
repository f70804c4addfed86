"""Suites: name -> the runs of one study. One function per figure or table of the paper, and some of our own.

A suite is a generator of Runs: typed, countable and free of tensors. It derives its points from a budget, so that every
suite runs on every budget. Scientific field: what the suite names. Nuisance field: the learning rate, one value per
budget for all arms. Everything else is fixed by the budget. Seeds are the outer loop, so that a sweep cut short holds
whole curves. A run's labels are not part of its name: suites share the runs that they have in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from experiments.settings import Budget, Run, UserError
from experiments.suites_allocation import allocation, baselines, lr, noise
from experiments.suites_memory import ablation, infinite_memory, layers
from experiments.suites_scale import horizon, sparsity

Suite = Callable[[Budget, str], Iterator[Run]]

SUITES: dict[str, Suite] = {
    "allocation": allocation,
    "sparsity": sparsity,
    "horizon": horizon,
    "infinite-memory": infinite_memory,
    "layers": layers,
    "ablation": ablation,
    "baselines": baselines,
    "noise": noise,
    "lr": lr,
}


def runs_of(suite: str, budget: Budget, data: str) -> list[Run]:
    """All runs of a suite, each once.

    Args:
        suite: a key of SUITES.
        budget: the study's size and grid.
        data: sha256 of the data manifest; any text will do for counting.

    Raises:
        UserError: unknown suite, or a point of the grid that cannot be allocated.
    """
    if suite not in SUITES:
        raise UserError(f"no suite {suite!r}: choose one of {', '.join(SUITES)}")
    try:
        runs = list(SUITES[suite](budget, data))
    except ValueError as error:
        raise UserError(f"{suite} on {budget.name}: {error}") from error
    named = [Run(spec=run.spec, labels=replace(run.labels, suite=suite)) for run in runs]
    each: dict[str, Run] = {}
    for run in named:
        each.setdefault(run.spec.run_id, run)  # what it was first asked for
    return list(each.values())


def about(suite: str) -> str:
    """The first line of a suite's docstring: its figure, and what varies."""
    return (SUITES[suite].__doc__ or "").partition("\n")[0]
