"""Token shards: built once from a corpus, deterministic, described by a manifest of hashes.

    DATA_DIR/<corpus>-<10 hex of settings and sources>/
      train.bin, valid.bin    token ids, uint16 or uint32, every document begun by the begin token
      tokenizer.json          what made them
      token_bytes.npy         bytes of text that each token stands for
      manifest.json           counts, hashes and versions

Each document falls by its own hash into one of three parts that never overlap: training text, validation text, and the
text that only the tokenizer is trained on. Exact duplicates are dropped.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer

from experiments.settings import DataConfig, UserError, canonical
from experiments.sources import check_source, fingerprint, read_documents
from experiments.tokenizers import begin_token, load_tokenizer, text_bytes, train_bpe

SCHEMA = 1
_VALID_SHARE, _TOKENIZER_SHARE = 0.03, 0.07
_VALID_BYTES, _TOKENIZER_BYTES = 32_000_000, 20_000_000  # more would change nothing that is measured
_BATCH_CHARS = 4_000_000


@dataclass
class _Survey:
    """What the first pass over a corpus finds."""

    documents: int = 0
    train_bytes: int = 0
    tokenizer_texts: list[str] = field(default_factory=list)
    tokenizer_bytes: int = 0
    valid: list[tuple[bytes, str]] = field(default_factory=list)
    valid_bytes: int = 0


def find(data: DataConfig, data_dir: Path) -> Path | None:
    """Return the shard directory of these settings and sources, if it is built."""
    check_source(data.corpus)
    path = _path(data, data_dir)
    return path if (path / "manifest.json").is_file() else None


def prepare(data: DataConfig, data_dir: Path) -> Path:
    """Build the shards, or find them built; return their directory.

    Raises:
        UserError: the corpus is missing, unreadable or too small, or the tokenizer does not load.
        OSError: the disk is full or not writable; nothing half-written is left.
    """
    check_source(data.corpus)
    path = _path(data, data_dir)
    data_dir.mkdir(parents=True, exist_ok=True)
    with open(data_dir / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second launch waits for the first one's shards
        if (path / "manifest.json").is_file():
            return path
        draft = path.with_name(path.name + ".part")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            draft.mkdir()
            _build(data, draft)
            draft.replace(path)
        except OSError as error:
            raise OSError(f"could not write the shards in {data_dir}: {error}; free space and run again") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    return path


def _path(data: DataConfig, data_dir: Path) -> Path:
    identity = {"schema": SCHEMA, "data": asdict(data), "sources": fingerprint(data.corpus)}
    digest = hashlib.sha256(canonical(identity).encode()).hexdigest()[:10]
    label = re.sub(r"[^A-Za-z0-9]+", "-", Path(data.corpus.split("+")[0].rstrip("/")).stem).strip("-") or "corpus"
    return data_dir / f"{label[:40]}-{digest}"


def _build(data: DataConfig, path: Path) -> None:
    with _Meter() as meter:
        survey = _survey(data, meter)
        keep = min(1.0, data.max_bytes / survey.train_bytes) if data.max_bytes else 1.0
        if data.tokenizer == "bpe":
            meter.start("training the tokenizer", None)
            tokenizer = train_bpe(iter(survey.tokenizer_texts), data.vocab_size)
        else:
            tokenizer = load_tokenizer(data.tokenizer)
        bos_id = begin_token(tokenizer)
        tokenizer.encode_special_tokens = True  # text that spells a special token stays text
        dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32)

        meter.start("writing tokens", round(keep * survey.train_bytes))
        train = (t for digest, t in _unique(data, _Survey()) if _part(digest) == "train" and _share(digest, 8) < keep)
        survey.valid.sort()  # by hash: a sample of the whole corpus however few tokens are scored
        writer = _Writer(path, tokenizer, bos_id, dtype)
        splits = {
            "train": writer.write("train", train, data.max_bytes, meter.advance),
            "valid": writer.write("valid", (text for _, text in survey.valid), 0, lambda n: None),
        }
    tokenizer.save(str(path / "tokenizer.json"))
    np.save(path / "token_bytes.npy", text_bytes(tokenizer))
    manifest = {
        "schema": SCHEMA,
        "corpus": data.corpus,
        "tokenizer": data.tokenizer,
        "vocab_size": tokenizer.get_vocab_size(),
        "bos_id": bos_id,
        "dtype": dtype.name,
        "splits": splits,
        "tokenizer_text": {"documents": len(survey.tokenizer_texts), "bytes": survey.tokenizer_bytes},
        "files": {name: _sha256(path / name) for name in ("tokenizer.json", "token_bytes.npy")},
        "made_with": {"python": platform.python_version(), "tokenizers": version("tokenizers")},
    }
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _unique(data: DataConfig, survey: _Survey) -> Iterator[tuple[bytes, str]]:
    """Yield (hash, text) of every distinct, non-empty document, up to where enough has been read."""
    seen: set[bytes] = set()
    for text in read_documents(data.corpus):
        digest = hashlib.sha256(text.encode()).digest()
        if not text.strip() or digest in seen:
            continue
        seen.add(digest)
        survey.documents += 1
        yield digest, text


def _survey(data: DataConfig, meter: _Meter) -> _Survey:
    """First pass: sizes, tokenizer text and validation text."""
    survey = _Survey()
    meter.start("reading the corpus", None)
    streamed = "hf:" in data.corpus
    if streamed and not data.max_bytes:
        raise UserError(f"{data.corpus} is streamed and may have no end: set data.max_bytes")
    for digest, text in _unique(data, survey):
        n_bytes, part = len(text.encode()), _part(digest)
        meter.advance(n_bytes)
        if part == "train":
            survey.train_bytes += n_bytes
        elif part == "valid" and survey.valid_bytes < _VALID_BYTES:
            survey.valid.append((digest, text))
            survey.valid_bytes += n_bytes
        elif part == "tokenizer" and survey.tokenizer_bytes < _TOKENIZER_BYTES:
            survey.tokenizer_texts.append(text)
            survey.tokenizer_bytes += n_bytes
        if streamed and survey.train_bytes >= data.max_bytes:
            break  # a stream is taken from its head; a local corpus is sampled as a whole
    if not (survey.train_bytes and survey.valid and (survey.tokenizer_texts or data.tokenizer != "bpe")):
        raise UserError(
            f"{data.corpus} has {survey.documents} documents: too few for training, validation and tokenizer text; "
            "use more, or part long files into documents with lines that hold U+001E"
        )
    return survey


def _share(digest: bytes, start: int) -> float:
    """A number in [0, 1) from four bytes of a hash."""
    return int.from_bytes(digest[start : start + 4]) / 2**32


def _part(digest: bytes) -> str:
    share = _share(digest, 0)
    if share < _VALID_SHARE:
        return "valid"
    return "tokenizer" if share < _VALID_SHARE + _TOKENIZER_SHARE else "train"


class _Writer:
    """Encodes documents and writes one file a split."""

    def __init__(self, path: Path, tokenizer: Tokenizer, bos_id: int, dtype: np.dtype[Any]) -> None:
        self.path, self.tokenizer, self.bos_id, self.dtype = path, tokenizer, bos_id, dtype

    def write(self, split: str, texts: Iterator[str], max_bytes: int, advance: Callable[[int], None]) -> dict[str, Any]:
        """Write a split; return its counts and hash."""
        documents = tokens = n_bytes = 0
        sha = hashlib.sha256()
        with open(self.path / f"{split}.bin", "wb") as file:
            for batch in _batches(texts, max_bytes):
                for encoding in self.tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                    ids = np.array([self.bos_id, *encoding.ids], dtype=self.dtype)
                    file.write(raw := ids.tobytes())
                    sha.update(raw)
                    tokens += len(ids)
                size = sum(len(text.encode()) for text in batch)
                documents, n_bytes = documents + len(batch), n_bytes + size
                advance(size)
        return {"documents": documents, "tokens": tokens, "bytes": n_bytes, "sha256": sha.hexdigest()}


def _batches(texts: Iterator[str], max_bytes: int) -> Iterator[list[str]]:
    """Group texts for the encoder, ending with the document that reaches `max_bytes`, if that is not 0."""
    batch: list[str] = []
    chars = total = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        total += len(text.encode())
        if chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
        if max_bytes and total >= max_bytes:
            break
    if batch:
        yield batch


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Meter:
    """A progress bar on a terminal; elsewhere one plain line a stage."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<24}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())

    def __enter__(self) -> _Meter:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def start(self, stage: str, total: int | None) -> None:
        if self.bar.disable:
            print(f"corpus: {stage}", file=sys.stderr)
        for task in self.bar.task_ids:
            self.bar.remove_task(task)
        self.task = self.bar.add_task(stage, total=total)

    def advance(self, n_bytes: int) -> None:
        self.bar.advance(self.task, n_bytes)
