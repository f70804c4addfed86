"""Routed experts by batched products over a few at a time: on CPUs, and on GPUs in other precisions than bf16.

    y_t = sum over the experts e of token t of  W_down,e g_te h_te,    h_te = silu(W_gate,e x_t) * (W_up,e x_t)

The backward is written out. Experts are taken by falling load, up to `CHUNK` at a time, and the tokens of a chunk are
padded to its fullest expert: experts of like load share a product, so that little is padded even where the router is
far from balanced. What a chunk needs fits a core's cache, and the only tensors of all rows are two of width F and one
of width D. A padded row reads token 0 with weight 0: while that token is finite it adds nothing, to outputs or
gradients.

U: rows, routed tokens and padding. In a chunk n: experts, A: rows of each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 8
"""Experts of a product, at most. With 4 calls cost more, from 16 on more is padded and less stays in cache."""
CALL_FLOPS = 2e7
"""Work that takes as long as a chunk's calls: an expert with so much less to do gets a chunk of its own."""
ROUND_BF16 = 32
"""oneDNN compiles bf16 products anew for every number of rows: rounded ones come back."""


@dataclass(frozen=True)
class _Chunk:
    """Some experts, and where their rows lie in U."""

    experts_n: Tensor
    tokens_nA: Tensor
    start: int

    def rows(self, x_U: Tensor) -> Tensor:
        """[n, A, ..], a view."""
        return x_U[self.start : self.start + self.tokens_nA.numel()].unflatten(0, self.tokens_nA.shape)

    def read(self, x_ND: Tensor) -> Tensor:
        """[n, A, D], the tokens of the rows."""
        return x_ND.index_select(0, self.tokens_nA.flatten()).unflatten(0, self.tokens_nA.shape)

    def weights(self, *w_E: Tensor) -> list[Tensor]:
        """[n, ..] of each."""
        return [w.index_select(0, self.experts_n) for w in w_E]


def _lay_out(ids_NK: Tensor, gate_EFD: Tensor, multiple: int) -> tuple[list[_Chunk], Tensor, Tensor]:
    """The chunks, the row [N, K] of every routed token, and the experts that no token chose."""
    n_experts, d_expert, d_model = gate_EFD.shape
    slack = CALL_FLOPS // (18 * d_model * d_expert)
    loads_E, experts_E = torch.bincount(ids_NK.flatten(), minlength=n_experts).sort(descending=True, stable=True)
    loads, first, U = loads_E.tolist(), 0, 0
    first_row_E, spans, device = torch.zeros_like(experts_E), [], ids_NK.device
    while first < n_experts and loads[first] > 0:
        n, A = 1, -(-loads[first] // multiple) * multiple
        while n < CHUNK and first + n < n_experts and loads[first + n] >= loads[first] - slack:
            n += 1
        first_row_E[first : first + n] = torch.arange(U, U + n * A, A, device=device)
        spans.append((first, n, A, U))
        first, U = first + n, U + n * A

    rank_E = torch.empty_like(experts_E).scatter_(0, experts_E, torch.arange(n_experts, device=device))
    rank_R, order_R = rank_E[ids_NK.flatten()].sort(stable=True)  # R = N K routed tokens
    before_E = loads_E.cumsum(0) - loads_E
    row_R = torch.arange(len(order_R), device=device) + (first_row_E - before_E)[rank_R]
    rows_NK = torch.empty_like(order_R).scatter_(0, order_R, row_R).view_as(ids_NK)
    tokens_U = torch.zeros(U, dtype=torch.long, device=device).scatter_(0, row_R, order_R // ids_NK.shape[1])
    chunks = [
        _Chunk(experts_E[first : first + n], tokens_U[start : start + n * A].view(n, A), start)
        for first, n, A, start in spans
    ]
    return chunks, rows_NK, experts_E[first:]


class _PaddedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, g_NK: Tensor, ids_NK: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        chunks, rows_NK, idle = _lay_out(ids_NK, gate_EFD, ROUND_BF16 if x_ND.dtype == torch.bfloat16 else 1)
        U = sum(chunk.tokens_nA.numel() for chunk in chunks)
        g_U = x_ND.new_zeros(U).scatter_(0, rows_NK.flatten(), g_NK.flatten().to(x_ND.dtype))
        a_UF, b_UF = (x_ND.new_empty(U, gate_EFD.shape[1]) for _ in range(2))
        out_UD = x_ND.new_empty(U, x_ND.shape[1])
        for chunk in chunks:
            x, (gate, up, down) = chunk.read(x_ND), chunk.weights(gate_EFD, up_EFD, down_EDF)
            a = torch.bmm(x, gate.mT, out=chunk.rows(a_UF))
            b = torch.bmm(x, up.mT, out=chunk.rows(b_UF))
            # Weighing before the last product is the same sum, over rows of width F instead of D.
            gh = F.silu(a).mul_(b).mul_(chunk.rows(g_U)[..., None])
            torch.bmm(gh, down.mT, out=chunk.rows(out_UD))
        ctx.chunks, ctx.rows_NK, ctx.idle = chunks, rows_NK, idle
        ctx.save_for_backward(x_ND, g_U, gate_EFD, up_EFD, down_EDF, a_UF, b_UF)
        return F.embedding_bag(rows_NK, out_UD, mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, g_U, gate_EFD, up_EFD, down_EDF, a_UF, b_UF = ctx.saved_tensors
        dg_U, dx_UD = torch.empty_like(g_U), x_ND.new_empty(len(g_U), x_ND.shape[1])
        dgate_EFD, dup_EFD, ddown_EDF = (
            torch.empty_like(w).index_fill_(0, ctx.idle, 0) for w in (gate_EFD, up_EFD, down_EDF)
        )
        for chunk in ctx.chunks:
            x, (gate, up, down) = chunk.read(x_ND), chunk.weights(gate_EFD, up_EFD, down_EDF)
            dy, a, b = chunk.read(dy_ND), chunk.rows(a_UF), chunk.rows(b_UF)
            g = chunk.rows(g_U)[..., None]
            silu_a = F.silu(a)
            h = silu_a * b
            dgh = torch.bmm(dy, down)
            torch.sum(dgh * h, -1, out=chunk.rows(dg_U))
            ddown_EDF.index_copy_(0, chunk.experts_n, torch.bmm(dy.mT, h.mul_(g)))
            dh = dgh.mul_(g)
            db = silu_a.mul_(dh)
            da = torch.ops.aten.silu_backward(dh.mul_(b), a)
            dgate_EFD.index_copy_(0, chunk.experts_n, torch.bmm(da.mT, x))
            dup_EFD.index_copy_(0, chunk.experts_n, torch.bmm(db.mT, x))
            torch.bmm(da, gate, out=chunk.rows(dx_UD)).baddbmm_(db, up)
        dx_ND = F.embedding_bag(ctx.rows_NK, dx_UD, mode="sum")
        return dx_ND, dg_U[ctx.rows_NK], None, dgate_EFD, dup_EFD, ddown_EDF


def experts_padded(
    x_ND: Tensor, g_NK: Tensor, ids_NK: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The weighted sum of each token's experts, [N, D].

    Args:
        x_ND: tokens, of the weights' dtype.
        g_NK: weights of the chosen experts.
        ids_NK: which they are; all different for a token.
        gate_EFD, up_EFD, down_EDF: the experts.
    """
    y_ND: Tensor = _PaddedExperts.apply(x_ND, g_NK, ids_NK, gate_EFD, up_EFD, down_EDF)  # type: ignore[no-untyped-call]
    return y_ND
