"""lm-evaluation-harness: load its tasks, score a model with them, keep every item. The only file that knows it.

Its own HFLM does the scoring, around the model that `export` writes, so that `lm_eval --model hf` on an exported
directory gives the same numbers.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benchmarks import TEXT, Benchmark
from experiments.finished import Finished
from experiments.local_tasks import local_tasks
from experiments.settings import UserError

FEWSHOT_SEED = 1234  # the harness's own default


class NotScored(Exception):
    """A benchmark that a model cannot be scored on, and why."""


@dataclass
class Tasks:
    """Benchmarks that can be scored, and why others cannot."""

    loaded: dict[Benchmark, dict[str, Any]] = field(default_factory=dict)
    """The harness's Task objects by name."""
    data: dict[Benchmark, str] = field(default_factory=dict)
    """sha256 of local items, or `hub`."""
    skipped: dict[Benchmark, str] = field(default_factory=dict)


def version() -> str:
    """Of the installed harness.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.metadata.version("lm-eval")
    except importlib.metadata.PackageNotFoundError:
        raise UserError("eval needs lm-evaluation-harness: pip install -c constraints.txt -e '.[eval]'") from None


def load_tasks(benchmarks: Sequence[Benchmark], data_dir: Path | None, folder: Path) -> Tasks:
    """Load what can be loaded: from local files where they are there, else from the hub unless that is offline.

    Args:
        benchmarks: what is wanted.
        data_dir: local benchmark files, laid out as `experiments.local_tasks` says.
        folder: for files that the harness reads while the tasks are in use.

    Raises:
        UserError: the harness is not installed, or a local file is damaged.
    """
    version()
    import lm_eval
    from lm_eval.tasks import TaskManager

    stock = Path(lm_eval.__file__).parent / "tasks"
    nearby, hub = TaskManager(include_defaults=False), None
    tasks = Tasks()
    for benchmark in benchmarks:
        if benchmark == TEXT or benchmark.missing:
            tasks.skipped[benchmark] = benchmark.missing
            continue
        found: Any = "no --data folder"
        if data_dir is not None:
            (place := folder / benchmark.name).mkdir(parents=True)
            found = local_tasks(benchmark.task, benchmark.shots, data_dir, stock, place)
        try:
            if isinstance(found, str):
                if _is_offline():
                    tasks.skipped[benchmark] = f"{found}, and HF_HUB_OFFLINE forbids the hub"
                    continue
                hub = hub or TaskManager()
                loaded, data = hub.load(benchmark.task)["tasks"], "hub"
            else:
                loaded = nearby.load([str(task.config) for task in found])["tasks"]
                data = hashlib.sha256("".join(task.data for task in found).encode()).hexdigest()
        except KeyError:
            tasks.skipped[benchmark] = "the harness has no such task"
            continue
        except Exception as error:  # whatever a task, the hub or a data set's own code raises
            tasks.skipped[benchmark] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        for task in loaded.values():
            if task.get_config("num_fewshot") != 0:  # as the harness: a task that says 0 means it
                task.set_config(key="num_fewshot", value=benchmark.shots)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        tasks.loaded[benchmark], tasks.data[benchmark] = loaded, data
    return tasks


def task_version(tasks: dict[str, Any]) -> str:
    """Versions of a benchmark's tasks, each once."""
    return ",".join(sorted({str(task.VERSION) for task in tasks.values()}))


def as_harness_model(finished: Finished, device: str, batch: int) -> Any:
    """The run's model as the harness scores it, weights read from its checkpoint.

    Raises:
        UserError: the weights are gone or damaged.
    """
    from lm_eval.models.huggingface import HFLM

    from engram.export import dress

    train = finished.run.spec.train
    model = finished.load_model().to(device)
    coat, words = dress(model, finished.shards.tokenizer, bos_id=finished.shards.bos_id, max_positions=train.seq_len)
    with _counting_truncations():  # it also warns that it was given a model
        return HFLM(pretrained=coat, tokenizer=words, backend="causal", batch_size=batch, device=device)


