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
import zlib
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


def split_sources(corpus: str) -> list[str]:
    """Return the sources that a corpus names; a path that exists may itself hold a `+`.

    Raises:
        UserError: a path that is not there, an empty name, or a hub name of too many parts.
    """
    sources = [corpus] if corpus and Path(corpus).expanduser().exists() else corpus.split("+")
    for source in sources:
        if source.startswith("hf:"):
            if not 2 <= len(parts := source.split(":")) <= 4 or not parts[1]:
                raise UserError(f"{source!r} names no dataset: write hf:NAME[:CONFIG[:SPLIT]]")
        elif source != "python" and not (source and Path(source).expanduser().exists()):
            raise UserError(f"no corpus {source!r}: give `python`, `hf:NAME`, or the path of a text file or folder")
    return sources


def read_source(source: str) -> Iterator[str]:
    """Yield the texts of one source in a fixed order, not yet deduplicated.

    Raises:
        UserError: the source cannot be read, or needs an extra that is not installed.
    """
    if source == "python":
        yield from _python_sources()
    elif source.startswith("hf:"):
        yield from _hub_dataset(source)
    else:
        yield from _local(Path(source).expanduser())


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
    name, config, split = [*source.removeprefix("hf:").split(":"), "", ""][:3]
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in rows:
            if not isinstance(text := row.get("text", 0), str | None):
                raise UserError(f"{source}: rows have no string `text`, only {', '.join(row)}")
            yield text or ""
    except (OSError, ValueError) as error:
        raise UserError(f"{source} could not be read from the hub: {error}".splitlines()[0]) from error


def _local(path: Path) -> Iterator[str]:
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and _kind(p) in (*TEXT_SUFFIXES, ".jsonl", ".parquet"))
        if not files:
            raise UserError(f"no text in the folder {path}: looked for {', '.join(TEXT_SUFFIXES)}, .jsonl and .parquet")
    else:
        files = [path]
    for file in files:
        if _kind(file) == ".parquet":
            yield from _parquet(file)
        elif _kind(file) == ".jsonl":
            yield from _json_lines(file)
        elif _kind(file) in TEXT_SUFFIXES:
            yield from _text(file)
        else:
            known = ", ".join((*TEXT_SUFFIXES, ".jsonl"))
            raise UserError(f"{file}: unknown kind of file; known are {known}, each also .gz or .zst, and .parquet")


def _kind(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix in _COMPRESSED else path.suffix


class _ZstdReader(io.RawIOBase):
    """The decompressed bytes of a .zst file. The library's own reader ends without a word where a cut file ends."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115  closed by close()
        # Files compressed with `zstd --long` need a larger window than the default refuses to allocate.
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._frame = self._decompressor.decompressobj()
        self._in_frame = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            raw = self._frame.unused_data or self._file.read(2**16)
            if not raw:
                if self._in_frame:
                    raise EOFError("the file ends in the middle of a zstd frame")
                return 0
            if self._frame.eof:
                self._frame = self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(raw))
            self._in_frame = not self._frame.eof
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _open(path: Path) -> io.TextIOWrapper:
    if path.suffix == ".gz":
        return io.TextIOWrapper(gzip.GzipFile(path), encoding="utf-8", newline="\n")
    if path.suffix == ".zst":
        return io.TextIOWrapper(io.BufferedReader(_ZstdReader(path), 2**20), encoding="utf-8", newline="\n")
    return open(path, encoding="utf-8", newline="\n")


def _lines(path: Path) -> Iterator[str]:
    try:
        with _open(path) as file:
            yield from file
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, zstandard.ZstdError) as error:
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
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{path}, line {number}: `text` holds half of a surrogate pair") from None
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
                for text in batch.column("text").to_pylist():
                    if not isinstance(text, str | None):
                        raise UserError(f"{path}: column `text` holds {type(text).__name__}, not strings")
                    yield text or ""
    except (OSError, pyarrow.ArrowException, KeyError) as error:
        raise UserError(f"{path}: no readable column `text`: {error}".splitlines()[0]) from error


def fingerprint(corpus: str) -> list[str]:
    """What tells one state of a corpus from another without reading it: versions, or files with sizes and times."""
    facts = []
    for source in split_sources(corpus):
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
            facts += [file_state(file) for file in files]
    return facts


def file_state(path: Path) -> str:
    """What changes when a file is replaced: its place, size and time."""
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
