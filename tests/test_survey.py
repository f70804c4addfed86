"""If these fail, held-out text leaks into training, or a bounded corpus is no fair sample of the whole."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pytest
from small_corpus import config, decoded, documents, write
from tokenizers import Tokenizer

from experiments import corpus, survey
from experiments.corpus import prepare
from experiments.settings import UserError
from experiments.shards import Shards
from experiments.survey import Sample, part_of


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write(tmp_path / "source.jsonl", documents())


@pytest.fixture
def shards(source: Path, tmp_path: Path) -> Shards:
    return Shards(prepare(config(source), tmp_path / "data"))


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
    counts = {part: sum(part_of(d) == part for d in digests) for part in ("valid", "tokenizer", "train")}
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
        sample = Sample(bound)
        for digest in chance.sample(list(sizes), len(sizes)):
            sample.add(digest, sizes[digest], digest.hex())
        assert sample.texts() == [digest.hex() for digest in expected]
        assert [d for d in sorted(sizes) if sample.takes(d, sizes[d])] == expected
        assert (sample.documents, sample.n_bytes) == (len(expected), sum(sizes[d] for d in expected))


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

    monkeypatch.setattr(survey, "read_source", endless)
    shards = Shards(prepare(config("hf:a+hf:b", vocab_size=262, max_bytes=20_000), tmp_path / "data"))
    assert 19_000 < shards.manifest["splits"]["train"]["bytes"] <= 20_000
    texts = decoded(shards, "train")
    assert {text[:4] for text in texts} == {"hf:a", "hf:b"}
    assert [entry["documents"] for entry in shards.manifest["sources"]] == list(taken.values())
