"""A corpus of a few hundred documents, for tests of how text becomes shards."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np

from experiments.settings import DataConfig
from experiments.shards import Shards

VOCAB = 300
SPECIAL = "<|bos|> <|eos|> <|pad|>"


def documents(n: int = 400) -> list[str]:
    """Distinct texts of a few hundred bytes, some with what a careless reader would take for special tokens."""
    words = random.Random(0)
    known = ["alpha", "beta", "\u4e2d\u6587", "gamma\tdelta", SPECIAL, "\U0001f600", "epsilon zeta", "\n"]
    return [f"{i} " + " ".join(words.choices(known, k=words.randrange(5, 60))) for i in range(n)]


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def config(source: Path | str, **settings: Any) -> DataConfig:
    return DataConfig(**{"corpus": str(source), "vocab_size": VOCAB} | settings)


def decoded(shards: Shards, split: str) -> list[str]:
    """The texts between begin tokens."""
    stream = np.asarray(shards.tokens(split))
    starts = np.flatnonzero(stream == shards.bos_id)
    assert starts[0] == 0
    return [
        shards.tokenizer.decode(ids[1:].tolist(), skip_special_tokens=False) for ids in np.split(stream, starts[1:])
    ]
