"""Speed and memory of the arms of Table 1: prefill and decode, with tables on the device and in host memory.

One table for each hardware and load, so that a cell never mixes two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd

from analysis.benchmarks import estimate
from analysis.speed import PLACES, SETTING
from analysis.style import numbers_table

MIB = 2**20
NOTE = """\
Tables on device, or in host memory: then each call brings the rows that it reads, and the logits are the same to the
bit. Means over seeds, +- one standard error; models are measured one after another, each column in processes of its
own, so that what else the machine did is part of the spread. Host memory is the most that the whole process held, the
interpreter and torch included; `before the model` is what it held without one. A CPU computes in host memory: there is
no device memory to name (-), tables in host memory save none, and cost the work of bringing rows. - is also what does
not exist or could not be told, as host memory of prefill and decode apart where a process cannot start its mark again.
"""


def speed_lines(arms: Mapping[str, pd.DataFrame], speeds: pd.DataFrame) -> list[str]:
    """Write the measurements of these arms as markdown; one line that says so where there are none.

    Args:
        arms: rows of runs.csv by the arm's title, in the order of the columns.
        speeds: rows of speed.csv, of these runs and of others.
    """
    ours = speeds[speeds["run_id"].isin(pd.concat([runs["run_id"] for runs in arms.values()]))]
    if ours.empty:
        return ["No speeds measured."]
    lines: list[str] = []
    for _, rows in ours.groupby(SETTING, dropna=False):
        columns = _columns(arms, rows)
        lines += [_head(rows), "", *numbers_table(["", *columns], _body(list(columns.values()))), ""]
    return [*lines, NOTE.rstrip("\n")]


def _columns(arms: Mapping[str, pd.DataFrame], rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Measurements by title: one column an arm, two for an arm with tables."""
    columns = {}
    for title, runs in arms.items():
        of_arm = rows[rows["run_id"].isin(runs["run_id"])]
        if (runs["P_engram"].fillna(0) > 0).any():
            for place, words in zip(PLACES, ("tables on device", "tables in host memory"), strict=True):
                columns[f"{title}, {words}"] = of_arm[of_arm["tables_on"] == place]
        else:
            columns[title] = of_arm
    return columns


def _head(rows: pd.DataFrame) -> str:
    first = rows.iloc[0]
    threads = f"{first['threads']} thread{'' if first['threads'] == 1 else 's'}"
    host = f"{first['host_cpu']}, {threads}"
    where = f"the CPU ({host})" if first["device"] == "cpu" else f"{first['device']} (host: {host})"
    text = (
        f"Speed and memory on {where}, {first['dtype']}, torch {first['torch']}: batch {first['batch']}, prompt "
        f"{first['prompt']} tokens read at once, then {first['new']} tokens written one by one; median of "
        f"{first['repeats']} repeats."
    )
    if (n_versions := rows["commit"].nunique()) > 1:
        text += f" Measured with {n_versions} versions of the code."
    return text


def _body(columns: list[pd.DataFrame]) -> list[list[str]]:
    def cells(values: Callable[[pd.DataFrame], pd.Series], digits: int) -> list[str]:
        return [_mean(values(rows), digits) for rows in columns]

    def memory(name: str, digits: int = 1) -> list[str]:
        return cells(lambda rows: rows[name] / MIB, digits)

    return [
        ["prefill, tokens/s", *cells(lambda rows: rows["prefill_tokens_per_s"], 0)],
        ["decode, tokens/s", *cells(lambda rows: rows["decode_tokens_per_s"], 0)],
        ["device memory in prefill, peak, MiB", *memory("prefill_device_bytes")],
        ["device memory in decode, peak, MiB", *memory("decode_device_bytes")],
        ["host memory in prefill, peak, MiB", *memory("prefill_host_bytes")],
        ["host memory in decode, peak, MiB", *memory("decode_host_bytes")],
        ["host memory ever, reading weights included, peak, MiB", *memory("process_host_bytes")],
        ["host memory before the model, MiB", *memory("before_host_bytes")],
        ["weights without tables, MiB", *cells(lambda rows: (rows["weights_bytes"] - rows["tables_bytes"]) / MIB, 2)],
        ["tables, MiB", *memory("tables_bytes", 2)],
        ["past (keys, values, windows) at the end, MiB", *memory("state_bytes", 2)],
        ["seeds", *(str(len(rows)) if len(rows) else "-" for rows in columns)],
    ]


def _mean(values: pd.Series, digits: int) -> str:
    """A number that some seed lacks is none: a mean over other seeds than its neighbours' would mislead."""
    if values.empty or values.isna().any():
        return "-"
    found = estimate([float(value) for value in values], None)
    if found.value == 0:
        return "0"
    # Sizes are equal over seeds: a spread of nothing says nothing.
    spread = f" +- {found.stderr:,.{digits}f}" if found.stderr else ""
    return f"{found.value:,.{digits}f}{spread}"
