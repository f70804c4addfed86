"""All parts by name."""

from __future__ import annotations

import timeit
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.engram_layer import engram_part
from benchmarks.experts import experts_part
from benchmarks.host_table import host_part
from benchmarks.model_step import against_transformers_part, memory_part, optimiser_part
from benchmarks.rounds import Part
from benchmarks.table_update import against_torch_part, growth_part

PARTS: dict[str, Callable[[torch.device], Part]] = {
    "experts": experts_part,
    "experts-bf16": partial(experts_part, bf16=True),
    "model-step": against_transformers_part,
    "model-step-bf16": partial(against_transformers_part, bf16=True),
    "muon-step": optimiser_part,
    "rho-step": memory_part,
    "engram-layer": engram_part,
    "engram-layer-bf16": partial(engram_part, bf16=True),
    "table-update": growth_part,
    "table-adam": against_torch_part,
    "host-table": host_part,
}


def worth_running(name: str, device: torch.device) -> bool:
    """Whether a part says something here: GPUs have every part in bf16 already, and some CPUs only emulate it."""
    return not name.endswith("-bf16") or (device.type == "cpu" and _bf16_pays())


def _bf16_pays() -> bool:
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.ones(512, 512, dtype=dtype) for _ in range(2))
        a @ b  # the first one compiles
        seconds[dtype] = min(timeit.repeat(partial(torch.matmul, a, b), number=1, repeat=10))
    return seconds[torch.bfloat16] < 0.9 * seconds[torch.float32]
