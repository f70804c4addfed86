"""Documents from named sources: local text, a Hugging Face dataset, or the Python sources that come with the suite.

A source is one of

    python                        the interpreter's library and the installed dependencies: no network, no file of ours
    hf:NAME[:CONFIG[:SPLIT]]      a dataset from the Hugging Face hub, streamed (pip install -e '.[data]')
    PATH                          a file or a folder: text, .jsonl or .parquet, plain or .gz or .zst

joined by `+`. Text files may hold several documents, separated by a line that holds U+001E.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import io
import json
import platform
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import zstandard

from experiments.settings import UserError

SEPARATOR = "\x1e"
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py", ".pyi", ".tex", ".html", ".c", ".h", ".cpp", ".json", ".csv", ".tsv")
_COMPRESSED = (".gz", ".zst")

# The dependencies whose sources make the embedded corpus; pinned in constraints.txt, read in this order.
_DISTRIBUTIONS = (
    "torch", "sympy", "scipy", "pandas", "numpy", "matplotlib", "networkx", "fonttools", "mpmath", "Pygments",
    "rich", "Jinja2", "fsspec", "omegaconf", "huggingface_hub", "tokenizers", "pillow", "setuptools", "pip",
)  # fmt: skip
_PYTHON_SUFFIXES = (".py", ".pyi", ".rst", ".md", ".txt")
# Longer files and files of very long lines are mostly generated tables.
_MIN_CHARS, _MAX_CHARS, _MAX_MEAN_LINE = 200, 200_000, 200


def read_documents(corpus: str) -> Iterator[str]:
    """Yield the texts of a corpus in a fixed order, not yet deduplicated.

    Args:
        corpus: sources joined by `+`, see the module's docstring.

    Raises:
        UserError: a source does not exist, cannot be read, or needs an extra that is not installed.
    """
    for source in corpus.split("+"):
        if source == "python":
            yield from _python_sources()
        elif source.startswith("hf:"):
            yield from _hub_dataset(source)
        else:
            yield from _local(Path(source).expanduser())


def check_source(corpus: str) -> None:
    """Refuse a corpus that cannot exist, before any work.

    Raises:
        UserError: a path that is not there.
    """
    for source in corpus.split("+"):
        if source != "python" and not source.startswith("hf:") and not Path(source).expanduser().exists():
            raise UserError(f"no corpus {source!r}: give `python`, `hf:NAME`, or the path of a text file or folder")


def _python_sources() -> Iterator[str]:
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in stdlib.rglob("*") if not {"site-packages", "__pycache__"} & set(p.parts))
    for name in _DISTRIBUTIONS:
        try:
            recorded = importlib.metadata.distribution(name).files or []
        except importlib.metadata.PackageNotFoundError:
            continue
        files += [Path(str(file.locate())) for file in sorted(recorded, key=str)]
    for path in files:
        text = _read_if_text(path)
        if text is not None and _looks_written(text):
            yield text


def _read_if_text(path: Path) -> str | None:
    if path.suffix not in _PYTHON_SUFFIXES or not path.is_file():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None  # the library's tests hold files in other encodings on purpose


def _looks_written(text: str) -> bool:
    return _MIN_CHARS <= len(text) <= _MAX_CHARS and len(text) / (text.count("\n") + 1) <= _MAX_MEAN_LINE


def _hub_dataset(source: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source} needs the `datasets` library: pip install -c constraints.txt -e '.[data]'") from None
    name, config, split, *_ = [*source.removeprefix("hf:").split(":"), None, None]
    try:
        rows = datasets.load_dataset(name, config, split=split or "train", streaming=True)
        for row in rows:
            if not isinstance(row.get("text"), str):
                raise UserError(f"{source}: rows have no `text`, only {', '.join(row)}")
            yield row["text"]
    except (OSError, ValueError) as error:
        raise UserError(f"{source} could not be read from the hub: {error}".splitlines()[0]) from error


def _local(path: Path) -> Iterator[str]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) in (*TEXT_SUFFIXES, ".jsonl", ".parquet"))
        if not files:
            raise UserError(f"no text in the folder {path}: looked for {', '.join(TEXT_SUFFIXES)}, .jsonl and .parquet")
    elif path.is_file():
        files = [path]
    else:
        raise UserError(f"no corpus {str(path)!r}: give `python`, `hf:NAME`, or the path of a text file or folder")
    for file in files:
        if _kind(file) == ".parquet":
            yield from _parquet(file)
        elif _kind(file) == ".jsonl":
            yield from _json_lines(file)
        elif _kind(file) in TEXT_SUFFIXES:
            yield from _text(file)
        else:
            known = ", ".join((*TEXT_SUFFIXES, ".jsonl", ".parquet"))
            raise UserError(f"{file}: unknown kind of file; known are {known}, each also with .gz or .zst")


def _kind(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix


def _open(path: Path) -> io.TextIOWrapper:
    raw: Any
    if path.suffix == ".gz":
        raw = gzip.open(path, "rb")
    elif path.suffix == ".zst":
        # Files compressed with `zstd --long` need a larger window than the default refuses to allocate.
        raw = zstandard.ZstdDecompressor(max_window_size=2**31).stream_reader(open(path, "rb"), closefd=True)
    else:
        raw = open(path, "rb")
    return io.TextIOWrapper(raw, encoding="utf-8", newline="\n")


def _lines(path: Path) -> Iterator[str]:
    try:
        with _open(path) as file:
            yield from file
    except (OSError, EOFError, UnicodeDecodeError, zstandard.ZstdError) as error:
        raise UserError(f"{path} could not be read: {error}".splitlines()[0]) from error


def _text(path: Path) -> Iterator[str]:
    document: list[str] = []
    for line in _lines(path):
        if line.strip("\r\n") == SEPARATOR:
            yield "".join(document)
            document = []
        else:
            document.append(line)
    yield "".join(document)


def _json_lines(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}, line {number}: needs a JSON object with a `text`") from None
        if not isinstance(text, str):
            raise UserError(f"{path}, line {number}: `text` is not a string")
        yield text


def _parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs the `pyarrow` library: pip install -c constraints.txt -e '.[data]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(columns=["text"]):
                yield from batch.column("text").to_pylist()
    except (OSError, pyarrow.ArrowException, KeyError) as error:
        raise UserError(f"{path}: no readable column `text`: {error}".splitlines()[0]) from error


def fingerprint(corpus: str) -> list[str]:
    """What tells one state of a corpus from another without reading it: versions, or files with sizes and times."""
    facts = []
    for source in corpus.split("+"):
        facts.append(source)
        if source == "python":
            facts.append(platform.python_version())
            for name in _DISTRIBUTIONS:
                try:
                    facts.append(f"{name}=={importlib.metadata.version(name)}")
                except importlib.metadata.PackageNotFoundError:
                    continue
        elif not source.startswith("hf:"):
            path = Path(source).expanduser()
            files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            facts += [f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    return facts
