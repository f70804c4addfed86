"""One worker: trains one run directory, alone or as one of several processes.

With `runtime.processes` above 1, and not already started as one of them, the worker starts them and waits. torchrun, or
a SLURM job, may do the same: what counts are the variables RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

Exit codes: 0 done, or left to another process; 3 interrupted, saved and resumable; 1 and 2 as everywhere.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from experiments.parallel import Team
from experiments.rundir import INTERRUPTED_CODE, PARENT_VARIABLE, RunBusy, RunDir, last_lines
from experiments.settings import Runtime
from experiments.shards import Shards
from experiments.train import train

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_POLL_S = 0.05
_GRACE_S = 10.0  # for the others, once one process of a run has failed


def work(run_dir: RunDir, shards_path: Path, runtime: Runtime) -> int:
    """Train a run from wherever it stands; return the exit code.

    Raises:
        UserError: the run, its shards or the settings make no sense.
        OSError: a file could not be written.
    """
    run_dir.load()
    if runtime.processes > 1 and "RANK" not in os.environ:
        return _start_team(run_dir, sys.argv, runtime.processes)
    stop = StopFlag()
    try:
        with ExitStack() as held, Team(runtime).joined() as team:
            busy = ""
            if team.is_first:
                try:
                    held.enter_context(run_dir.owned())
                except RunBusy as error:
                    busy = str(error)
            if busy := team.share(busy):
                if team.is_first:
                    print(busy)
                return 0
            outcome = train(run_dir, Shards(shards_path), runtime, stop, team)
            if team.is_first:
                print(f"{run_dir.path}: {outcome}")
            return INTERRUPTED_CODE if outcome == "interrupted" else 0
    except Exception as error:
        with suppress(OSError):  # a full disk is often why we are here
            text = f"{type(error).__name__}: {error}".splitlines()[0]
            run_dir.note_attempt("failed", error=text, rank=int(os.environ.get("RANK", "0")))
        raise


class StopFlag:
    """True once a stop signal has come, or the worker that started this process has gone: then a step is finished and
    saved."""

    def __init__(self) -> None:
        self.asked = False
        self.parent = os.environ.get(PARENT_VARIABLE)
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        self.asked = True

    def __call__(self) -> bool:
        return self.asked or (self.parent is not None and self.parent != str(os.getppid()))


def _start_team(run_dir: RunDir, argv: Sequence[str], n_processes: int) -> int:
    """Run this command once a rank on this machine; pass stop signals on; end all if one fails, and say which did."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(n_processes)}
    place[PARENT_VARIABLE] = str(os.getpid())
    command = [sys.executable, "-m", "experiments", *argv[1:]]
    ranks = [
        subprocess.Popen(command, env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(n_processes)
    ]

    def pass_on(number: int, _: object) -> None:
        ranks[0].send_signal(number)  # the processes agree on stopping after each step

    for number in STOP_SIGNALS:
        signal.signal(number, pass_on)
    culprit: tuple[int, int] | None = None
    give_up = float("inf")
    try:
        while None in (codes := [rank.poll() for rank in ranks]) and time.monotonic() < give_up:
            if culprit is None and (culprit := _first_failed(codes)) is not None:
                give_up = time.monotonic() + _GRACE_S  # the others may be about to say why, or be stuck
            time.sleep(_POLL_S)
    finally:
        for rank in ranks:
            rank.kill()  # nothing to one that has ended
    codes = [rank.wait() for rank in ranks]
    culprit = culprit or _first_failed(codes)
    if culprit is None:
        return max(code for code in codes if code is not None)
    _note_culprit(run_dir, *culprit, n_processes)
    return culprit[1] if culprit[1] >= 0 else 128 - culprit[1]


def _first_failed(codes: Sequence[int | None]) -> tuple[int, int] | None:
    """Rank and exit code; of several at once rather one that a signal killed, which the others then fell over."""
    failed = [(code, rank) for rank, code in enumerate(codes) if code not in (None, 0, INTERRUPTED_CODE)]
    return min(((rank, code) for code, rank in failed if code is not None), key=lambda pair: pair[1] >= 0, default=None)


def _note_culprit(run_dir: RunDir, rank: int, code: int, n_processes: int) -> None:
    """Let the last note be about the process that failed first: the others only say that a peer is gone."""
    if code < 0:
        name = signal.strsignal(-code)
        error = f"process {rank} of {n_processes} was killed by signal {-code} ({name})"
    else:
        notes = [note for note in last_lines(run_dir.path / "attempts.jsonl") if note["event"] == "failed"]
        own = [str(note["error"]) for note in notes if note.get("rank") == rank]
        error = own[-1] if own else f"process {rank} of {n_processes} ended with code {code}"
    with suppress(OSError):
        run_dir.note_attempt("failed", error=error, rank=rank)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
