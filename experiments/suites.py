"""Suites: name -> the runs of one study. One function per figure or table of the paper.

A suite is a generator of Runs: typed, countable and free of tensors. Scientific field: the allocation. Nuisance field:
the learning rate, one value per budget for all arms. Everything else is fixed by the budget. Seeds are the outer loop,
so that a sweep cut short holds whole curves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from engram.allocation import Mode, allocate, dense, module_only, realised_rho, with_rows
from engram.config import ModelConfig, OverEncodingConfig
from experiments.settings import Budget, Labels, Run, RunSpec, UserError

Suite = Callable[[Budget, str], Iterator[Run]]


def allocation(budget: Budget, data: str) -> Iterator[Run]:
    """Fig. 3 (left): loss against rho at fixed P_tot, P_act and tokens, with its controls.

    Command: python -m experiments launch allocation cpu-small
    Cost: 20 runs, about 16 minutes on two CPU cores; `plan` prints it for every budget.
    Expected (paper, 2e20 and 6e20 FLOPs): a U, lowest at rho = 0.75 to 0.85, 0.014 to 0.015 nats below rho = 1.
    """
    for seed in budget.seeds:
        for rho in budget.rhos:
            yield _at_rho(budget, data, seed, rho)
        for control in budget.controls:
            yield _control(budget, data, seed, control)


def baselines(budget: Budget, data: str) -> Iterator[Run]:
    """Table 1: dense, MoE, Engram and a larger Engram at equal P_act.

    Command: python -m experiments launch baselines cpu-small
    Cost: 8 runs, about 7 minutes on two CPU cores.
    Expected (paper, 27B): validation loss 1.768, 1.634, 1.622 and 1.610.
    """
    for seed in budget.seeds:
        yield _control(budget, data, seed, "dense")
        yield _at_rho(budget, data, seed, 1.0)
        engram = _at_rho(budget, data, seed, budget.control_rho)
        yield engram
        model = engram.spec.model
        assert model.memory is not None, "control_rho is below 1, so there is a memory"
        rows = round(model.memory.tables.n_rows * budget.large_memory_factor)
        labels = replace(engram.labels, arm="engram-large")
        yield Run(spec=replace(engram.spec, model=with_rows(model, rows)), labels=labels)


SUITES: dict[str, Suite] = {"allocation": allocation, "baselines": baselines}


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
    return list({run.spec.run_id: run for run in runs}.values())


def _at_rho(budget: Budget, data: str, seed: int, rho: float, mode: Mode = "paper") -> Run:
    model = allocate(budget.backbone, budget.engram, rho, mode)
    return _run(budget, data, seed, model, arm="allocation", mode=mode, rho_target=rho)


def _control(budget: Budget, data: str, seed: int, control: str) -> Run:
    rho, tables = budget.control_rho, budget.engram.tables
    if control == "strict":
        return _at_rho(budget, data, seed, rho, mode="strict")
    if control == "dense":
        return _run(budget, data, seed, dense(budget.backbone), arm=control)
    if control == "module-only":
        return _run(budget, data, seed, module_only(budget.backbone, budget.engram), arm=control, rho_target=1.0)
    if control == "random-ids":
        blind = replace(budget.engram, tables=replace(tables, lookup="random"))  # <- the intervention
        return _run(budget, data, seed, allocate(budget.backbone, blind, rho), arm=control, rho_target=rho)
    assert control == "over-encoding", control
    at_input = OverEncodingConfig(tables=tables)
    return _run(budget, data, seed, allocate(budget.backbone, at_input, rho), arm=control, rho_target=rho)


def _run(
    budget: Budget,
    data: str,
    seed: int,
    model: ModelConfig,
    *,
    arm: str,
    mode: Mode = "paper",
    rho_target: float | None = None,
) -> Run:
    rho = None if model.moe is None else realised_rho(budget.backbone, model)
    return Run(
        spec=RunSpec(seed=seed, model=model, train=budget.train, data=data),
        labels=Labels(budget=budget.name, arm=arm, mode=mode, rho_target=rho_target, rho=rho),
    )
