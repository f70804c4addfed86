"""Token shards: built once from a corpus, deterministic, described by a manifest of hashes.

    DATA_DIR/<corpus>-<10 hex of settings and sources>/
      train.bin, valid.bin    token ids, uint16 or uint32, every document begun by the begin token
      tokenizer.json          what made them
      token_bytes.npy         bytes of text that each token stands for
      manifest.json           counts, hashes and versions

Each document falls by its own hash into one of three parts that never overlap: training text, validation text, and the
text that only the tokenizer is trained on. Exact duplicates are dropped. Bounded parts keep the documents of lowest
hash, a uniform sample of the whole corpus.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import heapq
import json
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from experiments.settings import DataConfig, UserError, canonical
from experiments.sources import file_state, fingerprint, read_source, split_sources
from experiments.tokenizers import begin_token, encode, load_tokenizer, text_bytes, tokenizer_file, train_bpe

SCHEMA = 2
_VALID_SHARE, _TOKENIZER_SHARE = 0.03, 0.07
_VALID_BYTES, _TOKENIZER_BYTES = 32_000_000, 20_000_000  # more would change nothing that is measured
_LINE_EVERY_S = 30.0


class _Sample:
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
class _Source:
    """What the first pass finds in a source, less what an earlier source already held."""

    name: str
    documents: int = 0
    n_bytes: int = 0
    hashes: Any = field(default_factory=hashlib.sha256)


@dataclass
class _Survey:
    """What the first pass over a corpus finds."""

    sources: list[_Source]
    parts: dict[str, _Sample]

    @property
    def text_bytes(self) -> int:
        """Text that becomes tokens."""
        return self.parts["train"].n_bytes + self.parts["valid"].n_bytes


def find(data: DataConfig, data_dir: Path) -> Path | None:
    """Return the shard directory of these settings and sources, if it is built.

    Raises:
        UserError: the corpus is missing.
    """
    path = _path(data, data_dir)
    return path if (path / "manifest.json").is_file() else None


def prepare(data: DataConfig, data_dir: Path) -> Path:
    """Build the shards, or find them built; return their directory.

    Raises:
        UserError: the corpus is missing, unreadable or too small, or the tokenizer does not load.
        OSError: the disk is full or not writable; nothing half-written is left.
    """
    path = _path(data, data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    with open(data_dir / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second launch waits for the first one's shards
        if (path / "manifest.json").is_file():
            return path
        if path.exists():
            raise UserError(f"{path} has lost its manifest: delete that directory and run again")
        draft = path.with_name(path.name + ".part")
        shutil.rmtree(draft, ignore_errors=True)  # of a build that was killed
        taken = None if data.tokenizer == "bpe" else load_tokenizer(data.tokenizer)  # fails before the corpus is read
        with _Meter() as meter:
            survey = _survey(data, meter)
            try:
                draft.mkdir()
                _build(data, survey, taken, draft, meter)
                draft.replace(path)
            except OSError as error:
                is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                remedy = f"free about {survey.text_bytes / 1e6:.1f} MB, the size of the text, and run again"
                raise OSError(
                    f"could not write the shards in {data_dir}: {error}{f'; {remedy}' if is_full else ''}"
                ) from error
            finally:
                shutil.rmtree(draft, ignore_errors=True)
    return path


def _path(data: DataConfig, data_dir: Path) -> Path:
    sources = fingerprint(data.corpus)
    taken = tokenizer_file(data.tokenizer)
    if taken and taken.is_file():
        sources.append(file_state(taken))
    identity = {"schema": SCHEMA, "data": asdict(data), "sources": sources}
    digest = hashlib.sha256(canonical(identity).encode()).hexdigest()[:10]
    label = re.sub(r"[^A-Za-z0-9]+", "-", Path(data.corpus.split("+")[0].rstrip("/")).stem).strip("-") or "corpus"
    return data_dir / f"{label[:40]}-{digest}"


def _build(data: DataConfig, survey: _Survey, taken: Tokenizer | None, path: Path, meter: _Meter) -> None:
    parts = survey.parts
    if taken is None:
        meter.start("training the tokenizer", None)
        tokenizer = train_bpe(iter(parts["tokenizer"].texts()), data.vocab_size)
    else:
        tokenizer = taken
    n_given = tokenizer.get_vocab_size()
    bos_id = begin_token(tokenizer)
    token_bytes_V = text_bytes(tokenizer)
    dtype = np.dtype(np.uint16 if len(token_bytes_V) <= 2**16 else np.uint32)

    meter.start("writing tokens", survey.text_bytes)
    writer = _Writer(path, tokenizer, bos_id, dtype)
    splits = {
        "train": writer.write("train", _train_texts(survey), meter.advance),
        "valid": writer.write("valid", parts["valid"].texts(), meter.advance),
    }
    if (splits["train"]["documents"], splits["train"]["bytes"]) != (parts["train"].documents, parts["train"].n_bytes):
        raise UserError(f"{data.corpus} changed while it was read: run again when nothing writes to it")
    tokenizer.save(str(path / "tokenizer.json"))
    np.save(path / "token_bytes.npy", token_bytes_V)
    manifest = {
        "schema": SCHEMA,
        "corpus": data.corpus,
        "sources": [
            {"name": s.name, "documents": s.documents, "bytes": s.n_bytes, "sha256": s.hashes.hexdigest()}
            for s in survey.sources
        ],
        "tokenizer": data.tokenizer,
        "vocab_size": len(token_bytes_V),
        "bos_id": bos_id,
        "bos_token": tokenizer.id_to_token(bos_id),
        "bos_appended": tokenizer.get_vocab_size() > n_given,
        "dtype": dtype.name,
        "splits": splits,
        "tokenizer_text": {"documents": parts["tokenizer"].documents, "bytes": parts["tokenizer"].n_bytes},
        "files": {name: _sha256(path / name) for name in ("tokenizer.json", "token_bytes.npy")},
        "made_with": {"python": platform.python_version(), "tokenizers": version("tokenizers")},
    }
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _distinct(source: str, seen: set[bytes]) -> Iterator[tuple[bytes, int, str]]:
    """Yield (hash, bytes, text) of every document of a source that is not blank and not in `seen`; add it there."""
    for text in read_source(source):
        raw = text.encode()
        digest = hashlib.sha256(raw).digest()
        if digest not in seen and text.strip():
            seen.add(digest)
            yield digest, len(raw), text


def _survey(data: DataConfig, meter: _Meter) -> _Survey:
    """First pass: sizes, tokenizer text, validation text, and which documents the training text takes."""
    sources = [_Source(name) for name in split_sources(data.corpus)]
    bounds = {"train": data.max_bytes, "valid": _VALID_BYTES, "tokenizer": _TOKENIZER_BYTES}
    survey = _Survey(sources, {part: _Sample(bound) for part, bound in bounds.items()})
    meter.start("reading the corpus", None)
    seen: set[bytes] = set()
    for source in sources:
        is_streamed, train_bytes = source.name.startswith("hf:"), 0
        if is_streamed and not data.max_bytes:
            raise UserError(f"{source.name} is streamed and may have no end: set data.max_bytes")
        for digest, n_bytes, text in _distinct(source.name, seen):
            part = _part(digest)
            survey.parts[part].add(digest, n_bytes, "" if part == "train" else text)
            source.documents, source.n_bytes = source.documents + 1, source.n_bytes + n_bytes
            source.hashes.update(digest)
            meter.advance(n_bytes)
            train_bytes += n_bytes if part == "train" else 0
            if is_streamed and train_bytes >= data.max_bytes:
                break  # a stream is taken from its head; a local source is sampled as a whole
    _check_size(data, survey)
    return survey


def _check_size(data: DataConfig, survey: _Survey) -> None:
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


def _train_texts(survey: _Survey) -> Iterator[str]:
    """Second pass: the training text, in the order of the sources."""
    seen: set[bytes] = set()
    for source in survey.sources:
        for digest, n_bytes, text in islice(_distinct(source.name, seen), source.documents):
            if _part(digest) == "train" and survey.parts["train"].takes(digest, n_bytes):
                yield text


def _part(digest: bytes) -> str:
    share = int.from_bytes(digest[-4:]) / 2**32  # the last bytes: samples go by the first ones
    if share < _VALID_SHARE:
        return "valid"
    return "tokenizer" if share < _VALID_SHARE + _TOKENIZER_SHARE else "train"


class _Writer:
    """Encodes documents and writes one file a split."""

    def __init__(self, path: Path, tokenizer: Tokenizer, bos_id: int, dtype: np.dtype[Any]) -> None:
        self.path, self.tokenizer, self.bos_id, self.dtype = path, tokenizer, bos_id, dtype

    def write(self, split: str, texts: Iterable[str], advance: Callable[[int], None]) -> dict[str, Any]:
        """Write a split; return its counts and hash."""
        documents = tokens = n_bytes = 0
        sha = hashlib.sha256()
        with open(self.path / f"{split}.bin", "wb") as file:
            for batch, batch_ids in encode(self.tokenizer, texts):
                for ids in batch_ids:
                    file.write(raw := np.array([self.bos_id, *ids], dtype=self.dtype).tobytes())
                    sha.update(raw)
                    tokens += len(ids) + 1
                size = sum(len(text.encode()) for text in batch)
                documents, n_bytes = documents + len(batch), n_bytes + size
                advance(size)
        return {"documents": documents, "tokens": tokens, "bytes": n_bytes, "sha256": sha.hexdigest()}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Meter:
    """A progress bar on a terminal; elsewhere a plain line a stage, and one every half minute."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<24}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())

    def __enter__(self) -> _Meter:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def start(self, stage: str, total: int | None) -> None:
        for task in self.bar.task_ids:
            self.bar.remove_task(task)
        self.task = self.bar.add_task(stage, total=total)
        self.stage, self.done, self.total, self.said = stage, 0, total, time.monotonic()
        self._say("")

    def advance(self, n_bytes: int) -> None:
        self.bar.advance(self.task, n_bytes)
        self.done += n_bytes
        if time.monotonic() - self.said > _LINE_EVERY_S:
            self.said = time.monotonic()
            self._say(f", {self.done / 1e6:.0f} MB" + (f" of {self.total / 1e6:.0f}" if self.total else ""))

    def _say(self, how_far: str) -> None:
        if self.bar.disable:
            print(f"corpus: {self.stage}{how_far}", file=sys.stderr)
