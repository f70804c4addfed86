"""Validation loss in nats per token and in bits per byte of text, always over the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engram.transformer import Transformer


@dataclass(frozen=True)
class Validation:
    """Loss over the validation tokens."""

    nats_per_token: float
    bits_per_byte: float
    """Comparable over tokenizers."""
    tokens: int


@torch.no_grad()
def validate(
    model: Transformer,
    batches: Iterable[npt.NDArray[np.int64]],
    token_bytes_V: npt.NDArray[np.int32],
    precision: str,
) -> Validation:
    """Score fixed batches; the model's balancing counters stay as they are.

    Args:
        model: left in the mode it came in.
        batches: token arrays [B, T + 1].
        token_bytes_V: bytes of text that each token stands for.
        precision: "bf16" or "fp32", as in training.
    """
    device = model.embed_VD.device
    was_training = model.training
    model.eval()
    nats, sequences, tokens, n_bytes = 0.0, 0, 0, 0
    for batch in batches:
        ids = torch.from_numpy(batch).to(device)
        # Counted downwards from -1: random rows of validation are never those of training.
        draws_B = torch.arange(-sequences - 1, -sequences - 1 - len(batch), -1, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(ids[:, :-1], ids[:, 1:], draws_B)
        targets = batch[:, 1:]
        nats += float(loss) * targets.size
        sequences += len(batch)
        tokens += targets.size
        n_bytes += int(token_bytes_V[targets].sum(dtype=np.int64))
    model.train(was_training)
    return Validation(nats / tokens, nats / math.log(2) / n_bytes, tokens)
