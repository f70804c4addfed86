"""Cross-entropy from hidden states, without ever holding all logits.

A [N, V] matrix of fp32 logits is the largest tensor of a small model's step. Chunks of tokens are taken instead: each
makes its logits, its loss and, in the same pass, its gradients, so that the backward only scales what is there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_LOGITS = (
    1_048_576  # logits held at once: 4 MiB in fp32 stay in a CPU core's cache (1.3 to 1.6 times 16 MiB's speed)
)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, chunk: int) -> Tensor:
        needs_grad = any(ctx.needs_input_grad)
        loss = x_ND.new_zeros((), dtype=torch.float32)
        grad_x_ND = torch.empty_like(x_ND) if needs_grad else None
        grad_head_VD = torch.zeros_like(head_VD, dtype=torch.float32) if needs_grad else None
        for start in range(0, len(x_ND), chunk):
            x, targets = x_ND[start : start + chunk], targets_N[start : start + chunk]
            log_p_NV = F.linear(x, head_VD).float().log_softmax(-1)
            loss -= log_p_NV.gather(-1, targets[:, None]).sum()
            if grad_x_ND is not None and grad_head_VD is not None:
                # d loss / d logits = softmax - one_hot
                grad_NV = log_p_NV.exp_()
                grad_NV.scatter_add_(-1, targets[:, None], grad_NV.new_full((len(x), 1), -1.0))
                grad_NV = grad_NV.to(x.dtype)
                grad_x_ND[start : start + chunk] = grad_NV @ head_VD
                grad_head_VD += grad_NV.T @ x
        ctx.save_for_backward(grad_x_ND, grad_head_VD)
        ctx.n = len(x_ND)
        return loss / ctx.n

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_x_ND, grad_head_VD = ctx.saved_tensors
        scale = grad / ctx.n
        return grad_x_ND * scale.to(grad_x_ND.dtype), grad_head_VD * scale, None, None


def cross_entropy(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Mean cross-entropy in nats of softmax(x head^T) against the targets; a fp32 scalar.

    Args:
        x_ND: final hidden states.
        head_VD: output embedding.
        targets_N: token ids.
    """
    if torch.is_autocast_enabled(x_ND.device.type):
        dtype = torch.get_autocast_dtype(x_ND.device.type)
        x_ND, head_VD = x_ND.to(dtype), head_VD.to(dtype)
    chunk = max(1, CHUNK_LOGITS // len(head_VD))
    loss: Tensor = _ChunkedCrossEntropy.apply(x_ND, head_VD, targets_N, chunk)
    return loss
