"""If these fail, a table of speeds mixes machines, loads or places of tables, or states what nobody measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_benchmarks import results_table, runs_table

from analysis.__main__ import main
from analysis.baselines_table import baselines
from analysis.collect import write_table
from analysis.errors import BadFile
from analysis.speed import COLUMNS, collect, read_table

ROOT = Path(__file__).parent.parent
MIB = 2**20


def measured(run_id: str, tables_on: str | None, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {"run_id": run_id, "tables_on": tables_on, "device": "cpu", "host_cpu": "EPYC", "threads": 1, "batch": 8}
    row |= {"dtype": "float32", "prompt": 128, "new": 64, "repeats": 5, "torch": "2.13.0", "commit": "c"}
    row |= {"prefill_tokens_per_s": 4000.0, "decode_tokens_per_s": 500.0, "weights_bytes": 3 * MIB, "dirty": False}
    row |= {"prefill_host_bytes": 300 * MIB, "decode_host_bytes": 290 * MIB, "before_host_bytes": 280 * MIB}
    row |= {"process_host_bytes": 310 * MIB, "state_bytes": MIB, "tables_bytes": 0 if tables_on is None else MIB}
    return row | changes


def speeds(rows: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(dict(COLUMNS))


def runs_with_tables() -> pd.DataFrame:
    runs = runs_table()
    return runs.assign(
        P_engram=[0 if arm == "dense" or rho == 1 else 100 for arm, rho in zip(runs["arm"], runs["rho"], strict=True)]
    )


def tables_of(rows: list[dict[str, Any]]) -> list[dict[str, dict[str, str]]]:
    """Each table of speeds: arm -> line -> cell."""
    text = baselines("tiny", runs_with_tables(), results_table({}), speeds(rows))
    assert text is not None
    found = []
    for part in text.split("\nSpeed and memory on ")[1:]:
        head, _, *body = ([c.strip() for c in line.split("|")[1:-1]] for line in part.splitlines() if line[:1] == "|")
        found.append({arm: {line[0]: line[i] for line in body} for i, arm in enumerate(head) if i})
    return found


def test_tables_on_the_device_and_in_host_memory_stand_side_by_side_as_means_over_seeds() -> None:
    """By hand: 4000 and 4400 have the mean 4200 and the standard error 200."""
    [table] = tables_of(
        [
            measured("rdense0", None),
            measured("rdense1", None, prefill_tokens_per_s=4400.0),
            *(measured(f"rengram{seed}", "device") for seed in (0, 1)),
            measured("rengram0", "host", prefill_tokens_per_s=1000.0, prefill_host_bytes=None),
        ]
    )
    assert list(table) == [
        "dense",
        "MoE",
        "Engram, tables on device",
        "Engram, tables in host memory",
        "Engram, large, tables on device",
        "Engram, large, tables in host memory",
    ]
    assert table["dense"]["prefill, tokens/s"] == "4,200 +- 200"
    assert table["dense"]["tables, MiB"] == "0"
    assert table["Engram, tables on device"]["prefill, tokens/s"] == "4,000"
    assert table["Engram, tables on device"]["weights without tables, MiB"] == "2.00"
    assert table["Engram, tables on device"]["tables, MiB"] == "1.00"
    host = table["Engram, tables in host memory"]
    assert (host["prefill, tokens/s"], host["seeds"]) == ("1,000", "1")
    assert (host["host memory in prefill, peak, MiB"], host["host memory in decode, peak, MiB"]) == ("-", "290.0")
    assert set(table["MoE"].values()) == set(table["Engram, large, tables on device"].values()) == {"-"}
    assert {arm["device memory in decode, peak, MiB"] for arm in table.values()} == {"-"}


@pytest.mark.parametrize(
    "other",
    [
        {"device": "H100"},
        {"host_cpu": "Xeon"},
        {"threads": 2},
        {"batch": 1},
        {"prompt": 512},
        {"new": 8},
        {"torch": "3"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_what_differs_in_hardware_or_load_is_never_in_one_cell(other: dict[str, Any]) -> None:
    rows = [measured("rdense0", None), measured("rdense1", None, decode_tokens_per_s=900.0, **other)]
    found = tables_of(rows)
    assert sorted(table["dense"]["decode, tokens/s"] for table in found) == ["500", "900"]
    text = baselines("tiny", runs_with_tables(), results_table({}), speeds(rows))
    assert text is not None
    assert all(str(value) in text for value in other.values())


def test_a_mean_over_seeds_is_over_all_that_were_measured_or_there_is_none() -> None:
    rows = [measured("rdense0", None), measured("rdense1", None, decode_host_bytes=None)]
    [table] = tables_of(rows)
    assert table["dense"]["host memory in decode, peak, MiB"] == "-"


def test_a_study_that_was_not_measured_says_so() -> None:
    text = baselines("tiny", runs_with_tables(), results_table({}), speeds([measured("rother", None)]))
    assert text is not None
    assert "No speeds measured." in text
    assert "tokens/s" not in text


def test_versions_of_the_code_are_counted() -> None:
    rows = [measured("rdense0", None), measured("rdense1", None, commit="d")]
    text = baselines("tiny", runs_with_tables(), results_table({}), speeds(rows))
    assert text is not None
    assert "Measured with 2 versions of the code." in text


def write(folder: Path, **changes: Any) -> Path:
    row = measured("r0", "host") | changes
    (path := folder / "r0" / "evals" / "speed_cpu.speed").parent.mkdir(parents=True)
    path.write_text(json.dumps({key: value for key, value in row.items() if value != "missing"}))
    return path


def test_measurements_are_collected_and_read_back_as_they_were(tmp_path: Path) -> None:
    write(tmp_path, prefill_tokens_per_s=0.1 + 0.2)
    table = collect(tmp_path)
    write_table(table, tmp_path / "speed.csv")
    pd.testing.assert_frame_equal(read_table(tmp_path / "speed.csv"), table, check_exact=True)
    assert table["prefill_tokens_per_s"].tolist() == [0.1 + 0.2]
    assert collect(tmp_path / "nothing").empty
    assert read_table(tmp_path / "nothing.csv").empty
    (tmp_path / "speed.csv").write_text("a,b\n1,2\n")
    with pytest.raises(BadFile, match="is not a table of speeds"):
        read_table(tmp_path / "speed.csv")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run_id": "r9"}, "is of run r9"),
        ({"tables_bytes": "missing"}, "no measurement of speed .'tables_bytes'.: delete it and measure again"),
        ({"decode_tokens_per_s": None}, "no measurement of speed"),
        ({"decode_tokens_per_s": 0.0}, "at .4000.0, 0.0. tokens/s"),
        ({"tables_on": "cpu"}, "tables on 'cpu'"),
    ],
)
def test_what_is_no_measurement_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    write(tmp_path, **changes)
    with pytest.raises(BadFile, match=said):
        collect(tmp_path)


def test_the_commands_take_speeds_from_runs_to_table_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = runs_with_tables()
    for row in runs.to_dict("records"):
        known = {key: value for key, value in row.items() if key != "status" and not pd.isna(value)}
        (folder := tmp_path / "runs" / row["run_id"] / "evals").mkdir(parents=True)
        final = {"status": row["status"], "result": known, "cost": {}}
        (folder.parent / "final.json").write_text(json.dumps(final))
        place = "host" if row["P_engram"] else None
        (folder / "a.speed").write_text(json.dumps(measured(row["run_id"], place)))
    words = ["--table", str(tmp_path / "runs.csv")]
    assert main(["collect", "--runs", str(tmp_path / "runs"), *words]) == 0
    assert f"{tmp_path / 'speed.csv'}: 8 measurements" in capsys.readouterr().out
    assert main(["tables", *words, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "tiny_table1.md").read_text()
    assert "| decode, tokens/s | 500 | 500 | - | 500 | - | 500 |" in text


def test_the_data_dictionary_lists_exactly_the_columns_in_their_order() -> None:
    text = (ROOT / "results" / "README.md").read_text()
    section = text.split("## Columns of speed.csv")[1].split("\n## ")[0]
    rows = [line.split("|")[1:4] for line in section.splitlines() if line.startswith("| `")]
    assert [name.strip().strip("`") for name, _, _ in rows] == list(COLUMNS)
    assert all(unit.strip() and meaning.strip() for _, unit, meaning in rows)
