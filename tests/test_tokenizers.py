"""If these fail, bits per byte are wrong, documents are cut or misread by a tokenizer, or builds are not repeatable."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from experiments.settings import UserError
from experiments.tokenizers import begin_token, encode, load_tokenizer, text_bytes, tokenizer_file, train_bpe

PROSE = Path(argparse.__file__).read_text()
ODD_TEXTS = [
    "",
    "plain words",
    "\ttabs\t\tand  spaces \r\n\n ",
    "\u4e2d\u6587\u3001\u65e5\u672c\u8a9e",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301 \u00e9",
    "\x00\x1e\x7f\u2581\u0120 controls, a metaspace, a byte letter",
    "<|bos|> <|eos|> <s> <0x41>",
]


def n_bytes(tokenizer: Tokenizer, text: str) -> int:
    [(_, [ids])] = encode(tokenizer, [text])
    return int(text_bytes(tokenizer)[ids].sum())


def metaspace_bpe() -> Tokenizer:
    """A BPE as SentencePiece makes them: U+2581 for a space, bytes for what is not in the vocabulary."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=specials[:3], show_progress=False)
    tokenizer.train_from_iterator([PROSE], trainer)
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary |= {byte: len(vocabulary) + i for i, byte in enumerate(specials[3:])}
    return Tokenizer.from_str(json.dumps(state))


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(iter([PROSE]), 600)


def test_the_vocabulary_has_the_size_asked_for_and_the_specials_come_first(bpe: Tokenizer) -> None:
    assert bpe.get_vocab_size() == 600
    assert [bpe.id_to_token(i) for i in range(3)] == ["<|bos|>", "<|eos|>", "<|pad|>"]


def test_training_is_equal_to_the_byte_for_any_number_of_threads(bpe: Tokenizer) -> None:
    program = (
        "import argparse, pathlib, sys; from experiments.tokenizers import train_bpe;"
        "sys.stdout.write(train_bpe(iter([pathlib.Path(argparse.__file__).read_text()]), 600).to_str())"
    )
    for threads in ("1", "3"):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONPATH": str(Path(__file__).parents[1])}
        made = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True).stdout
        assert made.decode() == bpe.to_str()


@pytest.mark.parametrize("size", [0, 258])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(size: int) -> None:
    with pytest.raises(UserError, match="259"):
        train_bpe(iter([PROSE]), size)


def test_too_little_text_for_the_vocabulary_is_refused_with_the_size_that_fits() -> None:
    with pytest.raises(UserError, match=r"data\.vocab_size=26\d"):
        train_bpe(iter(["abab abab"]), 5000)


def test_byte_level_tokens_add_up_to_the_length_of_the_text(bpe: Tokenizer) -> None:
    for text in [PROSE, *ODD_TEXTS]:
        assert n_bytes(bpe, text) == len(text.encode())


def test_metaspace_tokens_add_up_to_the_length_of_the_text() -> None:
    tokenizer = metaspace_bpe()
    for text in [PROSE, "two words", "\u4e2d\u6587 \U0001f600", "a  b"]:
        assert n_bytes(tokenizer, text) == len(text.encode())


def test_added_tokens_stand_for_their_own_text_and_special_ones_for_none(bpe: Tokenizer) -> None:
    tokenizer = Tokenizer.from_str(bpe.to_str())
    tokenizer.add_tokens([AddedToken("caf\u00e9\u00e9", normalized=False)])  # letters that byte-level uses for bytes
    tokenizer.add_special_tokens(["<|extra|>"])
    assert n_bytes(tokenizer, "a caf\u00e9\u00e9!") == len("a caf\u00e9\u00e9!".encode())
    sizes = text_bytes(tokenizer)
    assert sizes[tokenizer.token_to_id("caf\u00e9\u00e9")] == 7
    assert [sizes[tokenizer.token_to_id(token)] for token in ("<|bos|>", "<|pad|>", "<|extra|>")] == [0, 0, 0]


def test_ids_without_a_token_have_no_bytes_and_a_place() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 5}, merges=[]))
    np.testing.assert_array_equal(text_bytes(tokenizer), [1, 0, 0, 0, 0, 1])


def test_text_that_spells_a_special_token_is_no_special_token(bpe: Tokenizer) -> None:
    [(_, [ids])] = encode(Tokenizer.from_str(bpe.to_str()), ["<|bos|>text<|eos|><|pad|>"])
    assert min(ids) > 2
    assert bpe.decode(ids) == "<|bos|>text<|eos|><|pad|>"


def test_encoding_keeps_every_text_and_the_order_over_batches(bpe: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.tokenizers._BATCH_CHARS", 30)
    batches = list(encode(bpe, iter(ODD_TEXTS)))
    assert len(batches) > 1
    assert [text for texts, _ in batches for text in texts] == ODD_TEXTS
    assert [bpe.decode(ids) for _, batch_ids in batches for ids in batch_ids] == ODD_TEXTS


@pytest.mark.parametrize(
    "token",
    ["<|bos|>", "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<|begin_of_text|>", "<s>", "<|endoftext|>"],
)
def test_the_begin_token_is_found_by_its_usual_names(token: str) -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.add_special_tokens(["<unk>", token])
    assert begin_token(tokenizer) == tokenizer.token_to_id(token) == 2
    assert tokenizer.get_vocab_size() == 3


def test_an_ordinary_token_is_never_taken_for_the_begin_token() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "<s>": 1}, merges=[]))
    assert begin_token(tokenizer) == 2
    assert tokenizer.id_to_token(2) == "<|bos|>"


def test_a_tokenizer_is_read_from_its_file_or_folder(tmp_path: Path, bpe: Tokenizer) -> None:
    bpe.save(str(tmp_path / "tokenizer.json"))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        assert load_tokenizer(str(name)).to_str() == bpe.to_str()


def test_truncation_and_padding_saved_with_a_tokenizer_are_turned_off(tmp_path: Path, bpe: Tokenizer) -> None:
    tokenizer = Tokenizer.from_str(bpe.to_str())
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    assert n_bytes(loaded, PROSE) == len(PROSE.encode())
    [(_, [short])] = encode(loaded, ["a"])
    assert len(short) == 1


@pytest.mark.parametrize("contents", [None, "{}", "no json"])
def test_a_missing_or_broken_tokenizer_is_refused(tmp_path: Path, contents: str | None) -> None:
    path = tmp_path / "tokenizer.json"
    if contents is not None:
        path.write_text(contents)
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(str(path))


def test_names_on_the_hub_are_told_from_paths(tmp_path: Path) -> None:
    assert tokenizer_file("owner/name") is None
    assert tokenizer_file("bpe") is None
    assert tokenizer_file(str(tmp_path)) == tmp_path / "tokenizer.json"
    for name in ("./folder", "/no/such", "a/b/c", "t.json"):
        assert tokenizer_file(name) == Path(name)


def test_the_tokens_of_deepseek_v3_add_up_to_the_length_of_the_text() -> None:
    if "ENGRAM_SHARED_DATA" not in os.environ:
        pytest.skip("ENGRAM_SHARED_DATA is not set: no copy of DeepSeek-V3's tokenizer")
    tokenizer = load_tokenizer(str(Path(os.environ["ENGRAM_SHARED_DATA"]) / "tokenizers" / "deepseek_v3"))
    assert begin_token(tokenizer) == 0
    for text in [PROSE, *ODD_TEXTS]:
        assert n_bytes(tokenizer, text) == len(text.encode())
