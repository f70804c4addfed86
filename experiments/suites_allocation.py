"""Suites about one curve: the split itself, the four models of Table 1, and what the error bars of both rest on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from engram.allocation import with_rows
from experiments.points import at_control_rho, at_rho, control, make_run
from experiments.settings import Budget, Run


def allocation(budget: Budget, data: str) -> Iterator[Run]:
    """Fig. 3 (left): loss against rho at fixed P_tot, P_act and tokens, with its controls.

    Command: python -m experiments launch allocation cpu-small
    Cost: 20 runs, about 16 minutes on two CPU cores; `plan` prints it for every budget.
    Expected (paper, 2e20 and 6e20 FLOPs): a U, lowest at rho = 0.75 to 0.85, 0.014 to 0.015 nats below rho = 1.
    """
    for seed in budget.seeds:
        for rho in budget.rhos:
            yield at_rho(budget, data, seed, rho)
        for name in budget.controls:
            yield control(budget, data, seed, name)


def baselines(budget: Budget, data: str) -> Iterator[Run]:
    """Table 1: dense, MoE, Engram and a larger Engram at equal P_act.

    Command: python -m experiments launch baselines cpu-small
    Cost: 8 runs, about 7 minutes on two CPU cores.
    Expected (paper, 27B): validation loss 1.768, 1.634, 1.622 and 1.610.
    """
    for seed in budget.seeds:
        yield control(budget, data, seed, "dense")
        yield at_rho(budget, data, seed, 1.0)
        engram = at_control_rho(budget, data, seed)
        yield engram
        model = engram.spec.model
        assert model.memory is not None, "at_control_rho has seen to it"
        rows = round(model.memory.tables.n_rows * budget.large_memory_factor)
        labels = replace(engram.labels, arm="engram-large")
        yield Run(spec=replace(engram.spec, model=with_rows(model, rows)), labels=labels)


def noise(budget: Budget, data: str) -> Iterator[Run]:
    """Our own: one spec with eight seeds, and its first seed once more: the error bar of everything else.

    Command: python -m experiments launch noise cpu-small
    Cost: 9 runs, about 8 minutes on two CPU cores.
    Expected: the paper reports no seeds. The replicate is equal to the last bit on a CPU; on a GPU it shows what
    kernels that add in changing order do.
    """
    first = None
    for seed in range(budget.grid.noise_seeds):
        run = at_control_rho(budget, data, seed)
        first = first or run
        yield run
    assert first is not None
    labels = replace(first.labels, variant="replicate")
    yield Run(spec=replace(first.spec, replicate=1), labels=labels)


def lr(budget: Budget, data: str) -> Iterator[Run]:
    """Our own: learning rate at rho = 1 and at `control_rho`, so that the nuisance is fixed fairly for both sides.

    One budget is one P_act; over several the best rate can be read against P_act. The seeds are of no other suite.

    Command: python -m experiments launch lr cpu-small
    Cost: 20 runs, about 16 minutes on two CPU cores.
    Expected: both sides agree on the best rate, as they did when cpu-small's was chosen (LOG.md).
    """
    for seed in budget.grid.lr_seeds:
        for factor in budget.grid.lr_factors:
            optim = replace(budget.train.optim, lr=budget.train.optim.lr * factor)
            train = replace(budget.train, optim=optim)
            for point in (at_rho(budget, data, seed, 1.0), at_control_rho(budget, data, seed)):
                yield make_run(
                    budget,
                    data,
                    seed,
                    point.spec.model,
                    arm="allocation",
                    rho_target=point.labels.rho_target,
                    variant=f"lr-{factor:g}x",
                    train=train,
                )
