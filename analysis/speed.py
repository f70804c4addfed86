"""Speed and memory of finished runs -> one table, `results/speed.csv`. `results/README.md` documents every column.

`python -m experiments speed` writes a file for each run, place of the tables and load; one row is one of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.collect import read_columns
from analysis.errors import BadFile

COLUMNS: Mapping[str, str] = {
    "run_id": "string",
    "tables_on": "string",
    "device": "string",
    "host_cpu": "string",
    "threads": "Int64",
    "dtype": "string",
    "batch": "Int64",
    "prompt": "Int64",
    "new": "Int64",
    "repeats": "Int64",
    "prefill_tokens_per_s": "float64",
    "decode_tokens_per_s": "float64",
    "prefill_device_bytes": "Int64",
    "decode_device_bytes": "Int64",
    "prefill_host_bytes": "Int64",
    "decode_host_bytes": "Int64",
    "before_host_bytes": "Int64",
    "process_host_bytes": "Int64",
    "weights_bytes": "Int64",
    "tables_bytes": "Int64",
    "state_bytes": "Int64",
    "commit": "string",
    "dirty": "boolean",
    "torch": "string",
}
SETTING = ["device", "host_cpu", "threads", "dtype", "torch", "batch", "prompt", "new", "repeats"]
"""What measurements must share to stand in one table."""
PLACES = ("device", "host")


def collect(runs: Path) -> pd.DataFrame:
    """Read every measurement below a directory of runs; an empty table where there are none.

    Raises:
        BadFile: a file is torn or not one of ours.
    """
    rows = [_row(path) for path in sorted(runs.glob("*/evals/*.speed"))]
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype(dict(COLUMNS))
    return table.sort_values([*SETTING, "run_id", "tables_on"], na_position="first", ignore_index=True)


def read_table(path: Path) -> pd.DataFrame:
    """Read what `analysis.collect.write_table` wrote of it; an empty table where there is no file.

    Raises:
        BadFile: it is not a table of speeds.
    """
    return read_columns(path, COLUMNS, "speeds")


def _row(path: Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        row = {name: result[name] for name in COLUMNS}
        speeds = [float(row[f"{phase}_tokens_per_s"]) for phase in ("prefill", "decode")]
    except (ValueError, KeyError, TypeError) as error:
        raise BadFile(f"{path} is no measurement of speed ({error}): delete it and measure again") from error
    if row["run_id"] != path.parent.parent.name:
        raise BadFile(f"{path}: the measurement is of run {row['run_id']}: a directory was renamed or copied")
    if row["tables_on"] not in (None, *PLACES) or min(speeds) <= 0:
        raise BadFile(f"{path}: tables on {row['tables_on']!r} at {speeds} tokens/s: delete it and measure again")
    return row
