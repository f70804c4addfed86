"""One step of the table: look up, gradient, update. Its cost must not depend on how many rows there are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.inputs import zipf
from benchmarks.rounds import Contender, Part
from engram.config import TableConfig
from engram.memory import NgramTables
from engram.table_adam import TableAdam

WIDTH, LOOKUPS = 32, 131_072
SMALL, LARGE = 65_536, 2**24
BETAS, EPS = (0.9, 0.95), 1e-8


def growth_part(device: torch.device, large: int = LARGE) -> Part:
    """16M rows against 65k: as many lookups, of as many different rows, spread over the whole table."""
    work = _Work(device)
    return Part(
        name="table-update",
        what=f"table update, {large:,} rows against {SMALL:,} of {WIDTH}: {LOOKUPS:,} lookups by Zipf's law",
        target=1.15,
        at_least=False,
        contenders={
            f"{large:,} rows": lambda: work.lazy(large, compared=False),
            f"{SMALL:,} rows": lambda: work.lazy(SMALL, compared=False),
        },
        note="look-up, backward and update; the larger table's rows lie far apart in memory",
    )


def against_torch_part(device: torch.device, rows: int = 1_000_000) -> Part:
    """Lazy Adam against what torch has for sparse and for dense gradients."""
    work = _Work(device)
    return Part(
        name="table-adam",
        what=f"table update, {rows:,} rows of {WIDTH}: {LOOKUPS:,} lookups by Zipf's law",
        target=1.0,
        at_least=True,
        contenders={
            "engram lazy": lambda: work.lazy(rows),
            "torch SparseAdam": lambda: work.sparse_adam(rows),
            "torch Adam, dense, fused": lambda: work.dense_adam(rows),
        },
        note="dense Adam trains another model (it moves rows that were not looked up): its outputs are not compared",
    )


@dataclass
class _Work:
    device: torch.device

    def lookups(self, n_rows: int) -> Tensor:
        """The same draws for every table: rows of the small one, moved apart to fill the large one."""
        generator = torch.Generator().manual_seed(0)
        ranks = zipf(SMALL, LOOKUPS, generator)
        places_S = torch.randperm(SMALL, generator=generator)  # a hash scatters common rows
        return (places_S[ranks] * (n_rows // SMALL)).to(self.device)

    def table(self, n_rows: int, *, sparse: bool) -> NgramTables:
        config = TableConfig(d_mem=WIDTH, ngram_orders=(2,), n_hash_heads=1, n_slots=((n_rows,),))
        tables = NgramTables(config, 0).to(self.device)
        tables.sparse_grad = sparse
        torch.nn.init.normal_(tables.table_SP, std=0.02, generator=_generator(self.device))
        return tables

    def lazy(self, n_rows: int, *, compared: bool = True) -> Contender:
        tables = self.table(n_rows, sparse=True)
        optimizer = TableAdam([tables.table_SP], 1e-3, BETAS, EPS, rowwise=False)
        return self._contender(tables, optimizer, compared=compared)

    def sparse_adam(self, n_rows: int) -> Contender:
        tables = self.table(n_rows, sparse=True)
        return self._contender(tables, torch.optim.SparseAdam([tables.table_SP], 1e-3, BETAS, EPS), compared=True)

    def dense_adam(self, n_rows: int) -> Contender:
        tables = self.table(n_rows, sparse=False)
        optimizer = torch.optim.Adam([tables.table_SP], 1e-3, BETAS, EPS, fused=True)
        return self._contender(tables, optimizer, compared=False)

    def _contender(self, tables: NgramTables, optimizer: torch.optim.Optimizer, *, compared: bool) -> Contender:
        rows_BTG = self.lookups(len(tables.table_SP)).view(1, -1, 1)
        direction = torch.randn(LOOKUPS, WIDTH, generator=torch.Generator().manual_seed(1)).to(self.device)

        def run() -> None:
            tables.table_SP.grad = None
            tables(rows_BTG).flatten(0, 1).backward(direction)
            optimizer.step()

        def outputs() -> list[Tensor]:
            return [tables.table_SP.detach()]

        return Contender(run, outputs if compared else None)


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(2)
