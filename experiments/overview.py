"""Where a suite stands: printed once, watched, or as JSON."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from experiments.pool import places
from experiments.rundir import RunDir
from experiments.settings import Run, Runtime
from experiments.squeue import SlurmSilent, jobs_of
from experiments.status import (
    WAITING,
    RunState,
    RunStatus,
    add_job,
    count,
    duration,
    look,
    loss_text,
    rate_text,
    sweep_eta,
)

WATCH_S = 5.0  # SLURM's controller is asked as often
WATCH_PLAIN_S = 30.0
STYLES = {
    "running": "cyan",
    "starting": "cyan",
    "failed": "red",
    "diverged": "red",
    "final": "green",
    "interrupted": "yellow",
    "requeued": "yellow",
}
ORDER: tuple[RunState, ...] = (
    "final",
    "diverged",
    "running",
    "starting",
    "queued",
    "requeued",
    "interrupted",
    "failed",
    "planned",
)


@dataclass(frozen=True)
class Overview:
    """A suite at one moment."""

    rows: Sequence[RunStatus]
    workers: int
    """Runs that go on side by side: in SLURM those at work now, else what fits this machine."""
    silent: str = ""
    """Why SLURM did not answer, if there was something to ask."""

    @property
    def done(self) -> bool:
        return all(row.state in ("final", "diverged") for row in self.rows)


def overview(runs: Sequence[Run], runtime: Runtime) -> Overview:
    """Look at every run, in the suite's order. Creates nothing."""
    dirs = [RunDir(Path(runtime.runs_dir) / run.spec.run_id) for run in runs]
    try:
        jobs, silent = jobs_of(dirs), ""
    except SlurmSilent as error:
        jobs, silent = {}, str(error)
    rows = []
    for run, run_dir in zip(runs, dirs, strict=True):
        row, job = look(run, run_dir), jobs.get(run.spec.run_id)
        rows.append(row if silent else add_job(row, job, run_dir))
    at_work = sum(row.state in ("running", "starting") for row in rows)
    return Overview(rows, max(1, at_work) if jobs else len(places(runtime)), silent)


def as_dict(now: Overview) -> dict[str, Any]:
    """For --json."""
    counts = Counter(row.state for row in now.rows)
    return {
        "counts": dict(counts),
        "workers": now.workers,
        "eta_s": sweep_eta(now.rows, now.workers),
        "slurm_silent": now.silent or None,
        "runs": [asdict(row) for row in now.rows],
    }


def render(rows: Sequence[RunStatus], width: int) -> Table:
    """The table as people read it; a narrow one leaves out the names of directories and hosts."""
    wide = width >= 100
    in_slurm = any(row.slurm for row in rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("run")  # the only one that may shrink
    table.add_column("state", no_wrap=True)
    for name in ("step", "loss", "tokens/s", "ETA"):
        table.add_column(name, justify="right", no_wrap=True)
    if in_slurm:
        table.add_column("job", no_wrap=True)
    if wide and in_slurm:
        table.add_column("host", no_wrap=True, max_width=24)
    if wide:
        table.add_column("directory", no_wrap=True)
    for row in rows:
        table.add_row(
            Text(row.label, no_wrap=True, overflow="crop"),
            Text(row.state, style=STYLES.get(row.state, "")),
            f"{row.step}/{row.steps}",
            loss_text(row.loss),
            rate_text(row.tokens_per_s),
            duration(row.eta_s) if row.state == "running" else "",
            *([row.job if row.slurm else ""] if in_slurm else []),
            *([row.host or ""] if wide and in_slurm else []),
            *([row.run_id] if wide else []),
        )
    return table


def footer(now: Overview) -> list[str]:
    """Counts, what failed and why, and how long the rest will take."""
    counts = Counter(row.state for row in now.rows)
    said = [f"{len(now.rows)} runs: {', '.join(f'{counts[state]} {state}' for state in ORDER if counts[state])}"]
    for row in now.rows:
        if row.state == "failed":
            said.append(f"failed: {row.label}: {row.error or 'no reason noted'}\n  log: {row.log}")
    if any(row.state in (*WAITING, "running") for row in now.rows):
        eta = duration(sweep_eta(now.rows, now.workers))
        said.append(f"about {eta} left on {count(now.workers, 'worker')}")
    if now.silent:
        said.append(f"SLURM does not answer, states are from files alone: {now.silent}")
    return said


def print_status(runs: Sequence[Run], runtime: Runtime, *, as_json: bool = False) -> None:
    """Print where a suite stands: a table and what failed, or JSON."""
    now = overview(runs, runtime)
    if as_json:
        print(json.dumps(as_dict(now), indent=1, allow_nan=False))
        return
    # What is piped into a file keeps its columns.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(render(now.rows, console.width))
    print("\n".join(footer(now)), flush=True)


def watch(runs: Sequence[Run], runtime: Runtime) -> None:
    """Show it again and again until all is done or Ctrl-C: in place on a terminal, else as one table after another."""
    console = Console()
    try:
        if not console.is_terminal or console.is_dumb_terminal:
            print_status(runs, runtime)
            while not overview(runs, runtime).done:
                time.sleep(WATCH_PLAIN_S)
                print_status(runs, runtime)
            return
        with Live(console=console, auto_refresh=False) as live:
            while True:
                now = overview(runs, runtime)
                text = Text("\n".join(footer(now)), overflow="ellipsis")
                live.update(Group(render(now.rows, console.width), text), refresh=True)
                if now.done:
                    return
                time.sleep(WATCH_S)
    except KeyboardInterrupt:
        return
