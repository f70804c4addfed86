"""Muon (Jordan 2024): momentum, orthogonalised by a Newton-Schulz iteration, with Moonlight's scale (arXiv 2502.16982).

    m <- mu m + g                      momentum, Nesterov: u = g + mu m
    O = NewtonSchulz(u)                near U V^T of u's singular value decomposition
    W <- W - lr (0.2 sqrt(max(a, b)) O + weight_decay W)

The scale gives O the root mean square of an AdamW update, so that both share learning rate and weight decay. As in
`torch.optim.Muon`, which takes 2-D weights only, momentum is an average (weights mu and 1 - mu): its scale cancels.

Matrices of equal shape go through one batched iteration, stacks of experts with them: a hundred small experts one by
one cost as much as half of the backward pass.

Under FSDP2 a process holds some rows of a matrix, or some experts of a stack. Experts are independent, so each process
orthogonalises its own; a matrix is gathered, orthogonalised everywhere, and each process keeps its rows.

A fused projection, such as MLA's kv_down and kv_up, is one matrix, as in `torch.optim.Muon` and Moonlight's code:
splitting it would make the optimiser depend on how attention lays out its heads.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

_A, _B, _C = 3.4445, -4.7750, 2.0315
_STEPS = 5
_EPS = 1e-7
CPU_MATRICES = 64
"""Taken through the iteration together on a CPU: few enough to stay in its cache, in two thirds of the time."""
GPU_VALUES = 2**27
"""Values taken through the iteration together on a GPU: enough to fill it, and its work space stays below 2 GiB."""


class Muon(Optimizer):
    """Muon for matrices [a, b] and stacks of matrices [n, a, b]; a stack is n independent matrices.

    Args:
        dtype: of the iteration; fp32 unless told otherwise. bf16, as in Jordan's, is good enough for it; processors
            without bf16 instructions take seven times as long for it.

    Raises:
        ValueError: momentum is outside [0, 1).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"{momentum=} must lie in [0, 1): 0.95 is usual")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None, "closures are not used"
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    # Cast before stacking: in bf16 the copies are half as large.
                    update = _whole_matrices(self._nesterov(weight, group["momentum"]).to(self.dtype))
                    by_shape[tuple(weight.shape[-2:])].append((weight, update.view(-1, *weight.shape[-2:])))
            for shape, pairs in by_shape.items():
                matrices = torch.cat([stack for _, stack in pairs])
                for some in matrices.split(_at_once(shape, matrices.device.type)):
                    some.copy_(newton_schulz(some))
                scale = 0.2 * max(shape) ** 0.5
                parts = matrices.split([len(stack) for _, stack in pairs])
                for (weight, _), update in zip(pairs, parts, strict=True):
                    own = weight.to_local() if isinstance(weight, DTensor) else weight
                    own.mul_(1 - group["lr"] * group["weight_decay"])
                    own.add_(_own_part(update, weight).view_as(own), alpha=-group["lr"] * scale)

    def _nesterov(self, weight: Tensor, momentum: float) -> Tensor:
        grad = weight.grad
        assert grad is not None
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(grad, 1 - momentum)
        return grad.lerp(state["momentum"], momentum)


def _at_once(shape: tuple[int, ...], device: str) -> int:
    """How many matrices go through the iteration together."""
    return CPU_MATRICES if device == "cpu" else max(1, GPU_VALUES // (shape[0] * shape[1]))


def _whole_matrices(update: Tensor) -> Tensor:
    """All matrices of which this process needs the update, whole."""
    if not isinstance(update, DTensor):
        return update
    return update.full_tensor() if update.ndim == 2 else update.to_local()


def _own_part(update: Tensor, weight: Tensor) -> Tensor:
    """What of an update belongs to this process."""
    if not isinstance(weight, DTensor) or weight.ndim == 3:
        return update
    whole = update.view(weight.shape)
    own: Tensor = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None).to_local()
    return own


def newton_schulz(G: Tensor) -> Tensor:
    """Orthogonalise a stack of matrices [n, a, b] approximately: singular values end between 0.7 and 1.2."""
    X = G
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT
    X = X / X.norm(dim=(-2, -1), keepdim=True).clamp_min(_EPS)
    for _ in range(_STEPS):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=_B, alpha=_C), X, beta=_A)
    return X.mT if tall else X
