"""Small models for the tests of `engram`. One thread: results then do not depend on the machine's load."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from engram.config import EngramConfig, MLAConfig, ModelConfig, MoEConfig, TableConfig
from engram.initialise import init_weights
from engram.transformer import Transformer

torch.set_num_threads(1)

VOCAB = 64
BOS = 1


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Random inputs do not depend on which tests ran before."""
    torch.manual_seed(0)


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in front of PATH, for programs that stand in for SLURM's."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def tiny_tables(**changes: Any) -> TableConfig:
    """Two orders, two hash heads, two memory layers with primes that differ."""
    defaults = TableConfig(d_mem=16, n_hash_heads=2, n_slots=((31, 37, 41, 43), (47, 53, 59, 61)))
    return replace(defaults, **changes)


def tiny_engram(**changes: Any) -> EngramConfig:
    """Memory in layers 0 and 2 of the tiny model."""
    return replace(EngramConfig(layer_ids=(0, 2), tables=tiny_tables()), **changes)


def tiny_config(**changes: Any) -> ModelConfig:
    """A model of three layers, one dense and two with experts, MLA, one stream and no memory, with `changes`."""
    defaults = ModelConfig(
        vocab_size=VOCAB,
        d_model=32,
        n_layers=3,
        d_ff=48,
        n_dense_layers=1,
        mla=MLAConfig(n_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12),
        moe=MoEConfig(n_routed_experts=8, top_k=2, d_expert=16, d_shared=24),
        bos_id=BOS,
    )
    return replace(defaults, **changes)


def compressed_vocabulary(vocab_size: int = VOCAB) -> npt.NDArray[np.int64]:
    """A map that merges tokens two by two, as case folding does."""
    return np.arange(vocab_size, dtype=np.int64) // 2


def tiny_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """The model of `config` with its initial weights."""
    model = Transformer(config, compressed_vocabulary(config.vocab_size) if config.memory else None)
    init_weights(model, seed)
    return model


def awake_model(config: ModelConfig, seed: int = 0, scale: float = 0.3) -> Transformer:
    """The same with noise on every parameter, so that nothing is hidden behind a zero or a one of initialisation."""
    model = tiny_model(config, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def tokens_without_bos(batch: int, length: int, seed: int = 0, vocab_size: int = VOCAB) -> torch.Tensor:
    """Random token ids that never begin a document."""
    return torch.randint(BOS + 1, vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
