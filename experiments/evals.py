"""Benchmarks of finished runs, each result once: what `python -m experiments eval` does.

    results/runs/r0123456789/evals/blimp@1.0_lm-eval-0.4.13.json

The name says task, task version and harness version, the folder the run; other data or another window make the file
anew. A result over the first items only (`--limit`) has a name of its own, and never stands in for the whole.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from experiments import harness
from experiments.benchmarks import TEXT, Benchmark
from experiments.domains import bits_per_byte, find_domains
from experiments.finished import Finished
from experiments.rundir import RunBusy, RunDir, provenance
from experiments.settings import UserError

SCHEMA = 2
"""Raised when a change of code changes a benchmark's metric. 2: shots from local files are drawn as from the hub's."""


@dataclass(frozen=True)
class Asked:
    """What to score, and with what."""

    benchmarks: Sequence[Benchmark]
    data_dir: Path | None = None
    """Local benchmark files; None asks the hub."""
    text_dir: Path | None = None
    """Held-out text, a file a domain."""
    limit: int | None = None
    """Only the first items of every task."""
    batch: int = 32
    device: str = "cpu"


@dataclass(frozen=True)
class Job:
    """One benchmark of one run that has no result yet."""

    finished: Finished
    path: Path
    key: dict[str, Any]
    """What makes two results the same one."""
    measure: Callable[[Any], dict[str, Any]]
    """From the harness's model to the result."""


@dataclass
class Report:
    """What there is in the end."""

    results: list[dict[str, Any]] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    busy: list[str] = field(default_factory=list)


def evaluate(runs: Sequence[Finished], asked: Asked, *, dry_run: bool = False) -> Report:
    """Score every run on every benchmark that has no result yet.

    Raises:
        UserError: the harness is not installed, files are damaged, or nothing can be scored.
    """
    with TemporaryDirectory(prefix="benchmarks-") as folder:
        tasks = harness.load_tasks(asked.benchmarks, asked.data_dir, Path(folder))
        report = Report(skipped={b.name: why for b, why in tasks.skipped.items() if b != TEXT})
        jobs, done = [], []
        for finished in runs:
            for path, key, measure in _wanted(finished, asked, tasks, report):
                stored = _stored(path, key)
                if stored is None:
                    jobs.append(Job(finished, path, key, measure))
                else:
                    done.append(stored)
        if not jobs and not done:
            raise UserError("nothing can be scored: " + "; ".join(f"{k}: {v}" for k, v in report.skipped.items()))
        report.results = done
        if dry_run:
            for job in jobs:
                print(f"to score: {_label(job.finished)}, {job.path.stem}")
        else:
            _work(jobs, asked, report)
    return report


def _wanted(
    finished: Finished, asked: Asked, tasks: harness.Tasks, report: Report
) -> Iterator[tuple[Path, dict[str, Any], Callable[[Any], dict[str, Any]]]]:
    """Where each result lies, what it must be of, and how it is made."""
    seq_len = finished.run.spec.train.seq_len
    same = {"schema": SCHEMA, "run_id": finished.run.spec.run_id, "limit": asked.limit, "seq_len": seq_len}
    evals = finished.run_dir.path / "evals"
    ending = f"_limit-{asked.limit}" if asked.limit else ""
    for benchmark, loaded in tasks.loaded.items():
        version, by = harness.task_version(loaded), f"lm-eval-{harness.version()}"
        key = same | _describe(benchmark) | {"harness": by, "version": version, "data": tasks.data[benchmark]}

        def measure(lm: Any, benchmark: Benchmark = benchmark, loaded: dict[str, Any] = loaded) -> dict[str, Any]:
            return harness.score(lm, benchmark, loaded, asked.limit)

        yield evals / f"{benchmark.name}@{version}_{by}{ending}.json", key, measure
    if TEXT not in asked.benchmarks:
        return
    if asked.text_dir is None:
        report.skipped[TEXT.name] = "no --text folder"
        return
    for domain, path in find_domains(asked.text_dir).items():
        name = f"{TEXT.name}_{domain}"
        # The whole file's size, since reading and hashing a large one only to find it done would be slow.
        key = same | _describe(TEXT) | {"benchmark": name, "harness": "own", "version": "1"}
        key |= {"data": f"{path.name}, {path.stat().st_size} bytes"}

        def measure_text(lm: Any, path: Path = path) -> dict[str, Any]:
            return bits_per_byte(lm.model.model, finished.shards, path, seq_len, asked.batch, asked.limit)

        yield evals / f"{name}@1_own{ending}.json", key, measure_text


