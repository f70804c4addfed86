"""Which parameter is updated how (paper, section 4.1 and Table 5).

    matrix      weight matrices and stacks of experts       Muon, weight decay
    embedding   vocabulary embedding, head, router, phi     AdamW, weight decay
    vector      gains, biases, convolution taps             AdamW, no weight decay
    table       n-gram tables                               Adam at 5 times the learning rate, no weight decay

Routers and the hyper-connections' phi score and mix rather than transform features, and an orthogonal update would give
all their directions equal weight: they stay with AdamW, like embedding and head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engram.config import OptimConfig
from engram.muon import Muon
from engram.table_adam import TableAdam

Role = Literal["matrix", "embedding", "vector", "table"]

_ROLES: dict[str, dict[int, Role]] = {
    "*table_SP": {2: "table"},
    "*embed_VD": {2: "embedding"},
    "*head_VD": {2: "embedding"},
    "router_ED": {2: "embedding"},
    "stream_phi": {2: "embedding"},
    "conv_*": {3: "vector"},
    "gain": {1: "vector", 2: "vector"},
    "w_*": {2: "matrix", 3: "matrix"},
    "*": {1: "vector", 2: "matrix"},
}
"""Last part of a parameter's name -> number of dimensions -> role. The first pattern that fits decides."""


def role(name: str, shape: Sequence[int]) -> Role:
    """Say how a parameter is updated, from its name and shape.

    Raises:
        ValueError: no rule knows the parameter.
    """
    leaf = name.rpartition(".")[2]
    by_dimensions = next(roles for pattern, roles in _ROLES.items() if fnmatchcase(leaf, pattern))
    if len(shape) not in by_dimensions:
        raise ValueError(
            f"no rule says how to update {name} of shape {tuple(shape)}: give it one in engram/optim.py, _ROLES"
        )
    return by_dimensions[len(shape)]


def group_by_role(model: nn.Module) -> dict[Role, list[Tensor]]:
    """Sort a model's parameters by role; every parameter is in one group.

    Raises:
        ValueError: a parameter has no role.
    """
    groups: dict[Role, list[Tensor]] = {"matrix": [], "embedding": [], "vector": [], "table": []}
    for name, parameter in model.named_parameters():
        groups[role(name, parameter.shape)].append(parameter)
    return groups


def needs_sparse_grad(config: OptimConfig) -> bool:
    """Whether the table optimiser wants gradients of the looked-up rows only."""
    return config.tables != "dense"


class Optimizers:
    """All optimisers of a model behind one step."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = tuple(optimizers)
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]

    def parameters(self) -> Iterable[Tensor]:
        """Every parameter that is updated."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]

    def clip(self, max_norm: float) -> float:
        """Scale all gradients to a global norm of at most `max_norm` (0: only measure); return the norm before.

        Sparse gradients are coalesced first: their norm is that of the summed rows, equal to the dense gradient's.
        """
        grads = []
        for parameter in self.parameters():
            if parameter.grad is not None:
                if parameter.grad.is_sparse:
                    parameter.grad = parameter.grad.coalesce()
                grads.append(parameter.grad.values() if parameter.grad.is_sparse else parameter.grad)
        norm = float(torch.nn.utils.get_total_norm(grads))
        # A norm that is not finite is left alone: the caller sees it and ends the run.
        if 0 < max_norm < norm < float("inf"):
            torch._foreach_mul_(grads, max_norm / norm)
        return norm

    def step(self, lr_factor: float) -> None:
        """Update every parameter at `lr_factor` times its peak learning rate."""
        for optimizer, peaks in zip(self.optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * lr_factor
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """State to continue from, bit for bit."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def build_optimizers(model: nn.Module, config: OptimConfig) -> Optimizers:
    """Group a model's parameters by role and give each group its optimiser.

    Raises:
        ValueError: a parameter has no role.
    """
    by_role = group_by_role(model)
    decayed = list(by_role["embedding"])
    optimizers: list[Optimizer] = []
    if config.matrices == "adamw":
        decayed += by_role["matrix"]
    elif by_role["matrix"]:
        optimizers.append(Muon(by_role["matrix"], config.lr, config.muon_momentum, config.weight_decay))
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": by_role["vector"], "weight_decay": 0.0},
    ]
    adam: dict[str, Any] = {"betas": config.adam_betas, "eps": config.adam_eps}
    if groups := [group for group in groups if group["params"]]:
        optimizers.append(torch.optim.AdamW(groups, lr=config.lr, fused=True, **adam))
    if tables := by_role["table"]:
        lr = config.lr * config.table_lr_mult
        if config.tables == "dense":
            optimizers.append(torch.optim.Adam(tables, lr=lr, fused=True, **adam))
        else:
            optimizers.append(TableAdam(tables, lr=lr, rowwise=config.tables == "rowwise", **adam))
    return Optimizers(optimizers)


@torch.no_grad()
def update_router_biases(model: nn.Module, gamma: float) -> None:
    """Move every router's balancing bias towards even load (loss-free balancing, arXiv 2408.15664, algorithm 1).

    Experts above the mean load become harder to choose, those below easier; the counters start again from zero.
    """
    for module in model.modules():
        bias_E, load_E = getattr(module, "bias_E", None), getattr(module, "load_E", None)
        if isinstance(bias_E, Tensor) and isinstance(load_E, Tensor):
            bias_E += gamma * (load_E.mean() - load_E).sign()
            load_E.zero_()
