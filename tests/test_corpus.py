"""If these fail, shards are not what the manifest says, or held-out text leaks into training.

Reading them is in test_shards.py.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from experiments import corpus
from experiments.corpus import _Sample, find, prepare
from experiments.settings import DataConfig, UserError
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


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source.jsonl", documents())


def config(source: Path | str, **settings: Any) -> DataConfig:
    return DataConfig(**{"corpus": str(source), "vocab_size": VOCAB} | settings)


@pytest.fixture
def shards(source: Path, tmp_path: Path) -> Shards:
    return Shards(prepare(config(source), tmp_path / "data"))


def decoded(shards: Shards, split: str) -> list[str]:
    """The texts between begin tokens."""
    stream = np.asarray(shards.tokens(split))
    starts = np.flatnonzero(stream == shards.bos_id)
    assert starts[0] == 0
    return [
        shards.tokenizer.decode(ids[1:].tolist(), skip_special_tokens=False) for ids in np.split(stream, starts[1:])
    ]


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


def test_training_validation_and_tokenizer_text_are_a_partition(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer_text: list[str] = []
    train_bpe = corpus.train_bpe

    def listen(texts: Any, vocab_size: int) -> Tokenizer:
        tokenizer_text.extend(texts)
        return train_bpe(iter(tokenizer_text), vocab_size)

    monkeypatch.setattr(corpus, "train_bpe", listen)
    shards = Shards(prepare(config(source), tmp_path / "data"))
    parts = [decoded(shards, "train"), decoded(shards, "valid"), tokenizer_text]
    assert all(parts)
    assert sorted(text for part in parts for text in part) == sorted(documents())


def test_a_documents_part_depends_on_its_text_alone(source: Path, tmp_path: Path) -> None:
    before = set(decoded(Shards(prepare(config(source), tmp_path / "data")), "valid"))
    more = [f"another {i}" for i in range(300)]
    write(source, more + documents()[::-1])
    after = set(decoded(Shards(prepare(config(source), tmp_path / "data")), "valid"))
    assert after - set(more) == before


def test_the_parts_have_their_shares_of_the_hashes() -> None:
    digests = [hashlib.sha256(str(i).encode()).digest() for i in range(20_000)]
    counts = {part: sum(corpus._part(d) == part for d in digests) for part in ("valid", "tokenizer", "train")}
    # Five standard deviations of a binomial count.
    for part, share in (("valid", 0.03), ("tokenizer", 0.07), ("train", 0.9)):
        assert abs(counts[part] - share * 20_000) < 5 * (share * (1 - share) * 20_000) ** 0.5


def test_duplicates_and_blank_documents_are_dropped(shards: Shards, source: Path, tmp_path: Path) -> None:
    again = write(tmp_path / "again.jsonl", ["", " \n\t", *documents(), *documents(50)])
    repeated = Shards(prepare(config(f"{again}+{source}"), tmp_path / "data"))
    assert repeated.hash == shards.hash


def test_the_bound_takes_a_sample_that_does_not_depend_on_the_order(source: Path, tmp_path: Path) -> None:
    whole = Shards(prepare(config(source), tmp_path / "data"))
    bound = whole.manifest["splits"]["train"]["bytes"] // 3
    one = Shards(prepare(config(source, max_bytes=bound), tmp_path / "data"))
    write(source, documents()[::-1])
    other = Shards(prepare(config(source, max_bytes=bound), tmp_path / "data"))
    assert set(decoded(one, "train")) == set(decoded(other, "train")) < set(decoded(whole, "train"))
    longest = max(len(text.encode()) for text in documents())
    assert bound - longest < one.manifest["splits"]["train"]["bytes"] <= bound
    assert decoded(one, "valid") == decoded(whole, "valid") == decoded(other, "valid")


@pytest.mark.parametrize("bound", [1, 60, 500, 10**6])
def test_a_sample_is_the_longest_run_of_lowest_hashes_that_fits(bound: int) -> None:
    chance = random.Random(bound)
    sizes = {hashlib.sha256(bytes([i])).digest(): chance.randrange(1, 90) for i in range(60)}
    expected: list[bytes] = []
    for digest in sorted(sizes):
        if sizes[digest] > bound:
            continue
        if sum(sizes[d] for d in expected) + sizes[digest] > bound:
            break
        expected.append(digest)
    for _ in range(20):
        sample = _Sample(bound)
        for digest in chance.sample(list(sizes), len(sizes)):
            sample.add(digest, sizes[digest], digest.hex())
        assert sample.texts() == [digest.hex() for digest in expected]
        assert [d for d in sorted(sizes) if sample.takes(d, sizes[d])] == expected
        assert (sample.documents, sample.n_bytes) == (len(expected), sum(sizes[d] for d in expected))


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


def test_too_few_documents_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 documents, too few: none fell into .*valid"):
        prepare(config(write(tmp_path / "a.jsonl", documents(2))), tmp_path / "data")
    assert [path.name for path in (tmp_path / "data").iterdir()] == [".lock"]


def test_a_bound_below_every_document_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.max_bytes=3"):
        prepare(config(source, max_bytes=3), tmp_path / "data")


def test_a_stream_without_a_bound_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"set data\.max_bytes"):
        prepare(config("hf:some/dataset"), tmp_path / "data")


def test_streams_are_taken_from_their_heads_up_to_the_bound_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = {"hf:a": 0, "hf:b": 0}

    def endless(source: str) -> Any:
        i = 0
        while True:
            taken[source] = max(taken[source], i + 1)
            yield f"{source} {i} alpha beta " * 5
            i += 1

    monkeypatch.setattr(corpus, "read_source", endless)
    shards = Shards(prepare(config("hf:a+hf:b", vocab_size=262, max_bytes=20_000), tmp_path / "data"))
    assert 19_000 < shards.manifest["splits"]["train"]["bytes"] <= 20_000
    texts = decoded(shards, "train")
    assert {text[:4] for text in texts} == {"hf:a", "hf:b"}
    assert [entry["documents"] for entry in shards.manifest["sources"]] == list(taken.values())


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
