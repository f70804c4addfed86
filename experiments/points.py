"""Single points of a suite: a model, its training and its labels, from a budget. Free of tensors."""

from __future__ import annotations

import math
from dataclasses import replace

from engram.allocation import Mode, allocate, dense, module_only, realised_rho, with_rows
from engram.config import EngramConfig, ModelConfig, OverEncodingConfig
from experiments.settings import Budget, Labels, Run, RunSpec, TrainConfig


def at_rho(
    budget: Budget, data: str, seed: int, rho: float, mode: Mode = "paper", *, variant: str | None = None
) -> Run:
    """A point of the curve: `rho` of the backbone's sparse capacity in experts, the rest in memory."""
    model = allocate(budget.backbone, budget.engram, rho, mode)
    return make_run(budget, data, seed, model, arm="allocation", mode=mode, rho_target=rho, variant=variant)


def at_control_rho(budget: Budget, data: str, seed: int, mode: Mode = "paper") -> Run:
    """The point of the curve at `control_rho`.

    Raises:
        ValueError: to whole experts, it is the pure mixture of experts.
    """
    run = at_rho(budget, data, seed, budget.control_rho, mode)
    moe = budget.backbone.moe
    assert moe is not None, "a budget's backbone is a mixture of experts"
    if run.spec.model.memory is None:
        most = 1 - 1 / (moe.n_routed_experts - moe.top_k)
        raise ValueError(
            f"control_rho={budget.control_rho} leaves all {moe.n_routed_experts} experts and no memory: "
            f"take at most {math.floor(1000 * most) / 1000}"
        )
    return run


def control(budget: Budget, data: str, seed: int, name: str) -> Run:
    """One of the budget's controls (`Budget.controls`).

    Raises:
        ValueError: it has a memory, and `control_rho` leaves none.
    """
    rho, tables = budget.control_rho, budget.engram.tables
    if name == "dense":
        return make_run(budget, data, seed, dense(budget.backbone), arm=name)
    if name == "module-only":
        return make_run(budget, data, seed, module_only(budget.backbone, budget.engram), arm=name, rho_target=1.0)
    engram = at_control_rho(budget, data, seed, "strict" if name == "strict" else "paper")
    if name == "strict":
        return engram
    if name == "random-ids":
        blind = replace(budget.engram, tables=replace(tables, lookup="random"))  # <- the intervention
        return make_run(budget, data, seed, allocate(budget.backbone, blind, rho), arm=name, rho_target=rho)
    assert name == "over-encoding", name
    at_input = OverEncodingConfig(tables=tables)
    return make_run(budget, data, seed, allocate(budget.backbone, at_input, rho), arm=name, rho_target=rho)


def rows_at(budget: Budget, multiple: float) -> int:
    """Rows of all of the budget's tables if each had `multiple` times the vocabulary, as the paper counts slots."""
    engram = budget.engram
    return round(multiple * budget.backbone.vocab_size) * len(engram.layer_ids) * engram.tables.n_lookups


def with_memory(backbone: ModelConfig, memory: EngramConfig | OverEncodingConfig, parameters: int) -> ModelConfig:
    """The whole backbone with tables of `parameters` values on top: P_tot grows, experts stay.

    Raises:
        ValueError: too few parameters for the number of tables.
    """
    return with_rows(module_only(backbone, memory), round(parameters / memory.tables.d_row))


def make_run(
    budget: Budget,
    data: str,
    seed: int,
    model: ModelConfig,
    *,
    arm: str,
    mode: Mode = "paper",
    rho_target: float | None = None,
    variant: str | None = None,
    train: TrainConfig | None = None,
    replicate: int | None = None,
) -> Run:
    """Put a run together. Its rho is told from the experts: 1 where the backbone kept all of them."""
    rho = None if model.moe is None else realised_rho(budget.backbone, model)
    return Run(
        spec=RunSpec(seed=seed, model=model, train=train or budget.train, data=data, replicate=replicate),
        labels=Labels(
            budget=budget.name,
            budget_hash=budget.content,
            arm=arm,
            mode=mode,
            rho_target=rho_target,
            rho=rho,
            variant=variant,
        ),
    )
