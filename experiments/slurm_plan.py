"""What a launch on SLURM would submit: decided from run directories and the queue, described, and confirmed."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram.counting import train_flops_per_token
from experiments.profiles import Profile
from experiments.rundir import RunDir, last_line
from experiments.settings import Run, Runtime, UserError
from experiments.squeue import Job, jobs_of
from experiments.status import count, label

MAX_ARRAY = 1000  # SLURM's default MaxArraySize is 1001
ENDING_S = 90.0  # a cancelled job takes KillWait (30 s by default) to leave the queue


@dataclass(frozen=True)
class Submission:
    """What a launch has to do."""

    runs: tuple[Run, ...]
    """To be submitted, in the suite's order."""
    left: dict[str, str]
    """run_id -> why it is not."""
    hours: float
    """Device hours of `runs`, estimated from the budget's speed."""


def decide(runs: Sequence[Run], runs_dir: Path, flops_per_s: float) -> Submission:
    """What is missing: neither done, nor worked on here, nor in SLURM's queue.

    Raises:
        SlurmSilent: there may be jobs, but SLURM does not answer.
    """
    dirs = {run.spec.run_id: RunDir(runs_dir / run.spec.run_id) for run in runs}
    jobs = _settled_jobs(dirs)
    left, missing, hours = {}, [], 0.0
    for run in runs:
        run_id = run.spec.run_id
        state, job = dirs[run_id].state(), jobs.get(run_id)
        if state in ("final", "diverged"):
            left[run_id] = "done"
        elif job is not None:
            why = f" ({job.host}: scontrol release {job.id}, or cancel)" if job.held else ""
            left[run_id] = f"{job.phase} as job {job.id}{why}"
        elif state == "running":
            left[run_id] = "trained by a process outside SLURM"
        else:
            missing.append(run)
            hours += _hours_left(run, dirs[run_id], flops_per_s)
    return Submission(tuple(missing), left, hours)


def _settled_jobs(dirs: dict[str, RunDir]) -> dict[str, Job]:
    """Jobs of these runs, once none of them is just ending: whether it will be requeued shows only then."""
    give_up = time.monotonic() + ENDING_S
    while True:
        jobs = jobs_of(dirs.values())
        if all(job.phase != "ending" for job in jobs.values()) or time.monotonic() > give_up:
            return jobs
        time.sleep(1.0)


def _hours_left(run: Run, run_dir: RunDir, flops_per_s: float) -> float:
    train = run.spec.train
    step = (last_line(run_dir.path / "metrics.jsonl") or {}).get("step", 0)
    flops = train_flops_per_token(run.spec.model, train.seq_len) * train.batch_tokens * (train.steps - step)
    return float(flops / flops_per_s / 3600)


def describe(profile: Profile, todo: Submission, runtime: Runtime) -> list[str]:
    """The arrays, their elements and what they cost, one line each."""
    tasks, cpus = count(profile.tasks_per_node, "task"), count(profile.cpus_per_task, "CPU")
    gpus, nodes = count(profile.gpus_per_node, "GPU"), count(profile.nodes, "node")
    shape = f"{nodes} with {gpus}, {profile.mem_gb:g} GB and {tasks} of {cpus}"
    lines = []
    for chunk in arrays(todo.runs):
        at_once = min(profile.array_parallelism, len(chunk))
        lines.append(f"array of {count(len(chunk), 'run')}, {at_once} at a time, each on {shape}, {profile.time} long")
        lines += [f"  {i:>3}  {run.spec.run_id}  {label(run)}" for i, run in enumerate(chunk)]
    reasons = Counter(why.partition(" as job")[0] for why in todo.left.values())
    lines += [f"not submitted: {n} {why}" for why, n in reasons.items()]
    if todo.runs:
        lines.append(
            f"about {_hours(todo.hours)} {profile.device} hours in all; runs in {runtime.runs_dir}, "
            f"partition {profile.partition or 'of the cluster'}"
        )
    return lines


def as_dict(profile: Profile, todo: Submission) -> dict[str, Any]:
    """The same for --json."""
    return {
        "arrays": [
            {
                "runs": [run.spec.run_id for run in chunk],
                "parallelism": min(profile.array_parallelism, len(chunk)),
                "partition": profile.partition,
                "minutes": profile.minutes,
                "nodes": profile.nodes,
                "tasks_per_node": profile.tasks_per_node,
                "gpus_per_node": profile.gpus_per_node,
                "cpus_per_task": profile.cpus_per_task,
                "mem_gb": profile.mem_gb,
            }
            for chunk in arrays(todo.runs)
        ],
        "left": todo.left,
        "device": profile.device,
        "hours": todo.hours,
    }


def arrays(runs: Sequence[Run]) -> list[Sequence[Run]]:
    """A profile is one resource shape, so one array, unless it is longer than SLURM takes."""
    return [runs[i : i + MAX_ARRAY] for i in range(0, len(runs), MAX_ARRAY)]


def _hours(hours: float) -> str:
    return f"{hours:,.1f}" if hours >= 1 else f"{hours:.2g}"


def confirm(profile: Profile, hours: float) -> bool:
    """Ask a person before much is submitted.

    Raises:
        UserError: there is nobody to ask.
    """
    if hours <= profile.ask_above_hours:
        return True
    much = f"{_hours(hours)} {profile.device} hours are more than ask_above_hours={profile.ask_above_hours:g}"
    if not sys.stdin.isatty():
        raise UserError(f"{much}: launch with --yes to submit them all the same")
    return input(f"{much}. Submit? [y/N] ").strip().lower() in ("y", "yes")
