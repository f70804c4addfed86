"""Benchmarks from local files: the harness's own tasks, with their data taken from a folder instead of the hub.

    DIR/blimp/<paradigm>.jsonl              DIR/<task>/validation.jsonl         DIR/lambada_openai/test.jsonl
    DIR/<task>/train.jsonl                  shots come from it; without it there are none

Fields are those of the hub's data sets. Files may be .gz or .bz2. Two other common forms are read as well: HellaSwag as
one text of six lines an item (llama.cpp's), and LAMBADA as context and continuation.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # comes with OmegaConf

from experiments.settings import UserError

Doc = dict[str, Any]

_ENDINGS = ("", ".gz", ".bz2")
_HELLASWAG_LINES = 6


@dataclass(frozen=True)
class _Source:
    """How a task of the harness reads local files."""

    stock: str
    """The task's own YAML, below lm_eval/tasks."""
    split: str = "validation"
    mend: Callable[[Doc], Doc] = dict
    """Brings an item to the fields that the task reads."""


def _lambada(doc: Doc) -> Doc:
    return doc if "text" in doc else {"text": f"{doc['context']} {doc['continuation']}"}


def _boolq(doc: Doc) -> Doc:
    return doc if "label" in doc else doc | {"label": int(doc["answer"])}


_SOURCES = {
    "lambada_openai": _Source("lambada/lambada_openai.yaml", "test", _lambada),
    "hellaswag": _Source("hellaswag/hellaswag.yaml"),
    "arc_easy": _Source("arc/arc_easy.yaml"),
    "arc_challenge": _Source("arc/arc_challenge.yaml"),
    "piqa": _Source("piqa/piqa.yaml"),
    "sciq": _Source("sciq/sciq.yaml"),
    "winogrande": _Source("winogrande/default.yaml"),
    "openbookqa": _Source("openbookqa/openbookqa.yaml"),
    "boolq": _Source("super_glue/boolq/default.yaml", mend=_boolq),
    "nq_open": _Source("nq_open/nq_open.yaml"),
    "gsm8k": _Source("gsm8k/gsm8k.yaml", "test"),
}


@dataclass(frozen=True)
class LocalTask:
    """One task of the harness on local files."""

    name: str
    config: Path
    """A YAML file that the harness loads."""
    data: str
    """sha256 of the items."""


def local_tasks(task: str, shots: int, data_dir: Path, stock: Path, folder: Path) -> list[LocalTask] | str:
    """Write what the harness needs to score a task on local files.

    Args:
        task: `blimp`, or the name of a task.
        shots: solved items before each question.
        data_dir: where the benchmarks lie.
        stock: the harness's folder of tasks.
        folder: where to write to.

    Returns:
        The tasks, several for `blimp`; or why there are none, in one line.

    Raises:
        UserError: a file is damaged.
    """
    if task == "blimp":
        files = _find_all(data_dir / "blimp")
        found = [
            _write(f"blimp_{stem}", _Source(f"blimp/{stem}.yaml"), {"validation": list(_lines(path))}, stock, folder)
            for stem, path in files.items()
            if (stock / "blimp" / f"{stem}.yaml").is_file()
        ]
        return found or f"no blimp/*.jsonl in {data_dir}"
    if (source := _SOURCES.get(task)) is None:
        return "its local form is not known"
    splits = {
        "train": _read(data_dir / task, "train", source),
        source.split: _read(data_dir / task, source.split, source),
    }
    if not splits[source.split]:
        return f"no {task}/{source.split}.jsonl in {data_dir}"
    if shots and not splits["train"]:
        return f"no {task}/train.jsonl in {data_dir}: shots must not come from what is scored"
    if shots > (n_train := len(splits["train"])):
        return f"{shots} shots need as many items in {task}/train.jsonl, which holds {n_train}"
    return [_write(task, source, {k: v for k, v in splits.items() if v}, stock, folder)]


def _write(name: str, source: _Source, splits: dict[str, list[Doc]], stock: Path, folder: Path) -> LocalTask:
    place = folder / name
    place.mkdir()
    files = {}
    digest = hashlib.sha256()
    for split, docs in splits.items():
        text = "".join(json.dumps(doc, ensure_ascii=False) + "\n" for doc in docs)
        digest.update(f"{split}\n{text}".encode())
        (path := place / f"{split}.jsonl").write_text(text, encoding="utf-8")
        files[split] = str(path)
    config = {
        "include": str(stock / source.stock),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
        **{f"{kind}_split": None for kind in ("training", "validation", "test", "fewshot")},
        # Named as a source of shots too: else the harness takes what it draws from for what it scores.
        **({"training_split": "train", "fewshot_split": "train"} if "train" in splits else {}),
        f"{source.split}_split": source.split,
    }
    (path := place / "task.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return LocalTask(name, path, digest.hexdigest())


def _read(place: Path, split: str, source: _Source) -> list[Doc]:
    for ending in _ENDINGS:
        if (path := place / f"{split}.jsonl{ending}").is_file():
            try:
                return [source.mend(doc) for doc in _lines(path)]
            except (KeyError, TypeError) as error:
                raise UserError(f"{path}: an item lacks the field {error}") from error
    if place.name == "hellaswag" and split == "validation":
        for path in sorted(place.glob("hellaswag_val_full.txt*")):
            return list(_hellaswag(path))
    return []


def _find_all(place: Path) -> dict[str, Path]:
    return {p.name.partition(".")[0]: p for p in sorted(place.glob("*.jsonl*")) if p.name.endswith(_jsonl_endings())}


def _jsonl_endings() -> tuple[str, ...]:
    return tuple(f".jsonl{ending}" for ending in _ENDINGS)


def _lines(path: Path) -> Iterator[Doc]:
    try:
        for line in _text(path).splitlines():
            if line.strip():
                yield json.loads(line)
    except ValueError as error:
        raise UserError(f"{path} is no JSON lines file: {error}") from error


def _hellaswag(path: Path) -> Iterator[Doc]:
    """Six lines an item: `activity: context`, the right ending's number, four endings."""
    lines = _text(path).splitlines()
    if len(lines) % _HELLASWAG_LINES:
        raise UserError(f"{path}: {len(lines)} lines are no whole number of items of six")
    for start in range(0, len(lines), _HELLASWAG_LINES):
        head, label, *endings = lines[start : start + _HELLASWAG_LINES]
        activity, _, context = head.partition(": ")
        yield {"activity_label": activity, "ctx_a": context, "ctx_b": "", "label": label, "endings": endings}


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        elif path.suffix == ".bz2":
            raw = bz2.decompress(raw)
        return raw.decode()
    except (EOFError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
