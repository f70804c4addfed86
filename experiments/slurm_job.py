"""What a SLURM job does: it starts the ordinary worker of one run, passes stop signals on, and asks to be requeued.

The worker is a process of its own, so that the signal handlers of submitit and those of the worker do not meet, and so
that the job outlives a worker that was killed and can say why.

How a job may be stopped, and what follows:

* USR2, before the time limit or a preemption: submitit calls `checkpoint`; the worker saves, the job is requeued and
  the next start goes on. SLURM sends USR2 at preemption only if its administrators set `preempt_send_user_signal`.
* TERM, from scancel, `scontrol requeue` or any other preemption: the worker saves, and the job waits for what SLURM
  does next, which is to kill it and perhaps to start it again.
* KILL, or a dead node: what was learnt since the last checkpoint is lost, nothing else.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from submitit.core.job_environment import JobEnvironment
from submitit.helpers import DelayedSubmission, TorchDistributedEnvironment

from experiments.failures import Marks, marks_of, noted_failure, why_it_failed
from experiments.pool import WORKER
from experiments.rundir import INTERRUPTED_CODE, PARENT_VARIABLE, RunDir

POLL_S = 0.2
MEETING_S = 240  # processes of one run give up on each other after 300 s (torch.distributed's store)
KILLED_WITHIN_S = 600  # of a TERM by SLURM: more than any usual KillWait and GraceTime

# While it was still starting: itself, or as a shell would put it.
ENDED_BY_TERM = (-signal.SIGTERM, 128 + signal.SIGTERM)


def deaf_to(*signals: str) -> tuple[str, ...]:
    """Put before a command, it keeps signals from ending it until it sets handlers of its own."""
    # What a shell ignores, the program that it becomes by exec ignores too.
    return ("sh", "-c", f'trap "" {" ".join(signals)}; exec "$@"', "sh")


# Until submitit has its handlers: a job that died of the signal of its preemption would have failed, not been requeued.
PYTHON = (*deaf_to("USR2", "TERM"), sys.executable)


@dataclass
class RunJob:
    """Trains one run: pickled by submitit at submission, called on the node at every start."""

    flags: Sequence[str]
    """The worker's arguments behind its run directory."""
    env: dict[str, str]
    lock_wait_s: float
    save_within_s: float
    """For the worker, between the signal and what must still follow before SLURM kills."""
    _worker: subprocess.Popen[bytes] | None = field(default=None, init=False)
    _marks: Marks = field(default=(0, 0), init=False)
    _told_by_slurm: bool = field(default=False, init=False)

    def __call__(self, run_path: str) -> str:
        """Train a run as far as possible.

        Args:
            run_path: its directory.

        Returns:
            The run's state.

        Raises:
            RuntimeError: the worker failed; in one line.
        """
        run_dir, job = RunDir(Path(run_path)), JobEnvironment()
        # A kill while submitit wrote it: the next one would be refused.
        job.paths.submitted_pickle.with_suffix(".pkl.save_tmp").unlink(missing_ok=True)
        signal.signal(signal.SIGTERM, self._pass_on)
        if job.global_rank == 0:
            self._wait_for_lock(run_dir, job.num_tasks)
        if run_dir.final() is not None:
            return run_dir.state()
        self._marks = marks_of(run_dir)
        self._start(run_dir, job)
        while (code := self._ended()) is None:
            time.sleep(POLL_S)
        if code == INTERRUPTED_CODE or (code in ENDED_BY_TERM and self._told_by_slurm):
            if self._told_by_slurm or job.global_rank != 0:
                # To end now would make a preempted job count as completed, or cut the first process's requeueing short.
                time.sleep(KILLED_WITHIN_S)
            return run_dir.state()
        return self._outcome(run_dir, code, is_first=job.global_rank == 0)

    def checkpoint(self, run_path: str) -> DelayedSubmission:
        """Submitit's hook, called inside its handler of USR2 in the run's first process: save, then be requeued."""
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # one is enough; a second would begin all this again
        run_dir, code = RunDir(Path(run_path)), None
        again = DelayedSubmission(self, run_path)
        if self._worker is None:
            return again
        self._stop_worker(signal.SIGTERM)
        give_up = time.monotonic() + self.save_within_s
        while (code := self._ended()) is None and time.monotonic() < give_up:
            time.sleep(POLL_S)
        if code is None:
            print(f"the worker has not saved within {self.save_within_s:.0f} s: it goes on from its last checkpoint")
            self._stop_worker(signal.SIGKILL)
        elif code == 0 and run_dir.final() is not None:
            raise SystemExit(0)  # that was its last step: nothing to requeue
        elif code != INTERRUPTED_CODE and code not in ENDED_BY_TERM:
            self._outcome(run_dir, code, is_first=True)
        return again

    def _wait_for_lock(self, run_dir: RunDir, n_tasks: int) -> None:
        """Give a process of a former start time to end, as after a node was out of reach."""
        patience = min(self.lock_wait_s, MEETING_S) if n_tasks > 1 else self.lock_wait_s
        give_up = time.monotonic() + patience
        while run_dir.is_locked() and run_dir.final() is None:
            if time.monotonic() > give_up:
                raise RuntimeError(f"{run_dir.path.name} is still being trained by another process: left to it")
            time.sleep(min(1.0, POLL_S * 5))

    def _start(self, run_dir: RunDir, job: JobEnvironment) -> None:
        env = os.environ | self.env | {PARENT_VARIABLE: str(os.getpid())}
        name = "train.log"
        if job.num_tasks > 1:
            team = TorchDistributedEnvironment()
            env |= {
                "RANK": str(team.rank),
                "LOCAL_RANK": str(team.local_rank),
                "WORLD_SIZE": str(team.world_size),
                "MASTER_ADDR": team.master_addr,
                "MASTER_PORT": str(team.master_port),
            }
            # Several nodes that append to one file overwrite each other on NFS.
            name = "train.log" if team.rank == 0 else f"train.{team.rank}.log"
        with open(run_dir.path / name, "ab") as log:
            self._worker = subprocess.Popen(
                # SLURM may send USR2 to all processes of a job; proctrack/linuxproc does.
                [*deaf_to("USR2"), *WORKER, str(run_dir.path), *self.flags],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _ended(self) -> int | None:
        """Exit code of the worker, negative for a signal, or None.

        It is looked at and left there, because this is asked inside a signal handler as well: Popen's own methods take
        a lock that the interrupted code may hold.
        """
        assert self._worker is not None
        found = os.waitid(os.P_PID, self._worker.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def _stop_worker(self, number: signal.Signals) -> None:
        if self._worker is not None and self._ended() is None:
            os.kill(self._worker.pid, number)

    def _pass_on(self, *_: object) -> None:
        self._told_by_slurm = True
        self._stop_worker(signal.SIGTERM)

    def _outcome(self, run_dir: RunDir, code: int, *, is_first: bool) -> str:
        """The state of a run whose worker ended by itself.

        Raises:
            RuntimeError: it failed.
        """
        if code != 0:
            error = why_it_failed(run_dir, self._marks, code)
            if is_first and noted_failure(run_dir, self._marks) is None:
                run_dir.note_attempt("failed", error=error)  # so that `status` knows, too
            raise RuntimeError(error)
        if is_first and run_dir.final() is None:
            raise RuntimeError(f"{run_dir.path.name} is being trained by another process: left to it")
        return run_dir.state()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if not key.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # what is left out belongs to one start
