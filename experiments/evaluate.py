"""Validation loss in nats per token and in bits per byte of text, always over the same tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from engram.transformer import Transformer
from experiments.parallel import Team


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
    team: Team | None = None,
) -> Validation:
    """Score fixed batches; the model's balancing counters stay as they are.

    Args:
        model: left in the mode it came in.
        batches: token arrays [B, T + 1].
        token_bytes_V: bytes of text that each token stands for.
        precision: "bf16" or "fp32", as in training.
        team: processes that share every batch; each gets the score of all.
    """
    device = model.embed_VD.device
    was_training = model.training
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64)  # nats, tokens, bytes
    sequences = 0
    for batch in batches:
        own = team.part(len(batch)) if team else slice(None)
        rows = batch[own]
        # Processes must make equal numbers of passes: one that is left without a sequence scores one for nothing.
        ids = torch.from_numpy(rows if len(rows) else batch[:1]).to(device)
        # Counted downwards from -1: random rows of validation are never those of training.
        draws_B = -1 - torch.arange(sequences, sequences + len(batch), device=device)[own]
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = model(ids[:, :-1], ids[:, 1:], draws_B if len(rows) else None)
        targets = rows[:, 1:]
        n_bytes = int(token_bytes_V[targets].sum(dtype=np.int64))
        totals += torch.tensor([float(loss) * targets.size, targets.size, n_bytes], dtype=torch.float64)
        sequences += len(batch)
    model.train(was_training)
    if team:
        totals = totals.to(device)
        team.sum(totals)
    nats, tokens, n_bytes = totals.tolist()
    return Validation(nats / tokens, nats / math.log(2) / n_bytes, int(tokens))
