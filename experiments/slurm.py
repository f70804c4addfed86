"""A suite -> job arrays on a SLURM cluster, each run submitted once; and their cancelling.

What is missing is decided in `experiments.slurm_plan`, under a lock that two launches of one place share. What a job
does is in `experiments.slurm_job`.
"""

from __future__ import annotations

import secrets
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.filelock import check_locks, launch_lock
from experiments.frozen import FrozenCode, check_clean, freeze
from experiments.launch import check_disk
from experiments.pool import ROOT, thread_variables, worker_flags
from experiments.profiles import Profile, fit_runtime
from experiments.rundir import RunDir, last_line
from experiments.settings import Run, Runtime, UserError
from experiments.slurm_plan import arrays, decide, describe
from experiments.squeue import NAME, Record, available, cancel_jobs, jobs_of, record_of, write_record
from experiments.status import count, label

SAVE_MARGIN_S = 15.0  # between a worker's save and SLURM's kill: writing the pickle and asking to be requeued


def submit(
    runs: Sequence[Run],
    runtime: Runtime,
    shards: Path,
    profile: Profile,
    *,
    profile_name: str,
    flops_per_s: float,
    allow_dirty: bool,
) -> list[str]:
    """Give SLURM what is missing of a suite.

    Args:
        runs: the suite.
        runtime: where directories lie; the workers' settings.
        shards: the data they were planned for.
        profile: resources.
        profile_name: noted in the runs.
        flops_per_s: the budget's speed.
        allow_dirty: submit code that no commit holds.

    Returns:
        What was done, in lines.

    Raises:
        UserError: no SLURM, no working locks, dirty code, or sbatch refuses.
        SlurmSilent: SLURM does not answer.
        OSError: runs_dir cannot be written.
    """
    check_ready(profile, runtime, allow_dirty=allow_dirty)
    runs_dir = Path(runtime.runs_dir).resolve()
    check_disk(runs_dir, runs)
    check_locks(runs_dir)
    with launch_lock(runs_dir):
        todo = decide(runs, runs_dir, flops_per_s)
        if not todo.runs:
            return [*describe(profile, todo, runtime), "nothing to submit"]
        code = freeze(ROOT, runs_dir.parent / "code", allow_dirty=allow_dirty)
        said = []
        for chunk in arrays(todo.runs):
            id = _submit_array(chunk, runs_dir, shards.resolve(), runtime, profile, profile_name, code)
            said.append(f"submitted {count(len(chunk), 'run')} as job {id}, with the code of {code.path}")
    others = [why for why in todo.left.values() if why != "done"]
    if others:
        said.append(f"{count(len(others), 'run')} left as they are: {', '.join(sorted(set(others))[:5])}")
    return said


def check_ready(profile: Profile, runtime: Runtime, *, allow_dirty: bool) -> None:
    """Everything that can be refused before a question is asked.

    Raises:
        UserError: no SLURM or no submitit here, settings that contradict each other, or dirty code.
    """
    fit_runtime(profile, runtime)
    if not available():
        raise UserError("no squeue on this machine: launch --on slurm from a login node of the cluster")
    try:
        import submitit  # noqa: F401  # an extra of the package
    except ImportError:
        raise UserError("submitit is not installed: pip install -c constraints.txt -e '.[slurm]'") from None
    check_clean(ROOT, allow_dirty=allow_dirty)


