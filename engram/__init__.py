"""Engram: a transformer whose sparse capacity can be experts, n-gram memory, or both.

One letter legend holds for the whole package. A tensor's suffix names its logical dimensions, `x_BTD`:

    B  batch                    E  routed experts            G  lookups of a token in one layer
    T  positions                K  routed experts a token         (orders x hash heads)
    N  tokens, B * T            R  routed tokens, N * K      P  width of one table row
    D  d_model                  F  hidden width of an FFN    S  rows of all tables of one layer
    V  vocabulary               H  attention heads           M  residual streams
    L  memory layers            C  channels of a head        J  convolution taps
    Q  row width of all lookups of a token, G * P            U  routed tokens, padded

The names below can be imported from here, `from engram import Engram, EngramConfig`; docs/engram-module.md shows how to
put the memory into a model of your own.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engram.allocation import prime_slots
    from engram.config import EngramConfig, ModelConfig, TableConfig
    from engram.decoding import DecodeState
    from engram.hashing import HashSpec, NgramHasher, compress_vocabulary
    from engram.initialise import init_weights
    from engram.memory import Engram
    from engram.transformer import Transformer

_HOMES = {
    "DecodeState": "decoding",
    "Engram": "memory",
    "EngramConfig": "config",
    "HashSpec": "hashing",
    "ModelConfig": "config",
    "NgramHasher": "hashing",
    "TableConfig": "config",
    "Transformer": "transformer",
    "compress_vocabulary": "hashing",
    "init_weights": "initialise",
    "prime_slots": "allocation",
}

__all__ = [
    "DecodeState",
    "Engram",
    "EngramConfig",
    "HashSpec",
    "ModelConfig",
    "NgramHasher",
    "TableConfig",
    "Transformer",
    "compress_vocabulary",
    "init_weights",
    "prime_slots",
]


def __getattr__(name: str) -> Any:
    # On demand: counting and allocation must not wait for torch.
    if name in _HOMES:
        return getattr(import_module(f"engram.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'engram' has no attribute {name!r}")
