"""Causal attention: multi-head latent (DeepSeek-V3) and grouped-query, both with rotary positions.

Attention runs over the whole packed sequence, as in the paper's backbone; only the memory stops at documents.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.config import GQAConfig, MLAConfig, ModelConfig
from engram.decoding import LayerState
from engram.norm import RMSNorm


def rope_angles(n_positions: int, d_rope: int, theta: float, device: torch.device) -> Tensor:
    """Angles [T, d_rope / 2] of the first positions in fp32: t * theta^(-2i / d_rope) (Su 2021, arXiv 2104.09864)."""
    return rope_angles_at(torch.arange(n_positions, device=device), d_rope, theta)


def rope_angles_at(positions_T: Tensor, d_rope: int, theta: float) -> Tensor:
    """Angles [.., T, d_rope / 2] of any positions [.., T]."""
    frequencies = theta ** -(torch.arange(0, d_rope, 2, device=positions_T.device, dtype=torch.float32) / d_rope)
    return positions_T.float()[..., None] * frequencies


def rotate(x_BTHC: Tensor, angles_TC: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + C/2}) by the position's angles, which may differ by sequence: [B, T, C]."""
    cos_T1C, sin_T1C = (f(angles_TC).unsqueeze(-2).to(x_BTHC.dtype) for f in (torch.cos, torch.sin))
    a_BTHC, b_BTHC = x_BTHC.chunk(2, dim=-1)
    return torch.cat((a_BTHC * cos_T1C - b_BTHC * sin_T1C, b_BTHC * cos_T1C + a_BTHC * sin_T1C), dim=-1)


def _attend(q_BTHC: Tensor, k_BTHC: Tensor, v_BTHC: Tensor, past: LayerState | None) -> Tensor:
    """Causal softmax attention, over the past as well if there is one; heads come back concatenated."""
    mask, causal = None, True
    if past is not None:
        k_BTHC, v_BTHC = past.with_keys(k_BTHC, v_BTHC)
        mask, causal = past.mask_B1TS, past.causal
    q, k, v = (x.transpose(1, 2) for x in (q_BTHC, k_BTHC, v_BTHC))
    if q.device.type == "cpu":
        # At small head widths torch's fp32 kernel is two to five times as fast as its bf16 one.
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, is_causal=causal).to(v.dtype)
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
    return out.transpose(1, 2).flatten(2)


class MLA(nn.Module):
    """Multi-head latent attention (arXiv 2412.19437, section 2.1.1): keys and values come from one small latent."""

    def __init__(self, config: ModelConfig, mla: MLAConfig) -> None:
        super().__init__()
        self.config = mla
        D, H = config.d_model, mla.n_heads
        d_qk = mla.qk_nope_head_dim + mla.qk_rope_head_dim
        if mla.q_lora_rank is None:
            self.q = nn.Linear(D, H * d_qk, bias=False)
        else:
            self.q_down = nn.Linear(D, mla.q_lora_rank, bias=False)
            self.norm_q = RMSNorm(mla.q_lora_rank, eps=config.norm_eps)
            self.q = nn.Linear(mla.q_lora_rank, H * d_qk, bias=False)
        self.kv_down = nn.Linear(D, mla.kv_lora_rank + mla.qk_rope_head_dim, bias=False)
        self.norm_kv = RMSNorm(mla.kv_lora_rank, eps=config.norm_eps)
        self.kv_up = nn.Linear(mla.kv_lora_rank, H * (mla.qk_nope_head_dim + mla.v_head_dim), bias=False)
        self.out = nn.Linear(H * mla.v_head_dim, D, bias=False)

    def forward(self, x_BTD: Tensor, angles_TC: Tensor, past: LayerState | None = None) -> Tensor:
        mla = self.config
        # Queries: c_q = W_DQ h, q = W_UQ norm(c_q)
        c_q = x_BTD if mla.q_lora_rank is None else self.norm_q(self.q_down(x_BTD))
        q_BTHC = self.q(c_q).unflatten(-1, (mla.n_heads, -1))
        q_nope, q_rope = q_BTHC.split((mla.qk_nope_head_dim, mla.qk_rope_head_dim), dim=-1)

        # Keys and values: one latent, and one rotary key that all heads share
        c_kv, k_rope = self.kv_down(x_BTD).split((mla.kv_lora_rank, mla.qk_rope_head_dim), dim=-1)
        kv_BTHC = self.kv_up(self.norm_kv(c_kv)).unflatten(-1, (mla.n_heads, -1))
        k_nope, v_BTHC = kv_BTHC.split((mla.qk_nope_head_dim, mla.v_head_dim), dim=-1)

        k_rope = rotate(k_rope[:, :, None], angles_TC).expand(-1, -1, mla.n_heads, -1)
        q_BTHC = torch.cat((q_nope, rotate(q_rope, angles_TC)), dim=-1)
        k_BTHC = torch.cat((k_nope, k_rope), dim=-1)
        return self.out(_attend(q_BTHC, k_BTHC, v_BTHC, past))


class GQA(nn.Module):
    """Grouped-query attention (arXiv 2305.13245): several query heads share a key and value head."""

    def __init__(self, config: ModelConfig, gqa: GQAConfig) -> None:
        super().__init__()
        self.config = gqa
        D = config.d_model
        self.q = nn.Linear(D, gqa.n_heads * gqa.head_dim, bias=False)
        self.k = nn.Linear(D, gqa.n_kv_heads * gqa.head_dim, bias=False)
        self.v = nn.Linear(D, gqa.n_kv_heads * gqa.head_dim, bias=False)
        self.out = nn.Linear(gqa.n_heads * gqa.head_dim, D, bias=False)

    def forward(self, x_BTD: Tensor, angles_TC: Tensor, past: LayerState | None = None) -> Tensor:
        gqa = self.config
        q_BTHC, k_BTHC, v_BTHC = (f(x_BTD).unflatten(-1, (-1, gqa.head_dim)) for f in (self.q, self.k, self.v))
        group = gqa.n_heads // gqa.n_kv_heads
        k_BTHC = rotate(k_BTHC, angles_TC).repeat_interleave(group, dim=2)
        v_BTHC = v_BTHC.repeat_interleave(group, dim=2)
        return self.out(_attend(rotate(q_BTHC, angles_TC), k_BTHC, v_BTHC, past))


def build_attention(config: ModelConfig) -> MLA | GQA:
    """Attention as the config chooses it."""
    if config.mla is not None:
        return MLA(config, config.mla)
    assert config.gqa is not None
    return GQA(config, config.gqa)


def rope_width(config: ModelConfig) -> int:
    """Channels of a head that rotate."""
    if config.mla is not None:
        return config.mla.qk_rope_head_dim
    assert config.gqa is not None
    return config.gqa.head_dim
