"""The scheduling loop of a launch: runs in order, side by side, each started at most once.

It asks one thing of an executor and three of its jobs, so that it does not know where workers run. What became of a run
is read from its directory and the worker's exit code: 0 done (or held by another process), 3 interrupted on request,
anything else a failure.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

from experiments.display import Display, Snapshot
from experiments.failures import Marks, marks_of, noted_failure, why_it_failed
from experiments.rundir import INTERRUPTED_CODE, RunDir
from experiments.settings import Run
from experiments.status import RunStatus, count, duration, loss_text, read_status, sweep_eta

POLL_S = 0.1
Outcome = Literal["waiting", "running", "final", "diverged", "failed", "skipped", "interrupted"]
GIVEN_UP = ("failed", "skipped")  # by this launch


class Job(Protocol):
    """A worker that was started."""

    def poll(self) -> int | None:
        """Exit code (negative: the signal that killed it), or None while it works."""

    def terminate(self) -> None:
        """Ask it to save and stop."""

    def kill(self) -> None:
        """End it at once."""


class Executor(Protocol):
    """Whatever starts workers."""

    capacity: int

    def start(self, run_dir: RunDir) -> Job:
        """Start the worker of a run; called for at most `capacity` runs at a time."""


@dataclass(frozen=True)
class Failure:
    """A run that a worker could not finish."""

    run_id: str
    label: str
    error: str
    log: Path


@dataclass(frozen=True)
class LaunchReport:
    """What became of every run, by run_id."""

    final: tuple[str, ...]
    diverged: tuple[str, ...]
    failed: tuple[Failure, ...]
    skipped: tuple[str, ...]
    """Held by another process."""
    interrupted: tuple[str, ...]
    """Saved part-way: the next launch goes on from there."""
    not_started: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """0 all done; 130 interrupted; 1 something failed or is still held by another process."""
        if self.interrupted or self.not_started:
            return 130
        return 1 if self.failed or self.skipped else 0


@dataclass
class Task:
    """A run on its way through one launch."""

    run: Run
    run_dir: RunDir
    row: RunStatus
    outcome: Outcome
    error: str = ""
    began: float = 0.0
    marks: Marks = (0, 0)


@dataclass
class Stop:
    """How often the user has asked to stop: once saves, twice kills."""

    asked: int = 0


@dataclass
class Sweep:
    """The scheduling loop: tasks in order, as many at a time as the executor takes."""

    tasks: list[Task]
    executor: Executor
    display: Display
    began: float = field(default_factory=time.monotonic)

    def run(self, stop: Stop) -> None:
        """Work until every task has an outcome, or until asked to stop and all workers have ended."""
        waiting = deque(task for task in self.tasks if task.outcome == "waiting")
        working: list[tuple[Task, Job]] = []
        told = 0
        try:
            while working or (waiting and not stop.asked):
                while waiting and len(working) < self.executor.capacity and not stop.asked:
                    task = waiting.popleft()
                    if self._is_free(task):
                        working.append((task, self._start(task)))
                if stop.asked > told:
                    told = stop.asked
                    self._stop(working, kill=told > 1)
                for task, job in list(working):
                    code = job.poll()
                    if code is not None:
                        working.remove((task, job))
                        self._end(task, code, stopping=told > 0)
                self.display.refresh(self.snapshot)
                time.sleep(POLL_S)
        finally:
            # Empty unless this loop itself failed: then nothing should go on without it.
            for _, job in working:
                job.terminate()

    def snapshot(self) -> Snapshot:
        """The sweep now; reads the files of running runs only."""
        for task in self.tasks:
            if task.outcome == "running":
                task.row = read_status(task.run, task.run_dir, "running")
        of = [task.outcome for task in self.tasks]
        return Snapshot(
            total=len(of),
            done=of.count("final") + of.count("diverged"),
            left=of.count("waiting") + of.count("interrupted"),
            failed=of.count("failed"),
            elapsed_s=time.monotonic() - self.began,
            eta_s=sweep_eta([t.row for t in self.tasks if t.outcome not in GIVEN_UP], self.executor.capacity),
            running=[task.row for task in self.tasks if task.outcome == "running"],
        )

    def report(self) -> LaunchReport:
        """Outcomes, once `run` is over."""

        def ids(outcome: Outcome) -> tuple[str, ...]:
            return tuple(task.row.run_id for task in self.tasks if task.outcome == outcome)

        failed = [
            Failure(task.row.run_id, task.row.label, task.error, task.run_dir.path / "train.log")
            for task in self.tasks
            if task.outcome == "failed"
        ]
        return LaunchReport(
            ids("final"), ids("diverged"), tuple(failed), ids("skipped"), ids("interrupted"), ids("waiting")
        )

    def _is_free(self, task: Task) -> bool:
        """Look once more before starting: another launch may have come first."""
        state = task.run_dir.state()
        if state == "running":
            task.outcome = "skipped"
            self.display.say(f"skip  {task.row.label}: another process is at it")
        elif state in ("final", "diverged"):
            self._settle(task)
        return task.outcome == "waiting"

    def _start(self, task: Task) -> Job:
        task.marks = marks_of(task.run_dir)
        task.began = time.monotonic()
        job = self.executor.start(task.run_dir)
        task.outcome = "running"
        self.display.begin(task.row.label)
        return job

    def _stop(self, working: list[tuple[Task, Job]], *, kill: bool) -> None:
        workers = count(len(working), "worker")
        self.display.say(
            f"killing {workers}" if kill else f"stopping: {workers} to finish a step and save; Ctrl-C again kills"
        )
        for _, job in working:
            if kill:
                job.kill()
            else:
                job.terminate()

    def _end(self, task: Task, code: int, *, stopping: bool) -> None:
        seconds = time.monotonic() - task.began
        fresh = task.marks[0] == 0
        if code == INTERRUPTED_CODE or (stopping and (code < 0 or code > 128)):  # killed, or its processes were
            task.outcome = "interrupted"
            task.row = read_status(task.run, task.run_dir)
            said = f"stop  {task.row.label}: at step {task.row.step} of {task.row.steps}"
        elif code != 0:
            task.outcome, task.error = "failed", why_it_failed(task.run_dir, task.marks, code)
            if noted_failure(task.run_dir, task.marks) is None:
                with suppress(OSError):  # a killed worker could not say it, and `status` asks for it
                    task.run_dir.note_attempt("failed", error=task.error)
            said = f"FAIL  {task.row.label}: {task.error}"
        elif self._settle(task):
            if fresh and task.outcome == "final":
                task.row = replace(task.row, run_s=seconds)  # counts the start-up, which final.json leaves out
            said = f"done  {task.row.label}: valid loss {loss_text(task.row.loss)}"
            if task.outcome == "diverged":
                said = f"DIVERGED {task.row.label}: at step {task.row.step}"
        else:
            task.outcome = "skipped"
            said = f"skip  {task.row.label}: another process is at it"
        self.display.end(f"{said}, {duration(seconds)}", self.snapshot())

    def _settle(self, task: Task) -> bool:
        """Note the outcome that final.json tells; False if there is none."""
        row = read_status(task.run, task.run_dir)
        if row.state == "final" or row.state == "diverged":
            task.row, task.outcome = row, row.state
            return True
        return False


def new_task(run: Run, run_dir: RunDir) -> Task:
    """A run as a launch finds it: done, or waiting."""
    row = read_status(run, run_dir)
    outcome: Outcome = row.state if row.state == "final" or row.state == "diverged" else "waiting"
    return Task(run, run_dir, row, outcome)
