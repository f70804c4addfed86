"""Inputs that look like text where it matters: token ids by Zipf's law, so that n-grams repeat as words do."""

from __future__ import annotations

import torch
from torch import Tensor


def zipf(n_kinds: int, n_draws: int, generator: torch.Generator) -> Tensor:
    """Draw ranks 0, 1, ... with probabilities in proportion to 1 / (rank + 1)."""
    weights = 1 / torch.arange(1, n_kinds + 1, dtype=torch.float64)
    return torch.multinomial(weights, n_draws, replacement=True, generator=generator)


def zipf_tokens(vocab_size: int, batch: int, length: int, seed: int = 0) -> Tensor:
    """Token ids [batch, length] on the CPU, without 0, which begins documents."""
    return 1 + zipf(vocab_size - 1, batch * length, torch.Generator().manual_seed(seed)).view(batch, length)
