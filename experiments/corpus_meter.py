"""What a person sees while a corpus is read and written."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

_LINE_EVERY_S = 30.0


class Meter:
    """A progress bar on a terminal; elsewhere a plain line a stage, and one every half minute."""

    def __init__(self) -> None:
        columns = (TextColumn("{task.description:<24}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self.bar = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())

    def __enter__(self) -> Meter:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def start(self, stage: str, total: int | None) -> None:
        """Begin a stage of so many bytes, or of an unknown number."""
        for task in self.bar.task_ids:
            self.bar.remove_task(task)
        self.task = self.bar.add_task(stage, total=total)
        self.stage, self.done, self.total, self.said = stage, 0, total, time.monotonic()
        self._say("")

    def advance(self, n_bytes: int) -> None:
        """So many bytes more are done."""
        self.bar.advance(self.task, n_bytes)
        self.done += n_bytes
        if time.monotonic() - self.said > _LINE_EVERY_S:
            self.said = time.monotonic()
            self._say(f", {self.done / 1e6:.0f} MB" + (f" of {self.total / 1e6:.0f}" if self.total else ""))

    def _say(self, how_far: str) -> None:
        if self.bar.disable:
            print(f"corpus: {self.stage}{how_far}", file=sys.stderr)
