"""RMSNorm, with one gain per residual stream where a module keeps streams apart."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * gain over the last dimension; `gain` may have leading dimensions of its own, [M, D] say."""

    def __init__(self, *shape: int, eps: float) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(shape))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.gain
