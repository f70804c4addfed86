"""If these fail, a table of benchmarks claims a difference that is none, hides one, or compares unlike things."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.__main__ import main
from analysis.baselines_table import baselines
from analysis.benchmark_figure import draw, numbers, points
from analysis.benchmarks import (
    COLUMNS,
    collect,
    difference,
    estimate,
    items_of,
    rank_correlation,
    read_table,
    score,
)
from analysis.collect import COLUMNS as RUN_COLUMNS
from analysis.collect import write_table
from analysis.errors import BadFile
from analysis.speed import read_table as read_speeds

NO_SPEEDS = read_speeds(Path("nothing.csv"))
ARMS = {"dense": None, "allocation": 1.0, "engram": 0.8, "engram-large": 0.8}


def runs_table(seeds: tuple[int, ...] = (0, 1)) -> pd.DataFrame:
    rows = []
    for arm, rho in ARMS.items():
        for seed in seeds:
            row: dict[str, Any] = dict.fromkeys(RUN_COLUMNS)
            row |= {"run_id": f"r{arm}{seed}", "status": "final", "budget": "tiny", "mode": "paper", "seed": seed}
            row |= {"arm": "allocation" if arm == "engram" else arm, "rho": rho, "data": "d", "schema": 1, "steps": 10}
            row |= {"P_tot": 1000, "P_act": 100, "P_engram": 0, "flops_per_token": 600.0, "train_tokens": 5000}
            row |= {"valid_loss": 3.0 + seed + 0.1 * len(arm), "valid_bpb": 2.0 + 0.01 * seed}
            rows.append(row)
    return pd.DataFrame(rows, columns=list(RUN_COLUMNS)).astype(dict(RUN_COLUMNS))


def results_table(shares: dict[str, float], seeds: tuple[int, ...] = (0, 1), n: int = 400) -> pd.DataFrame:
    """One benchmark of two choices; the arms answer the same items, right where a hidden ease is below a share."""
    ease = np.random.default_rng(0).uniform(size=n)
    rows = []
    for arm, share in shares.items():
        for seed in seeds:
            right = (ease + np.random.default_rng(seed + 1).uniform(-0.01, 0.01, n) < share).astype(int)
            row: dict[str, Any] = dict.fromkeys(COLUMNS)
            row |= {"run_id": f"r{arm}{seed}", "benchmark": "blimp", "shots": 0, "metric": "acc", "chance": 0.5, "n": n}
            row |= {"value": right.mean(), "items": "".join(map(str, right)), "harness": "h", "version": "1"}
            rows.append(row | {"data": "x", "items_id": "y", "seq_len": 64, "truncated": 0})
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(dict(COLUMNS))


def test_with_one_seed_the_interval_is_that_of_a_paired_t_test() -> None:
    rng = np.random.default_rng(1)
    one, other = (rng.integers(0, 2, 200).astype(float) for _ in range(2))
    found = estimate([float((one - other).mean())], [one - other])
    expected = stats.ttest_rel(one, other)
    interval = expected.confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p == pytest.approx(expected.pvalue)


def test_without_items_the_interval_is_that_of_the_seeds() -> None:
    values = [0.3, 0.1, 0.25, 0.2]
    found, expected = estimate(values, None), stats.ttest_1samp(values, 0.0)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert estimate([0.3], None).low is None


def test_intervals_over_items_and_seeds_cover() -> None:
    """Three seeds with noise of their own and 300 shared items: 95 percent intervals hold the truth as often."""
    rng, hits, draws = np.random.default_rng(0), 0, 1500
    for _ in range(draws):
        item = rng.normal(0, 0.5, 300)
        seeds = [0.1 + rng.normal(0, 0.03) + item + rng.normal(0, 0.3, 300) for _ in range(3)]
        found = estimate([float(s.mean()) for s in seeds], seeds)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.1 <= found.high
    assert 0.94 < hits / draws <= 1.0


def test_pairing_takes_out_what_the_items_have_in_common() -> None:
    table = results_table({"engram": 0.70, "allocation": 0.66})
    table["seed"] = table["run_id"].str[-1].astype(int)
    ours, theirs = (table[table["run_id"].str.startswith(f"r{arm}")] for arm in ("engram", "allocation"))
    paired, alone = difference(ours, theirs), score(ours)
    assert paired is not None
    assert paired.stderr is not None
    assert alone.stderr is not None
    assert paired.stderr < 0.6 * alone.stderr
    assert difference(ours[ours["seed"] == 0], theirs[theirs["seed"] == 1]) is None


def test_rank_correlation_and_when_there_is_none() -> None:
    found = rank_correlation([1, 2, 3, 4, 5, 6, 7, 8], [8, 7, 6, 5, 4, 3, 1, 2])
    assert found is not None
    r, low, high = found
    assert r == pytest.approx(stats.spearmanr(range(8), [8, 7, 6, 5, 4, 3, 1, 2]).statistic)
    assert -1 < low < r < high < 0
    perfect = rank_correlation([1, 2, 3, 4], [8, 7, 6, 5])
    assert perfect is not None
    assert perfect[0] == perfect[1] == -1
    assert perfect[2] > 0.5  # four points in order show next to nothing
    assert rank_correlation([1, 2, 3], [1, 2, 3]) is None
    assert rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]) is None


def test_the_table_says_what_differs_what_is_at_chance_and_how_many_were_compared() -> None:
    shares = {"dense": 0.5, "allocation": 0.8, "engram": 0.8, "engram-large": 0.9}
    text = baselines("tiny", runs_table(), results_table(shares), NO_SPEEDS)
    assert text is not None
    (line,) = [line for line in text.splitlines() if line.startswith("| blimp") and "0.5000" in line]
    _, _, chance, dense, moe, engram, large, _ = (cell.strip() for cell in line.split("|"))
    assert chance == "0.5000"
    assert "_at chance_" in dense
    assert not any("chance" in cell for cell in (moe, engram, large))
    (line,) = [line for line in text.splitlines() if line.startswith("| blimp") and ", p " in line]
    _, _, dense, engram, large, _ = (cell.strip() for cell in line.split("|"))
    assert dense.startswith("**-0.")
    assert large.startswith("**+0.")
    assert not engram.startswith("**")
    assert "over all 9 comparisons" in text
    assert "Tiny models" in text


def test_other_items_are_another_benchmark() -> None:
    part, whole = results_table({"allocation": 0.8, "engram": 0.8}), results_table({"allocation": 0.8, "engram": 0.8})
    part["limit"], part["items_id"] = 400, "z"
    text = baselines("tiny", runs_table(), pd.concat([part, whole]), NO_SPEEDS)
    assert text is not None
    assert "first 400 items of each task" in text
    assert len([line for line in text.splitlines() if line.startswith("| blimp")]) == 4


def test_results_of_two_harnesses_stand_side_by_side_and_neither_hides_the_other() -> None:
    old, new = (results_table({"allocation": share, "engram": share}) for share in (0.8, 0.9))
    text = baselines("tiny", runs_table(), pd.concat([old, new.assign(harness="lm-eval-9")]), NO_SPEEDS)
    assert text is not None
    lines = [line for line in text.splitlines() if line.startswith("| blimp")]
    assert len(lines) == len(set(lines)) == 4
    assert sum("harness lm-eval-9" in line for line in lines) == 2


def test_losses_stand_over_the_seeds_that_every_arm_has() -> None:
    runs = runs_table()
    more = runs[runs["arm"] == "allocation"].assign(seed=99, run_id="rmore", valid_loss=9.0)
    one, two = (baselines("tiny", rows, results_table({}), NO_SPEEDS) for rows in (runs, pd.concat([runs, more])))
    assert one == two


def test_a_study_without_the_large_engram_has_no_such_table() -> None:
    runs = runs_table()
    assert baselines("tiny", runs[runs["arm"] != "engram-large"], results_table({}), NO_SPEEDS) is None


def test_the_figure_shows_the_sweep_alone() -> None:
    chosen = points(runs_table(), results_table({"dense": 0.5, "allocation": 0.8, "engram": 0.7}))
    assert set(chosen["rho"]) == {1.0, 0.8}
    found = numbers("tiny", chosen)["benchmarks"][0]
    assert [point["rho"] for point in found["points"]] == [0.8, 0.8, 1.0, 1.0]
    assert found["rank_correlation"] is not None
    assert len(draw("tiny", chosen, "").axes) == 3


def scored(
    benchmarks: Sequence[tuple[str, str, float | None, int]], seeds: dict[float, tuple[int, ...]]
) -> pd.DataFrame:
    """Results of a sweep as `points` gives them: (benchmark, metric, chance, items) at each rho and seed."""
    rows = []
    for benchmark, metric, chance, n in benchmarks:
        for rho, of_rho in seeds.items():
            for seed in of_rho:
                row = dict.fromkeys(COLUMNS) | {"run_id": f"r{rho}-{seed}", "benchmark": benchmark, "shots": 0, "n": n}
                row |= {"metric": metric, "chance": chance, "value": 0.5 + 0.1 * seed + 0.01 * rho, "items_id": str(n)}
                rows.append(row | {"rho": rho, "seed": seed, "valid_loss": 3.0 + seed + rho})
    return pd.DataFrame(rows)


def legend_of(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_scores_and_bits_per_byte_have_axes_of_their_own_that_say_what_is_better() -> None:
    both = [("arc_easy", "acc", 0.25, 500), ("bits_per_byte_wiki", "bits_per_byte", None, 20)]
    figure = draw("tiny", scored(both, {0.5: (0, 1), 1.0: (0, 1)}), "careful")
    _, scores, over_loss, bits, bits_over_loss = figure.axes
    assert "higher is better" in scores.get_ylabel()
    assert "share of items" in scores.get_ylabel()
    assert "bits per byte" in bits.get_ylabel()
    assert "lower is better" in bits.get_ylabel()
    assert [label.split(":")[0] for label in legend_of(over_loss)] == ["arc_easy, 500 items"]
    assert [label.split(":")[0] for label in legend_of(bits_over_loss)] == ["bits_per_byte_wiki, 20 items"]
    assert "-1 would be perfect" in over_loss.get_legend().get_title().get_text()
    assert "+1 would be perfect" in bits_over_loss.get_legend().get_title().get_text()


def test_the_figure_carries_the_warning_of_its_runs() -> None:
    figure = draw("tiny", scored([("a", "acc", 0.5, 10)], {0.5: (0,), 1.0: (0,)}), "One-minute runs")
    assert figure._supxlabel.get_text() == "One-minute runs"  # type: ignore[attr-defined]
    assert draw("tiny", scored([("a", "acc", 0.5, 10)], {1.0: (0,)}), "")._supxlabel is None  # type: ignore[attr-defined]


def test_no_two_benchmarks_look_alike_or_read_alike() -> None:
    many = [(f"task{i % 13}", "acc", 0.25, 100 + 50 * (i // 13)) for i in range(26)]
    axes = draw("tiny", scored(many, {0.5: (0, 1), 1.0: (0, 1)}), "").axes[2]
    assert len(set(legend_of(axes))) == 26
    shown = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in shown}
    assert len(looks) == 26
    assert len({line.get_color() for line in shown[:9]}) == 9


def test_equal_numbers_of_other_items_are_told_apart() -> None:
    twice = scored([("arc_easy", "acc", 0.25, 500)], {0.5: (0, 1), 1.0: (0, 1)})
    axes = draw("tiny", pd.concat([twice, twice.assign(items_id="ffff", limit=500)]), "").axes[2]
    assert {label.split(":")[0] for label in legend_of(axes)} == {
        "arc_easy, 500 items, limit none", "arc_easy, 500 items, limit 500"
    }  # fmt: skip


def test_lines_join_means_of_the_seeds_that_every_rho_has() -> None:
    """A third seed of one rho alone would bend them: here every seed is a nat from the next."""
    chosen = scored([("a", "acc", 0.25, 10)], {0.5: (0, 1), 0.75: (0, 1, 5), 1.0: (0, 1)})
    loss, scores = draw("tiny", chosen, "").axes[:2]
    [line] = [line for line in loss.lines if line.get_linestyle() == "-"]
    assert line.get_ydata() == pytest.approx([4.0, 4.25, 4.5])
    assert "2 seeds that every rho has" in loss.get_title(loc="left")
    [line] = [line for line in scores.lines if line.get_linestyle() == "-" and len(line.get_xdata()) == 3]
    assert line.get_ydata() == pytest.approx([0.305, 0.3075, 0.31])
    apart = draw("tiny", scored([("a", "acc", 0.25, 10)], {0.5: (0,), 1.0: (1,)}), "").axes
    assert "no line" in apart[0].get_title(loc="left")
    assert "no line" in legend_of(apart[2])[0]


def write_result(folder: Path, run: str = "r0", **changes: Any) -> Path:
    result = {
        "run_id": run, "benchmark": "blimp", "shots": 0, "metric": "acc", "chance": 0.5, "n": 4, "limit": None,
        "seq_len": 8, "harness": "h", "version": "1", "data": "d", "items_id": "i", "truncated": 0,
        "metrics": {"acc": {"value": 0.5, "stderr": 0.29}},
        "items": {"acc": {"blimp_b": "10", "blimp_a": "01"}},
    }  # fmt: skip
    (path := folder / run / "evals" / "blimp.json").parent.mkdir(parents=True)
    path.write_text(json.dumps(result | changes))
    return path


def test_results_are_collected_and_read_back_as_they_were(tmp_path: Path) -> None:
    """Items in the order of their tasks' names, zeros in front included."""
    write_result(tmp_path)
    table = collect(tmp_path)
    assert table["items"].tolist() == ["0110"]
    write_table(table, tmp_path / "benchmarks.csv")
    pd.testing.assert_frame_equal(read_table(tmp_path / "benchmarks.csv"), table)
    items = items_of("0110")
    assert items is not None
    assert items.tolist() == [0, 1, 1, 0]
    assert collect(tmp_path / "nothing").empty
    assert read_table(tmp_path / "nothing.csv").empty


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"run_id": "r9"}, "is of run r9"),
        ({"metric": "f1"}, "no result of a benchmark"),
        ({"items": None}, "no result"),
    ],
)
def test_what_is_no_result_is_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    write_result(tmp_path, **changes)
    with pytest.raises(BadFile, match=said):
        collect(tmp_path)


def test_the_commands_write_table_and_figure(tmp_path: Path) -> None:
    write_table(runs_table(), tmp_path / "runs.csv")
    write_table(results_table({"dense": 0.5, "allocation": 0.8, "engram": 0.7}), tmp_path / "benchmarks.csv")
    words = ["--table", str(tmp_path / "runs.csv"), "--out", str(tmp_path / "out")]
    assert main(["tables", *words]) == main(["figures", *words]) == 0
    assert (tmp_path / "out" / "tiny_table1.md").is_file()
    assert {path.name for path in (tmp_path / "out").glob("tiny_be*")} == {
        "tiny_benchmarks.json", "tiny_benchmarks.pdf", "tiny_benchmarks.png"
    }  # fmt: skip
