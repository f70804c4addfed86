"""The config of an exported model as `transformers` reads and writes it: a ModelConfig as plain values, and its hash.

This file and `modeling_engram.py` travel inside every exported directory, with the parts of the package that they need.
"""

from __future__ import annotations

from dataclasses import asdict, fields, is_dataclass
from typing import Any, get_args, get_type_hints

from transformers import PretrainedConfig

from engram.config import ModelConfig


class EngramLMConfig(PretrainedConfig):
    """What `config.json` holds.

    Args:
        architecture: a ModelConfig as nested plain values.
        hash_spec: "multipliers", "n_slots" and "pad_id" of the HashSpec, and "compressed_sha256" of its canonical ids,
            which lie in the weights; None without a memory.
        tokenizer_sha256: fingerprint of the tokenizer that the model was trained with.
        max_position_embeddings: tokens of a training sequence. RoPE sets no limit, but beyond it the model guesses.
        kwargs: what every config of `transformers` takes.
    """

    model_type = "engram_lm"

    def __init__(
        self,
        architecture: dict[str, Any] | None = None,
        hash_spec: dict[str, Any] | None = None,
        tokenizer_sha256: str | None = None,
        max_position_embeddings: int = 2048,
        **kwargs: Any,
    ) -> None:
        self.architecture = architecture
        self.hash_spec = hash_spec
        self.tokenizer_sha256 = tokenizer_sha256
        self.max_position_embeddings = max_position_embeddings
        if architecture is not None:  # `transformers` makes an empty one to compare with
            self.vocab_size = architecture["vocab_size"]
            self.hidden_size = architecture["d_model"]
            self.num_hidden_layers = architecture["n_layers"]
        super().__init__(**{"tie_word_embeddings": False} | kwargs)

    def model_config(self) -> ModelConfig:
        """The architecture as the package's own, checked again.

        Raises:
            ValueError: there is none, or a value in it is impossible.
        """
        if self.architecture is None:
            raise ValueError("the config describes no architecture: load it from an exported directory")
        return _build(ModelConfig, self.architecture)


def plain(config: ModelConfig) -> dict[str, Any]:
    """A ModelConfig as JSON values."""
    return asdict(config)


def _build(kind: Any, values: dict[str, Any]) -> Any:
    """A frozen dataclass from the values that `asdict` gave, after JSON made lists of its tuples."""
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - {f.name for f in fields(kind)})
    if unknown:
        raise ValueError(f"this version of the code does not know {', '.join(unknown)} in {kind.__name__}")
    return kind(**{name: _value(hints[name], value) for name, value in values.items()})


def _value(hint: Any, value: Any) -> Any:
    if isinstance(value, dict):
        nested = next(part for part in (hint, *get_args(hint)) if is_dataclass(part))
        return _build(nested, value)
    return tuple(_value(None, inner) for inner in value) if isinstance(value, list) else value
