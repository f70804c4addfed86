"""All parts by name."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.engram_layer import engram_part
from benchmarks.experts import experts_part
from benchmarks.host_table import host_part
from benchmarks.model_step import against_transformers_part, memory_part, optimiser_part
from benchmarks.rounds import Part
from benchmarks.table_update import against_torch_part, growth_part

PARTS: dict[str, Callable[[torch.device], Part]] = {
    "experts": experts_part,
    "model-step": against_transformers_part,
    "muon-step": optimiser_part,
    "rho-step": memory_part,
    "engram-layer": engram_part,
    "table-update": growth_part,
    "table-adam": against_torch_part,
    "host-table": host_part,
}
