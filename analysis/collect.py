"""Run directories -> one table, `results/runs.csv`. `results/README.md` documents every column.

The table is a pure function of the directories: the same runs give the same bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.errors import BadFile, UserError

RUNS = Path("results/runs")
TABLE = Path("results/runs.csv")

STATUSES = ("final", "diverged")

# Name -> pandas type. Nullable types, because a dense run has no rho and a diverged one no validation loss.
# FLOPs are floats: 2e20 does not fit 64-bit integers. Versions and hashes are strings: 3.10 is not 3.1.
COLUMNS: Mapping[str, str] = {
    "run_id": "string",
    "status": "string",
    "schema": "Int64",
    "budget": "string",
    "budget_hash": "string",
    "suite": "string",
    "arm": "string",
    "variant": "string",
    "mode": "string",
    "rho_target": "float64",
    "rho": "float64",
    "seed": "Int64",
    "replicate": "Int64",
    "P_tot": "Int64",
    "P_act": "Int64",
    "P_sparse": "Int64",
    "P_moe_sparse": "Int64",
    "P_engram": "Int64",
    "P_vocab": "Int64",
    "P_tot_per_P_act": "float64",
    "flops_per_token": "float64",
    "flops": "float64",
    "train_tokens": "Int64",
    "tokens_per_P_tot": "float64",
    "steps": "Int64",
    "n_routed_experts": "Int64",
    "top_k": "Int64",
    "n_slots": "Int64",
    "engram_layers": "string",
    "n_layers": "Int64",
    "d_model": "Int64",
    "n_streams": "Int64",
    "vocab_size": "Int64",
    "lr": "float64",
    "table_lr_mult": "float64",
    "corpus": "string",
    "data": "string",
    "epochs": "float64",
    "valid_loss": "float64",
    "valid_bpb": "float64",
    "valid_tokens": "Int64",
    "train_loss": "float64",
    "seconds": "float64",
    "tokens_per_s": "float64",
    "peak_memory_gib": "float64",
    "device": "string",
    "threads": "Int64",
    "processes": "Int64",
    "micro_batch_tokens": "Int64",
    "attempts": "Int64",
    "commit": "string",
    "dirty": "boolean",
    "torch": "string",
    "python": "string",
    "host_cpu": "string",
}
NEEDED = ("run_id", "budget", "arm", "mode", "seed")
SORT = ["budget", "suite", "arm", "variant", "mode", "rho", "seed", "run_id"]
LATER = {
    *("budget_hash", "suite", "variant", "replicate", "engram_layers", "lr", "table_lr_mult"),
    *("P_tot_per_P_act", "tokens_per_P_tot"),
}
"""Columns that tables of before there were several suites lack; they are empty there, or follow from others."""


def collect(runs: Path) -> pd.DataFrame:
    """Read every finished run below a directory: one row for each thing that it is for.

    Known columns come first, unknown ones at the end.

    Args:
        runs: The directory that holds `<run_id>/final.json`; runs without that file have not finished.

    Raises:
        UserError: no run has finished there.
        BadFile: a `final.json` is torn, is not one of ours, or lies in a directory of another name.
    """
    finals = sorted(runs.glob("*/final.json"))
    if not finals:
        raise UserError(f"no finished runs in {runs}: train some with `make sweep`, or name their place with --runs")
    rows = [row for path in finals for row in _rows(path)]
    extra = sorted({key for row in rows for key in row} - set(COLUMNS))
    table = pd.DataFrame(rows, columns=[*COLUMNS, *extra])
    try:
        table = _with_ratios(table.astype(dict(COLUMNS)))
    except (TypeError, ValueError) as error:
        raise BadFile(f"{runs}: a final.json holds a value of the wrong type: {error}") from error
    return table.sort_values(SORT, na_position="last", kind="stable", ignore_index=True)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write the table as CSV; floats as the shortest text that reads back as the same number."""
    write_atomically(path, table.to_csv(index=False, lineterminator="\n"))


def read_table(path: Path) -> pd.DataFrame:
    """Read what `write_table` wrote.

    Raises:
        UserError: there is no such file, or no run in it.
        BadFile: it is not a table of runs.
    """
    if not path.is_file():
        raise UserError(f"no table {path}: train runs with `make sweep`, then `python -m analysis collect`")
    with path.open(encoding="utf-8", errors="replace") as file:
        header = file.readline().rstrip("\n").split(",")
    if missing := [name for name in COLUMNS if name not in header and name not in LATER]:
        raise BadFile(f"{path} lacks the columns {', '.join(missing)}: run `python -m analysis collect` again")
    # Floats as text first: only some versions of pandas read them exactly by themselves.
    first = {name: "string" if kind == "float64" else kind for name, kind in COLUMNS.items()}
    try:
        table = pd.read_csv(path, dtype=first)
        table = table.reindex(columns=[*COLUMNS, *(name for name in table.columns if name not in COLUMNS)])
        table = _with_ratios(table.astype(dict(COLUMNS)))
    except (ValueError, TypeError) as error:
        raise BadFile(f"{path} is not a table of runs: {' '.join(str(error).split())}") from error
    if table.empty:
        raise UserError(f"the table {path} holds no run: train some, then `python -m analysis collect`")
    _check_rows(table, path)
    return table


