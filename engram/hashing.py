"""From tokens to table rows: token compression (paper, section 2.2) and multi-head n-gram hashing (Eq. 1).

Integers only. Which row a token reads depends on four things that must travel with the weights: the compressed
vocabulary, the multipliers, the table sizes and the pad token. `HashSpec` holds them; a checkpoint stores it, and
loading compares it, because a table read with another hash is noise that raises no error of its own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Regex, Tokenizer, normalizers
from torch import Tensor, nn

from engram.config import EngramConfig, OverEncodingConfig

_MAX = 2**63 - 1
_LONE_SPACE = "\ue000"  # private use: keeps a token that is one space from being stripped to nothing


def compress_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> npt.NDArray[np.int64]:
    """Map every token id to a canonical id, so that `Apple`, ` apple` and `APPLE` share their n-grams.

    The pipeline is the one of the paper's demo: NFKC, NFD, accents stripped, lower case, white space collapsed and
    stripped. A token that is no valid UTF-8 by itself, or that normalises to nothing, keeps its own text as key.

    Args:
        tokenizer: any `tokenizers.Tokenizer`.
        vocab_size: rows of the model's embedding, at least the tokenizer's size. Ids without a token stay distinct,
            which gives DeepSeek-V4.1's 99,092 of 129,280.

    Returns:
        Canonical ids [V], numbered in the order in which they first appear.

    Raises:
        ValueError: the tokenizer has more tokens than `vocab_size`.
    """
    if (n_tokens := tokenizer.get_vocab_size(with_added_tokens=True)) > vocab_size:
        raise ValueError(f"the tokenizer has {n_tokens} tokens, the model's vocabulary only {vocab_size}")
    canonical = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), _LONE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(_LONE_SPACE, " "),
        ]
    )
    first_seen: dict[tuple[str, str | int], int] = {}
    compressed = np.empty(vocab_size, dtype=np.int64)
    for token_id in range(vocab_size):
        raw = tokenizer.id_to_token(token_id)
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        key: tuple[str, str | int]
        if raw is None:
            key = ("unused", token_id)
        elif "\ufffd" in text:
            key = ("text", raw)
        else:
            key = ("text", canonical.normalize_str(text) or text)
        compressed[token_id] = first_seen.setdefault(key, len(first_seen))
    return compressed


@dataclass(frozen=True, kw_only=True, eq=False)
class HashSpec:
    """All integers that decide which rows a text reads."""

    compressed_V: npt.NDArray[np.int64]
    """Canonical id of every token."""
    multipliers: tuple[tuple[int, ...], ...]
    """Odd numbers, one tuple a memory layer, one number a position of the window."""
    n_slots: tuple[tuple[int, ...], ...]
    pad_id: int
    """Canonical id that stands before a document's first token."""

    @classmethod
    def build(cls, memory: EngramConfig | OverEncodingConfig, compressed_V: npt.NDArray[np.int64]) -> HashSpec:
        """Draw the multipliers of every layer as the paper's demo does: odd, seeded by the layer, free of overflow.

        Args:
            memory: whose tables and layers are hashed into.
            compressed_V: canonical ids from `compress_vocabulary`; not used if `compress_tokens` is off.

        Raises:
            ValueError: the pad token is outside the vocabulary.
        """
        tables = memory.tables
        if not 0 <= tables.pad_id < len(compressed_V):
            raise ValueError(
                f"pad_id={tables.pad_id} is no token of a vocabulary of {len(compressed_V)}: set tables.pad_id"
            )
        if not tables.compress_tokens:
            compressed_V = np.arange(len(compressed_V), dtype=np.int64)
        n_compressed = int(compressed_V.max()) + 1
        half_bound = max(1, _MAX // n_compressed // 2)
        multipliers = []
        for layer_id in memory.layer_ids:
            rng = np.random.default_rng(tables.hash_seed + 10007 * layer_id)
            draws = rng.integers(0, half_bound, size=max(tables.ngram_orders), dtype=np.int64)
            multipliers.append(tuple(int(2 * r + 1) for r in draws))
        return cls(
            compressed_V=compressed_V,
            multipliers=tuple(multipliers),
            n_slots=tables.n_slots,
            pad_id=int(compressed_V[tables.pad_id]),
        )

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint; `from_state` turns them back."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {
            "compressed_V": torch.from_numpy(self.compressed_V)
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> HashSpec:
        """Rebuild what `state` gave."""
        return cls(**state | {"compressed_V": state["compressed_V"].cpu().numpy()})

    def check_same(self, stored: HashSpec) -> None:
        """Refuse tables that were trained with another hash.

        Raises:
            ValueError: names the part that differs, its stored and its present value.
        """
        for name in (f.name for f in fields(self)):
            here, there = getattr(self, name), getattr(stored, name)
            if name == "compressed_V":
                here, there = _describe_vocabulary(here), _describe_vocabulary(there)
            if here != there:
                raise ValueError(
                    f"the checkpoint's tables were hashed with another {name}: stored {there}, now {here}; "
                    "use the tokenizer and the config it was trained with"
                )


def _describe_vocabulary(compressed_V: npt.NDArray[np.int64]) -> str:
    digest = hashlib.sha256(compressed_V.tobytes()).hexdigest()[:12]
    return f"{int(compressed_V.max()) + 1:,} canonical ids for {len(compressed_V):,} tokens (sha256 {digest})"


class NgramHasher(nn.Module):
    """Row ids of all memory layers, computed once a batch, on the batch's device."""

    compressed_V: Tensor
    sizes_LG: Tensor

    def __init__(self, memory: EngramConfig | OverEncodingConfig, spec: HashSpec) -> None:
        super().__init__()
        self.tables = memory.tables
        self.spec = spec
        self.register_buffer("compressed_V", torch.from_numpy(spec.compressed_V), persistent=False)
        self.register_buffer("sizes_LG", torch.tensor(spec.n_slots), persistent=False)

    def forward(
        self,
        tokens_BT: Tensor,
        documents_BT: Tensor | None,
        draws_B: Tensor | None = None,
        positions_BT: Tensor | None = None,
    ) -> list[Tensor]:
        """Hash every suffix n-gram.

        Args:
            tokens_BT: token ids.
            documents_BT: number of the document each token belongs to; None lets windows cross documents.
            draws_B: number of each sequence, int64, which the rows of the `random` lookup depend on; None counts
                from 0. Text lookups ignore it.
            positions_BT: where each token stands in its sequence, which random rows depend on too; None counts from 0.

        Returns:
            One int64 tensor [B, T, G] a memory layer: rows of that layer's stacked tables.
        """
        if self.tables.lookup == "random":
            return self._random_rows(tokens_BT, draws_B, positions_BT)
        ids_BT = self.compressed_V[tokens_BT]
        window_BT = [self._shifted(ids_BT, documents_BT, back) for back in range(max(self.tables.ngram_orders))]
        return [
            self._layer_rows(window_BT, multipliers, sizes_G)
            for multipliers, sizes_G in zip(self.spec.multipliers, self.sizes_LG, strict=True)
        ]

    def _shifted(self, ids_BT: Tensor, documents_BT: Tensor | None, back: int) -> Tensor:
        """Canonical id `back` positions earlier; the pad id before the start of the sequence or the document."""
        if back == 0:
            return ids_BT
        earlier_BT = ids_BT[:, :-back]
        if documents_BT is not None:
            earlier_BT = earlier_BT.masked_fill(documents_BT[:, back:] != documents_BT[:, :-back], self.spec.pad_id)
        shifted_BT = torch.full_like(ids_BT, self.spec.pad_id)
        shifted_BT[:, back:] = earlier_BT
        return shifted_BT

    def _layer_rows(self, window_BT: list[Tensor], multipliers: tuple[int, ...], sizes_G: Tensor) -> Tensor:
        # mix_n = x_t m_0 xor x_{t-1} m_1 xor ... xor x_{t-n+1} m_{n-1}. The heads of an order share the mix and
        # differ in their prime modulus; order n + 1 goes on from the mix of order n.
        heads = self.tables.n_hash_heads
        rows, mix_BT = [], torch.zeros_like(window_BT[0])
        for n, (ids_BT, multiplier) in enumerate(zip(window_BT, multipliers, strict=True), start=1):
            mix_BT = mix_BT ^ (ids_BT * multiplier)
            if n in self.tables.ngram_orders:
                first = self.tables.ngram_orders.index(n) * heads
                rows.append(mix_BT[..., None] % sizes_G[first : first + heads])
        return torch.cat(rows, dim=-1) + _first_rows(sizes_G)

    def _random_rows(self, tokens_BT: Tensor, draws_B: Tensor | None, positions_BT: Tensor | None) -> list[Tensor]:
        """Uniform rows from (hash_seed, number of the sequence, position, layer, lookup) alone.

        A hash of counters rather than a generator: the rows are the same on every device and however a batch is
        split over micro-batches and processes.
        """
        B, T = tokens_BT.shape
        device, G = tokens_BT.device, self.tables.n_lookups
        if draws_B is None:
            draws_B = torch.arange(B, device=device)
        if positions_BT is None:
            positions_BT = torch.arange(T, device=device)[None]
        key_BT = _split_mix(
            _split_mix(draws_B + _split_mix(torch.tensor(self.tables.hash_seed, device=device)))[:, None] + positions_BT
        )
        rows = []
        for layer, sizes_G in enumerate(self.sizes_LG):
            any_BTG = _split_mix(key_BT[..., None] + torch.arange(layer * G, (layer + 1) * G, device=device))
            rows.append((any_BTG & _MAX) % sizes_G + _first_rows(sizes_G))
        return rows


def _split_mix(x: Tensor) -> Tensor:
    """SplitMix64 (Steele 2014): a bijection of 64-bit integers whose outputs look independent. int64 wraps around."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, n: int) -> Tensor:
    """The logical shift; torch's keeps the sign."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _signed(bits: int) -> int:
    """The int64 of these 64 bits."""
    return bits - (1 << 64) if bits >= 1 << 63 else bits


def _first_rows(sizes_G: Tensor) -> Tensor:
    """Where each table begins when the tables of a layer are stacked."""
    return sizes_G.cumsum(0) - sizes_G
