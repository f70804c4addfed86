"""The JSON-lines files of a run: metrics, equal to the byte for equal runs, and clock readings, which never are."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from experiments.settings import UserError


class Lines:
    """A JSON-lines file, open for writing behind its first `n_bytes`; later lines belong to steps that run again.

    With `path` None it only counts, as all processes of a run but the first do.
    """

    def __init__(self, path: Path | None, n_bytes: int) -> None:
        self.path, self.file = path, None
        if path is None:
            return
        if n_bytes > (size := path.stat().st_size if path.exists() else 0):
            raise UserError(
                f"{path} has {size:,} bytes, but the checkpoint counts {n_bytes:,}: lines were lost; "
                "delete the run's directory to train it from its start"
            )
        self.file = open(path, "ab")  # noqa: SIM115  closed by __exit__
        self.file.truncate(n_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, line: dict[str, Any]) -> int:
        """Append a line; return its length in bytes.

        Raises:
            OSError: the disk is full or not writable.
        """
        text = (json.dumps(line) + "\n").encode()
        if self.file is not None:
            with self._saying_where():
                self.file.write(text)
                self.file.flush()
        return len(text)

    def sync(self) -> None:
        """Bring to disk what was written.

        Raises:
            OSError: the disk is full or not writable.
        """
        if self.file is not None:
            with self._saying_where():
                os.fsync(self.file.fileno())

    @contextmanager
    def _saying_where(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"could not write {self.path}: {error.strerror}; free space and launch again") from error


class Timing(Lines):
    """timing.jsonl: seconds since this attempt began, and the rate since the line before; an attempt begins with 0."""

    def __init__(self, path: Path | None, step: int) -> None:
        whole = path.read_bytes().rfind(b"\n") + 1 if path is not None and path.exists() else 0
        super().__init__(path, whole)  # a kill may have torn the last line
        self.began = self.last = time.monotonic()
        self.write({"step": step, "seconds": 0.0, "tokens_per_s": 0.0})

    def note(self, step: int, tokens: int) -> None:
        """Write the time of a step that took `tokens`."""
        now = time.monotonic()
        rate = round(tokens / (now - self.last), 1)
        self.write({"step": step, "seconds": round(now - self.began, 3), "tokens_per_s": rate})
        self.last = now


@contextmanager
def open_logs(run_path: Path, metrics_bytes: int, step: int, *, writes: bool) -> Iterator[tuple[Lines, Timing]]:
    """Open metrics.jsonl, cut to what the checkpoint counts, and timing.jsonl.

    Args:
        run_path: the run's directory.
        metrics_bytes: length of the metrics that are kept.
        step: where the attempt begins.
        writes: whether this process is the one that writes.
    """
    metrics = Lines(run_path / "metrics.jsonl" if writes else None, metrics_bytes)
    with metrics, Timing(run_path / "timing.jsonl" if writes else None, step) as timing:
        yield metrics, timing


def attempt_seconds(run_path: Path) -> float:
    """Seconds of all attempts together, each up to its last step."""
    seconds, last = 0.0, 0.0
    for text in (run_path / "timing.jsonl").read_text().splitlines():
        now = json.loads(text)["seconds"]
        seconds += last if now == 0 else 0.0
        last = now
    return seconds + last
