"""If these fail, words that should share their n-grams do not, or the hash is not the paper's."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from engram.hashing import compress_vocabulary

# Accents, a ligature, full-width digits, Chinese, Cyrillic, sharp s and o with stroke.
SAMPLE = """Apple apple APPLE applE the The THE cafe caf\u00e9 CAF\u00c9 Cafe
na\u00efve naive NAIVE \u00fcnder under \ufb01ne fine
\uff12\uff13 23 \u6f22\u5b57 \u6f22\u5b57 \u0414\u0430 \u0434\u0430 \u0414\u0410 \u65e5\u672c
\u00df SS ss \u00f8 o
\tx\n\n  y   z \r\n one  two"""


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level BPE whose words are whole tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        min_frequency=1,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [space + word for word in SAMPLE.split() for space in ("", " ")]
    bpe.train_from_iterator([SAMPLE, "\u0301 \u0302\u0301", *words], trainer)
    return bpe


def token(tokenizer: Tokenizer, text: str) -> int:
    found = [i for i in range(tokenizer.get_vocab_size()) if tokenizer.decode([i]) == text]
    assert len(found) == 1, f"{text!r} is no single token here"
    return found[0]


def python_key(text: str) -> str:
    """The paper's pipeline with Python's own Unicode tables."""
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    text = "".join(c for c in text if not unicodedata.category(c).startswith("M")).lower()
    text = re.sub(r"[ \t\r\n]+", " ", text)
    return text if text == " " else text.strip()


def test_compression_equals_the_pipeline_in_plain_python(tokenizer: Tokenizer) -> None:
    size = tokenizer.get_vocab_size()
    seen: dict[str, int] = {}
    expected = []
    for i in range(size):
        text = tokenizer.decode([i], skip_special_tokens=False)
        key = tokenizer.id_to_token(i) if "\ufffd" in text else python_key(text) or text
        expected.append(seen.setdefault(key, len(seen)))
    assert compress_vocabulary(tokenizer, size).tolist() == expected


@pytest.mark.parametrize(
    "family",
    [
        ["Apple", " apple", "APPLE", "apple", " Apple"],
        ["cafe", " caf\u00e9", " CAF\u00c9", " Cafe"],
        ["na\u00efve", " naive", " NAIVE"],
        [
            " \u0414\u0430",
            " \u0434\u0430",
            " \u0414\u0410",
        ],
        [" \ufb01ne", " fine"],
        [" \uff12\uff13", " 23"],
        [" ", "\n", "\t"],
    ],
    ids=lambda family: family[0].strip() or "spaces",
)
def test_case_accents_spaces_and_width_are_folded(tokenizer: Tokenizer, family: list[str]) -> None:
    compressed_V = compress_vocabulary(tokenizer, tokenizer.get_vocab_size())
    assert len({int(compressed_V[token(tokenizer, text)]) for text in family}) == 1


def test_other_words_stay_apart(tokenizer: Tokenizer) -> None:
    compressed_V = compress_vocabulary(tokenizer, tokenizer.get_vocab_size())
    words = [" apple", " the", " cafe", " under", " 23", " ", " o", "\u00f8", " ss"]
    assert len({int(compressed_V[token(tokenizer, text)]) for text in words}) == len(words)


def test_bytes_that_are_no_text_by_themselves_stay_apart(tokenizer: Tokenizer) -> None:
    compressed_V = compress_vocabulary(tokenizer, tokenizer.get_vocab_size())
    partial = [i for i in range(tokenizer.get_vocab_size()) if "\ufffd" in tokenizer.decode([i])]
    assert len(partial) > 100
    assert len({int(compressed_V[i]) for i in partial}) == len(partial)


def test_ids_without_a_token_stay_distinct(tokenizer: Tokenizer) -> None:
    size = tokenizer.get_vocab_size()
    padded = compress_vocabulary(tokenizer, size + 50)
    plain = compress_vocabulary(tokenizer, size)
    assert np.array_equal(padded[:size], plain)
    assert np.array_equal(padded[size:], plain.max() + 1 + np.arange(50))


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused_with_both_sizes(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=rf"{tokenizer.get_vocab_size()} tokens.*only 100"):
        compress_vocabulary(tokenizer, 100)


def test_deepseek_vocabulary_shrinks_as_in_the_paper() -> None:
    """DeepSeek-V4.1's 99,092 of 129,280; with the 815 added tokens that this file lacks, the paper's 23.43 percent."""
    if "ENGRAM_SHARED_DATA" not in os.environ:
        pytest.skip("set ENGRAM_SHARED_DATA to a folder that holds tokenizers/deepseek_v3/tokenizer.json")
    path = Path(os.environ["ENGRAM_SHARED_DATA"]) / "tokenizers" / "deepseek_v3" / "tokenizer.json"
    deepseek = Tokenizer.from_file(str(path))
    compressed_V = compress_vocabulary(deepseek, 129_280)
    assert compressed_V.max() + 1 == 99_092
    assert 1 - (compressed_V[:128_815].max() + 1) / 128_815 == pytest.approx(0.2343, abs=1e-4)
