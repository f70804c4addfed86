"""Adam for n-gram tables, at a cost that does not depend on how many rows they have.

Dense Adam moves every row at every step, by its momentum if nothing else. The two sparse forms touch only the rows that
the batch looked up; they train different models, which is why the choice has a name (`OptimConfig.tables`):

    lazy      first and second moment a value, updated when the row is looked up; equals torch.optim.SparseAdam
    rowwise   one second moment a row, the mean of its squared gradients: half of Adam's state

Bias correction counts global steps in both. `lazy` is written out because it coalesces once, together with clipping,
and makes no sparse tensor of its updates: 32 ms a step where SparseAdam takes 46 (one CPU thread, 1M rows of 32, 131k
look-ups of 48k different rows). Dense Adam takes 35 there, and 58 more to fill the dense gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class TableAdam(Optimizer):
    """Adam over the rows of sparse gradients.

    Raises:
        ValueError: a gradient is dense; make the look-up sparse with `Transformer.set_sparse_tables`.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, betas: tuple[float, float], eps: float, rowwise: bool
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "rowwise": rowwise})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "closures are not used"
        for group in self.param_groups:
            for table_SP in group["params"]:
                if table_SP.grad is not None:
                    self._update(table_SP, table_SP.grad, group)

    def _update(self, table_SP: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        if not grad.is_sparse:
            raise ValueError("lazy and rowwise table optimisers need sparse gradients: call set_sparse_tables(True)")
        grad = grad.coalesce()  # nothing to do if clipping has coalesced it
        rows_U, grad_UP = grad.indices()[0], grad.values()
        state = self.state[table_SP]
        if not state:
            state["step"] = 0
            state["first"] = torch.zeros_like(table_SP)
            state["second"] = torch.zeros_like(table_SP[:, :1] if group["rowwise"] else table_SP)
        state["step"] += 1
        first_UP = state["first"].index_select(0, rows_U)
        second_UP = state["second"].index_select(0, rows_U)
        update_UP = adam_rows(grad_UP, first_UP, second_UP, state["step"], group)
        state["first"].index_copy_(0, rows_U, first_UP)
        state["second"].index_copy_(0, rows_U, second_UP)
        table_SP.index_add_(0, rows_U, update_UP)


def adam_rows(grad_UP: Tensor, first_UP: Tensor, second_UP: Tensor, step: int, group: dict[str, Any]) -> Tensor:
    """Move the moments of some rows in place; return what to add to the rows, [U, P]."""
    beta1, beta2 = group["betas"]
    square_UP = grad_UP.square()
    if group["rowwise"]:
        square_UP = square_UP.mean(-1, keepdim=True)
    first_UP.lerp_(grad_UP, 1 - beta1)
    second_UP.lerp_(square_UP, 1 - beta2)
    # As SparseAdam: eps is added to the uncorrected root, both corrections go into the step's size.
    size = group["lr"] * math.sqrt(1 - beta2**step) / (1 - beta1**step)
    return first_UP.div(second_UP.sqrt().add_(group["eps"])).mul_(-size)
