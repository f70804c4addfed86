"""Token shards: built once from a corpus, deterministic, described by a manifest of hashes.

    DATA_DIR/<corpus>-<10 hex of settings and sources>/
      train.bin, valid.bin    token ids, uint16 or uint32, every document begun by the begin token
      tokenizer.json          what made them
      token_bytes.npy         bytes of text that each token stands for
      manifest.json           counts, hashes and versions

Which document goes into which of them is survey.py's subject.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import platform
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from experiments.corpus_meter import Meter
from experiments.settings import DataConfig, UserError, canonical
from experiments.sources import file_state, fingerprint
from experiments.survey import Survey, survey_corpus, train_texts
from experiments.tokenizers import begin_token, encode, load_tokenizer, text_bytes, tokenizer_file, train_bpe

SCHEMA = 2


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
        with Meter() as meter:
            survey = survey_corpus(data, meter)
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


def _build(data: DataConfig, survey: Survey, taken: Tokenizer | None, path: Path, meter: Meter) -> None:
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
        "train": writer.write("train", train_texts(survey), meter.advance),
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
