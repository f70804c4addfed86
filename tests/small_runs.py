"""Runs that are planned in an instant, for tests that need directories rather than models."""

from __future__ import annotations

from typing import Any

from engram.config import GQAConfig, ModelConfig, OptimConfig
from experiments.settings import Labels, Run, RunSpec, TrainConfig

BATCH_TOKENS = 100


def small_run(seed: int = 0, steps: int = 5, **labels: Any) -> Run:
    """A dense run of `steps` steps."""
    model = ModelConfig(
        vocab_size=16, d_model=4, n_layers=1, d_ff=4, gqa=GQAConfig(n_heads=1, n_kv_heads=1, head_dim=4)
    )
    train = TrainConfig(
        tokens=BATCH_TOKENS * steps, batch_tokens=BATCH_TOKENS, seq_len=10, eval_tokens=100, optim=OptimConfig(lr=1e-3)
    )
    spec = RunSpec(seed=seed, model=model, train=train, data="0" * 64)
    return Run(spec=spec, labels=Labels(**{"budget": "test", "arm": "dense"} | labels))
