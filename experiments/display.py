"""What a person sees while a sweep runs: a live block in a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from experiments.status import RunStatus, duration, loss_text, rate_text

REFRESH_S = 0.5
HEARTBEAT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The sweep at one moment."""

    total: int
    done: int
    left: int
    """Neither started nor done."""
    failed: int
    elapsed_s: float
    eta_s: float | None
    running: Sequence[RunStatus]


class Display(Protocol):
    """Where the launcher tells what happens."""

    def begin(self, text: str) -> None:
        """A run starts."""

    def end(self, text: str, now: Snapshot) -> None:
        """A run has ended."""

    def say(self, text: str) -> None:
        """Anything that should stay readable."""

    def refresh(self, look: Callable[[], Snapshot]) -> None:
        """Called often; calls `look` only when it is time to show something."""

    def close(self) -> None:
        """The sweep is over."""


def open_display() -> Display:
    """The live display if standard output is a terminal, else plain lines."""
    console = Console()
    return LiveDisplay(console) if console.is_terminal and not console.is_dumb_terminal else PlainDisplay()


class PlainDisplay:
    """One line when something happens, and one for every running run each half minute."""

    def __init__(self) -> None:
        self.next_beat = time.monotonic() + HEARTBEAT_S

    def begin(self, text: str) -> None:
        self.say(f"start {text}")

    def end(self, text: str, now: Snapshot) -> None:
        self.say(f"{text}, {now.done} of {now.total} done, sweep ETA {duration(now.eta_s)}")

    def say(self, text: str) -> None:
        print(text, flush=True)

    def refresh(self, look: Callable[[], Snapshot]) -> None:
        if time.monotonic() < self.next_beat:
            return
        self.next_beat = time.monotonic() + HEARTBEAT_S
        for row in look().running:
            self.say(
                f"      {row.label}: step {row.step} of {row.steps}, loss {loss_text(row.loss)}, "
                f"{rate_text(row.tokens_per_s)} tokens/s, ETA {duration(row.eta_s)}"
            )

    def close(self) -> None:
        """Plain lines leave nothing to tidy up."""


class LiveDisplay:
    """A block at the foot of the terminal: counts, then one line per running run. Other lines scroll by above it."""

    def __init__(self, console: Console) -> None:
        self.next_refresh = 0.0
        self.live = Live(console=console, auto_refresh=False, transient=True)
        self.live.start()

    def begin(self, text: str) -> None:
        """The run's own line shows it."""

    def end(self, text: str, now: Snapshot) -> None:
        self.say(text)  # the block's head shows the rest

    def say(self, text: str) -> None:
        self.live.console.print(Text(text), soft_wrap=True)

    def refresh(self, look: Callable[[], Snapshot]) -> None:
        if time.monotonic() < self.next_refresh:
            return
        self.next_refresh = time.monotonic() + REFRESH_S
        self.live.update(block(look()), refresh=True)

    def close(self) -> None:
        self.live.stop()


def block(now: Snapshot) -> Group:
    """The live block; nothing in it wraps, what does not fit is cut."""
    head = (
        f"done {now.done}/{now.total}  running {len(now.running)}  left {now.left}  failed {now.failed}  "
        f"elapsed {duration(now.elapsed_s)}  sweep ETA {duration(now.eta_s)}"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("run")  # the only one that may shrink
    table.add_column("", no_wrap=True)
    for name in ("step", "loss", "tokens/s", "ETA"):
        table.add_column(name, no_wrap=True, justify="right", min_width=6)  # so that columns stand still
    for row in now.running:
        table.add_row(
            Text(row.label, no_wrap=True, overflow="crop"),
            ProgressBar(total=row.steps, completed=row.step, width=8),
            f"{row.step:>{len(str(row.steps))}}/{row.steps}",
            loss_text(row.loss),
            rate_text(row.tokens_per_s),
            duration(row.eta_s),
        )
    # The terminal echoes ^C where the cursor rests: on an empty line of its own it pushes no full one over the edge.
    return Group(Text(head, style="bold", no_wrap=True, overflow="crop"), table, Text())
