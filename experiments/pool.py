"""Worker processes on this machine: how many fit side by side, what each sees, how one is started.

A worker lives in a session of its own, so that a terminal's Ctrl-C reaches the launcher only. If the launcher itself is
killed, its workers finish the runs they are at; their locks keep other launchers away from these meanwhile.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from experiments.rundir import RunDir
from experiments.settings import Runtime, UserError

ROOT = Path(__file__).parent.parent
WORKER = (sys.executable, "-m", "experiments", "run")


class LocalPool:
    """Starts workers here, each in a place of its own: a GPU, or a share of the cores."""

    def __init__(self, runtime: Runtime, worker_flags: Sequence[str], command: Sequence[str]) -> None:
        self.places = places(runtime)
        self.capacity = len(self.places)
        self.command, self.flags = command, worker_flags
        self.running: dict[int, subprocess.Popen[bytes]] = {}

    def start(self, run_dir: RunDir) -> subprocess.Popen[bytes]:
        """Start a worker in the first free place; what it prints goes to train.log."""
        free = [i for i in range(self.capacity) if i not in self.running or self.running[i].poll() is not None]
        argv = [*self.command, str(run_dir.path.resolve()), *self.flags]
        with open(run_dir.path / "train.log", "ab") as log:
            process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env=os.environ | self.places[free[0]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running[free[0]] = process
        return process


def places(runtime: Runtime) -> list[dict[str, str]]:
    """Environment variables of every worker that may run at the same time.

    Raises:
        UserError: a negative number of workers, or less than one thread.
    """
    if runtime.threads < 1 or runtime.workers < 0:
        raise UserError(
            f"runtime.threads={runtime.threads} must be at least 1 and runtime.workers={runtime.workers} at least 0"
        )
    each = max(1, runtime.processes)
    gpus = [] if runtime.device == "cpu" else visible_gpus()
    by_cores = 1 if runtime.device == "cuda" else max(1, usable_cores() // (runtime.threads * each))
    env = thread_variables(runtime)
    if gpus and len(gpus) < each:
        raise UserError(f"runtime.processes={each} takes as many GPUs, and here are {len(gpus)}: lower it")
    groups = [",".join(gpus[i : i + each]) for i in range(0, len(gpus) - each + 1, each)]
    n_workers = runtime.workers or len(groups) or by_cores
    return [env | ({"CUDA_VISIBLE_DEVICES": groups[i % len(groups)]} if groups else {}) for i in range(n_workers)]


def worker_flags(runtime: Runtime, shards: Path) -> list[str]:
    """What stands behind a run directory on a worker's command line."""
    return ["--shards", str(shards), *(f"{f.name}={getattr(runtime, f.name)}" for f in fields(runtime))]


def thread_variables(runtime: Runtime) -> dict[str, str]:
    """What every worker sees, wherever it runs."""
    threads = {f"{name}_NUM_THREADS": str(runtime.threads) for name in ("OMP", "MKL", "OPENBLAS")}
    return {"PYTHONUNBUFFERED": "1"} | threads


def visible_gpus() -> list[str]:
    """Names of the GPUs that a process started here would see, found without importing torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        gpus = [name.strip() for name in named.split(",")]
        ends = [i for i, name in enumerate(gpus) if name in ("", "-1")]  # CUDA ignores what follows an invalid name
        return gpus[: ends[0]] if ends else gpus
    if shutil.which("nvidia-smi") is None:
        return []
    # UUIDs: nvidia-smi counts in bus order, CUDA fastest first.
    query = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    found = subprocess.run(query, capture_output=True, text=True, check=False)
    return found.stdout.split() if found.returncode == 0 else []


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
