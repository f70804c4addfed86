"""A study small enough to train for real inside a test: real Python text, a few hundred tokens a step."""

from __future__ import annotations

import shutil
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

from conftest import tiny_config, tiny_engram

from engram.config import ModelConfig, OptimConfig
from experiments.corpus import prepare
from experiments.settings import DataConfig, Labels, Run, RunSpec, TrainConfig
from experiments.shards import Shards

VOCAB = 320
STEPS = 12


def build_shards(folder: Path) -> Shards:
    """Shards of some sixty files of the standard library."""
    text = folder / "text"
    text.mkdir(parents=True)
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(p for p in stdlib.glob("*.py") if 2_000 < p.stat().st_size < 20_000)[:60]:
        shutil.copy(path, text / path.name)
    return Shards(prepare(DataConfig(corpus=str(text), vocab_size=VOCAB), folder / "data"))


def study_run(shards: Shards, *, model: dict[str, Any] | None = None, seed: int = 0, **train: Any) -> Run:
    """A run of `STEPS` steps of an Engram MoE, with changes to its model and its training."""
    config: ModelConfig = tiny_config(vocab_size=VOCAB, bos_id=shards.bos_id, engram=tiny_engram())
    config = replace(config, **(model or {}))
    defaults = TrainConfig(
        tokens=STEPS * 256, batch_tokens=256, seq_len=64, eval_tokens=512, precision="fp32", optim=OptimConfig(lr=5e-3)
    )
    spec = RunSpec(seed=seed, model=config, train=replace(defaults, **train), data=shards.hash)
    return Run(spec=spec, labels=Labels(budget="test", arm="allocation", rho_target=0.5, rho=0.5))
