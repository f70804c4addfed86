"""Cross-entropy from hidden states, without ever holding all logits.

A [N, V] matrix of fp32 logits is the largest tensor of a small model's step. Chunks of tokens are taken instead: each
makes its logits, its loss and, in the same pass, its gradients, so that the backward only scales what is there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_LOGITS = {"cpu": 2**20, "cuda": 2**27}
"""Logits held at once. On a CPU 4 MiB in fp32 stay in a core's cache (1.3 to 1.6 times 16 MiB's speed); a GPU wants
long products and has the memory."""
MIN_CHUNK = 256
"""Tokens a chunk. Every chunk adds to the head's whole gradient: shorter ones spend their time there (measured on a
CPU at 32 tokens and V = 32,768: twice as slow, at 8 tokens and V = 129,280: eight times; at 128 tokens and V = 16,384
4 to 13 percent slower than at 256)."""


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, head_VD: Tensor, targets_N: Tensor, chunk: int, needs_grad: bool) -> Tensor:
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
    @once_differentiable  # the gradients were made without a graph: a second derivative would be silently wrong
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_x_ND, grad_head_VD = ctx.saved_tensors
        scale = grad / ctx.n
        return grad_x_ND * scale.to(grad_x_ND.dtype), grad_head_VD * scale, None, None, None


def _chunk(head_VD: Tensor) -> int:
    """Tokens taken at once."""
    return max(MIN_CHUNK, CHUNK_LOGITS.get(head_VD.device.type, CHUNK_LOGITS["cuda"]) // len(head_VD))


@torch.no_grad()
def token_losses(x_ND: Tensor, head_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy of each token [N] in nats, fp32: what `cross_entropy` is the mean of, without gradients."""
    parts = [
        F.cross_entropy(F.linear(x, head_VD).float(), targets, reduction="none")
        for x, targets in zip(x_ND.split(_chunk(head_VD)), targets_N.split(_chunk(head_VD)), strict=True)
    ]
    return torch.cat(parts)


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
    chunk = _chunk(head_VD)
    # Asked here: inside the function autograd is always off, and needs_input_grad is true even under no_grad.
    needs_grad = torch.is_grad_enabled() and (x_ND.requires_grad or head_VD.requires_grad)
    loss: Tensor = _ChunkedCrossEntropy.apply(x_ND, head_VD, targets_N, chunk, needs_grad)  # type: ignore[no-untyped-call]
    return loss
