"""A real SLURM for tests, brought up by `slurm/test-cluster`, and a study small enough to train on it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "slurm" / "test-cluster"
PATIENCE_S = 180.0

BUDGET = """
about: a study of seconds, long enough to be interrupted
backbone:
  {vocab_size: 300, d_model: 32, n_layers: 2, n_dense_layers: 1, d_ff: 64,
  gqa: {n_heads: 2, n_kv_heads: 1, head_dim: 16}, moe: {n_routed_experts: 16, top_k: 2, d_expert: 16, d_shared: 32}}
engram: {layer_ids: [1], tables: {d_mem: 16, n_hash_heads: 1}}
train: {tokens: 98_304, batch_tokens: 2048, seq_len: 128, eval_tokens: 2048, precision: fp32, optim: {lr: 1.0e-2}}
data: {corpus: "CORPUS", vocab_size: 300}
rhos: [1.0, 0.5]
control_rho: 0.5
controls: []
seeds: [0]
runtime: {device: cpu, workers: 2}
"""


def daemons_found() -> bool:
    """Whether SLURM is installed; Debian keeps daemons off an ordinary user's PATH."""
    return shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is not None


@dataclass(frozen=True)
class Cluster:
    """A running test cluster."""

    path: Path

    @property
    def env(self) -> dict[str, str]:
        return os.environ | {
            "SLURM_CONF": str(self.path / "slurm.conf"),
            "PATH": f"{self.path / 'bin'}:{os.environ['PATH']}",
        }

    def call(self, *argv: str, check: bool = True, timeout: float = 120) -> str:
        """Output of a command that sees the cluster."""
        done = subprocess.run(argv, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0 or not check, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def pid(self, daemon: str) -> int:
        return int((self.path / f"run/{daemon}.pid").read_text())

    def preempt(self, seconds: int) -> None:
        """A job of the upper partition that wants the whole node."""
        wrap = ["--wrap", f"sleep {seconds}", "--output", "/dev/null"]
        self.call("sbatch", "--partition=urgent", "--exclusive", "--mem=100", *wrap)

    def start_what_is_down(self) -> None:
        """After a daemon was killed."""
        subprocess.run([sys.executable, SCRIPT, "start", self.path], check=True, capture_output=True, timeout=60)

    def empty(self) -> bool:
        return not self.call("squeue", "--noheader").strip()


@contextmanager
def cluster(path: Path, *options: str) -> Iterator[Cluster]:
    """Start a cluster; stop it whatever happens."""
    subprocess.run([sys.executable, SCRIPT, "start", path, *options], check=True, capture_output=True, timeout=60)
    try:
        yield Cluster(path)
    finally:
        subprocess.run([sys.executable, SCRIPT, "stop", path], check=True, capture_output=True, timeout=120)


class Sweep:
    """A suite of runs in a directory of its own, driven by the commands a user types."""

    def __init__(self, path: Path, budget: Path, cluster: Cluster | None, *changes: str) -> None:
        self.path, self.cluster = path, cluster
        places = [f"runtime.runs_dir={path / 'runs'}", f"runtime.data_dir={budget.parent / 'data'}"]
        self.words = ["allocation", str(budget), *places, *changes]

    def command(self, name: str, *more: str) -> list[str]:
        return [sys.executable, "-m", "experiments", name, *self.words, *more]

    def call(self, name: str, *more: str, code: int = 0) -> str:
        env = self.cluster.env if self.cluster else None
        done = subprocess.run(self.command(name, *more), cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def slurm_words(self, *profile: str) -> list[str]:
        # 11 minutes: submitit takes a preemption of any shorter job for a time limit.
        defaults = {"time": "11", "signal_delay_s": "10", "mem_gb": "1"}
        defaults |= dict(word.split("=") for word in profile)
        words = [f"slurm.{key}={value}" for key, value in defaults.items()]
        return ["--on", "slurm", "--profile", "cpu", "--allow-dirty", *words]

    def submit(self, *profile: str) -> str:
        return self.call("launch", *self.slurm_words(*profile))

    def dirs(self) -> list[Path]:
        return sorted((self.path / "runs").glob("r*"))

    def rows(self) -> list[dict[str, Any]]:
        return list(json.loads(self.call("status", "--json"))["runs"])

    def states(self) -> list[str]:
        return [row["state"] for row in self.rows()]

    def job(self) -> str:
        """Of the only run, from its record: `status` would take seconds."""
        (path,) = self.dirs()
        return str(json.loads((path / "slurm.json").read_text())["job"])

    def steps(self) -> list[int]:
        """How far every run is, from its files alone: cheap to ask often."""
        return [n_steps(path) for path in self.dirs()]

    def finished(self) -> bool:
        return all((path / "final.json").exists() for path in self.dirs())

    def wait_for_step(self, step: int) -> None:
        wait(lambda: bool(self.steps()) and min(self.steps()) >= step, self.log)

    @contextmanager
    def held(self) -> Iterator[list[int]]:
        """Workers (their process ids) stand still, and go on afterwards.

        So how fast a machine trains does not decide whether a run is over before SLURM interferes.
        """
        pids = [pid for path in self.dirs() for pid in workers_of(path)]
        assert pids, "no worker to hold"
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield pids
        finally:
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)

    @contextmanager
    def held_until_told_to_stop(self) -> Iterator[None]:
        """The same, and what happens inside must bring a worker a TERM."""
        with self.held() as pids:
            yield
            wait(lambda: any(told_to_stop(pid) for pid in pids), self.log)

    def wait_to_end(self) -> None:
        wait(self.finished, self.log)

    def log(self) -> str:
        files = [
            p for p in (self.path / "runs").rglob("*") if p.suffix in (".log", ".err", ".out") or "attempts" in p.name
        ]
        return "\n".join(f"== {path}\n{path.read_text()[-2000:]}" for path in files)

    def events(self) -> list[list[str]]:
        """What happened to every run, one word an event."""
        return [[line["event"] for line in lines(path / "attempts.jsonl")] for path in self.dirs()]

    def steps_taken(self) -> list[list[int]]:
        """Every step that any attempt took, in order: a step that was trained twice is there twice."""
        # A line at 0 seconds begins an attempt and is no step.
        return [[line["step"] for line in lines(path / "timing.jsonl") if line["seconds"] > 0] for path in self.dirs()]

    def results(self) -> dict[str, Any]:
        """What must be equal to the bit: the results, and every line of the metrics."""
        finals = {path.name: json.loads((path / "final.json").read_text())["result"] for path in self.dirs()}
        return {
            name: (result, (self.path / "runs" / name / "metrics.jsonl").read_bytes())
            for name, result in finals.items()
        }


def lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a JSON-lines file."""
    return [json.loads(text) for text in path.read_text().split("\n")[:-1]] if path.exists() else []


def n_steps(run_dir: Path) -> int:
    """How far a run is."""
    return len(lines(run_dir / "metrics.jsonl"))


def wait(true: Callable[[], bool], explain: Callable[[], str] = str, seconds: float = PATIENCE_S) -> None:
    give_up = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < give_up, f"waited in vain\n{explain()}"
        time.sleep(0.1)


def workers_of(run_dir: Path) -> list[int]:
    """Processes that train a run: those whose command line begins with Python and names its directory."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0") if entry.name.isdigit() else []
        except OSError:
            continue
        if b"experiments" in words and b"run" in words and str(run_dir).encode() in words:
            found.append(int(entry.name))
    return found