def _check_rows(table: pd.DataFrame, path: Path) -> None:
    """Refuse rows that `collect` cannot have written: a torn file, or one that was edited."""
    for column in (*NEEDED, "status"):
        if (bad := table[column].isna()).any():
            where = f"line {int(bad.to_numpy().argmax()) + 2}"
            raise BadFile(f"{path} has no {column} in {where}: run `python -m analysis collect` again")
    final = table[table["status"] == "final"]
    if not (good := np.isfinite(final["valid_loss"]) & (final["valid_loss"] >= 0)).all():
        row = final[~good].iloc[0]
        raise BadFile(f"{path}: a final run needs a loss of at least 0, not {row['valid_loss']} ({row['run_id']})")


def read_columns(path: Path, columns: Mapping[str, str], what: str) -> pd.DataFrame:
    """Read another table that `write_table` wrote; an empty one where there is no file.

    Args:
        path: a CSV file.
        columns: its columns and their pandas types.
        what: what it is a table of, for the message.

    Raises:
        BadFile: it is not such a table.
    """
    if not path.is_file():
        return pd.DataFrame(columns=list(columns)).astype(dict(columns))
    try:
        # Floats as text first, as above; text stays text: as a number, 0101 would lose its first zero.
        table = pd.read_csv(path, dtype={k: "string" if v == "float64" else v for k, v in columns.items()})
        return table[list(columns)].astype(dict(columns))
    except (ValueError, TypeError, KeyError) as error:
        raise BadFile(f"{path} is not a table of {what}: {' '.join(str(error).split())}") from error


def _with_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """Fill in what older runs lack and others of their columns tell."""
    per_active, per_total = table["P_tot"] / table["P_act"], table["train_tokens"] / table["P_tot"]
    return table.assign(
        P_tot_per_P_act=table["P_tot_per_P_act"].fillna(per_active.astype("float64")),
        tokens_per_P_tot=table["tokens_per_P_tot"].fillna(per_total.astype("float64")),
    )


def write_atomically(path: Path, text: str) -> None:
    """Write text so that a reader finds the old file or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sibling = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        sibling.write_text(text, encoding="utf-8")
        os.replace(sibling, path)
    finally:
        sibling.unlink(missing_ok=True)


def _rows(path: Path) -> list[dict[str, Any]]:
    """The run, once for everything that it is for: budgets and suites share runs."""
    row, others = _row(path), path.with_name("labels.jsonl")
    try:
        labels = (
            [json.loads(line) for line in others.read_text(encoding="utf-8").splitlines()] if others.exists() else []
        )
    except ValueError as error:
        raise BadFile(f"{others} is torn ({error}): delete it and launch the suites again") from error
    rows = [row, *(row | each for each in labels)]
    # A later version says again, and more fully, what a run is for: the line that says less is then a copy.
    fullest: dict[tuple[Any, ...], int] = {}
    for row in rows:
        fullest[_purpose(row)] = max(_told(row), fullest.get(_purpose(row), 0))
    return [row for row in rows if _told(row) == fullest[_purpose(row)]]


def _told(row: dict[str, Any]) -> int:
    return sum(row.get(key) is not None for key in ("suite", "budget_hash"))


def _purpose(row: dict[str, Any]) -> tuple[Any, ...]:
    suite = row.get("suite") or suite_before(str(row["arm"]))
    return (suite, *(row.get(key) for key in ("budget", "arm", "mode", "rho_target")))


def suite_before(arm: str) -> str:
    """The suite of a run of before suites were noted, when there were two."""
    return "baselines" if arm == "engram-large" else "allocation"


def rows_of_suite(table: pd.DataFrame, suite: str) -> pd.DataFrame:
    """Rows that a suite asked for."""
    return table[table["suite"].fillna(table["arm"].map(suite_before)) == suite]


def _row(path: Path) -> dict[str, Any]:
    try:
        final = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadFile(f"{path} is torn or not JSON ({error}): delete it and launch the run again") from error
    result, cost, status = (final.get(k) if isinstance(final, dict) else None for k in ("result", "cost", "status"))
    if not isinstance(result, dict) or not isinstance(cost, dict):
        raise BadFile(f"{path} was not written by this suite: it needs the objects `result` and `cost`")
    if status not in STATUSES:
        raise BadFile(f"{path}: status is {status!r}, not one of {', '.join(STATUSES)}")
    if missing := [key for key in NEEDED if result.get(key) is None]:
        raise BadFile(f"{path}: result lacks {', '.join(missing)}")
    if result["run_id"] != path.parent.name:
        raise BadFile(f"{path}: the result is of run {result['run_id']}: a directory was renamed or copied")
    loss = result.get("valid_loss")
    if status == "final" and not (isinstance(loss, int | float) and math.isfinite(loss)):
        raise BadFile(f"{path}: a final run needs a finite valid_loss, not {loss!r}")
    if twice := sorted((set(result) & set(cost)) | ({"status"} & (set(result) | set(cost)))):
        raise BadFile(f"{path}: {', '.join(twice)} is given twice")
    return {"status": status} | {key: _scalar(value) for key, value in {**result, **cost}.items()}


def _scalar(value: Any) -> Any:
    """A CSV cell holds one value: a nested one becomes compact JSON."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")) if isinstance(value, list | dict) else value
