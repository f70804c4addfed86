"""Reading token shards: memory-mapped tokens, the order of training, the fixed validation batches."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from experiments.settings import UserError, canonical

Batch = npt.NDArray[np.int64]


class Shards:
    """A shard directory, checked against its manifest when it is opened.

    Raises:
        UserError: a file is missing, truncated or not what the manifest says.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.manifest: dict[str, Any] = json.loads((path / "manifest.json").read_text())
            self._decisive = {
                "splits": self.manifest["splits"],
                "files": self.manifest["files"],
                "dtype": self.manifest["dtype"],
                "bos_id": self.manifest["bos_id"],
            }
            self.corpus = str(self.manifest["corpus"])
            self.bos_id, self.vocab_size = int(self.manifest["bos_id"]), int(self.manifest["vocab_size"])
            self._tokens = {split: self._map(split) for split in ("train", "valid")}
        except OSError as error:
            raise UserError(f"no shards in {path}: {error}; build them with `python -m experiments data`") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"no shards in {path}: manifest.json is damaged ({type(error).__name__}: {error}); {self._remedy()}"
            ) from error
        for name in self._decisive["files"]:
            if not (path / name).is_file():  # else every worker would find it out for itself
                raise self._damaged(name, "it is not there")

    @cached_property
    def hash(self) -> str:
        """sha256 of all that decides the tokens; RunSpec.data."""
        return hashlib.sha256(canonical(self._decisive).encode()).hexdigest()

    def tokens(self, split: str) -> npt.NDArray[np.unsignedinteger[Any]]:
        """The memory-mapped token stream of "train" or "valid"."""
        return self._tokens[split]

    @cached_property
    def token_bytes(self) -> npt.NDArray[np.int32]:
        """Bytes of text that each token stands for, [V].

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            sizes_V = np.asarray(np.load(self.path / "token_bytes.npy"), dtype=np.int32)
        except (OSError, ValueError, EOFError) as error:
            raise self._damaged("token_bytes.npy", error) from error
        if len(sizes_V) != self.vocab_size:
            raise self._damaged("token_bytes.npy", f"{len(sizes_V):,} tokens instead of {self.vocab_size:,}")
        return sizes_V

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What made the tokens.

        Raises:
            UserError: the file is missing or damaged.
        """
        try:
            return Tokenizer.from_file(str(self.path / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exceptions
            raise self._damaged("tokenizer.json", error) from error

    def describe(self) -> str:
        """One line for people."""
        train, valid = self.manifest["splits"]["train"], self.manifest["splits"]["valid"]
        return (
            f"{train['tokens']:,} training tokens ({train['bytes'] / 1e6:.1f} MB, {train['documents']:,} documents), "
            f"{valid['tokens']:,} validation tokens, vocabulary {self.vocab_size:,}"
        )

    def verify(self) -> None:
        """Compare every byte with the manifest.

        Raises:
            UserError: names the first file that differs.
        """
        expected = self.manifest["files"] | {f"{s}.bin": f["sha256"] for s, f in self.manifest["splits"].items()}
        for name, sha256 in expected.items():
            try:
                with open(self.path / name, "rb") as file:
                    found = hashlib.file_digest(file, "sha256").hexdigest()
            except FileNotFoundError as error:
                raise UserError(f"{self.path / name} is missing: {self._remedy()}") from error
            if found != sha256:
                raise UserError(f"{self.path / name} is not what the manifest says: {self._remedy()}")

    def _map(self, split: str) -> npt.NDArray[np.unsignedinteger[Any]]:
        file, dtype = self.path / f"{split}.bin", np.dtype(self.manifest["dtype"])
        expected = self.manifest["splits"][split]["tokens"] * dtype.itemsize
        size = file.stat().st_size if file.exists() else 0
        if size != expected:
            raise UserError(f"{file} has {size:,} bytes instead of {expected:,}: {self._remedy()}")
        return np.memmap(file, dtype=dtype, mode="r")

    def _damaged(self, name: str, why: object) -> UserError:
        return UserError(f"{self.path / name} is damaged ({' '.join(str(why).split())}): {self._remedy()}")

    def _remedy(self) -> str:
        return f"delete {self.path} and run `python -m experiments data` again"


def check_vocab(shards: Shards, model_vocab_size: int) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        UserError: the tokenizer is larger than the model's vocabulary.
    """
    if shards.vocab_size > model_vocab_size:
        raise UserError(
            f"the tokenizer of {shards.path} has {shards.vocab_size:,} tokens, the model only {model_vocab_size:,}: "
            f"set backbone.vocab_size={shards.vocab_size} or use another tokenizer"
        )


class TrainOrder:
    """Which tokens each step trains on: a function of (seed, data, step) and nothing else.

    Sample i of an epoch is tokens [i T, i T + T] of the stream; every epoch has its own permutation.
    """

    def __init__(self, shards: Shards, seq_len: int, seed: int) -> None:
        self.stream, self.seq_len = shards.tokens("train"), seq_len
        self.key = f"{seed}|{shards.hash}"
        self.n_samples = (len(self.stream) - 1) // seq_len
        if self.n_samples < 1:
            raise UserError(
                f"{shards.path} has {len(self.stream):,} training tokens, less than one sequence of {seq_len}"
            )
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def batch(self, step: int, n_sequences: int) -> Batch:
        """Return the step's tokens [B, T + 1]: inputs and, shifted by one, targets."""
        first = step * n_sequences
        starts = [self._sample(i) * self.seq_len for i in range(first, first + n_sequences)]
        return np.stack([self.stream[s : s + self.seq_len + 1].astype(np.int64) for s in starts])

    def epochs(self, tokens: int) -> float:
        """How often training on `tokens` passes over the data."""
        return tokens / (self.n_samples * self.seq_len)

    def _sample(self, i: int) -> int:
        epoch, place = divmod(i, self.n_samples)
        if epoch != self._epoch:
            entropy = int.from_bytes(hashlib.sha256(f"{self.key}|{epoch}".encode()).digest())
            self._epoch, self._permutation = epoch, np.random.default_rng(entropy).permutation(self.n_samples)
        return int(self._permutation[place])


def valid_batches(shards: Shards, n_tokens: int, seq_len: int, n_sequences: int) -> list[Batch]:
    """The first `n_tokens` validation tokens as batches [B, T + 1]; the last may be smaller.

    Raises:
        UserError: the split holds fewer tokens.
    """
    stream, wanted = shards.tokens("valid"), n_tokens // seq_len
    if len(stream) < wanted * seq_len + 1:
        raise UserError(
            f"{shards.path} has {len(stream):,} validation tokens, {n_tokens:,} are asked for: "
            f"set train.eval_tokens to at most {(len(stream) - 1) // seq_len * seq_len}, or use more text"
        )
    rows = np.stack([stream[i * seq_len : (i + 1) * seq_len + 1].astype(np.int64) for i in range(wanted)])
    return [rows[i : i + n_sequences] for i in range(0, wanted, n_sequences)]
