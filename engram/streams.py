"""Residual streams: manifold-constrained hyper-connections (mHC, arXiv 2512.24880), or a plain residual for M = 1.

    x_in    = H_pre x                 H_pre  = sigmoid(.)          [1, M]   how a sub-layer reads the streams
    x_new   = H_res^T x + H_post^T F(x_in)
                                      H_post = 2 sigmoid(.)        [1, M]   how its output is written back
                                      H_res  = Sinkhorn(exp(.))    [M, M]   doubly stochastic: keeps the mean

Each (.) is alpha * (phi RMSNorm(vec x)) + b. As in DeepSeek-V4's code, Sinkhorn starts from a softmax over rows, and a
small eps keeps its divisions finite.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engram.config import ModelConfig

_EPS = 1e-6


class PlainResidual(nn.Module):
    """M = 1: x + F(x)."""

    def forward(self, x_BTMD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        return x_BTMD + sublayer(x_BTMD[:, :, 0])[:, :, None]


class HyperConnection(nn.Module):
    """M > 1: learned, input-dependent reading, writing and mixing of the streams. Always in fp32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        M = config.n_streams
        self.sizes = (M, M, M * M)
        self.sinkhorn_iters = config.sinkhorn_iters
        self.norm_eps = config.norm_eps
        self.stream_phi = nn.Parameter(torch.empty(sum(self.sizes), M * config.d_model))
        self.stream_bias = nn.Parameter(torch.empty(sum(self.sizes)))
        self.stream_alpha = nn.Parameter(torch.empty(3))

    def start(self) -> dict[str, Tensor]:
        """Initial biases and alphas. A plain residual: read the mean, write the output to every stream, hardly mix."""
        M = self.sizes[0]
        pre = torch.full((M,), -math.log(M - 1))  # sigmoid -> 1 / M
        post = torch.zeros(M)  # 2 sigmoid -> 1
        res = (torch.eye(M) * 8.0).flatten()
        return {"stream_bias": torch.cat((pre, post, res)), "stream_alpha": torch.full((3,), 0.01)}

    def maps(self, x_BTMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return H_pre [B, T, M], H_post [B, T, M] and H_res [B, T, M, M]; H_res[i, j] carries stream i to j."""
        with torch.autocast(x_BTMD.device.type, enabled=False):
            flat = F.rms_norm(x_BTMD.float().flatten(2), (x_BTMD.shape[2] * x_BTMD.shape[3],), eps=self.norm_eps)
            pre, post, res = F.linear(flat, self.stream_phi.float()).split(self.sizes, dim=-1)
            pre_b, post_b, res_b = self.stream_bias.split(self.sizes)
            pre_a, post_a, res_a = self.stream_alpha.unbind()
            H_pre = torch.sigmoid(pre_a * pre + pre_b) + _EPS
            H_post = 2 * torch.sigmoid(post_a * post + post_b)
            M = self.sizes[0]
            return H_pre, H_post, _sinkhorn((res_a * res + res_b).unflatten(-1, (M, M)), self.sinkhorn_iters)

    def forward(self, x_BTMD: Tensor, sublayer: Callable[[Tensor], Tensor]) -> Tensor:
        H_pre, H_post, H_res = self.maps(x_BTMD)
        y_BTD = sublayer((H_pre[..., None] * x_BTMD).sum(2).to(x_BTMD.dtype))
        # Autocast would round the streams to bf16 in every sub-layer.
        with torch.autocast(x_BTMD.device.type, enabled=False):
            mixed_BTMD = H_res.transpose(-1, -2) @ x_BTMD.float() + H_post[..., None] * y_BTD[:, :, None]
            return mixed_BTMD.to(x_BTMD.dtype)


def _sinkhorn(scores: Tensor, iterations: int) -> Tensor:
    """Make matrices doubly stochastic by normalising columns and rows in turn."""
    H = scores.softmax(-1) + _EPS
    H = H / (H.sum(-2, keepdim=True) + _EPS)
    for _ in range(iterations - 1):
        H = H / (H.sum(-1, keepdim=True) + _EPS)
        H = H / (H.sum(-2, keepdim=True) + _EPS)
    return H


def build_residual(config: ModelConfig) -> PlainResidual | HyperConnection:
    """Residual path of one sub-layer."""
    return PlainResidual() if config.n_streams == 1 else HyperConnection(config)
