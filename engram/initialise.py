"""Initial weights with common random numbers.

Every tensor draws from a generator seeded by (seed, its name), every expert from (seed, name, expert). Two models of
one seed therefore agree wherever their shapes do: expert 7 of a model with 46 experts starts as expert 7 of one with
106, and runs of a sweep differ only in what rho changes.

    embed_VD                       N(0, 1 / D)
    head_VD                        N(0, 1 / D^2): the first loss is close to ln V at any width
    table_SP                       N(0, 0.02^2); the paper does not say
    matrices [.., out, in]         N(0, 1 / in)
    matrices that write to the     N(0, 1 / in) / sqrt(2 n_layers): the residual's variance does not grow with depth
      residual: out, down          (Radford 2019, GPT-2)
    router_ED                      N(0, 1 / D), row by row: a row belongs to its expert
    stream_phi                     N(0, 1 / in); biases as HyperConnection.reset_biases says
    gains                          1
    conv_JMD                       0 (paper, section 4.1)
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from engram.streams import HyperConnection
from engram.transformer import Transformer

_EXPERT_STACKS = ("w_gate_EFD", "w_up_EFD", "w_down_EDF", "router_ED")
_RESIDUAL_WRITERS = ("attention.out.weight", ".down.weight", "w_down_EDF", "w_value_DQ")


def init_weights(model: Transformer, seed: int) -> None:
    """Fill every parameter in place, on its own device, from numbers drawn on the CPU."""
    for name, parameter in model.named_parameters():
        if name.endswith(_EXPERT_STACKS):
            for expert, weight in enumerate(parameter.unbind()):
                _normal(weight, _std(name, parameter, model), f"{seed}|{name}|{expert}")
        elif name.endswith("gain"):
            nn.init.ones_(parameter)
        elif name.endswith("conv_JMD"):
            nn.init.zeros_(parameter)
        elif not name.endswith(("stream_bias", "stream_alpha")):
            _normal(parameter, _std(name, parameter, model), f"{seed}|{name}")
    for module in model.modules():
        if isinstance(module, HyperConnection):
            module.reset_biases()


def _std(name: str, parameter: Tensor, model: Transformer) -> float:
    if name == "head_VD":
        return 1 / parameter.shape[-1]
    if name.endswith("table_SP"):
        return 0.02
    std = 1 / math.sqrt(parameter.shape[-1])
    return std / math.sqrt(2 * model.config.n_layers) if name.endswith(_RESIDUAL_WRITERS) else std


def _normal(weight: Tensor, std: float, key: str) -> None:
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]))
    with torch.no_grad():
        weight.copy_(torch.randn(weight.shape, generator=generator) * std)
