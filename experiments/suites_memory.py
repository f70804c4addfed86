"""Suites about the memory itself, on the whole MoE of rho = 1: how many slots, in which layers, with which parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from engram.config import EngramConfig, OptimConfig, OverEncodingConfig, TableConfig
from experiments.points import at_rho, make_run, rows_at, with_memory
from experiments.settings import Budget, Run


def infinite_memory(budget: Budget, data: str) -> Iterator[Run]:
    """Fig. 3 (right): loss against slots on a fixed MoE, for Engram and for OverEncoding of equally many rows.

    A slot is a row of every table. Both methods have equally many rows of equal width, and so equal parameters, but
    OverEncoding holds them in one layer.

    Command: python -m experiments launch infinite-memory cpu-small
    Cost: 26 runs, about 30 minutes on two CPU cores.
    Expected (paper, 3B MoE): linear in log10 slots, 0.0284 nats a decade; Engram 0.011 to 0.016 below OverEncoding.
    """
    engram, at_input = budget.engram, OverEncodingConfig(tables=budget.engram.tables)
    for seed in budget.seeds:
        yield at_rho(budget, data, seed, 1.0)
        for multiple in budget.grid.slot_multiples:
            parameters = rows_at(budget, multiple) * engram.tables.d_row
            for arm, memory in (("engram", engram), ("over-encoding", at_input)):
                model = with_memory(budget.backbone, memory, parameters)
                yield make_run(budget, data, seed, model, arm=arm, variant=f"slots-{multiple:g}x")


def layers(budget: Budget, data: str) -> Iterator[Run]:
    """Fig. 5, the curve: the layer of a single Engram of fixed size, and the same size split over two layers.

    A single module reads rows as wide as both of the split read together. Variants count layers from 1, as the paper.

    Command: python -m experiments launch layers cpu-small
    Cost: 12 runs, about 12 minutes on two CPU cores.
    Expected (paper, 12 layers): layer 2 best, 1.7705; layers 2 and 6 together 1.7678; the last layers 1.782.
    """
    engram, n_layers = budget.engram, budget.backbone.n_layers
    width = engram.tables.d_mem * len(engram.layer_ids)
    parameters = rows_at(budget, budget.grid.fixed_slots) * engram.tables.d_row
    places = [(layer,) for layer in budget.grid.layers or range(n_layers)]
    for seed in budget.seeds:
        yield at_rho(budget, data, seed, 1.0)
        for place in [*places, _two_layers(budget)]:
            tables = replace(engram.tables, d_mem=width // len(place))
            memory = replace(engram, layer_ids=place, tables=tables)
            model = with_memory(budget.backbone, memory, parameters)
            variant = "layer-" + "+".join(str(layer + 1) for layer in place)
            yield make_run(budget, data, seed, model, arm="engram", variant=variant)


def ablation(budget: Budget, data: str) -> Iterator[Run]:
    """Fig. 5, the markers: Engram of fixed size with one part changed, and what the paper left out.

    Command: python -m experiments launch ablation cpu-small
    Cost: 30 runs, about 30 minutes on two CPU cores.
    Expected (paper): without fusion +0.0064, compression +0.0057, gate +0.0046, convolution +0.0005; with 4-grams
    +0.0017. Not in the paper: plain gate, heads, the tables' learning rate and optimiser, windows across documents.
    """
    engram = budget.engram
    parameters = rows_at(budget, budget.grid.fixed_slots) * engram.tables.d_row
    for seed in budget.seeds:
        yield at_rho(budget, data, seed, 1.0)
        for variant, memory, optim in [("reference", engram, budget.train.optim), *_ablations(budget)]:
            model = with_memory(budget.backbone, memory, parameters)
            train = replace(budget.train, optim=optim)
            yield make_run(budget, data, seed, model, arm="ablation", variant=variant, train=train)


def _ablations(budget: Budget) -> Iterator[tuple[str, EngramConfig, OptimConfig]]:
    """Variants by name. Where P_tot stays, the width of a row gives way and the number of rows follows."""
    engram, optim, heads = budget.engram, budget.train.optim, budget.engram.tables.n_hash_heads

    def tables(**changes: object) -> EngramConfig:
        return replace(engram, tables=replace(engram.tables, **changes))  # type: ignore[arg-type]

    for name in budget.grid.ablations:
        if name == "no-fusion":
            if budget.backbone.n_streams > 1:  # else there is nothing to fuse, and `notes` says so
                yield name, replace(engram, one_stream=True), optim
        elif name == "no-compression":
            yield name, tables(compress_tokens=False), optim
        elif name == "no-gate":
            yield name, replace(engram, gate="none"), optim
        elif name == "no-conv":
            yield name, replace(engram, conv_kernel=0), optim
        elif name == "plus-4-grams":
            orders = tuple(sorted({*engram.tables.ngram_orders, 4}))
            yield name, tables(ngram_orders=orders, d_mem=_near(engram.tables, len(orders) * heads)), optim
        elif name == "plain-gate":
            yield name, replace(engram, gate="sigmoid"), optim
        elif name == "half-heads" and heads > 1:
            yield (
                name,
                tables(n_hash_heads=heads // 2, d_mem=_near(engram.tables, _orders(engram) * (heads // 2))),
                optim,
            )
        elif name == "double-heads":
            yield name, tables(n_hash_heads=heads * 2, d_mem=_near(engram.tables, _orders(engram) * heads * 2)), optim
        elif name == "table-lr":
            for multiple in budget.grid.table_lr_mults:
                if multiple != optim.table_lr_mult:
                    yield f"table-lr-{multiple:g}x", engram, replace(optim, table_lr_mult=multiple)
        elif name == "dense-adam" and optim.tables != "dense":
            yield name, engram, replace(optim, tables="dense")
        elif name == "rowwise-adam" and optim.tables != "rowwise":
            yield name, engram, replace(optim, tables="rowwise")
        elif name == "cross-documents":
            yield name, tables(stop_at_documents=False), optim


def _orders(engram: EngramConfig) -> int:
    return len(engram.tables.ngram_orders)


def _near(tables: TableConfig, n_lookups: int) -> int:
    """The multiple of `n_lookups` nearest to d_mem, since every lookup reads a row of whole width."""
    return max(1, round(tables.d_mem / n_lookups)) * n_lookups


def _two_layers(budget: Budget) -> tuple[int, int]:
    """The budget's own first two memory layers, or its single one and the middle of the model."""
    first, *others = budget.engram.layer_ids
    if others:
        return first, others[0]
    second = max(first + 1, budget.backbone.n_layers // 2)
    if second < budget.backbone.n_layers:
        return first, second
    if first == 0:
        raise ValueError("a single layer cannot hold two modules: take a deeper backbone")
    return first - 1, first
