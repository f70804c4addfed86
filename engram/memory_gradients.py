"""Eq. 4's score and Eq. 5's convolution with their gradients written out.

The streams are the widest tensors of a memory layer. Left to autograd, each norm, product and shift of them is a pass
over memory of its own, there and back; these take less than half as many and keep only their inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _inverse_rms(x_BTMD: Tensor, eps: float) -> Tensor:
    """1 / rms(x), [B, T, M, 1] in fp32."""
    norm_BTM1 = torch.linalg.vector_norm(
        x_BTMD, dim=-1, keepdim=True, dtype=torch.promote_types(x_BTMD.dtype, torch.float32)
    )
    return torch.rsqrt(norm_BTM1.square() / x_BTMD.shape[-1] + eps)


class _GateScore(torch.autograd.Function):
    """s = sum_d G_d h_d k_d / (rms(h) rms(k) sqrt(D)), G the product of the two norms' gains."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, k: Tensor, gain_query: Tensor, gain_key: Tensor, eps: float) -> Tensor:
        r_h, r_k = _inverse_rms(h, eps), _inverse_rms(k, eps)
        score_BTM1 = (h * (gain_query * gain_key) * k).sum(-1, keepdim=True) * (r_h * r_k / math.sqrt(h.shape[-1]))
        ctx.save_for_backward(h, k, gain_query, gain_key, r_h, r_k, score_BTM1)
        return score_BTM1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ds: Tensor) -> tuple[Tensor | None, ...]:
        h, k, gain_query, gain_key, r_h, r_k, s = ctx.saved_tensors
        D = h.shape[-1]
        gain = gain_query * gain_key
        # ds/dh = G k / (rms(h) rms(k) sqrt(D)) - h s / (D rms(h)^2), and the same for k
        wide = torch.promote_types(torch.promote_types(h.dtype, k.dtype), gain.dtype)
        scale = (ds * r_h * r_k / math.sqrt(D)).to(wide)
        along_h, along_k = ((ds * s * r.square() / D).to(wide) for r in (r_h, r_k))
        dh = torch.addcmul(k * gain * scale, h, along_h, value=-1)
        scaled_h = h * scale
        dgain = (scaled_h * k).sum((0, 1))
        dk = torch.addcmul(scaled_h * gain, k, along_k, value=-1)
        return dh.to(h.dtype), dk.to(k.dtype), dgain * gain_key, dgain * gain_query, None


def gate_score(h_BTMD: Tensor, k_BTMD: Tensor, gain_query_MD: Tensor, gain_key_MD: Tensor, eps: float) -> Tensor:
    """<RMSNorm(h), RMSNorm(k)> / sqrt(D), [B, T, M, 1].

    Args:
        h_BTMD: what asks: the residual streams.
        k_BTMD: what is asked: keys.
        gain_query_MD, gain_key_MD: gains of the two norms.
        eps: of both.
    """
    score: Tensor = _GateScore.apply(h_BTMD, k_BTMD, gain_query_MD, gain_key_MD, eps)  # type: ignore[no-untyped-call]
    return score


class _CausalConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTMD: Tensor, w_JMD: Tensor, dilation: int, documents_BT: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_BTMD, w_JMD, documents_BT)
        ctx.dilation = dilation
        y_BTMD = x_BTMD * w_JMD[0]
        for j, back, same in _taps(x_BTMD, w_JMD, dilation, documents_BT):
            x_earlier = x_BTMD[:, :-back] if same is None else x_BTMD[:, :-back] * same
            y_BTMD[:, back:].addcmul_(x_earlier, w_JMD[j])
        return y_BTMD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BTMD: Tensor) -> tuple[Tensor | None, ...]:
        x_BTMD, w_JMD, documents_BT = ctx.saved_tensors
        dx_BTMD, dw_JMD = dy_BTMD * w_JMD[0], torch.zeros_like(w_JMD)
        dw_JMD[0] = (dy_BTMD * x_BTMD).sum((0, 1))
        for j, back, same in _taps(x_BTMD, w_JMD, ctx.dilation, documents_BT):
            dy_later = dy_BTMD[:, back:] if same is None else dy_BTMD[:, back:] * same
            dx_BTMD[:, :-back].addcmul_(dy_later, w_JMD[j])
            dw_JMD[j] = (dy_later * x_BTMD[:, :-back]).sum((0, 1))
        return dx_BTMD.to(x_BTMD.dtype), dw_JMD, None, None


def _taps(
    x_BTMD: Tensor, w_JMD: Tensor, dilation: int, documents_BT: Tensor | None
) -> Iterator[tuple[int, int, Tensor | None]]:
    """Each tap that looks back: its number, how far, and where that is the same document."""
    for j in range(1, len(w_JMD)):
        if (back := j * dilation) >= x_BTMD.shape[1]:
            return
        yield (
            j,
            back,
            None if documents_BT is None else (documents_BT[:, back:] == documents_BT[:, :-back])[..., None, None],
        )


def causal_convolution(x_BTMD: Tensor, w_JMD: Tensor, dilation: int, documents_BT: Tensor | None) -> Tensor:
    """y_t = sum_j w_j * x_{t - j * dilation}, depthwise, within documents.

    Args:
        x_BTMD: inputs.
        w_JMD: weights, the present token's first.
        dilation: tokens between taps.
        documents_BT: document numbers that no tap crosses; None lets it.
    """
    y: Tensor = _CausalConvolution.apply(x_BTMD, w_JMD, dilation, documents_BT)  # type: ignore[no-untyped-call]
    return y
