"""Where every run of a suite stands, read from its files: for people, for scripts, and for the launcher's display."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from heapq import heapify, heappop, heappush
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.plan import short
from experiments.pool import places
from experiments.rundir import RunDir, State, last_line, last_lines
from experiments.settings import Run, Runtime

RECENT_BYTES = 4096  # of a log: some fifty lines, enough for a steady rate and cheap to read often
UNKNOWN = "--"


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """One run as its files show it. None is unknown."""

    run_id: str
    label: str
    state: State
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

    @property
    def share_left(self) -> float:
        return 1 - self.step / self.steps


def label(run: Run) -> str:
    """A run's name for people: `allocation rho 0.80 seed 0`."""
    labels, words = run.labels, [run.labels.arm]
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
    step, loss, tokens_per_s, eta_s, run_s, error = 0, None, None, None, None, None
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
    )


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
    waiting = [row for row in rows if row.state in ("planned", "interrupted", "failed")]
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


def status(runs: Sequence[Run], runtime: Runtime) -> list[RunStatus]:
    """One row a run, in the suite's order. Creates nothing."""
    return [read_status(run, RunDir(Path(runtime.runs_dir) / run.spec.run_id)) for run in runs]


def as_dict(rows: Sequence[RunStatus], workers: int) -> dict[str, Any]:
    """For --json."""
    counts = Counter(row.state for row in rows)
    return {
        "counts": dict(counts),
        "workers": workers,
        "eta_s": sweep_eta(rows, workers),
        "runs": [asdict(row) for row in rows],
    }


def render(rows: Sequence[RunStatus], width: int) -> Table:
    """The table as people read it; a narrow one leaves out the names of the directories."""
    wide = width >= 100
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("run")  # the only one that may shrink
    table.add_column("state", no_wrap=True)
    for name in ("step", "loss", "tokens/s", "ETA"):
        table.add_column(name, justify="right", no_wrap=True)
    if wide:
        table.add_column("directory", no_wrap=True)
    styles = {"running": "cyan", "failed": "red", "diverged": "red", "final": "green", "interrupted": "yellow"}
    for row in rows:
        table.add_row(
            Text(row.label, no_wrap=True, overflow="crop"),
            Text(row.state, style=styles.get(row.state, "")),
            f"{row.step}/{row.steps}",
            loss_text(row.loss),
            rate_text(row.tokens_per_s),
            duration(row.eta_s) if row.state == "running" else "",
            *([row.run_id] if wide else []),
        )
    return table


def print_status(runs: Sequence[Run], runtime: Runtime, *, as_json: bool = False) -> None:
    """Print where a suite stands: a table and what failed, or JSON."""
    rows, workers = status(runs, runtime), len(places(runtime))
    if as_json:
        print(json.dumps(as_dict(rows, workers), indent=1, allow_nan=False))
        return
    # What is piped into a file keeps its columns.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(render(rows, console.width))
    counts = Counter(row.state for row in rows)
    order: tuple[State, ...] = ("final", "diverged", "running", "interrupted", "failed", "planned")
    print(f"{len(rows)} runs: {', '.join(f'{counts[state]} {state}' for state in order if counts[state])}")
    for row in rows:
        if row.state == "failed":
            print(f"failed: {row.label}: {row.error or 'no reason noted'}\n  log: {row.log}")
    if any(row.state not in ("final", "diverged") for row in rows):
        print(f"about {duration(sweep_eta(rows, workers))} left on {count(workers, 'worker')}")


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
