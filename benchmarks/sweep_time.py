"""A sweep's wall time against the sum of its steps over its workers: what starting, saving and waiting cost."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class SweepTime:
    """What a sweep took."""

    words: str
    n_runs: int
    n_workers: int
    wall_s: float
    steps_s: float
    """Seconds of all training steps, with the validation that ends a run."""

    @property
    def ratio(self) -> float:
        return self.wall_s * self.n_workers / self.steps_s


def time_sweep(words: list[str], n_workers: int) -> SweepTime:
    """Launch a study in an empty directory, its data built beforehand, and add up what its steps took.

    Raises:
        CalledProcessError: the launch failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        where = [f"runtime.runs_dir={folder}/runs", f"runtime.data_dir={folder}/data", f"runtime.workers={n_workers}"]
        budget = [word for word in words if "=" not in word][-1]
        data = [w for w in [*words, *where] if w.startswith(("data.", "runtime.data_dir"))]
        _experiments("data", budget, *data)
        began = time.perf_counter()
        _experiments("launch", *words, *where)
        wall_s = time.perf_counter() - began
        logs = list(Path(folder, "runs").glob("*/timing.jsonl"))
        steps_s = sum(json.loads(log.read_text().splitlines()[-1])["seconds"] for log in logs)
    return SweepTime(" ".join(words), len(logs), n_workers, wall_s, steps_s)


def _experiments(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "experiments", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
