"""Initial weights with common random numbers.

Every tensor draws from a generator seeded by (seed, its name), every expert from (seed, name, expert), and every block
of table rows from (seed, name, block). Two models of one seed therefore agree wherever their shapes do: expert 7 of a
model with 46 experts starts as expert 7 of one with 106, row 7 of a small table as row 7 of a large one, and runs of a
sweep differ only in what rho changes. Nor do initial weights depend on how many processes share a model.

    embed_VD                       N(0, 1 / D)
    head_VD                        N(0, 1 / D^2): the first loss is close to ln V at any width
    table_SP                       N(0, 0.02^2); the paper does not say
    matrices [.., out, in]         N(0, 1 / in)
    matrices that write to the     N(0, 1 / in) / sqrt(2 n_layers): the residual's variance does not grow with depth
      residual: out, down          (Radford 2019, GPT-2)
    router_ED                      N(0, 1 / D), row by row: a row belongs to its expert
    stream_phi                     N(0, 1 / in); biases as HyperConnection.start says
    gains                          1
    conv_JMD                       0 (paper, section 4.1)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from engram.streams import HyperConnection
from engram.transformer import Transformer

_EXPERT_STACKS = ("w_gate_EFD", "w_up_EFD", "w_down_EDF", "router_ED")
_RESIDUAL_WRITERS = ("attention.out.weight", ".down.weight", "w_down_EDF", "w_value_DQ")


_BLOCK_ROWS = 65_536


def init_weights(model: nn.Module, seed: int, n_layers: int | None = None) -> None:
    """Fill every parameter in place, on its own device, from numbers drawn on the CPU.

    A model that is split over processes gets, in each of them, its share of the same numbers.

    Args:
        model: a `Transformer`, or a module of this package that stands in another model.
        seed: equal seeds and names give equal numbers.
        n_layers: blocks of that other model; a `Transformer` knows its own.
    """
    if n_layers is None:
        assert isinstance(model, Transformer), "a module alone does not know how deep the model is: give n_layers"
        n_layers = model.config.n_layers
    for name, parameter in model.named_parameters():
        std = _std(name, parameter, n_layers)
        if name.endswith("table_SP"):
            _init_rows(model.get_submodule(name.rpartition(".")[0]), std, f"{seed}|{name}")
        elif name.endswith(_EXPERT_STACKS):
            keys = (f"{seed}|{name}|{expert}" for expert in range(len(parameter)))
            _fill(parameter, torch.stack([_normal(parameter.shape[1:], std, key) for key in keys]))
        elif name.endswith("gain"):
            _fill(parameter, torch.ones(parameter.shape))
        elif name.endswith("conv_JMD"):
            _fill(parameter, torch.zeros(parameter.shape))
        elif not name.endswith(("stream_bias", "stream_alpha")):
            _fill(parameter, _normal(parameter.shape, std, f"{seed}|{name}"))
    for module in model.modules():
        if isinstance(module, HyperConnection):
            for part, start in module.start().items():
                _fill(getattr(module, part), start)


def _init_rows(tables: nn.Module, std: float, key: str) -> None:
    """Fill the rows of a process, block by block: a block is drawn whole, and none that lies elsewhere."""
    table_SP, first = tables.table_SP, int(tables.first_row)  # type: ignore[arg-type]
    assert isinstance(table_SP, Tensor)
    n, d_row = table_SP.shape
    with torch.no_grad():
        for block in range(first // _BLOCK_ROWS, -(-(first + n) // _BLOCK_ROWS)):
            begin = block * _BLOCK_ROWS
            rows = _normal((_BLOCK_ROWS, d_row), std, f"{key}|{block}")
            low, high = max(first, begin), min(first + n, begin + _BLOCK_ROWS)
            table_SP[low - first : high - first] = rows[low - begin : high - begin].to(table_SP.device)


def _fill(parameter: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            # src_data_rank=None: every process has drawn the whole and takes its own part, nothing is sent.
            part = distribute_tensor(values.to(mesh.device_type), mesh, placements, src_data_rank=None)
            parameter.to_local().copy_(part.to_local())
        else:
            parameter.copy_(values)


def _std(name: str, parameter: Tensor, n_layers: int) -> float:
    if name == "head_VD":
        return 1 / parameter.shape[-1]
    if name.endswith("table_SP"):
        return 0.02
    std = 1 / math.sqrt(parameter.shape[-1])
    return std / math.sqrt(2 * n_layers) if name.endswith(_RESIDUAL_WRITERS) else std


def _normal(shape: Sequence[int], std: float, key: str) -> Tensor:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]))
    return torch.randn(*shape, generator=generator).mul_(std)