def told_to_stop(pid: int) -> bool:
    """Whether a stopped process has a TERM waiting, or is not stopped any more: SLURM wakes what it ends."""
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    except OSError:
        return True
    return not status["State"].strip().startswith("T") or bool(int(status["ShdPnd"], 16) >> (signal.SIGTERM - 1) & 1)


def kill_worker(run_dir: Path) -> None:
    pids = workers_of(run_dir)
    assert len(pids) == 1, pids
    os.kill(pids[0], signal.SIGKILL)


def write_budget(path: Path) -> Path:
    """The budget above, on some files of the standard library."""
    (path / "text").mkdir(parents=True)
    stdlib = Path(sysconfig.get_path("stdlib"))
    for file in sorted(p for p in stdlib.glob("*.py") if 1500 < p.stat().st_size < 12_000)[:60]:
        shutil.copy(file, path / "text" / file.name)
    budget = path / "tiny.yaml"
    budget.write_text(BUDGET.replace("CORPUS", str(path / "text")))
    return budget


def require_slurm() -> None:
    """Skip where SLURM is not installed, or fail if ENGRAM_REQUIRE_SLURM=1, as in CI, where nobody reads skips."""
    if not daemons_found():
        reason = "SLURM is not installed: apt-get install --no-install-recommends slurm-wlm munge"
        if os.environ.get("ENGRAM_REQUIRE_SLURM") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
