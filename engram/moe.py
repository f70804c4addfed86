"""DeepSeekMoE with loss-free balancing (arXiv 2401.06066, 2412.19437, 2408.15664).

    s = sigmoid(W_r x)                    scores, fp32
    chosen = top_k(s + b)                 the balancing bias b chooses but does not weigh
    g = scale * s_chosen / sum s_chosen   weights
    y = shared(x) + sum_chosen g_e expert_e(x)

The bias moves outside the model, in training only (`engram.optim.update_router_biases`), from the load counters that
the router fills in training only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.config import MoEConfig
from engram.padded_experts import experts_padded


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x) (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, d_model: int, d_hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d_model, d_hidden, bias=False)
        self.up = nn.Linear(d_model, d_hidden, bias=False)
        self.down = nn.Linear(d_hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Router(nn.Module):
    """Chooses top_k experts a token and weighs them."""

    bias_E: Tensor
    load_E: Tensor

    def __init__(self, d_model: int, config: MoEConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.route_scale = config.route_scale
        self.router_ED = nn.Parameter(torch.empty(config.n_routed_experts, d_model))
        self.register_buffer("bias_E", torch.zeros(config.n_routed_experts))
        self.register_buffer("load_E", torch.zeros(config.n_routed_experts))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights [N, K] in fp32 and expert ids [N, K]."""
        with torch.autocast(x_ND.device.type, enabled=False):
            scores_NE = F.linear(x_ND.float(), self.router_ED.float()).sigmoid()
        expert_ids_NK = (scores_NE + self.bias_E).topk(self.top_k, dim=-1, sorted=False).indices
        scores_NK = scores_NE.gather(-1, expert_ids_NK)
        if self.training:
            # torch.bincount would make the host wait for the GPU.
            chosen_R = expert_ids_NK.flatten()
            self.load_E.scatter_add_(0, chosen_R, self.load_E.new_ones(len(chosen_R)))
        # As in DeepSeek-V3, a tiny term keeps the weights finite where all chosen scores underflow.
        return self.route_scale * scores_NK / (scores_NK.sum(-1, keepdim=True) + 1e-20), expert_ids_NK


class RoutedExperts(nn.Module):
    """A stack of SwiGLU experts. The `fast` way of the device and the plain `loop` compute the same sum."""

    def __init__(self, d_model: int, config: MoEConfig) -> None:
        super().__init__()
        E, F_ = config.n_routed_experts, config.d_expert
        self.w_gate_EFD = nn.Parameter(torch.empty(E, F_, d_model))
        self.w_up_EFD = nn.Parameter(torch.empty(E, F_, d_model))
        self.w_down_EDF = nn.Parameter(torch.empty(E, d_model, F_))
        self.backend: Literal["fast", "loop"] = "fast"

    def forward(self, x_ND: Tensor, weights_NK: Tensor, expert_ids_NK: Tensor) -> Tensor:
        dtype = self.w_gate_EFD.dtype
        if torch.is_autocast_enabled(x_ND.device.type):  # neither way is on autocast's list
            dtype = torch.get_autocast_dtype(x_ND.device.type)
        x_ND, *weights = (t.to(dtype) for t in (x_ND, self.w_gate_EFD, self.w_up_EFD, self.w_down_EDF))
        if self.backend == "loop":
            return experts_loop(x_ND, weights_NK, expert_ids_NK, *weights)
        return fast_way(x_ND.device.type, dtype)(x_ND, weights_NK, expert_ids_NK, *weights)


def fast_way(device: str, dtype: torch.dtype) -> Callable[..., Tensor]:
    """Grouped products for bf16 on a GPU, which is all that they promise there (torch 2.11 to 2.13); else padded ones.

    On a CPU grouped_mm is a loop over experts, and in bf16 compiles for every number of tokens that one gets.
    """
    return experts_grouped if device != "cpu" and dtype == torch.bfloat16 else experts_padded


def experts_loop(
    x_ND: Tensor, g_NK: Tensor, ids_NK: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """The plain reference: expert after expert.

    `unbind` matters: indexing W[e] in a loop makes the backward build a full-size gradient per expert.
    """
    y_ND = torch.zeros_like(x_ND)
    experts = zip(gate_EFD.unbind(), up_EFD.unbind(), down_EDF.unbind(), strict=True)
    for e, (gate_FD, up_FD, down_DF) in enumerate(experts):
        tokens, choice = torch.where(ids_NK == e)
        x = x_ND[tokens]
        out = F.linear(F.silu(F.linear(x, gate_FD)) * F.linear(x, up_FD), down_DF)
        y_ND = y_ND.index_add(0, tokens, (out * g_NK[tokens, choice, None]).to(y_ND.dtype))
    return y_ND


def experts_grouped(
    x_ND: Tensor, g_NK: Tensor, ids_NK: Tensor, gate_EFD: Tensor, up_EFD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Tokens sorted by expert, one grouped matrix product a projection."""
    order_R, ends_E = _sort_by_expert(ids_NK, len(gate_EFD))
    x_RD = x_ND.index_select(0, order_R // ids_NK.shape[1])
    h_RF = F.silu(F.grouped_mm(x_RD, gate_EFD.transpose(-2, -1), offs=ends_E))
    h_RF = h_RF * F.grouped_mm(x_RD, up_EFD.transpose(-2, -1), offs=ends_E)
    # Weighing before the last product is the same sum, over rows of width F instead of D.
    h_RF = h_RF * g_NK.flatten()[order_R, None].to(h_RF.dtype)
    out_RD = F.grouped_mm(h_RF, down_EDF.transpose(-2, -1), offs=ends_E)
    return out_RD.index_select(0, _inverse(order_R)).unflatten(0, ids_NK.shape).sum(1)


def _sort_by_expert(ids_NK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """Order of the routed tokens by expert, and where each expert's share ends (int32)."""
    sorted_R, order_R = ids_NK.flatten().sort(stable=True)
    experts_E = torch.arange(n_experts, device=ids_NK.device)
    return order_R, torch.searchsorted(sorted_R, experts_E, right=True, out_int32=True)


def _inverse(order_R: Tensor) -> Tensor:
    return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))


class MoE(nn.Module):
    """Shared experts, always on, plus the routed ones."""

    def __init__(self, d_model: int, config: MoEConfig) -> None:
        super().__init__()
        self.router = Router(d_model, config)
        self.experts = RoutedExperts(d_model, config)
        # The shared experts are one SwiGLU of their summed width: the same function, one product less.
        self.shared = SwiGLU(d_model, config.d_shared) if config.d_shared > 0 else None

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        y_ND = self.experts(x_ND, *self.router(x_ND))
        if self.shared is not None:
            y_ND = y_ND + self.shared(x_ND)
        return y_ND.view_as(x_BTD)
