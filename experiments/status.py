"""Where a run stands, read from its files and from what SLURM says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heappop, heappush
from pathlib import Path
from statistics import fmean
from typing import Literal

from experiments.failures import last_words
from experiments.plan import short
from experiments.rundir import RunDir, State, last_line, last_lines
from experiments.settings import Run, UserError
from experiments.squeue import Job, record_of

RunState = State | Literal["queued", "requeued", "starting"]
"""With what only SLURM knows: waiting for the first time, waiting once more, a job whose worker is still to come."""

WAITING: tuple[RunState, ...] = ("planned", "queued", "requeued", "starting", "interrupted", "failed")
RECENT_BYTES = 4096  # of a log: some fifty lines, enough for a steady rate and cheap to read often
UNKNOWN = "--"


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One run as its files show it. None is unknown."""

    run_id: str
    label: str
    state: RunState
    step: int
    steps: int
    loss: float | None
    """Nats per token: on validation text if the run is final, else the last one written."""
    tokens_per_s: float | None
    eta_s: float | None
    """Seconds until a running run ends."""
    run_s: float | None
    """Seconds of the whole run: measured if it is final, extrapolated if it runs."""
    error: str | None
    """Why the last attempt failed."""
    log: str
    job: str | None = None
    """The SLURM job that has it now, or had it last."""
    slurm: str | None = None
    """SLURM's word for that job's state; None once it has left the queue."""
    host: str | None = None
    """Where it runs, or why it waits."""

    @property
    def share_left(self) -> float:
        return 1 - self.step / self.steps


def label(run: Run) -> str:
    """A run's name for people: `allocation rho 0.80 seed 0`."""
    labels, words = run.labels, [run.labels.arm]
    if labels.variant is not None:
        words.append(labels.variant)
    if labels.mode == "strict":
        words.append("strict")
    if labels.rho_target is not None:
        rho = labels.rho_target
        words.append(f"rho {rho:.2f}" if round(rho, 2) == rho else f"rho {rho:g}")
    return " ".join([*words, f"seed {run.spec.seed}"])


def read_status(run: Run, run_dir: RunDir, state: State | None = None) -> RunStatus:
    """Read a run's files, of logs the last lines only.

    Args:
        run: what was planned.
        run_dir: its directory, which need not exist.
        state: known to the caller; None asks the files.

    Raises:
        UserError: final.json is damaged.
    """
    state = state or run_dir.state()
    train = run.spec.train
    step, loss, tokens_per_s, eta_s, run_s, error, host = 0, None, None, None, None, None, None
    if state in ("final", "diverged"):
        final = run_dir.final()
        assert final is not None
        result, cost = final["result"], final["cost"]
        step, tokens_per_s = result["steps"], cost["tokens_per_s"]
        if state == "final":
            loss, run_s = result["valid_loss"], cost["seconds"]
    elif state != "planned":
        lines = last_lines(run_dir.path / "metrics.jsonl", RECENT_BYTES)
        if lines:
            step, loss = lines[-1]["step"], lines[-1]["loss"]
    if state == "running" and (steps_per_s := _steps_per_s(run_dir.path, train.batch_tokens)):
        tokens_per_s = steps_per_s * train.batch_tokens
        eta_s, run_s = (train.steps - step) / steps_per_s, train.steps / steps_per_s
    if state == "running":
        host = (last_line(run_dir.path / "attempts.jsonl") or {}).get("host")
    if state == "failed":
        error = (last_line(run_dir.path / "attempts.jsonl") or {}).get("error")
    return RunStatus(
        run_id=run.spec.run_id,
        label=label(run),
        state=state,
        step=step,
        steps=train.steps,
        loss=loss if loss is not None and math.isfinite(loss) else None,
        tokens_per_s=tokens_per_s,
        eta_s=eta_s,
        run_s=run_s,
        error=error,
        log=str(run_dir.path / "train.log"),
        host=host,
    )


