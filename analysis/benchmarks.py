"""Benchmark results of runs -> one table, and what two models' results say of their difference.

`python -m experiments eval` writes a file for each benchmark of a run; `collect` puts them into
`results/benchmarks.csv`, items included, so that every comparison can be made again without the runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from analysis.collect import read_columns
from analysis.errors import BadFile

Floats = npt.NDArray[np.float64]

LEVEL = 0.95
COLUMNS: Mapping[str, str] = {
    "run_id": "string",
    "benchmark": "string",
    "shots": "Int64",
    "metric": "string",
    "value": "float64",
    "stderr": "float64",
    "chance": "float64",
    "n": "Int64",
    "limit": "Int64",
    "truncated": "Int64",
    "seq_len": "Int64",
    "harness": "string",
    "version": "string",
    "data": "string",
    "items_id": "string",
    "items": "string",
}
SAME = ["benchmark", "metric", "limit", "seq_len", "harness", "version", "data", "items_id"]
"""What results must share to be compared."""


@dataclass(frozen=True)
class Estimate:
    """A mean over items and seeds, or a difference of two, with its t interval."""

    value: float
    stderr: float | None
    low: float | None
    high: float | None
    p: float | None
    """Two-sided, of the value being zero."""
    n_seeds: int


def collect(runs: Path) -> pd.DataFrame:
    """Read every result below a directory of runs; an empty table where there are none.

    Raises:
        BadFile: a file is torn or not one of ours.
    """
    rows = [_row(path) for path in sorted(runs.glob("*/evals/*.json"))]
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype(dict(COLUMNS))
    return table.sort_values(["benchmark", "run_id", "limit"], na_position="first", ignore_index=True)


def read_table(path: Path) -> pd.DataFrame:
    """Read what `analysis.collect.write_table` wrote of it; an empty table where there is no file.

    Raises:
        BadFile: it is not a table of benchmarks.
    """
    return read_columns(path, COLUMNS, "benchmarks")


def items_of(cell: Any) -> Floats | None:
    """Every item's 0 or 1; None where the items are of another kind."""
    if not isinstance(cell, str) or not cell:
        return None
    return np.frombuffer(cell.encode(), dtype=np.uint8).astype(np.float64) - ord("0")


def estimate(values: Sequence[float], items: Sequence[Floats] | None) -> Estimate:
    """Mean over seeds of a score or of a difference, and how far it can be trusted.

    Two things vary: which items a benchmark happens to hold, and which seed a model was trained from. The variance of
    the mean is the sum of both, the first from the items' own means over seeds, the second from the seeds' means, with
    Satterthwaite's degrees of freedom. With one seed only the items vary, and the interval is that of these models, not
    of their kind; without items only the seeds do.

    Args:
        values: one number a seed.
        items: an array [n] a seed whose mean it is, if known.
    """
    value, n_seeds = float(np.mean(values)), len(values)
    parts: list[tuple[float, int]] = []
    if items is not None and len(items[0]) > 1:
        by_item = np.mean(items, axis=0)
        parts.append((float(np.var(by_item, ddof=1)) / len(by_item), len(by_item) - 1))
    if n_seeds > 1:
        parts.append((float(np.var(values, ddof=1)) / n_seeds, n_seeds - 1))
    variance = sum(v for v, _ in parts)
    if not parts:
        return Estimate(value, None, None, None, None, n_seeds)
    if variance == 0:
        return Estimate(value, 0.0, value, value, 1.0 if value == 0 else 0.0, n_seeds)
    df = variance**2 / sum(v**2 / d for v, d in parts)
    stderr = float(np.sqrt(variance))
    half = float(stats.t.ppf((1 + LEVEL) / 2, df)) * stderr
    p = float(2 * stats.t.sf(abs(value) / stderr, df))
    return Estimate(value, stderr, value - half, value + half, p, n_seeds)


def score(rows: pd.DataFrame, minus: float = 0.0) -> Estimate:
    """One arm's score over its seeds, less a constant such as chance.

    Args:
        rows: its results on one benchmark, one a seed.
        minus: what is taken off.
    """
    items = [items_of(cell) for cell in rows["items"]]
    known = [x - minus for x in items if x is not None]
    return estimate((rows["value"] - minus).tolist(), known if len(known) == len(rows) else None)


def difference(arm: pd.DataFrame, reference: pd.DataFrame) -> Estimate | None:
    """Arm minus reference at equal seeds and equal items; None if they share no seed.

    Args:
        arm: its results on one benchmark, one a seed, with the column `seed`.
        reference: the other's.
    """
    pairs = arm.merge(reference, on="seed", suffixes=("", "_reference"))
    if pairs.empty:
        return None
    values = (pairs["value"] - pairs["value_reference"]).tolist()
    ours, theirs = ([items_of(cell) for cell in pairs[name]] for name in ("items", "items_reference"))
    items = [a - b for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    return estimate(values, items if len(items) == len(pairs) else None)


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float] | None:
    """Spearman's correlation and its interval by Fisher's z with the variance of Bonett and Wright (2000).

    A perfect order, whose interval would have no width, gets that of the nearest order that is not: one pair of
    neighbours swapped. None below four points, or where all points of a side are equal.
    """
    if len(x) < 4 or len(set(x)) < 2 or len(set(y)) < 2:
        return None
    r = float(stats.spearmanr(x, y).statistic)
    n = len(x)
    almost = 1 - 12 / (n * (n**2 - 1))
    near = float(np.clip(r, -almost, almost))
    half = float(stats.norm.ppf((1 + LEVEL) / 2)) * np.sqrt((1 + near**2 / 2) / (n - 3))
    low, high = (float(np.tanh(np.arctanh(near) + side * half)) for side in (-1, 1))
    return r, min(low, r), max(high, r)


def _row(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        found = result["metrics"][result["metric"]]
        by_task = result["items"].get(result["metric"], {})
        plain = {name: result.get(name) for name in COLUMNS}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadFile(f"{path} is no result of a benchmark ({error}): delete it and evaluate again") from error
    if result["run_id"] != path.parent.parent.name:
        raise BadFile(f"{path}: the result is of run {result['run_id']}: a directory was renamed or copied")
    whole = bool(by_task) and all(isinstance(items, str) for items in by_task.values())
    items = "".join(by_task[task] for task in sorted(by_task)) if whole else None
    return plain | {"value": found["value"], "stderr": found["stderr"], "items": items}
