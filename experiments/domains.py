"""Bits per byte of held-out text, domain by domain and document by document: a benchmark that any model can move."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from engram.loss import token_losses
from engram.transformer import Transformer
from experiments.settings import UserError
from experiments.shards import Shards
from experiments.sources import read_source
from experiments.tokenizers import encode


def find_domains(folder: Path) -> dict[str, Path]:
    """Files by domain: `wiki.test.txt.zst` is of `wiki`. Where there are test files, only those are held out.

    Raises:
        UserError: the folder holds no file.
    """
    files = sorted(path for path in folder.glob("*") if path.is_file() and not path.name.startswith("."))
    held_out = [path for path in files if ".test." in path.name] or files
    domains = {path.name.partition(".")[0]: path for path in held_out}
    if not domains:
        raise UserError(f"no text in {folder}: --text takes a folder of files, one a domain")
    return domains


@torch.no_grad()
def bits_per_byte(
    model: Transformer, shards: Shards, path: Path, seq_len: int, batch: int, limit: int | None
) -> dict[str, Any]:
    """Score a domain's documents, each from its own beginning, in windows of the training length.

    The ratio of sums over documents, with the standard error of a ratio; one document is one item.

    Args:
        model: in evaluation mode.
        shards: whose tokenizer and bytes a token count.
        path: the documents.
        seq_len: tokens of a window; each token is scored once, from what stands before it in its window.
        batch: windows at once.
        limit: only the first documents; None takes all.
    """
    device = model.embed_VD.device
    documents = _first(_tokens(shards, path), limit)
    nats, n_bytes, digest = [], [], hashlib.sha256()
    for ids in documents:
        digest.update(np.asarray(ids, dtype=np.int64).tobytes())
        text = torch.tensor([shards.bos_id, *ids], device=device)
        n_windows = -(-len(ids) // seq_len)
        # Rows of equal length: what is filled up behind the text is seen by no token of it.
        padded = F.pad(text, (0, n_windows * seq_len + 1 - len(text)), value=shards.bos_id)
        inputs_WT = padded[:-1].unflatten(0, (n_windows, seq_len))
        targets_WT = padded[1:].unflatten(0, (n_windows, seq_len))
        losses = [
            token_losses(
                model.hidden(x, draws_B=torch.full((len(x),), -1, device=device)).flatten(0, 1),
                model.head_VD,
                y.flatten(),
            )
            for x, y in zip(inputs_WT.split(batch), targets_WT.split(batch), strict=True)
        ]
        nats.append(float(torch.cat(losses)[: len(ids)].double().sum()))
        n_bytes.append(int(shards.token_bytes[np.asarray(ids)].sum()))
    if not sum(n_bytes):
        raise UserError(f"{path} holds no text")
    value, stderr = ratio(np.array(nats) / math.log(2), np.array(n_bytes))
    return {
        "metrics": {"bits_per_byte": {"value": value, "stderr": stderr}},
        "n": len(nats),
        "chance": None,
        "items": {"nats": [round(x, 4) for x in nats], "bytes": n_bytes},
        "items_id": digest.hexdigest(),
    }


def ratio(above: Any, below: Any) -> tuple[float, float | None]:
    """Sum over sum, and its standard error over items (Cochran 1977, section 2.11)."""
    value = float(above.sum() / below.sum())
    n = len(above)
    if n < 2:
        return value, None
    spread = float(np.sum((above - value * below) ** 2)) / (n - 1)
    return value, math.sqrt(n * spread) / float(below.sum())


def _tokens(shards: Shards, path: Path) -> Iterator[list[int]]:
    for _, batch in encode(shards.tokenizer, read_source(str(path))):
        yield from (ids for ids in batch if ids)


def _first(documents: Iterator[list[int]], limit: int | None) -> Iterator[list[int]]:
    for i, ids in enumerate(documents):
        if limit is not None and i >= limit:
            return
        yield ids