def _submit_array(
    runs: Sequence[Run],
    runs_dir: Path,
    shards: Path,
    runtime: Runtime,
    profile: Profile,
    profile_name: str,
    code: FrozenCode,
) -> str:
    """One sbatch; returns the job's id."""
    from submitit import AutoExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    from experiments.slurm_job import PYTHON, RunJob

    submission = secrets.token_hex(4)
    logs = runs_dir / "slurm" / submission
    record = Record(
        submission=submission, index=0, job=None, time=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        profile=profile_name, logs=str(logs), commit=code.commit, dirty=code.dirty,
    )  # fmt: skip
    dirs = [RunDir.create(runs_dir, run) for run in runs]
    before = [record_of(run_dir) for run_dir in dirs]
    for i, run_dir in enumerate(dirs):
        write_record(run_dir, replace(record, index=i))
    # Named, since submitit by itself takes SLURM wherever it sees srun, reachable or not.
    executor = AutoExecutor(
        folder=logs, cluster="slurm", slurm_max_num_timeout=profile.max_requeues, slurm_python=shlex.join(PYTHON)
    )
    executor.update_parameters(**_parameters(profile, code, NAME + submission))
    told = fit_runtime(profile, runtime)
    job = RunJob(
        flags=worker_flags(told, shards),
        env=thread_variables(told),
        lock_wait_s=profile.lock_wait_s,
        save_within_s=max(profile.signal_delay_s - SAVE_MARGIN_S, 5.0),
    )
    try:
        jobs = executor.map_array(job, [str(run_dir.path) for run_dir in dirs])
    except (FailedJobError, FailedSubmissionError) as error:
        for run_dir, old in zip(dirs, before, strict=True):
            write_record(run_dir, old)
        raise UserError(f"sbatch refused: {' '.join(str(error).split())}: mend the profile {profile_name}") from error
    for i, (run_dir, submitted) in enumerate(zip(dirs, jobs, strict=True)):
        write_record(run_dir, replace(record, index=i, job=submitted.job_id))
    return jobs[0].job_id.partition("_")[0]


def _parameters(profile: Profile, code: FrozenCode, name: str) -> dict[str, Any]:
    """The profile in submitit's words."""
    path = shlex.quote(str(code.path))
    return {
        "name": name,
        "timeout_min": profile.minutes,
        "nodes": profile.nodes,
        "gpus_per_node": profile.gpus_per_node or None,
        "tasks_per_node": profile.tasks_per_node,
        "cpus_per_task": profile.cpus_per_task,
        "mem_gb": profile.mem_gb,
        "slurm_partition": profile.partition,
        "slurm_account": profile.account,
        "slurm_qos": profile.qos,
        "slurm_constraint": profile.constraint,
        "slurm_array_parallelism": profile.array_parallelism,
        "slurm_signal_delay_s": profile.signal_delay_s,
        # The job's own Python and the worker both import the copy: it stands before an installed `engram`.
        "slurm_setup": [*profile.setup, f"cd {path}", f"export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}"],
        # Since 22.05 srun does not take --cpus-per-task over from sbatch. One process that fails ends all of its run.
        "slurm_srun_args": [f"--cpus-per-task={profile.cpus_per_task}", "--kill-on-bad-exit=1"],
        # Some clusters forbid requeueing unless a job asks for it.
        "slurm_additional_parameters": {"requeue": True}
        | {key: value for key, value in profile.extra.items() if value is not False},
    }


def cancel(runs: Sequence[Run], runs_dir: Path) -> list[str]:
    """Take the jobs of these runs out of SLURM's queue; those at work save first.

    Returns:
        What was done, in lines.

    Raises:
        SlurmSilent: SLURM does not answer.
    """
    if not runs_dir.is_dir():
        return ["nothing to cancel"]
    dirs = {run.spec.run_id: RunDir(runs_dir / run.spec.run_id) for run in runs}
    with launch_lock(runs_dir):  # so that what another launch is just submitting is seen
        jobs = jobs_of(dirs.values())
        if jobs:
            cancel_jobs(job.id for job in jobs.values())
        for run_id in jobs:
            if (record := record_of(dirs[run_id])) is not None:
                write_record(dirs[run_id], replace(record, cancelled=True))
    phases = Counter(job.phase for job in jobs.values())
    said = [f"cancelled {' and '.join(f'{n} {phase}' for phase, n in phases.items())}"] if jobs else []
    said += [f"  job {jobs[r.spec.run_id].id}  {label(r)}" for r in runs if r.spec.run_id in jobs]
    for run in runs:
        run_id = run.spec.run_id
        if run_id not in jobs and dirs[run_id].state() == "running":
            last = last_line(dirs[run_id].path / "attempts.jsonl") or {}
            pid, host = last.get("pid", "?"), last.get("host", "?")
            said.append(
                f"not in SLURM: {label(run)}, trained by process {pid} on {host}; kill -TERM {pid} saves and ends it"
            )
    return said or ["nothing to cancel"]
