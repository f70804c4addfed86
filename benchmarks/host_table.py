"""Tables in host memory: what they cost beside tables on the device, and how large they may be."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from benchmarks.inputs import zipf_tokens
from benchmarks.model_step import LR, Shape, training_step
from benchmarks.rounds import Contender, Part
from engram.config import EngramConfig, ModelConfig, OptimConfig, TableConfig
from engram.initialise import init_weights
from engram.optim import build_optimizers
from engram.stored_tables import store_tables
from engram.transformer import Transformer

SHAPE = {
    "cpu": Shape(B=8, T=512, V=16_384, D=256, heads=4, layers=4, F=128, E=26, K=6),
    "cuda": Shape(B=8, T=2048, V=129_280, D=1280, heads=16, layers=4, F=1216, E=26, K=6),
}
LARGE = 2_000_000_000
"""Parameters of the table that need not fit the device."""


def host_part(device: torch.device, n_values: int = 0) -> Part:
    """A training step with its tables in host memory against the same step with tables on the device."""
    shape = SHAPE[device.type]
    config = _with_tables(shape, n_values or (50_000_000 if device.type == "cpu" else 1_000_000_000))
    return Part(
        name="host-table",
        what=f"training step, table of {_values(config) / 1e6:,.0f}M in host memory against the device: {shape}",
        target=1.015,
        at_least=False,
        contenders={
            "host": lambda: _Steps(config, shape, device, torch.device("cpu")).contender(),
            "device": lambda: _Steps(config, shape, device, None).contender(),
        },
        tolerance=1e-5 if device.type == "cpu" else 2e-2,
        note="the outputs compared are the losses of the first steps"
        + (
            "; without a GPU both lie in the same memory, and the moving itself is what is seen"
            * (device.type == "cpu")
        ),
    )


def large_table(device: torch.device) -> str:
    """Train a few steps with a table of two billion values in bf16; say how long they took and how much memory."""
    shape = SHAPE[device.type]
    config = _with_tables(shape, LARGE)
    began = time.perf_counter()
    steps = _Steps(config, shape, device, torch.device("cpu"), dtype=torch.bfloat16)
    built = time.perf_counter() - began
    seconds = []
    contender = steps.contender()
    for _ in range(5):
        began = time.perf_counter()
        contender.run()
        seconds.append(time.perf_counter() - began)
    seconds = sorted(seconds[1:])
    return (
        f"{_values(config) / 1e9:.2f}B values in bf16, lazy Adam with moments in bf16; built and initialised in "
        f"{built:.0f} s; a step of {shape.B * shape.T:,} tokens takes {seconds[0]:.2f} to {seconds[-1]:.2f} s; "
        f"the process holds {_resident_gib():.1f} GiB"
    )


def _with_tables(shape: Shape, n_values: int) -> ModelConfig:
    tables = TableConfig(d_mem=shape.D // 2, n_hash_heads=4)
    rows = n_values // (2 * tables.n_lookups * tables.d_row)
    # Odd neighbours stand in for primes: here only sizes matter.
    slots = tuple(tuple(rows + 2 * (layer * tables.n_lookups + i) for i in range(tables.n_lookups)) for layer in (0, 1))
    engram = EngramConfig(layer_ids=(1, shape.layers // 2), tables=replace(tables, n_slots=slots))
    return replace(shape.config(), engram=engram)


def _values(config: ModelConfig) -> int:
    assert config.memory is not None
    return config.memory.tables.n_rows * config.memory.tables.d_row


@dataclass
class _Steps:
    """Training steps over batches that change, as in a run: otherwise every row would be here already."""

    config: ModelConfig
    shape: Shape
    device: torch.device
    store: torch.device | None
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        optim = OptimConfig(lr=LR, matrices="adamw")
        self.model = Transformer(self.config, np.arange(self.config.vocab_size))
        self.model.set_sparse_tables(True)
        if self.store is not None:
            store_tables(self.model, self.store, self.dtype)
        self.model.to(self.device)
        init_weights(self.model, seed=0)
        self.optimizers = build_optimizers(self.model, optim)
        self.step = 0
        self.losses: list[Tensor] = []

    def batch(self, step: int) -> Tensor:
        return zipf_tokens(self.shape.V, self.shape.B, self.shape.T + 1, seed=step)

    def rows(self, step: int) -> list[Tensor]:
        return self.model.look_ups(self.batch(step)[:, :-1].to(self.device))[0]

    def run(self) -> None:
        stored = self.optimizers.stored
        if stored:
            if not stored.is_fetching:
                stored.prefetch(lambda: self.rows(self.step))
            stored.begin()
            following = self.step + 1
            stored.prefetch(lambda: self.rows(following))
        ids = self.batch(self.step).to(self.device)
        self.losses.append(training_step(self.model, self.optimizers, ids, bf16=ids.is_cuda))
        self.step += 1

    def contender(self) -> Contender:
        return Contender(self.run, lambda: [torch.stack(self.losses)])


def _resident_gib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**30
