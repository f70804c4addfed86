"""If these fail, documents are lost, cut or invented on their way in, or bad input ends in a traceback."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import rich.progress
import zstandard

from experiments import sources
from experiments.settings import UserError
from experiments.sources import fingerprint, read_source, split_sources

TEXT = "first line\n\ta tab, caf\u00e9, \u4e2d\u6587, \U0001f600\n"


def read(path: Path) -> list[str]:
    return list(read_source(str(path)))


def zstd_stream(raw: bytes, window_log: int) -> bytes:
    """Compress as a pipe does: the frame does not tell its size, so that its window is what the header says."""
    parameters = zstandard.ZstdCompressionParameters(window_log=window_log, enable_ldm=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return compressor.compress(raw) + compressor.flush()


@pytest.mark.parametrize(
    ("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.ZstdCompressor().compress)]
)
def test_a_text_file_gives_its_text_whether_compressed_or_not(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress(TEXT.encode()))
    assert read(path) == [TEXT]


def test_a_line_of_u001e_separates_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\x1e\ntwo \x1e inside\n\x1e\nthree\n")
    assert read(path) == ["one\n", "two \x1e inside\n", "three\n"]


def test_carriage_returns_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\r\n")
    assert read(path) == ["one\r\ntwo\r\n"]


def test_all_frames_of_a_zst_file_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    texts = [f"part {i}\n" * 40_000 for i in range(3)]
    path.write_bytes(b"".join(zstandard.ZstdCompressor().compress(text.encode()) for text in texts))
    assert read(path) == ["".join(texts)]


def test_a_zst_file_with_a_long_window_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstd_stream(TEXT.encode(), window_log=28))
    with pytest.raises(zstandard.ZstdError, match="memory"):  # else the file would prove nothing
        zstandard.ZstdDecompressor().stream_reader(io.BytesIO(path.read_bytes())).read()
    assert read(path) == [TEXT]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_short_is_refused(tmp_path: Path, suffix: str) -> None:
    raw = os.urandom(100_000).hex().encode()
    whole = gzip.compress(raw) if suffix == ".gz" else zstandard.ZstdCompressor().compress(raw)
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"a\.txt{suffix} could not be read"):
        read(path)


@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.zst", "a.txt"])
def test_a_file_of_other_bytes_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xff\xfe\xfd no such format")
    with pytest.raises(UserError, match="could not be read"):
        read(path)


def test_a_gzip_file_with_broken_contents_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    raw = bytearray(gzip.compress(TEXT.encode() * 100))
    raw[10] = 0xFF  # no kind of deflate block
    path.write_bytes(raw)
    with pytest.raises(UserError, match="could not be read"):
        read(path)


def test_jsonl_gives_the_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    lines = "\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate((TEXT, "two")))
    path.write_bytes(gzip.compress((lines + "\n\n").encode()))
    assert read(path) == [TEXT, "two"]


@pytest.mark.parametrize("line", ['{"body": "x"}', "[1]", "{", '{"text": 3}', '{"text": null}', '{"text": "\\ud800"}'])
def test_a_bad_jsonl_line_is_refused_with_file_and_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2"):
        read(path)


def test_a_folder_is_read_in_the_order_of_its_paths_and_other_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("z.txt", "a.md", "sub/m.py"):
        (tmp_path / name).write_text(name)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert read(tmp_path) == ["a.md", "sub/m.py", "z.txt"]


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(UserError, match="no text in the folder"):
        read(tmp_path)


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.docx"
    path.write_text("x")
    with pytest.raises(UserError, match=r"a\.docx: unknown kind"):
        read(path)


@pytest.mark.parametrize("corpus", ["", "python+", "+python", "no/such/file.txt", "hf:", "hf:a:b:c:d"])
def test_a_corpus_that_cannot_exist_is_refused(corpus: str) -> None:
    with pytest.raises(UserError, match=r"no corpus|names no dataset"):
        split_sources(corpus)


def test_sources_are_joined_by_a_plus_which_a_path_may_hold_too(tmp_path: Path) -> None:
    path = tmp_path / "c++.txt"
    path.write_text(TEXT)
    assert split_sources(str(path)) == [str(path)]
    assert split_sources(f"python+{tmp_path}+hf:name:config") == ["python", str(tmp_path), "hf:name:config"]


def test_the_fingerprint_follows_the_files(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = fingerprint(str(tmp_path))
    assert fingerprint(str(tmp_path)) == before
    path.write_text("one more")
    assert fingerprint(str(tmp_path)) != before


def test_the_embedded_corpus_is_the_same_each_time_and_holds_written_text_only() -> None:
    first, again = (list(islice(read_source("python"), 1500)) for _ in range(2))
    assert first == again
    assert len(first) == 1500
    for text in first:
        assert 200 <= len(text) <= 200_000
        assert len(text) / (text.count("\n") + 1) <= 200


def test_the_embedded_corpus_holds_the_library_and_the_dependencies_but_no_test_tools() -> None:
    modules = (argparse, json, rich.progress, pytest)
    texts = [Path(module.__file__ or "").read_text() for module in modules]
    found = set(texts) & set(read_source("python"))
    assert [text in found for text in texts] == [True, True, True, False]


def test_every_distribution_of_the_embedded_corpus_is_pinned_or_comes_with_every_environment() -> None:
    pins = (Path(__file__).parents[1] / "constraints.txt").read_text().lower()
    pinned = {line.split("==")[0] for line in pins.splitlines() if "==" in line}
    assert {name.lower() for name in sources._DISTRIBUTIONS} - pinned == {"pip", "setuptools"}


def test_parquet_without_its_library_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"\.\[data\]"):
        read(tmp_path / "a.parquet")


def test_a_hub_dataset_without_its_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"\.\[data\]"):
        list(read_source("hf:name"))


def test_parquet_gives_the_texts_and_null_is_an_empty_one(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="the optional extra [data]")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"id": [1, 2, 3], "text": [TEXT, None, "three"]}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [TEXT, "", "three"]


def test_parquet_without_a_column_of_strings_is_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="the optional extra [data]")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"body": ["x"]}), tmp_path / "none.parquet")
    parquet.write_table(pa.table({"text": [1]}), tmp_path / "numbers.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and nothing")
    for name in ("none", "numbers", "broken"):
        with pytest.raises(UserError, match=rf"{name}\.parquet"):
            read(tmp_path / f"{name}.parquet")


def test_a_dataset_is_streamed_by_name(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the optional extra [data]")
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXT, "two")))
    assert list(read_source(f"hf:{tmp_path}")) == [TEXT, "two"]
    with pytest.raises(UserError, match="could not be read from the hub"):
        list(read_source(f"hf:{tmp_path}::nosuchsplit"))
