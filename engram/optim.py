"""Which parameter is updated how (paper, section 4.1 and Table 5).

    matrix      weight matrices and stacks of experts       Muon, weight decay
    embedding   vocabulary embedding, head, router, phi     AdamW, weight decay
    vector      gains, biases, convolution taps             AdamW, no weight decay
    table       n-gram tables                               Adam at 5 times the learning rate, no weight decay

Routers and the hyper-connections' phi score and mix rather than transform features, and an orthogonal update would give
all their directions equal weight: they stay with AdamW, like embedding and head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from engram.config import OptimConfig
from engram.muon import Muon
from engram.stored_tables import StoredTableAdam, StoredTables
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


Reduce = Callable[[Tensor], None]
"""Sums a tensor over the processes of a run, in place."""


def alone(_: Tensor) -> None:
    """The sum over one process."""


class Optimizers:
    """All optimisers of a model behind one step.

    Args:
        optimizers: each with its own parameters.
        reduce: sums over processes, where parameters are split over some.
        split: the parameters besides DTensors of which every process holds another part: sharded tables.
    """

    def __init__(self, optimizers: Sequence[Optimizer], reduce: Reduce = alone, split: Sequence[Tensor] = ()) -> None:
        self.optimizers = tuple(optimizers)
        self._reduce, self._split = reduce, {id(parameter) for parameter in split}
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.stored = next((o for o in self.optimizers if isinstance(o, StoredTableAdam)), None)
        """What moves the rows of stored tables, where a model has them."""

    def parameters(self) -> Iterable[Tensor]:
        """Every parameter that is updated."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                yield from group["params"]

    def clip(self, max_norm: float) -> float:
        """Scale all gradients to a global norm of at most `max_norm` (0: only measure); return the norm before.

        Sparse gradients are coalesced first: their norm is that of the summed rows, equal to the dense gradient's.
        """
        whole: list[Tensor] = []
        parts: list[Tensor] = []
        for parameter in self.parameters():
            if (grad := parameter.grad) is None:
                continue
            if grad.is_sparse:
                parameter.grad = grad = grad.coalesce()
                grad = grad.values()
            if isinstance(grad, DTensor):
                parts.append(grad.to_local())
            else:
                (parts if id(parameter) in self._split else whole).append(grad)
        if self.stored:
            whole += self.stored.gradients()
        square = torch.nn.utils.get_total_norm(parts).square() if parts else torch.zeros(())
        square = square.to((whole or parts)[0].device)
        self._reduce(square)
        grads = whole + parts
        norm = float((square + torch.nn.utils.get_total_norm(whole).square()).sqrt() if whole else square.sqrt())
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

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """What the optimisers remember of a parameter; empty before its first step."""
        return next((o.state[parameter] for o in self.optimizers if parameter in o.state), {})

    def restore(self, parameter: Tensor, what: str, value: Any) -> None:
        """Put back one entry of `state_of`."""
        owner = next(o for o in self.optimizers if any(parameter is p for g in o.param_groups for p in g["params"]))
        owner.state[parameter][what] = value


def build_optimizers(
    model: nn.Module,
    config: OptimConfig,
    reduce: Reduce = alone,
    *,
    tables_are_split: bool = False,
    muon_dtype: torch.dtype = torch.float32,
) -> Optimizers:
    """Group a model's parameters by role and give each group its optimiser.

    Args:
        model: whole, or split over processes.
        config: which optimisers, and their settings.
        reduce: sums over the processes of a run.
        tables_are_split: whether every process holds rows of its own.
        muon_dtype: of Muon's iteration.

    Raises:
        ValueError: a parameter has no role, or dense Adam is asked for stored tables.
    """
    by_role = group_by_role(model)
    decayed = list(by_role["embedding"])
    optimizers: list[Optimizer] = []
    if config.matrices == "adamw":
        decayed += by_role["matrix"]
    elif by_role["matrix"]:
        optimizers.append(Muon(by_role["matrix"], config.lr, config.muon_momentum, config.weight_decay, muon_dtype))
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": by_role["vector"], "weight_decay": 0.0},
    ]
    adam: dict[str, Any] = {"betas": config.adam_betas, "eps": config.adam_eps}
    if groups := [group for group in groups if group["params"]]:
        optimizers.append(torch.optim.AdamW(groups, lr=config.lr, fused=True, **adam))
    if tables := by_role["table"]:
        lr, rowwise = config.lr * config.table_lr_mult, config.tables == "rowwise"
        stored = [module for module in model.modules() if isinstance(module, StoredTables)]
        if config.tables == "dense" and stored:
            raise ValueError(
                "dense Adam moves every row at every step: tables stored apart need tables=lazy or rowwise"
            )
        if config.tables == "dense":
            optimizers.append(torch.optim.Adam(tables, lr=lr, fused=True, **adam))
        elif stored:
            device = model.get_parameter("embed_VD").device
            optimizers.append(StoredTableAdam(stored, lr=lr, rowwise=rowwise, device=device, **adam))
        else:
            optimizers.append(TableAdam(tables, lr=lr, rowwise=rowwise, **adam))
    return Optimizers(optimizers, reduce, by_role["table"] if tables_are_split else ())


@torch.no_grad()
def update_router_biases(model: nn.Module, gamma: float, reduce: Reduce = alone) -> None:
    """Move every router's balancing bias towards even load (loss-free balancing, arXiv 2408.15664, algorithm 1).

    Experts above the mean load become harder to choose, those below easier; the counters start again from zero. With
    several processes, loads are counted over all of them.
    """
    routers = [m for m in model.modules() if isinstance(getattr(m, "load_E", None), Tensor) and hasattr(m, "bias_E")]
    if not routers:
        return
    loads_RE = torch.stack([router.get_buffer("load_E") for router in routers])
    reduce(loads_RE)
    for router, load_E in zip(routers, loads_RE, strict=True):
        bias_E = router.get_buffer("bias_E")
        bias_E += gamma * (load_E.mean() - load_E).sign()
        router.get_buffer("load_E").zero_()
