"""Tokenizers: train a byte-level BPE, or take one by path or hub name; and the bytes that each token stands for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.settings import UserError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"  # ids 0, 1, 2, in the places of DeepSeek's

# Tokens that other tokenizers begin a document with, the usual names first.
_KNOWN_BOS = (BOS, "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>", "<|startoftext|>", "<|endoftext|>", "</s>")


def train_bpe(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE with `vocab_size` tokens, specials included.

    Raises:
        UserError: the text is too small for that many tokens, or the size leaves no room for the bytes.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 3:
        raise UserError(
            f"data.vocab_size={vocab_size} is too small: 256 bytes and 3 special tokens need {len(alphabet) + 3}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS, PAD], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (size := tokenizer.get_vocab_size()) < vocab_size:
        raise UserError(f"the text holds only {size} distinct tokens: use more text or data.vocab_size={size}")
    return tokenizer


def load_tokenizer(name: str) -> Tokenizer:
    """Read a tokenizer.json by path, or fetch one from the hub by name.

    Raises:
        UserError: neither is there, or the file is no tokenizer.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        if path.suffix == ".json":
            return Tokenizer.from_file(str(path))
        return Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises bare Exceptions for files and for the hub
        raise UserError(
            f"no tokenizer {name!r} (`bpe`, a tokenizer.json, or a hub name): {error}".splitlines()[0]
        ) from error


def begin_token(tokenizer: Tokenizer) -> int:
    """Return the id that begins a document, adding `<|bos|>` to a tokenizer without any."""
    for token in _KNOWN_BOS:
        if (token_id := tokenizer.token_to_id(token)) is not None:
            return token_id
    tokenizer.add_special_tokens([AddedToken(BOS, special=True)])
    return tokenizer.token_to_id(BOS)


def text_bytes(tokenizer: Tokenizer) -> npt.NDArray[np.int32]:
    """Bytes of text that each token stands for, [V]; special tokens stand for none.

    Bits per byte divide by their sum, so they must add up to the text's length: byte-level tokens spell one byte a
    letter; SentencePiece tokens spell text, with U+2581 for a space and `<0xNN>` for a byte.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    ordinary = [token for token, token_id in vocabulary.items() if token_id not in special]
    byte_level = sum(set(token) <= alphabet for token in ordinary) > 0.9 * len(ordinary)
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int32)
    for token, token_id in vocabulary.items():
        if token_id in special:
            continue
        if byte_level and set(token) <= alphabet:
            sizes[token_id] = len(token)
        elif len(token) == 6 and token.startswith("<0x"):
            sizes[token_id] = 1
        else:
            sizes[token_id] = len(token.replace("\u2581", " ").encode())
    return sizes