def score(lm: Any, benchmark: Benchmark, tasks: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """Score a model: every metric's mean and standard error, items, chance.

    Args:
        lm: from `as_harness_model`.
        benchmark: what is scored.
        tasks: its tasks from `load_tasks`.
        limit: only the first items of every task; None takes all.

    Returns:
        Plain values: `metrics` by name, `n` items, `chance` of the benchmark's metric (None if it has none), `tasks`
        with each task's own numbers, `items` by metric and task (text of 0 and 1 where every item is one of them), and
        `items_id`, equal where items are; `truncated`, how many texts were too long for the window and were cut.

    Raises:
        NotScored: an answer alone is longer than the window, or not every task has the benchmark's metric.
    """
    from lm_eval.evaluator import evaluate

    # It draws a bar for every kind of request and has no switch for that.
    with _counting_truncations() as truncated, redirect_stderr(io.StringIO()):
        try:
            results = evaluate(lm, {"tasks": tasks, "groups": {}}, limit=limit, bootstrap_iters=0, log_samples=True)
        except AssertionError as error:  # all that the harness says of an answer longer than the window
            raise NotScored(
                f"{benchmark.name} cannot be scored in a window of {lm.max_length} tokens: an answer is longer"
            ) from error
    assert results is not None, "one process scores alone"
    samples = {name: _chosen(rows, benchmark.filter) for name, rows in results["samples"].items()}
    metrics = _shared_metrics(samples)
    if benchmark.metric not in metrics:
        raise NotScored(
            f"{benchmark.name} has no metric {benchmark.metric} in all of its tasks, only "
            f"{', '.join(metrics) or 'none'}: score it with the harness itself"
        )
    items = {m: {name: [float(row[m]) for row in rows] for name, rows in samples.items()} for m in metrics}
    ways = {m: next(iter(tasks.values())).aggregation()[m] for m in metrics}
    ids = hashlib.sha256("".join(row["doc_hash"] for name in sorted(samples) for row in samples[name]).encode())
    return {
        "metrics": {m: summary(list(values.values()), ways[m]) for m, values in items.items()},
        "n": sum(map(len, samples.values())),
        "chance": _chance(benchmark, tasks, samples),
        "tasks": {name: {m: summary([items[m][name]], ways[m])["value"] for m in metrics} for name in samples},
        "items": {m: {name: _packed(values) for name, values in by_task.items()} for m, by_task in items.items()},
        "items_id": ids.hexdigest(),
        "truncated": len(truncated),
    }


def summary(tasks: list[list[float]], way: Callable[[list[float]], float] | None = None) -> dict[str, float | None]:
    """A metric over all items, and its standard error with the tasks as strata, since they are no sample of tasks.

    Args:
        tasks: values of items, task by task.
        way: from items to the metric; None, or the harness's own mean, is the mean. Others have no standard error.
    """
    if way is not None and way.__name__ != "mean":
        return {"value": float(way([value for items in tasks for value in items])), "stderr": None}
    sizes = np.array([len(items) for items in tasks])
    variances = np.array([np.var(items, ddof=1) if len(items) > 1 else np.nan for items in tasks])
    stderr = float(np.sqrt(np.sum(sizes * variances)) / sizes.sum())
    return {"value": float(np.mean(np.concatenate(tasks))), "stderr": stderr if np.isfinite(stderr) else None}


@contextmanager
def _counting_truncations() -> Iterator[list[str]]:
    """The harness warns of every text that it cuts. A count says as much, and can be kept."""
    cut: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        if is_cut := record.getMessage().startswith("Combined length of context"):
            cut.append(record.getMessage())
        return not is_cut and record.levelno >= logging.ERROR

    loggers = [logging.getLogger(name) for name in ("lm_eval.models.huggingface", "lm_eval.evaluator")]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield cut
    finally:
        for logger in loggers:
            logger.removeFilter(keep)


def _chosen(rows: list[dict[str, Any]], wanted: str) -> list[dict[str, Any]]:
    """The samples of one filter, in the items' order."""
    name = wanted or rows[0]["filter"]
    return sorted((row for row in rows if row["filter"] == name), key=lambda row: int(row["doc_id"]))


def _shared_metrics(samples: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Metrics that every task has and that are a number an item; AGIEval, say, mixes kinds of tasks."""
    number = bool | int | float | np.floating | np.integer | np.bool_
    kinds = [{m for m in rows[0]["metrics"] if isinstance(rows[0][m], number)} for rows in samples.values()]
    return sorted(set.intersection(*kinds))


def _chance(benchmark: Benchmark, tasks: dict[str, Any], samples: dict[str, list[dict[str, Any]]]) -> float | None:
    """What guessing scores, item by item; None where that is not known, or the metric is no share of items."""
    if not benchmark.metric.startswith(("acc", "exact")):
        return None
    levels: list[float | None] = []
    for name, rows in samples.items():
        kind = tasks[name].OUTPUT_TYPE
        if kind == "multiple_choice":
            levels += [1 / len(row["resps"]) for row in rows]
        else:  # a text whose every token must be the likeliest is not met by guessing
            levels += [0.0 if kind == "loglikelihood" else benchmark.guess] * len(rows)
    known = [level for level in levels if level is not None]
    return sum(known) / len(levels) if len(known) == len(levels) else None


def _packed(values: list[float]) -> str | list[float]:
    return "".join(str(int(v)) for v in values) if set(values) <= {0.0, 1.0} else values


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
