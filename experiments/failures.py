"""Why a worker ended: read from what it left behind."""

from __future__ import annotations

import signal
from pathlib import Path

from experiments.rundir import RunDir, last_line

TAIL_BYTES = 4096

Marks = tuple[int, int]
"""Sizes of attempts.jsonl and train.log before a worker started: what follows is its own."""


def marks_of(run_dir: RunDir) -> Marks:
    """To be taken before a worker is started."""
    return _size(run_dir.path / "attempts.jsonl"), _size(run_dir.path / "train.log")


def noted_failure(run_dir: RunDir, marks: Marks) -> str | None:
    """The error that the worker itself wrote down, if it could."""
    attempts = run_dir.path / "attempts.jsonl"
    last = last_line(attempts) if _size(attempts) > marks[0] else None
    return str(last["error"]) if last is not None and last["event"] == "failed" else None


def why_it_failed(run_dir: RunDir, marks: Marks, code: int) -> str:
    """One line: the error the worker noted, else what killed it, else the last thing it printed.

    Args:
        run_dir: where it worked.
        marks: taken before it started.
        code: its exit code; negative is the signal that killed it.
    """
    if (error := noted_failure(run_dir, marks)) is not None:
        return error
    if code < 0:
        hint = "; out of memory is the usual reason" if -code == signal.SIGKILL else ""
        return f"killed by signal {-code} ({signal.strsignal(-code)}){hint}"
    return last_words(run_dir.path / "train.log", marks[1]) or f"exit code {code}, and nothing printed"


def last_words(log: Path, start: int = 0) -> str:
    """The last line of a log that is not empty, looked for behind its first `start` bytes; empty if there is none."""
    if not log.exists():
        return ""
    with open(log, "rb") as file:
        file.seek(max(start, _size(log) - TAIL_BYTES))
        printed = file.read().decode(errors="replace").split("\n")
    said = [line.strip() for line in printed if line.strip()]
    return said[-1] if said else ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
