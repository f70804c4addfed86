"""Tokenizers: train a byte-level BPE, or take one by path or hub name; encode with it; the bytes of its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.settings import UserError

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"  # ids 0, 1, 2, in the places of DeepSeek's

_BATCH_CHARS = 4_000_000

# Tokens that other tokenizers begin a document with, the usual names first.
_KNOWN_BOS = (BOS, "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<s>", "<|startoftext|>", "<|endoftext|>", "</s>")  # noqa: RUF001


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
    path = tokenizer_file(name)
    try:
        tokenizer = Tokenizer.from_file(str(path)) if path else Tokenizer.from_pretrained(name)
    except Exception as error:  # the library raises bare Exceptions for files and for the hub
        raise UserError(
            f"no tokenizer {name!r} (`bpe`, a tokenizer.json, or a hub name): {error}".splitlines()[0]
        ) from error
    # Both are saved with a tokenizer; the first would cut every document, the second would fill it up.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def tokenizer_file(name: str) -> Path | None:
    """Return the file that a tokenizer's name means, or None for `bpe` and for a name on the hub."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path / "tokenizer.json"
    # Hub names are NAME or OWNER/NAME. Asking the hub for a mistyped path would take half a minute to fail.
    is_path = path.suffix == ".json" or name.startswith((".", "~")) or path.is_absolute() or len(path.parts) > 2
    return path if is_path else None


def begin_token(tokenizer: Tokenizer) -> int:
    """Return the id that begins a document, adding `<|bos|>` to a tokenizer without any.

    Only special tokens count: `<s>` may also be an ordinary piece of HTML.
    """
    specials = {
        token.content: token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special
    }
    for token in _KNOWN_BOS:
        if token in specials:
            return specials[token]
    tokenizer.add_special_tokens([AddedToken(BOS, special=True)])
    token_id = tokenizer.token_to_id(BOS)
    assert token_id is not None
    return token_id


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[tuple[list[str], list[list[int]]]]:
    """Yield texts and their ids in batches; text that spells a special token stays text."""
    # Not saved with a tokenizer, so it is set where text is encoded.
    tokenizer.encode_special_tokens = True
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= _BATCH_CHARS:
            yield batch, _ids(tokenizer, batch)
            batch, chars = [], 0
    if batch:
        yield batch, _ids(tokenizer, batch)


def _ids(tokenizer: Tokenizer, batch: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False)]


def text_bytes(tokenizer: Tokenizer) -> npt.NDArray[np.int32]:
    """Bytes of text that each token stands for, [V]; special tokens stand for none.

    Bits per byte divide by their sum, so they must add up to the text's length: byte-level tokens spell one byte a
    letter; SentencePiece tokens spell text, with U+2581 for a space and `<0xNN>` for a byte; added tokens spell
    themselves. A SentencePiece tokenizer puts a space before each document, which counts as one byte more.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    ordinary = [token for token, token_id in vocabulary.items() if token_id not in added]
    byte_level = sum(set(token) <= alphabet for token in ordinary) > 0.9 * len(ordinary)
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int32)
    for token, token_id in vocabulary.items():
        if token_id in added:
            sizes[token_id] = 0 if added[token_id].special else len(token.encode())
        elif byte_level and set(token) <= alphabet:
            sizes[token_id] = len(token)
        elif len(token) == 6 and token.startswith("<0x"):
            sizes[token_id] = 1
        else:
            sizes[token_id] = len(token.replace("\u2581", " ").encode())
    return sizes
