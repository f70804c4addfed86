"""A suite -> finished runs on this machine: checks first, then the sweep, then what became of it."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from engram.counting import count_params
from experiments.display import open_display
from experiments.pool import WORKER, LocalPool
from experiments.rundir import RunDir
from experiments.settings import Run, Runtime
from experiments.status import count, duration, label
from experiments.sweep import LaunchReport, Stop, Sweep, new_task

PROBE_BYTES = 1 << 20


def launch(
    runs: Sequence[Run],
    runtime: Runtime,
    worker_flags: Sequence[str],
    command: Sequence[str] = WORKER,
    elsewhere: Collection[str] = (),
) -> LaunchReport:
    """Train what is not done yet, side by side, and say how it went.

    SIGINT or SIGTERM stops: workers save and end, and the next launch goes on from there. A second one kills them.

    Args:
        runs: a suite, in the order to start.
        runtime: where directories lie, how many workers, their threads.
        worker_flags: put behind the run directory on a worker's command line.
        command: what comes before it.
        elsewhere: run_ids that are left alone, since a cluster has them queued or at work.

    Raises:
        UserError: a run directory holds another spec, or the settings make no sense.
        OSError: runs_dir cannot be written, or the disk is too full.
    """
    runs_dir = Path(runtime.runs_dir)
    with stop_signals() as stop:
        pool = LocalPool(runtime, worker_flags, command)
        check_disk(runs_dir, runs)
        tasks = [new_task(run, RunDir.create(runs_dir, run)) for run in runs]
        for task in tasks:
            if task.outcome == "waiting" and task.run.spec.run_id in elsewhere:
                task.outcome = "skipped"
        outcomes = [task.outcome for task in tasks]
        to_do, queued = outcomes.count("waiting"), outcomes.count("skipped")
        done_before = len(runs) - to_do - queued
        if to_do:
            workers = count(min(pool.capacity, to_do), "worker")
            before = f"{done_before} done before, " if done_before else ""
            before += f"{queued} left to SLURM, " if queued else ""
            print(f"{count(len(runs), 'run')} in {runs_dir}: {before}{to_do} to do with {workers}", flush=True)
        display = open_display()
        sweep = Sweep(tasks, pool, display)
        try:
            sweep.run(stop)
        finally:
            display.close()
    report = sweep.report()
    print(summary(report, runs, done_before, seconds=time.monotonic() - sweep.began), flush=True)
    return report


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """Count SIGINT and SIGTERM instead of dying of them."""
    stop = Stop()

    def note(*_: object) -> None:
        stop.asked += 1

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def check_disk(runs_dir: Path, runs: Sequence[Run]) -> None:
    """Find out before any work that results could not be written.

    Raises:
        OSError: no directory, not writable, full, or less space than the weights alone will take.
    """
    remedy = "free space, or choose another place with runtime.runs_dir=DIR"
    try:
        runs_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=runs_dir) as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())  # some file systems find out only then
    except OSError as error:
        raise OSError(f"cannot write to {runs_dir}: {error.strerror}; {remedy}") from error
    # A lower bound: a checkpoint also holds the optimisers' state, whose size their kind decides.
    written = ("checkpoint", "final.json")
    new = [run for run in runs if not any((runs_dir / run.spec.run_id / name).exists() for name in written)]
    needed = sum(4 * count_params(run.spec.model).total for run in new)
    free = shutil.disk_usage(runs_dir).free
    if free < needed:
        raise OSError(
            f"{runs_dir} has {free / 2**30:.1f} GiB free, but the weights of {count(len(new), 'run')} alone take "
            f"{needed / 2**30:.1f} GiB: {remedy}"
        )


def summary(report: LaunchReport, runs: Sequence[Run], done_before: int, seconds: float) -> str:
    """What a launch leaves the user with: counts, then every run that needs attention."""
    name = {run.spec.run_id: label(run) for run in runs}
    done = len(report.final) + len(report.diverged)
    how = "all done before" if done_before == len(runs) else f"{done - done_before} now, in {duration(seconds)}"
    lines = [f"{done} of {count(len(runs), 'run')} done ({how})"]
    lines += [f"diverged: {name[run_id]}" for run_id in report.diverged]
    lines += [f"failed: {failure.label}: {failure.error}\n  log: {failure.log}" for failure in report.failed]
    lines += [f"left to another process: {name[run_id]}" for run_id in report.skipped]
    if report.failed:
        lines.append(f"{count(len(report.failed), 'run')} failed: launch again once what is said of them is mended")
    if report.interrupted or report.not_started:
        stopped, rest = len(report.interrupted), len(report.not_started)
        lines.append(f"interrupted: {stopped} stopped part-way, {rest} not started; the same command goes on from here")
    return "\n".join(lines)
