"""Tables split by rows over the processes of a run. Rows travel by all-to-all; no table is ever gathered whole.

    every process   its own tokens' row ids, each once                       ids  ->  owners
    owners          look the rows up in their share                          rows ->  askers
    backward        the same way back: gradients of rows -> owners, which sum them over askers

As in the paper's training (section 2.5). Gradients are sums over processes, never means.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from engram.memory import NgramTables


def share_of_rows(n_rows: int, rank: int, size: int) -> range:
    """Rows that a process owns: equal shares rounded up, so that the last ones may be smaller, as `torch.chunk`'s."""
    share = -(-n_rows // size)
    return range(min(rank * share, n_rows), min((rank + 1) * share, n_rows))


class ShardedTables(nn.Module):
    """This process's share of `NgramTables`; looks up any row of the whole.

    Args:
        tables: the whole tables. Their weights are not read: shares are made to be initialised or loaded.
        group: the processes that share them.
    """

    def __init__(self, tables: NgramTables, group: ProcessGroup) -> None:
        super().__init__()
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.n_rows, d_row = tables.table_SP.shape
        own = share_of_rows(self.n_rows, self.rank, self.size)
        self.first_row = own.start
        self.share = len(share_of_rows(self.n_rows, 0, self.size))
        self.table_SP = nn.Parameter(torch.empty(len(own), d_row, device=tables.table_SP.device))
        self.sparse_grad = tables.sparse_grad

    def forward(self, rows_BTG: Tensor) -> Tensor:
        """Return e_BTQ, the concatenated rows; Q = G * P = d_mem."""
        # Zipf: a batch asks for few different rows, and sorted ones lie together by owner.
        asked_U, place_BTG = rows_BTG.unique(return_inverse=True)
        n_ask = torch.bincount(asked_U // self.share, minlength=self.size)
        n_serve = torch.empty_like(n_ask)
        dist.all_to_all_single(n_serve, n_ask, group=self.group)
        ask, serve = n_ask.tolist(), n_serve.tolist()

        wanted_R = asked_U.new_empty(sum(serve))
        dist.all_to_all_single(wanted_R, asked_U, serve, ask, group=self.group)
        found_RP = F.embedding(wanted_R - self.first_row, self.table_SP, sparse=self.sparse_grad)
        rows_UP: Tensor = _AllToAll.apply(found_RP, serve, ask, self.group)  # type: ignore[no-untyped-call]
        return F.embedding(place_BTG, rows_UP).flatten(-2)


class _AllToAll(torch.autograd.Function):
    """Send `send[i]` rows to process i and get `take[i]` from it; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, x_RP: Tensor, send: list[int], take: list[int], group: ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = (send, take), group
        return _exchange(x_RP, send, take, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_UP: Tensor) -> tuple[Tensor, None, None, None]:
        send, take = ctx.splits
        return _exchange(grad_UP, take, send, ctx.group), None, None, None


def _exchange(x_RP: Tensor, send: list[int], take: list[int], group: ProcessGroup) -> Tensor:
    taken = x_RP.new_empty(sum(take), x_RP.shape[1])
    dist.all_to_all_single(taken, x_RP.contiguous(), take, send, group=group)
    return taken


def shard_tables(model: nn.Module, group: ProcessGroup) -> None:
    """Replace every table of a model by this process's share of it."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, NgramTables):
                setattr(module, name, ShardedTables(child, group))