def look(run: Run, run_dir: RunDir) -> RunStatus:
    """The same for whoever shows all runs of a suite: a damaged one counts as failed, and hides no other."""
    try:
        return read_status(run, run_dir)
    except UserError as error:
        return replace(read_status(run, run_dir, "failed"), error=str(error))


def add_job(row: RunStatus, job: Job | None, run_dir: RunDir) -> RunStatus:
    """What SLURM adds to what a run's files show."""
    if (record := record_of(run_dir)) is None:
        return row
    row = replace(row, job=job.id if job else record.job)
    if row.state in ("final", "diverged"):
        return row
    if job is not None:
        row = replace(row, slurm=job.state, host=job.host)
        if row.state == "running" or job.phase == "ending":
            return row
        return replace(row, state="starting" if job.phase == "running" else job.phase, error=None)
    if row.state in ("planned", "interrupted") and record.job is not None and not record.cancelled:
        last = last_line(run_dir.path / "attempts.jsonl") or {"event": "start", "time": "", "job": None}
        # The job that had the run is gone. Its worker says when it saves or fails; if this one did not, it was killed,
        # or the job never came as far as starting one.
        if last["time"] < record.time or (last["event"] == "start" and last.get("job") == record.job):
            assert record.log is not None
            error = last_words(record.log) or f"job {record.job} has left the queue without a word"
            return replace(row, state="failed", error=error, log=str(record.log))
    return row


def _steps_per_s(path: Path, batch_tokens: int) -> float | None:
    """Recent rate of the attempt that runs now; None before its first step."""
    timing, attempts = path / "timing.jsonl", path / "attempts.jsonl"
    if not (timing.exists() and attempts.exists()) or timing.stat().st_mtime < attempts.stat().st_mtime:
        return None  # what is there was written before this attempt began
    lines = last_lines(timing, RECENT_BYTES)
    # An attempt starts its clock at 0: keep what follows the last fall.
    falls = [i for i in range(1, len(lines)) if lines[i]["seconds"] < lines[i - 1]["seconds"]]
    lines = lines[falls[-1] if falls else 0 :]
    if not lines:
        return None
    first, last = lines[0], lines[-1]
    if last["seconds"] > first["seconds"]:
        return float((last["step"] - first["step"]) / (last["seconds"] - first["seconds"]))
    return float(last["tokens_per_s"] / batch_tokens)


def sweep_eta(rows: Sequence[RunStatus], workers: int) -> float | None:
    """Seconds until all rows are done if `workers` take them in order; None until a run's length is known.

    Finished runs tell how long one takes; before there are any, the running ones do.
    """
    running = [row for row in rows if row.state == "running"]
    waiting = [row for row in rows if row.state in WAITING]
    lengths = [row.run_s for row in rows if row.state == "final" and row.run_s is not None]
    lengths = lengths or [row.run_s for row in running if row.run_s is not None]
    if not running and not waiting:
        return 0.0
    if not lengths:
        return None
    mean_s = fmean(lengths)
    ends = [row.eta_s if row.eta_s is not None else row.share_left * mean_s for row in running]
    ends += [0.0] * (workers - len(ends))
    heapify(ends)
    last = max(ends)
    for row in waiting:
        end = heappop(ends) + row.share_left * mean_s
        last = max(last, end)
        heappush(ends, end)
    return last


def count(number: int, noun: str) -> str:
    """`1 run`, `2 runs`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float | None) -> str:
    """Two units at most: 45s, 3m20s, 1h02m, 2d03h."""
    if seconds is None:
        return UNKNOWN
    whole = round(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small:02d}{small_unit}"
    return f"{whole}s"


def loss_text(loss: float | None) -> str:
    """Four decimals."""
    return UNKNOWN if loss is None else f"{loss:.4f}"


def rate_text(tokens_per_s: float | None) -> str:
    """Three significant digits and a letter."""
    return UNKNOWN if tokens_per_s is None else short(tokens_per_s)
