"""If these fail, n-gram tables learn by another rule than their name says, or a step costs as much as the whole table.

Lazy tables are held against `torch.optim.SparseAdam`, rowwise ones against a loop over rows in Python floats, both to
1e-5 (relative) plus 1e-6.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from engram.optim import Optimizers
from engram.table_adam import TableAdam


def copies(tensors: list[Tensor]) -> list[nn.Parameter]:
    return [nn.Parameter(tensor.clone()) for tensor in tensors]


def lookups(n_rows: int, step: int) -> list[Tensor]:
    """Two micro-batches of row ids, with repeats inside and between them."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(n_rows, (2, 7), generator=generator) for _ in range(2)]


def look_up_backward(table_SP: nn.Parameter, step: int, sparse: bool = True) -> None:
    """Accumulate the gradients of two micro-batches."""
    for ids in lookups(len(table_SP), step):
        rows = F.embedding(ids, table_SP, sparse=sparse)
        factors = torch.randn(rows.shape, generator=torch.Generator().manual_seed(100 + step))
        (rows * factors).sum().backward()


ADAM: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8}


def test_lazy_tables_equal_sparse_adam_with_repeated_rows_and_accumulated_gradients() -> None:
    ours, theirs = copies([torch.randn(40, 6, generator=torch.Generator().manual_seed(0))] * 2)
    optimizers = [TableAdam([ours], rowwise=False, **ADAM), torch.optim.SparseAdam([theirs], **ADAM)]
    for step in range(10):
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            look_up_backward(p, step)
            assert p.grad is not None
            assert not p.grad.is_coalesced()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours.detach(), theirs.detach(), rtol=1e-5, atol=1e-6)


def test_rowwise_tables_equal_a_loop_over_rows() -> None:
    table_SP = copies([torch.randn(40, 6, generator=torch.Generator().manual_seed(0))])[0]
    optimizer = TableAdam([table_SP], rowwise=True, **ADAM)
    beta1, beta2 = ADAM["betas"]
    rows, first, second = table_SP.tolist(), [[0.0] * 6 for _ in range(40)], [0.0] * 40
    for step in range(10):
        look_up_backward(table_SP, step)
        assert table_SP.grad is not None
        gradient = table_SP.grad.to_dense().tolist()
        optimizer.step()
        optimizer.zero_grad()
        for s in {int(s) for ids in lookups(40, step) for s in ids.flatten()}:
            second[s] = beta2 * second[s] + (1 - beta2) * sum(g * g for g in gradient[s]) / 6
            for p in range(6):
                first[s][p] = beta1 * first[s][p] + (1 - beta1) * gradient[s][p]
                corrected = first[s][p] / (1 - beta1 ** (step + 1))
                root = math.sqrt(second[s] / (1 - beta2 ** (step + 1)))
                rows[s][p] -= ADAM["lr"] * corrected / (root + ADAM["eps"])
    torch.testing.assert_close(table_SP.detach(), torch.tensor(rows), rtol=1e-5, atol=1e-6)


def test_rowwise_tables_keep_one_second_moment_a_row() -> None:
    table_SP = copies([torch.ones(40, 6)])[0]
    optimizer = TableAdam([table_SP], rowwise=True, **ADAM)
    look_up_backward(table_SP, 0)
    optimizer.step()
    numbers = sum(t.untyped_storage().nbytes() // 4 for t in optimizer.state[table_SP].values() if torch.is_tensor(t))
    assert numbers == 40 * 6 + 40


class FullSizeOps(TorchDispatchMode):
    """Note every operation that reads, writes or makes a dense tensor of `n_rows` rows."""

    def __init__(self, n_rows: int) -> None:
        super().__init__()
        self.n_rows = n_rows
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in (*args, *(kwargs or {}).values(), out):
            if isinstance(x, Tensor) and not x.is_sparse and x.ndim > 0 and x.shape[0] == self.n_rows:
                self.seen.add(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize("rowwise", [False, True])
def test_the_step_reaches_a_table_only_through_the_rows_looked_up(rowwise: bool) -> None:
    # Instead of timing: these operations cost as much as the rows they are given, whatever the table's size.
    table_SP = copies([torch.ones(1009, 4)])[0]
    optimizers = Optimizers([TableAdam([table_SP], rowwise=rowwise, **ADAM)])
    look_up_backward(table_SP, 0)
    optimizers.step(1.0)  # makes the state
    optimizers.zero_grad()
    look_up_backward(table_SP, 1)
    with FullSizeOps(1009) as ops:
        optimizers.clip(0.1)
        optimizers.step(1.0)
    assert ops.seen == {"index_select", "index_copy_", "index_add_"}


def test_lazy_tables_refuse_a_dense_gradient() -> None:
    table_SP = copies([torch.ones(40, 6)])[0]
    look_up_backward(table_SP, 0, sparse=False)
    with pytest.raises(ValueError, match="need sparse gradients"):
        TableAdam([table_SP], rowwise=False, **ADAM).step()
