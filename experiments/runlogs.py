"""The JSON-lines files of a run: metrics, equal to the byte for equal runs, and clock readings, which never are."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import IO, Any, Self


class Lines:
    """A JSON-lines file, open for writing behind its first `n_bytes`; later lines belong to steps that run again."""

    def __init__(self, path: Path, n_bytes: int) -> None:
        self.file: IO[bytes] = open(path, "ab")  # noqa: SIM115  closed by __exit__
        self.file.truncate(n_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, line: dict[str, Any]) -> int:
        """Append a line; return its length in bytes."""
        text = (json.dumps(line) + "\n").encode()
        self.file.write(text)
        self.file.flush()
        return len(text)

    def sync(self) -> None:
        """Bring to disk what was written."""
        os.fsync(self.file.fileno())


class Timing(Lines):
    """timing.jsonl: seconds since this attempt began, and the rate since the line before."""

    def __init__(self, run_path: Path) -> None:
        path = run_path / "timing.jsonl"
        whole = path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0
        super().__init__(path, whole)  # a kill may have torn the last line
        self.began = self.last = time.monotonic()

    def note(self, step: int, tokens: int) -> None:
        """Write the time of a step that took `tokens`."""
        now = time.monotonic()
        rate = round(tokens / (now - self.last), 1)
        self.write({"step": step, "seconds": round(now - self.began, 3), "tokens_per_s": rate})
        self.last = now


def attempt_seconds(run_path: Path) -> float:
    """Seconds of all attempts together, each up to its last step."""
    seconds, last = 0.0, 0.0
    for text in (run_path / "timing.jsonl").read_text().splitlines():
        now = json.loads(text)["seconds"]
        seconds += last if now < last else 0.0  # an attempt starts its clock at 0
        last = now
    return seconds + last
