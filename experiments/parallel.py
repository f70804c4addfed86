"""The processes that train one run together: DDP for a model that fits a device, FSDP2 for one that does not.

Each process takes an equal part of every batch. What is reported and what is learnt do not depend on how many there
are, but for the order of sums: gradients are summed over processes, losses and expert loads too. The n-gram tables are
always split by rows (`engram.sharding`).

Processes find each other by the variables that torchrun sets, and that `experiments.worker` and SLURM's jobs set too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from engram.sharding import shard_tables
from engram.transformer import Transformer
from experiments.settings import Runtime, UserError

T = TypeVar("T")


class Team:
    """This process among those of its run; a run of one process needs no group and pays for none."""

    def __init__(self, runtime: Runtime) -> None:
        self.rank, self.size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.layout = runtime.parallel
        self.device = choose_device(runtime.device, int(os.environ.get("LOCAL_RANK", "0")))
        self.mesh: DeviceMesh | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    @contextmanager
    def joined(self) -> Iterator[Team]:
        """Meet the other processes, and part from them at the end."""
        if self.size == 1:
            yield self
            return
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        self.mesh = init_device_mesh(self.device.type, (self.size,))
        try:
            yield self
        finally:
            dist.destroy_process_group()

    def share(self, value: T) -> T:
        """The first process's value, everywhere."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def sum(self, x: Tensor) -> None:
        """Sum over processes, in place."""
        if self.size > 1:
            dist.all_reduce(x)

    def any(self, *flags: bool) -> list[bool]:
        """Of each flag, whether some process has raised it."""
        if self.size == 1:
            return list(flags)
        raised = torch.tensor(flags, dtype=torch.int32, device=self.device)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in raised.tolist()]

    def part(self, n: int) -> slice:
        """This process's share of `n` things, in order; shares differ by one at most."""
        small, larger = divmod(n, self.size)
        start = self.rank * small + min(self.rank, larger)
        return slice(start, start + small + (self.rank < larger))

    def split(self, model: Transformer) -> None:
        """Spread a model over the processes: tables by rows and, with FSDP2, everything else as well."""
        if self.mesh is None:
            return
        shard_tables(model, self.mesh.get_group())
        if self.layout == "fsdp":
            tables = set(_tables(model).values())
            for module in (*model.blocks, model):
                fully_shard(module, mesh=self.mesh, ignored_params=tables)
                assert isinstance(module, FSDPModule)
                module.set_gradient_divide_factor(1.0)  # a sum, not a mean
                module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum

    def wrap(self, model: Transformer) -> nn.Module:
        """What to call in training: with DDP, a module that sums gradients as they appear."""
        if self.mesh is None or self.layout == "fsdp":
            return model
        # Set on the model before it is wrapped: tables differ between processes and must not be averaged.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, [*_tables(model), *(name for name, _ in model.named_buffers())]
        )
        # find_unused_parameters keeps DDP from ordering its buckets anew after the first step: a resumed run would
        # begin with another order of sums than the one it was cut from.
        ddp = DistributedDataParallel(model, find_unused_parameters=True)
        ddp.register_comm_hook(None, _sum_gradients)
        return ddp

    @contextmanager
    def accumulating(self, model: nn.Module, *, last: bool) -> Iterator[None]:
        """Exchange gradients in the last micro-batch only."""
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(last)
        with model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext():
            yield


def _tables(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith("table_SP")}


def _sum_gradients(_, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations that are strings
    """Sum over processes, where DDP's own hook divides by their number."""
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0])


def choose_device(wanted: Literal["auto", "cpu", "cuda"], local_rank: int = 0) -> torch.device:
    """The device asked for.

    Raises:
        UserError: "cuda" without a usable GPU, or more processes on a machine than GPUs.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "runtime.device=cuda, but torch sees no GPU: use runtime.device=cpu or install a CUDA build of torch"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"process {local_rank + 1} of a run finds only {torch.cuda.device_count()} GPUs")
    return torch.device("cuda", local_rank)
