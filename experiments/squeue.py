"""Which runs SLURM has queued or at work. It is asked afresh each time: its queue is the only record that counts.

A submission is an array of jobs named `engram-<submission>`; element i is the i-th of its runs. Each run's slurm.json
says which submission and which element it was in last. It is written before sbatch is called, so that a launcher that
dies in between cannot lose track of what it has submitted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from experiments.rundir import RunDir

NAME = "engram-"
TIMEOUT_S = 60.0
_COLUMNS = ("JobArrayID", "Name", "State", "RestartCnt", "NodeList", "ReasonList")

Phase = Literal["queued", "requeued", "starting", "running", "ending"]


class SlurmSilent(OSError):
    """SLURM's commands are missing, or its controller does not answer."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """slurm.json: where a run was submitted last."""

    submission: str
    index: int
    job: str | None
    """None until sbatch has answered."""
    time: str
    profile: str
    logs: str
    """Directory of what the job itself printed."""
    commit: str
    dirty: bool
    cancelled: bool = False

    @property
    def log(self) -> Path | None:
        """What the job printed before and besides its worker."""
        return Path(self.logs) / f"{self.job}_0_log.err" if self.job else None


@dataclass(frozen=True, kw_only=True)
class Job:
    """One array element in SLURM's queue."""

    id: str
    state: str
    """SLURM's word, such as PENDING."""
    restarts: int
    host: str
    """Its nodes, or why it waits."""

    @property
    def phase(self) -> Phase:
        """The state in our words."""
        if self.state == "COMPLETING":
            return "ending"
        if self.state in ("RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING", "STAGE_OUT"):
            return "running" if self.state == "RUNNING" else "starting"
        return "requeued" if self.restarts else "queued"

    @property
    def held(self) -> bool:
        """Whether it waits for somebody to release it, as after starts that failed on several nodes."""
        return self.state == "REQUEUE_HOLD" or "held" in self.host.lower()


def record_of(run_dir: RunDir) -> Record | None:
    """The run's slurm.json, if it was ever submitted."""
    try:
        return Record(**json.loads((run_dir.path / "slurm.json").read_text()))
    except (FileNotFoundError, ValueError, TypeError):  # torn, or of another version: SLURM's queue decides
        return None


def write_record(run_dir: RunDir, record: Record | None) -> None:
    """Replace slurm.json, or remove it."""
    path = run_dir.path / "slurm.json"
    if record is None:
        path.unlink(missing_ok=True)
        return
    draft = path.with_name(f"slurm.json.{os.getpid()}")
    draft.write_text(json.dumps(asdict(record), indent=1) + "\n")
    draft.replace(path)


def jobs_of(run_dirs: Iterable[RunDir]) -> dict[str, Job]:
    """Jobs queued or at work, by run_id. SLURM is asked only if a run that is not done was ever submitted.

    Raises:
        SlurmSilent: there are records, but nobody to ask.
    """
    # Whether it can be read is another question: no job works on a run that has one.
    undone = [run_dir for run_dir in run_dirs if not (run_dir.path / "final.json").exists()]
    records = {run_dir.path.name: record for run_dir in undone if (record := record_of(run_dir)) is not None}
    if not records:
        return {}
    queue = _queue()
    found = {}
    for run_id, record in records.items():
        if (job := queue.get((record.submission, record.index))) is not None:
            found[run_id] = job
    return found


def cancel_jobs(ids: Iterable[str]) -> None:
    """scancel.

    Raises:
        SlurmSilent: it failed.
    """
    ask("scancel", *ids)


def available() -> bool:
    """Whether this machine has SLURM's commands."""
    return shutil.which("squeue") is not None


def ask(*argv: str) -> str:
    """Output of one of SLURM's commands.

    Raises:
        SlurmSilent: it is missing, fails or hangs.
    """
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except FileNotFoundError:
        raise SlurmSilent(f"no {argv[0]} on this machine: is it a login node of the cluster?") from None
    except subprocess.TimeoutExpired:
        raise SlurmSilent(f"{argv[0]} has not answered for {TIMEOUT_S:.0f} s") from None
    if done.returncode != 0:
        raise SlurmSilent(f"{argv[0]} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _queue() -> dict[tuple[str, int], Job]:
    """This user's jobs by submission and element."""
    # --array: one line an element. A suffix instead of a width: fields are then as long as they are.
    text = ask("squeue", "--me", "--array", "--noheader", "--Format", ",".join(f"{name}:|" for name in _COLUMNS))
    queue = {}
    for line in text.splitlines():
        fields = line.split("|")
        if len(fields) < len(_COLUMNS) or not fields[1].startswith(NAME):
            continue
        id, name, state, restarts, nodes, reason = fields[: len(_COLUMNS)]
        # An array of one element is submitted as a plain job, whose id has no second part.
        index = int(id.partition("_")[2] or 0)
        job = Job(id=id, state=state, restarts=int(restarts or 0), host=nodes or reason.strip("()"))
        queue[name.removeprefix(NAME), index] = job
    return queue
