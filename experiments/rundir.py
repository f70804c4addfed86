"""A run's directory: identity, ownership, logs and state. States follow from files; there is no database.

config.yaml       the Run (spec and labels), written once, compared on every start
labels.jsonl      what else it is for, where another suite or budget shares it
attempts.jsonl    one line when a process starts, one when it stops without finishing
metrics.jsonl     deterministic quantities only: equal to the byte for equal runs
timing.jsonl      clock readings; never compared
checkpoint/       one state, replaced atomically
train.log         what a worker printed
final.json        written last, atomically: "status", "result", "cost"
slurm.json        which job of a SLURM cluster it was given to last, if any
LOCK              held by flock while a process works; never deleted
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from experiments.loading import load_run, save_run
from experiments.settings import Labels, Run, UserError

State = Literal["planned", "running", "interrupted", "failed", "diverged", "final"]

INTERRUPTED_CODE = 3
"""Exit code of a worker that was asked to stop and saved."""

PARENT_VARIABLE = "ENGRAM_WORKER"
"""Process id that a worker stops without: set by whoever starts it and must not be outlived by it."""

FINAL_KEYS = {"result": ("steps", "valid_loss"), "cost": ("seconds", "tokens_per_s")}
"""What every final.json holds, and commands that only look at runs read."""

FROZEN = "FROZEN.json"
"""In a copy of the code that was made for jobs (`experiments.frozen`): its commit, and whether it was changed."""


class RunBusy(Exception):
    """Another process works on this run."""


class RunDir:
    """Paths and facts of one run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, runs_dir: Path, run: Run) -> RunDir:
        """Make the directory of a run, or check that the one there is this run's.

        Raises:
            UserError: the directory holds another spec.
        """
        here = cls(runs_dir / run.spec.run_id)
        config = here.path / "config.yaml"
        if config.exists():
            there = load_run(config)
            if there.spec != run.spec:
                raise UserError(f"{here.path} holds another run than its name says: move it away and launch again")
            here._note_labels(run.labels, there.labels)
            return here
        here.path.mkdir(parents=True, exist_ok=True)
        draft = here.path / f"config.yaml.{os.getpid()}"
        save_run(run, draft)
        assert load_run(draft) == run, "a run must come back as it was written: is a number of another type?"
        draft.replace(config)
        return here

    def _note_labels(self, labels: Labels, first: Labels) -> None:
        """Append to labels.jsonl what else the run is for: another budget's point may be the same run."""
        path, line = self.path / "labels.jsonl", json.dumps(asdict(labels))
        if labels != first and line not in (path.read_text().splitlines() if path.exists() else []):
            with open(path, "a") as file:
                file.write(line + "\n")

    def load(self) -> Run:
        """Read config.yaml and check that the directory bears the run's name.

        Raises:
            UserError: no run here, or a spec that does not hash to the directory's name.
        """
        config = self.path / "config.yaml"
        if not config.is_file():
            raise UserError(f"no run in {self.path}: it has no config.yaml")
        run = load_run(config)
        if run.spec.run_id != self.path.name:
            raise UserError(
                f"{self.path}: config.yaml describes run {run.spec.run_id}; it was edited or moved. "
                "Start another run with overrides instead of editing one"
            )
        return run

    @contextmanager
    def owned(self, patience_s: float = 2.0) -> Iterator[None]:
        """Hold the run's lock.

        Args:
            patience_s: how long to try; `is_locked` holds the lock for an instant, which must not turn a worker away.

        Raises:
            RunBusy: another process holds it.
        """
        give_up = time.monotonic() + patience_s
        with open(self.path / "LOCK", "a") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= give_up:
                        raise RunBusy(f"{self.path.name} is being trained by another process") from None
                    time.sleep(0.1)
            yield

    def is_locked(self) -> bool:
        """Whether a process works on the run now."""
        try:
            # Shared, so that two who ask at once do not take each other for the worker.
            with open(self.path / "LOCK", "rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except BlockingIOError:
            return True
        return False

    def state(self) -> State:
        """Where the run stands.

        Raises:
            UserError: final.json is damaged.
        """
        locked = self.is_locked()  # asked first: a worker that ends between the two questions has left its final.json
        final = self.final()
        if final is not None:
            return "diverged" if final["status"] == "diverged" else "final"
        if locked:
            return "running"
        last = last_line(self.path / "attempts.jsonl")
        if last is None:
            return "planned"
        return "failed" if last["event"] == "failed" else "interrupted"

    def final(self) -> dict[str, Any] | None:
        """final.json, if the run is done.

        Raises:
            UserError: the file is damaged.
        """
        path = self.path / "final.json"
        try:
            final = json.loads(path.read_text())
            if final["status"] not in ("final", "diverged"):
                raise ValueError(f"status {final['status']!r}")
            # Looked up, not used: whoever reads on may rely on these.
            _ = [final[part][key] for part, keys in FINAL_KEYS.items() for key in keys]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            why = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise UserError(f"{path} is damaged ({why}): delete it and launch again") from error
        return dict(final)

    def write_final(self, final: dict[str, Any]) -> None:
        """Write final.json at once and whole."""
        draft = self.path / "final.json.part"
        text = json.dumps(final, indent=1, allow_nan=False) + "\n"
        with open(draft, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name with nothing in it
        draft.replace(self.path / "final.json")

    def note_attempt(self, event: Literal["start", "interrupted", "failed"], **facts: Any) -> None:
        """Append to attempts.jsonl."""
        line = {"event": event, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | facts
        path = self.path / "attempts.jsonl"
        torn = path.exists() and not path.read_bytes().endswith(b"\n")  # by a disk that was full
        with open(path, "a") as file:
            file.write("\n" * torn + json.dumps(line) + "\n")

    def attempts(self) -> int:
        """Processes that have worked on the run so far."""
        path = self.path / "attempts.jsonl"
        return path.read_text().count('"event": "start"') if path.exists() else 0


def last_line(path: Path) -> dict[str, Any] | None:
    """The last whole line of a JSON-lines file, if there is one."""
    lines = last_lines(path)
    return lines[-1] if lines else None


def last_lines(path: Path, n_bytes: int = 65_536) -> list[dict[str, Any]]:
    """The whole lines among the last `n_bytes` of a JSON-lines file; torn ones are passed over."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - n_bytes))
            texts = file.read().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    lines = []
    for text in texts:
        with suppress(ValueError):  # torn by a kill, or cut by where we began to read
            lines.append(dict(json.loads(text)))
    return lines


def provenance() -> dict[str, Any]:
    """What produced a result: code, machine, command."""
    frozen = Path(__file__).parent.parent / FROZEN
    if frozen.exists():  # git would answer for the checkout that the copy happens to lie in
        code = json.loads(frozen.read_text())
    else:
        code = {"commit": _git("rev-parse", "HEAD") or "unknown", "dirty": bool(_git("status", "--porcelain"))}
    return {
        "command": " ".join(sys.argv),
        **code,
        "job": slurm_job(),
        "host": platform.node(),
        "python": platform.python_version(),
        "pid": os.getpid(),
    }


def slurm_job() -> str | None:
    """The SLURM job that this process is part of, as squeue names it."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def _git(*args: str) -> str:
    done = subprocess.run(["git", *args], capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
