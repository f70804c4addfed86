"""Which documents of a corpus go where: a first pass that counts, and a second that yields the training text.

Each document falls by its own hash into one of three parts that never overlap: training text, validation text, and the
text that only the tokenizer is trained on. Exact duplicates are dropped. Bounded parts keep the documents of lowest
hash, a uniform sample of the whole corpus.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from experiments.corpus_meter import Meter
from experiments.settings import DataConfig, UserError
from experiments.sources import read_source, split_sources

_VALID_SHARE, _TOKENIZER_SHARE = 0.03, 0.07
_VALID_BYTES, _TOKENIZER_BYTES = 32_000_000, 20_000_000  # more would change nothing that is measured


class Sample:
    """Of the documents added, in whatever order, those of lowest hash that fit into `max_bytes`.

    A bound of 0 takes all, and then keeps no texts.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.documents, self.n_bytes = max_bytes, 0, 0
        self._end = 2**256  # every document from this hash on is left out
        self._heap: list[tuple[int, int, str]] = []  # (-hash, bytes, text): the highest hash first

    def takes(self, digest: bytes, n_bytes: int) -> bool:
        """Whether a document belongs here, given all that were added."""
        return not self.max_bytes or (n_bytes <= self.max_bytes and int.from_bytes(digest) < self._end)

    def add(self, digest: bytes, n_bytes: int, text: str = "") -> None:
        """Take a document, if it belongs here, and drop those that it displaces."""
        if not self.takes(digest, n_bytes):
            return
        self.documents, self.n_bytes = self.documents + 1, self.n_bytes + n_bytes
        if self.max_bytes:
            heapq.heappush(self._heap, (-int.from_bytes(digest), n_bytes, text))
        while self._heap and self.n_bytes > self.max_bytes:
            rank, dropped, _ = heapq.heappop(self._heap)
            self._end = -rank
            self.documents, self.n_bytes = self.documents - 1, self.n_bytes - dropped

    def texts(self) -> list[str]:
        """The documents by hash: their first ones are a sample of the corpus too."""
        return [text for _, _, text in sorted(self._heap, reverse=True)]


@dataclass
class Source:
    """What the first pass finds in a source, less what an earlier source already held."""

    name: str
    documents: int = 0
    n_bytes: int = 0
    hashes: Any = field(default_factory=hashlib.sha256)


@dataclass
class Survey:
    """What the first pass over a corpus finds."""

    sources: list[Source]
    parts: dict[str, Sample]

    @property
    def text_bytes(self) -> int:
        """Text that becomes tokens."""
        return self.parts["train"].n_bytes + self.parts["valid"].n_bytes


def survey_corpus(data: DataConfig, meter: Meter) -> Survey:
    """First pass: sizes, tokenizer text, validation text, and which documents the training text takes.

    Raises:
        UserError: the corpus is missing, unreadable or too small, or a stream has no bound.
    """
    sources = [Source(name) for name in split_sources(data.corpus)]
    bounds = {"train": data.max_bytes, "valid": _VALID_BYTES, "tokenizer": _TOKENIZER_BYTES}
    survey = Survey(sources, {part: Sample(bound) for part, bound in bounds.items()})
    meter.start("reading the corpus", None)
    seen: set[bytes] = set()
    for source in sources:
        is_streamed, train_bytes = source.name.startswith("hf:"), 0
        if is_streamed and not data.max_bytes:
            raise UserError(f"{source.name} is streamed and may have no end: set data.max_bytes")
        for digest, n_bytes, text in _distinct(source.name, seen):
            part = part_of(digest)
            survey.parts[part].add(digest, n_bytes, "" if part == "train" else text)
            source.documents, source.n_bytes = source.documents + 1, source.n_bytes + n_bytes
            source.hashes.update(digest)
            meter.advance(n_bytes)
            train_bytes += n_bytes if part == "train" else 0
            if is_streamed and train_bytes >= data.max_bytes:
                break  # a stream is taken from its head; a local source is sampled as a whole
    _check_size(data, survey)
    return survey


def _check_size(data: DataConfig, survey: Survey) -> None:
    needed = ("train", "valid", "tokenizer") if data.tokenizer == "bpe" else ("train", "valid")
    empty = [part for part in needed if not survey.parts[part].documents]
    documents = sum(source.documents for source in survey.sources)
    if empty == ["train"] and data.max_bytes:
        raise UserError(f"data.max_bytes={data.max_bytes} is less than a document of {data.corpus}: raise it")
    if empty:
        raise UserError(
            f"{data.corpus} has {documents} documents, too few: none fell into {', '.join(empty)}; "
            "use more, or part long files into documents with lines that hold U+001E"
        )


def train_texts(survey: Survey) -> Iterator[str]:
    """Second pass: the training text, in the order of the sources; where a source changed meanwhile, it differs."""
    seen: set[bytes] = set()
    for source in survey.sources:
        for digest, n_bytes, text in islice(_distinct(source.name, seen), source.documents):
            if part_of(digest) == "train" and survey.parts["train"].takes(digest, n_bytes):
                yield text


def _distinct(source: str, seen: set[bytes]) -> Iterator[tuple[bytes, int, str]]:
    """Yield (hash, bytes, text) of every document of a source that is not blank and not in `seen`; add it there."""
    for text in read_source(source):
        raw = text.encode()
        digest = hashlib.sha256(raw).digest()
        if digest not in seen and text.strip():
            seen.add(digest)
            yield digest, len(raw), text


def part_of(digest: bytes) -> str:
    """`train`, `valid` or `tokenizer`, by the SHA-256 of a document's text alone."""
    share = int.from_bytes(digest[-4:]) / 2**32  # the last bytes: samples go by the first ones
    if share < _VALID_SHARE:
        return "valid"
    return "tokenizer" if share < _VALID_SHARE + _TOKENIZER_SHARE else "train"
