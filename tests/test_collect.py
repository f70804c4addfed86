"""If these fail, results/runs.csv may lose, alter or mix up runs, or say things that its data dictionary does not."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis.__main__ import main
from analysis.collect import COLUMNS, LATER, collect, read_table, rows_of_suite, write_atomically, write_table
from analysis.errors import BadFile, UserError

ROOT = Path(__file__).parent.parent
AWKWARD = 0.1 + 0.2
"""Needs 17 digits: 0.30000000000000004."""


def write_run(runs: Path, run_id: str, status: str = "final", **changes: Any) -> Path:
    """Write a finished run as training does, with some fields changed; None leaves a field out."""
    result = {"run_id": run_id, "schema": 1, "budget": "b", "arm": "allocation", "mode": "paper", "rho_target": 0.8}
    result |= {"rho": 0.8, "seed": 0, "P_tot": 2_612_000, "P_act": 262_000, "flops": 2e20, "valid_loss": 4.25} | changes
    cost = {"seconds": 12.5, "device": "cpu", "attempts": 1, "commit": "0012e45", "dirty": False, "python": "3.10"}
    path = runs / run_id / "final.json"
    path.parent.mkdir(parents=True)
    path.write_text(
        json.dumps({"status": status, "result": {k: v for k, v in result.items() if v is not None}, "cost": cost})
    )
    return path


def test_a_table_reads_back_equal(tmp_path: Path) -> None:
    write_run(tmp_path, "ra", valid_loss=AWKWARD)
    write_run(tmp_path, "rb", arm="dense", rho=None, rho_target=None)
    write_run(tmp_path, "rc", status="diverged", valid_loss=None, seed=1)
    table = collect(tmp_path)
    write_table(table, tmp_path / "runs.csv")
    again = read_table(tmp_path / "runs.csv")
    pd.testing.assert_frame_equal(again, table, check_exact=True)
    assert again["valid_loss"][0] == AWKWARD
    assert again["flops"][0] == 2e20
    assert again["commit"][0] == "0012e45"
    assert again["python"][0] == "3.10"


def test_a_run_that_serves_two_budgets_has_a_row_for_each(tmp_path: Path) -> None:
    path = write_run(tmp_path, "ra")
    labels = {"budget": "mine", "arm": "allocation", "mode": "paper", "rho_target": 0.75, "rho": 0.75}
    path.with_name("labels.jsonl").write_text(json.dumps(labels) + "\n")
    table = collect(tmp_path)
    assert table[["budget", "rho", "run_id"]].values.tolist() == [["b", 0.8, "ra"], ["mine", 0.75, "ra"]]
    assert table["valid_loss"].nunique() == 1
    path.with_name("labels.jsonl").write_text('{"budget": "mi')
    with pytest.raises(BadFile, match=r"labels.jsonl is torn"):
        collect(tmp_path)


def test_every_float_reads_back_as_the_same_number(tmp_path: Path) -> None:
    write_run(tmp_path, "ra")
    losses = np.random.default_rng(0).lognormal(0, 9, 3000)
    table = pd.concat([collect(tmp_path)] * len(losses), ignore_index=True).assign(valid_loss=losses)
    write_table(table, tmp_path / "runs.csv")
    np.testing.assert_array_equal(read_table(tmp_path / "runs.csv")["valid_loss"], losses)


def test_columns_come_in_the_listed_order_with_unknown_ones_last(tmp_path: Path) -> None:
    write_run(tmp_path, "ra", zebra=1, apple=[1, 2])
    table = collect(tmp_path)
    assert list(table.columns) == [*COLUMNS, "apple", "zebra"]
    assert table["apple"][0] == "[1,2]"


def test_rows_are_sorted_and_bytes_do_not_depend_on_the_order_of_writing(tmp_path: Path) -> None:
    runs = [("ra", 1.0, 1), ("rb", 0.5, 1), ("rc", 1.0, 0), ("rd", 0.5, 0)]
    texts = []
    for name, order in (("one", runs), ("two", runs[::-1])):
        for run_id, rho, seed in order:
            write_run(tmp_path / name, run_id, rho=rho, seed=seed)
        write_table(collect(tmp_path / name), tmp_path / f"{name}.csv")
        texts.append((tmp_path / f"{name}.csv").read_bytes())
    assert texts[0] == texts[1]
    assert read_table(tmp_path / "one.csv")["run_id"].tolist() == ["rd", "rb", "rc", "ra"]


def test_a_run_without_final_json_is_not_a_row(tmp_path: Path) -> None:
    write_run(tmp_path, "ra")
    (tmp_path / "rb").mkdir()
    (tmp_path / "rb" / "metrics.jsonl").write_text("{}\n")
    assert collect(tmp_path)["run_id"].tolist() == ["ra"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"status": "final", "resu', "torn or not JSON"),
        ("[1, 2]", "not written by this suite"),
        ('{"status": "final", "result": {}}', "not written by this suite"),
        ('{"status": "running", "result": {}, "cost": {}}', "status is 'running'"),
        ('{"status": "final", "result": {"run_id": "ra"}, "cost": {}}', "lacks budget, arm, mode, seed"),
    ],
    ids=["torn", "list", "no cost", "status", "fields"],
)
def test_a_torn_or_foreign_final_json_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "ra").mkdir()
    (tmp_path / "ra" / "final.json").write_text(text)
    with pytest.raises(BadFile, match=f"ra.final.json.*{re.escape(message)}"):
        collect(tmp_path)


def test_a_final_run_without_a_finite_loss_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "ra", valid_loss=float("nan"))
    with pytest.raises(BadFile, match="needs a finite valid_loss, not nan"):
        collect(tmp_path)


def test_a_copied_run_directory_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "ra").parent.rename(tmp_path / "rb")
    with pytest.raises(BadFile, match="the result is of run ra"):
        collect(tmp_path)


def test_a_value_of_the_wrong_type_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path, "ra", P_tot="many")
    with pytest.raises(BadFile, match="wrong type"):
        collect(tmp_path)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_table_that_lacks_columns_is_refused(tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text("run_id,seed\nra,0\n")
    with pytest.raises(BadFile, match="lacks the columns status, schema"):
        read_table(tmp_path / "runs.csv")


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda text: text[: text.rindex("allocation")], r"has no \w+ in line 3"),
        (lambda text: text.replace("4.0", "inf", 1), r"a loss of at least 0, not inf \(ra\)"),
        (lambda text: text.replace("4.0", "-4.0", 1), r"a loss of at least 0, not -4\.0 \(ra\)"),
        (lambda text: text.splitlines()[0] + "\n", "holds no run"),
        (lambda text: "\udcff\udcfe" + text, "lacks the columns run_id"),
    ],
    ids=["cut", "infinite", "negative", "empty", "binary"],
)
def test_a_table_that_collect_cannot_have_written_is_refused_with_the_place(
    harm: Callable[[str], str], said: str, tmp_path: Path
) -> None:
    for seed, name in enumerate(("ra", "rb")):
        write_run(tmp_path, name, seed=seed, suite="allocation", valid_loss=4.0, rho_target=0.8, variant=None)
    write_table(collect(tmp_path), path := tmp_path / "runs.csv")
    path.write_bytes(harm(path.read_text()).encode(errors="surrogateescape"))
    with pytest.raises((BadFile, UserError), match=said) as error:
        read_table(path)
    assert str(path) in str(error.value)


def test_a_missing_table_says_which_command_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="python -m analysis collect"):
        read_table(tmp_path / "runs.csv")


def test_the_data_dictionary_lists_exactly_the_columns_in_their_order() -> None:
    text = (ROOT / "results" / "README.md").read_text()
    section = text.split("## Columns of runs.csv")[1].split("\n## ")[0]
    rows = [line.split("|")[1:4] for line in section.splitlines() if line.startswith("| `")]
    assert [name.strip().strip("`") for name, _, _ in rows] == list(COLUMNS)
    assert all(unit.strip() and meaning.strip() for _, unit, meaning in rows)


def test_the_command_writes_the_table_and_counts_the_diverged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "runs", "ra")
    write_run(tmp_path / "runs", "rb", status="diverged", valid_loss=None)
    table = tmp_path / "new" / "runs.csv"
    assert main(["collect", "--runs", str(tmp_path / "runs"), "--table", str(table)]) == 0
    assert "2 runs, 1 of them diverged" in capsys.readouterr().out
    assert len(read_table(table)) == 2


def test_no_finished_runs_is_a_users_mistake_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["collect", "--runs", str(tmp_path), "--table", str(tmp_path / "runs.csv")]) == 2
    error = capsys.readouterr().err
    assert "make sweep" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "runs.csv").exists()


def test_a_torn_file_is_a_failure_and_leaves_the_old_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "runs.csv"
    table.write_text("old")
    write_run(tmp_path / "runs", "ra").write_text("{")
    assert main(["collect", "--runs", str(tmp_path / "runs"), "--table", str(table)]) == 1
    assert "ra/final.json is torn" in capsys.readouterr().err
    assert table.read_text() == "old"


def test_help_loads_nothing_slow_and_drawing_loads_no_torch() -> None:
    def loaded(code: str) -> set[str]:
        script = f"import sys\n{code}\nprint(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
        return set(done.stdout.split())

    assert not {"torch", "pandas", "matplotlib", "scipy"} & loaded("import analysis.__main__")
    assert not {"torch", "engram", "experiments"} & loaded("import analysis.figures, analysis.tables")


def test_a_table_of_before_there_were_suites_is_read_with_the_ratios_that_follow(tmp_path: Path) -> None:
    write_run(tmp_path, "ra", train_tokens=26_120_000)
    table = collect(tmp_path)
    write_table(table.drop(columns=sorted(LATER)), tmp_path / "runs.csv")
    again = read_table(tmp_path / "runs.csv")
    assert list(again.columns) == list(COLUMNS)
    assert again["suite"].isna().all()
    assert again["P_tot_per_P_act"][0] == 2_612_000 / 262_000
    assert again["tokens_per_P_tot"][0] == 10


def test_a_run_that_was_labelled_again_with_its_suite_has_one_row_for_each_suite(tmp_path: Path) -> None:
    path = write_run(tmp_path, "ra")
    same = {"budget": "b", "arm": "allocation", "mode": "paper", "rho_target": 0.8, "rho": 0.8}
    lines = [same | {"suite": suite, "variant": None} for suite in ("allocation", "baselines")]
    path.with_name("labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert collect(tmp_path)["suite"].tolist() == ["allocation", "baselines"]


def test_a_label_that_also_tells_what_the_budget_held_takes_the_place_of_the_one_that_does_not(tmp_path: Path) -> None:
    path = write_run(tmp_path, "ra", suite="allocation")
    same = {"budget": "b", "arm": "allocation", "mode": "paper", "rho_target": 0.8, "rho": 0.8, "suite": "allocation"}
    lines = [same | {"budget_hash": content} for content in ("one", "two")]
    path.with_name("labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert collect(tmp_path)["budget_hash"].tolist() == ["one", "two"]


def test_a_label_for_one_suite_takes_an_older_run_from_no_other(tmp_path: Path) -> None:
    """rho = 1 was trained for the curve before suites were noted; then `baselines` shared it."""
    path = write_run(tmp_path, "ra", rho=1.0, rho_target=1.0)
    label = {"budget": "b", "arm": "allocation", "mode": "paper", "rho_target": 1.0, "rho": 1.0, "suite": "baselines"}
    path.with_name("labels.jsonl").write_text(json.dumps(label) + "\n")
    write_run(tmp_path, "rb", arm="engram-large")
    table = collect(tmp_path)
    assert rows_of_suite(table, "allocation")["run_id"].tolist() == ["ra"]
    assert rows_of_suite(table, "baselines")["run_id"].tolist() == ["ra", "rb"]
