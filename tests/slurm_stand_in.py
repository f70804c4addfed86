"""Programs that stand in for SLURM's commands, and runs as a submission leaves them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from small_runs import small_run

from experiments.rundir import RunDir
from experiments.settings import Run
from experiments.squeue import Record, write_record

RECORD = Record(
    submission="ab12", index=0, job="7_0", time="2026-01-01T00:00:00Z", profile="cpu", logs="", commit="c", dirty=False
)


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def queue(folder: Path, *lines: str) -> None:
    program(folder / "squeue", "cat <<'END'\n" + "\n".join(lines) + "\nEND")


def submitted(tmp_path: Path, seed: int = 0, **changes: Any) -> tuple[Run, RunDir]:
    run = small_run(seed)
    run_dir = RunDir.create(tmp_path / "runs", run)
    write_record(run_dir, replace(RECORD, logs=str(tmp_path / "logs"), **changes))
    return run, run_dir
