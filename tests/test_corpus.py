"""If these fail, shards are not what the manifest says, or a build that went wrong leaves something behind.

Which document goes where is in test_survey.py, reading shards in test_shards.py.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_corpus import SPECIAL, VOCAB, config, decoded, documents, write
from tokenizers import Tokenizer

from experiments import corpus
from experiments.corpus import find, prepare
from experiments.settings import DataConfig, UserError
from experiments.shards import Shards


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source.jsonl", documents())


@pytest.fixture
def shards(source: Path, tmp_path: Path) -> Shards:
    return Shards(prepare(config(source), tmp_path / "data"))


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_two_builds_are_equal_to_the_byte(source: Path, tmp_path: Path) -> None:
    first, second = (prepare(config(source), tmp_path / name) for name in ("one", "two"))
    assert set(contents(first)) == {"train.bin", "valid.bin", "tokenizer.json", "token_bytes.npy", "manifest.json"}
    assert contents(first) == contents(second)


def test_a_second_call_finds_what_the_first_has_built(source: Path, tmp_path: Path) -> None:
    data_dir = tmp_path / "data"
    assert find(config(source), data_dir) is None
    path = prepare(config(source), data_dir)
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert find(config(source), data_dir) == prepare(config(source), data_dir) == path
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before


def test_other_sources_settings_or_tokenizer_files_have_another_directory(source: Path, tmp_path: Path) -> None:
    data_dir, taken = tmp_path / "data", tmp_path / "tokenizer.json"
    first = prepare(config(source), data_dir)
    taken.write_bytes((first / "tokenizer.json").read_bytes())
    paths = {first, prepare(config(source, vocab_size=VOCAB + 1), data_dir)}
    paths.add(prepare(config(source, tokenizer=str(taken)), data_dir))
    taken.write_text(taken.read_text() + "\n")
    paths.add(prepare(config(source, tokenizer=str(taken)), data_dir))
    write(source, documents(401))
    paths.add(prepare(config(source), data_dir))
    assert len(paths) == 5


def test_every_document_begins_with_the_begin_token_and_keeps_its_text(shards: Shards) -> None:
    texts = decoded(shards, "train") + decoded(shards, "valid")
    assert set(texts) <= set(documents())
    assert len(texts) == len(set(texts))
    assert any(SPECIAL in text for text in texts)


def test_the_manifest_counts_and_hashes_what_is_there(source: Path, tmp_path: Path) -> None:
    second = write(tmp_path / "second.jsonl", ["of the second source", *documents(3)])
    path = prepare(config(f"{source}+{second}"), tmp_path / "data")
    manifest = json.loads((path / "manifest.json").read_text())
    for split in ("train", "valid"):
        stated = manifest["splits"][split]
        texts = decoded(Shards(path), split)
        assert stated["documents"] == len(texts)
        assert stated["bytes"] == sum(len(text.encode()) for text in texts)
        assert stated["tokens"] * np.dtype(manifest["dtype"]).itemsize == (path / f"{split}.bin").stat().st_size
        assert stated["sha256"] == hashlib.sha256((path / f"{split}.bin").read_bytes()).hexdigest()
    new = [documents(), ["of the second source"]]
    assert [entry["documents"] for entry in manifest["sources"]] == [len(texts) for texts in new]
    for entry, texts in zip(manifest["sources"], new, strict=True):
        hashes = b"".join(hashlib.sha256(text.encode()).digest() for text in texts)
        assert entry["sha256"] == hashlib.sha256(hashes).hexdigest()
        assert entry["bytes"] == sum(len(text.encode()) for text in texts)


def test_token_bytes_add_up_to_the_text(shards: Shards) -> None:
    for split in ("train", "valid"):
        total = int(shards.token_bytes[np.asarray(shards.tokens(split))].sum())
        assert total == shards.manifest["splits"][split]["bytes"]


def test_a_large_vocabulary_without_begin_token_takes_four_bytes_and_gets_one(source: Path, tmp_path: Path) -> None:
    made = json.loads((prepare(config(source), tmp_path / "data") / "tokenizer.json").read_text())
    made["added_tokens"] = []
    made["model"]["vocab"] |= {f"never{i}": VOCAB + i for i in range(70_000)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    shards = Shards(prepare(config(source, tokenizer=str(tmp_path / "tokenizer.json")), tmp_path / "data"))
    assert shards.manifest["dtype"] == "uint32"
    # The names of the specials are still ordinary tokens here; the begin token must be a special one.
    assert shards.manifest["bos_token"] == "<|bos|>"
    assert shards.vocab_size == len(shards.token_bytes) >= VOCAB + 70_000
    assert set(decoded(shards, "train")) <= set(documents())


def test_a_begin_token_that_had_to_be_appended_is_recorded(source: Path, tmp_path: Path) -> None:
    made = json.loads((prepare(config(source), tmp_path / "data") / "tokenizer.json").read_text())
    made["added_tokens"] = []
    names = {"<|bos|>": "x1x", "<|eos|>": "x2x", "<|pad|>": "x3x"}
    made["model"]["vocab"] = {names.get(token, token): token_id for token, token_id in made["model"]["vocab"].items()}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    shards = Shards(prepare(config(source, tokenizer=str(tmp_path / "tokenizer.json")), tmp_path / "data"))
    assert (shards.bos_id, shards.vocab_size, shards.manifest["bos_appended"]) == (VOCAB, VOCAB + 1, True)
    assert shards.tokenizer.token_to_id("<|bos|>") == VOCAB
    assert set(decoded(shards, "train")) <= set(documents())


def test_away_from_a_terminal_progress_is_a_plain_line_a_stage(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(config(source), tmp_path / "data")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"corpus: {stage}" for stage in ("reading the corpus", "training the tokenizer", "writing tokens")]


def test_two_processes_build_once(source: Path, tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from experiments.corpus import prepare; from experiments.settings import DataConfig;"
        f"print(prepare(DataConfig(corpus={str(source)!r}, vocab_size={VOCAB}), pathlib.Path(sys.argv[1])))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", program, str(tmp_path / "data")]
    both = [subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in both]
    assert outputs[0][0] == outputs[1][0] != ""
    assert sum(error.count("writing tokens") for _, error in outputs) == 1


# Bad input


def test_a_missing_corpus_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no corpus .*nowhere\.txt"):
        prepare(config(tmp_path / "nowhere.txt"), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_missing_tokenizer_is_refused_before_the_corpus_is_read(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        prepare(config(source, tokenizer=str(tmp_path / "tokenizer.json")), tmp_path / "data")
    assert capsys.readouterr().err == ""


def test_a_corpus_that_changes_while_it_is_read_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_bpe = corpus.train_bpe

    def meanwhile(texts: Any, vocab_size: int) -> Tokenizer:
        write(source, documents(200))
        return train_bpe(texts, vocab_size)

    monkeypatch.setattr(corpus, "train_bpe", meanwhile)
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(config(source), tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".lock"]


def test_a_full_disk_leaves_nothing_and_says_how_much_is_needed(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, *_: object) -> None:
        assert (Path(file).parent / "train.bin").stat().st_size > 0
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))

    data_dir = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match=r"data: .*No space left.*; free about 0\.\d MB") as caught:
            prepare(config(source), data_dir)
    assert "\n" not in str(caught.value)
    assert [path.name for path in data_dir.iterdir()] == [".lock"]
    Shards(prepare(config(source), data_dir)).verify()


def test_what_a_killed_build_has_left_is_replaced(source: Path, tmp_path: Path) -> None:
    whole = prepare(config(source), tmp_path / "data")
    left = whole.with_name(whole.name + ".part")
    whole.rename(left)
    (left / "train.bin").write_bytes(b"half")
    assert prepare(config(source), tmp_path / "data") == whole
    Shards(whole).verify()
    assert not left.exists()


def test_a_directory_without_manifest_is_refused_and_kept(source: Path, tmp_path: Path) -> None:
    path = prepare(config(source), tmp_path / "data")
    (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="delete that directory"):
        prepare(config(source), tmp_path / "data")
    assert (path / "train.bin").exists()


def test_a_corpus_of_english_gives_shards_that_verify(tmp_path: Path) -> None:
    if "ENGRAM_SHARED_DATA" not in os.environ:
        pytest.skip("ENGRAM_SHARED_DATA is not set: no English text")
    small = Path(os.environ["ENGRAM_SHARED_DATA"]) / "corpora" / "small"
    source = "+".join(str(small / f"{domain}.train.txt.zst") for domain in ("books", "wiki"))
    shards = Shards(prepare(DataConfig(corpus=source, max_bytes=4_000_000), tmp_path / "data"))
    shards.verify()
    assert 3_500_000 < shards.manifest["splits"]["train"]["bytes"] <= 4_000_000
    assert (
        int(shards.token_bytes[np.asarray(shards.tokens("train"))].sum()) == shards.manifest["splits"]["train"]["bytes"]
    )