def _describe(benchmark: Benchmark) -> dict[str, Any]:
    return {
        "benchmark": benchmark.name,
        "task": benchmark.task,
        "shots": benchmark.shots,
        "metric": benchmark.metric,
        "filter": benchmark.filter,
    }


def _work(jobs: Sequence[Job], asked: Asked, report: Report) -> None:
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    by_run: dict[str, list[Job]] = {}
    for job in jobs:
        by_run.setdefault(job.finished.run.spec.run_id, []).append(job)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("scoring", total=len(jobs))
        for same in by_run.values():
            finished = same[0].finished
            try:
                with finished.run_dir.owned():
                    lm = harness.as_harness_model(finished, asked.device, asked.batch)
                    for job in same:
                        progress.update(bar, description=f"{_label(finished)}: {job.key['benchmark']}")
                        try:
                            result = _measure(job, lm, asked)
                        except harness.NotScored as error:
                            report.skipped[job.key["benchmark"]] = str(error)
                            progress.advance(bar)
                            continue
                        report.results.append(result)
                        progress.console.print(
                            f"{_label(finished)}: {in_words(result)}", highlight=False, soft_wrap=True
                        )
                        progress.advance(bar)
            except RunBusy as busy:
                report.busy.append(str(busy))
                progress.advance(bar, len(same))


def _measure(job: Job, lm: Any, asked: Asked) -> dict[str, Any]:
    started = time.perf_counter()
    found = job.measure(lm)
    facts = provenance()
    cost = {"seconds": round(time.perf_counter() - started, 2), "device": asked.device, "batch": asked.batch}
    result = job.key | found | {"cost": cost | {"commit": facts["commit"], "dirty": facts["dirty"]}}
    job.path.parent.mkdir(exist_ok=True)
    draft = job.path.with_name(f".{job.path.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(result, allow_nan=False) + "\n")
        draft.replace(job.path)
    finally:
        draft.unlink(missing_ok=True)
    return result


def _stored(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The result that lies there, if it is of these items."""
    try:
        result = dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): delete it and evaluate again") from error
    return result if all(result.get(name) == value for name, value in key.items()) else None


def stored_results(run_dir: RunDir) -> list[dict[str, Any]]:
    """All results of a run."""
    return [json.loads(path.read_text()) for path in sorted((run_dir.path / "evals").glob("*.json"))]


def in_words(result: dict[str, Any]) -> str:
    """`blimp 0.612 +- 0.006, above chance, 0.500, 670 items`: as Table 1 judges one run, by the spread of items."""
    found, chance, n = result["metrics"][result["metric"]], result["chance"], result["n"]
    stderr = found["stderr"]
    if chance is not None and n > 1:  # a share of items; the harness's own error leaves out what lies between tasks
        stderr = math.sqrt(found["value"] * (1 - found["value"]) / (n - 1))
    spread = "" if stderr is None else f" +- {stderr:.4f}"
    text = f"{result['benchmark']} {found['value']:.4f}{spread}"
    if chance is None:
        return f"{text}, {result['n']} items"
    reach = 1.96 * (stderr or 0.0)
    side = "above" if found["value"] - reach > chance else "below" if found["value"] + reach < chance else "at"
    return f"{text}, {side} chance, {chance:.4f}, {result['n']} items"


def _label(finished: Finished) -> str:
    labels = finished.run.labels
    rho = "" if labels.rho is None else f" rho {labels.rho:.2f}"
    return f"{labels.arm}{rho} seed {finished.run.spec.seed}"
