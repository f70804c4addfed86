"""Suites that ask whether the best rho moves: with P_tot / P_act, and with training length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from engram.allocation import with_sparsity
from experiments.points import at_rho
from experiments.settings import Budget, Run


def sparsity(budget: Budget, data: str) -> Iterator[Run]:
    """Our own: loss against rho at P_tot / P_act of 5, 10 and 20, by the number of experts at rho = 1.

    Widths, top_k, tokens and learning rate stay; P_tot changes, and P_act by the router's rows only. In models of a few
    dozen dimensions these rows are a good part of P_act, which then falls with rho: `plan` shows by how much.

    Command: python -m experiments launch sparsity cpu-small
    Cost: 30 runs, about 30 minutes on two CPU cores.
    Expected: nobody has measured it. The paper holds the ratio near 10, and two models that were released disagree.
    """
    for seed in budget.seeds:
        for ratio in budget.grid.sparsity_ratios:
            level = replace(budget, backbone=with_sparsity(budget.backbone, ratio))
            for rho in budget.grid.rhos:
                yield at_rho(level, data, seed, rho, variant=f"sparsity-{ratio:g}")


def horizon(budget: Budget, data: str) -> Iterator[Run]:
    """Our own: loss against rho at several training lengths of one backbone.

    The learning rate is the budget's at every length; its schedule stretches with the run.

    Command: python -m experiments launch horizon cpu-small
    Cost: 50 runs, about an hour on two CPU cores.
    Expected: not in the paper, which trains on about 10 tokens per parameter of P_tot.
    """
    for seed in budget.seeds:
        for factor in budget.grid.horizons:
            batch = budget.train.batch_tokens
            tokens = budget.train.tokens if factor == 1 else max(1, round(budget.train.tokens * factor / batch)) * batch
            level = replace(budget, train=replace(budget.train, tokens=tokens))
            for rho in budget.grid.rhos:
                yield at_rho(level, data, seed, rho, variant=f"horizon-{factor:g}x")
