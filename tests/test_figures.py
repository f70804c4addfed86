"""If these fail, the figure or the table beside it may show other numbers than the runs gave."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from analysis import tables
from analysis.__main__ import main
from analysis.collect import COLUMNS, write_table
from analysis.errors import UserError
from analysis.figures import _apart, allocation, caption, read_paper, save
from analysis.study import Study, read_study, split

RHOS = (0.0, 0.25, 0.5, 0.65, 0.8, 0.9, 1.0)
CONTROLS = {
    "dense": (None, 0.03),
    "module-only": (1.0, -0.01),
    "random-ids": (0.8, 0.01),
    "over-encoding": (0.8, 0.012),
}
"""Control -> its rho and its loss minus the loss at rho = 1."""


def bowl(rho: float) -> float:
    return 4.2 + 0.16 * (rho - 0.7) ** 2


def make_table(
    curve: Callable[[float], float] = bowl,
    seeds: tuple[int, ...] = (0, 1),
    controls: dict[str, tuple[float | None, float]] = CONTROLS,
    strict: bool = False,
    **fixed: Any,
) -> pd.DataFrame:
    """Build the table of a synthetic study: a curve, seeds that shift it, and noise of 0.001."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    common = {"status": "final", "schema": 1, "budget": "b", "P_tot": 2_612_000, "P_act": 262_000, "data": "ab" * 32}
    common |= {"train_tokens": 1_200_000, "steps": 146, "flops_per_token": 2.1e6, "n_slots": 40_000}

    def add(arm: str, mode: str, rho: float | None, seed: int, loss: float) -> None:
        noisy = loss + 0.02 * seed + rng.normal(0, 0.001)
        row = {"run_id": f"r{len(rows):010x}", "arm": arm, "mode": mode, "rho": rho, "seed": seed}
        rows.append(common | row | {"valid_loss": noisy, "valid_bpb": noisy / 3} | fixed)

    for seed in seeds:
        for rho in RHOS:
            add("allocation", "paper", rho, seed, curve(rho))
            if strict and rho < 1:
                add("allocation", "strict", rho, seed, curve(rho) + 0.005)
        for arm, (at, offset) in controls.items():
            add(arm, "paper", at, seed, curve(1.0) + offset)
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(dict(COLUMNS))


def study_of(table: pd.DataFrame) -> Study:
    [(name, rows)] = split(table).items()
    return read_study(name, rows)


def draw(study: Study) -> Figure:
    return allocation(study, read_paper())


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def margin(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


# Studies


def test_runs_on_other_data_or_tokens_are_kept_apart_and_named_by_what_differs() -> None:
    table = pd.concat([make_table(), make_table(lambda rho: 5 - rho, train_tokens=2_400_000)])
    studies = {name: read_study(name, rows) for name, rows in split(table).items()}
    assert set(studies) == {"b_train_tokens-1200000", "b_train_tokens-2400000"}
    assert [s.verdict.answer for s in studies.values()] == ["U", "no U"]


def test_seeds_of_another_budget_under_the_same_name_are_not_pooled() -> None:
    first = make_table().assign(budget_hash="aaaaaaaaaa")
    other = make_table(lambda rho: 5 - rho).assign(budget_hash="bbbbbbbbbb")
    other = other.assign(seed=other["seed"] + 10, run_id=other["run_id"] + "b")
    studies = split(pd.concat([first, other]))
    assert set(studies) == {"b_budget_hash-aaaaaaaaaa", "b_budget_hash-bbbbbbbbbb"}
    assert max(read_study("b", studies["b_budget_hash-aaaaaaaaaa"]).sweep.seeds) < 10


def test_means_of_the_table_are_over_the_seeds_that_every_rho_has() -> None:
    table = make_table()
    one = table[(table["arm"] == "allocation") & (table["rho"] == 1)].iloc[[0]]
    extra = one.assign(seed=99, run_id="rextra", valid_loss=9.0, valid_bpb=9.0)
    more, before = (
        [line for line in tables.allocation(study_of(rows)).splitlines() if line.startswith("|")]
        for rows in (pd.concat([table, extra]), table)
    )
    assert [re.sub(r"(\d) of \d", r"\1", line) for line in more] == before != more


def test_a_sweep_that_diverged_as_a_whole_is_said_to_have() -> None:
    with pytest.raises(UserError, match=r"all runs of the allocation sweep of b diverged: lower train\.optim\.lr"):
        split(make_table().assign(status="diverged"))


def test_two_runs_of_one_place_are_refused_with_their_names() -> None:
    table = make_table()
    twin = table.iloc[[3]].assign(run_id="rtwin")
    with pytest.raises(UserError, match=r"r0000000003, rtwin are all allocation, rho 0\.65, seed 0"):
        study_of(pd.concat([table, twin]))


def test_an_unknown_budget_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match="no finished runs of budget c: the table holds b"):
        split(make_table(), "c")


def test_the_pure_moe_labelled_strict_still_serves_as_the_reference() -> None:
    table = make_table(strict=True)
    pure = (table["arm"] == "allocation") & (table["rho"] == 1)
    study = study_of(table.assign(mode=table["mode"].mask(pure, "strict")))
    assert study.sweep.rho[-1] == 1
    strict = {a.rho: a.difference for a in study.arms if a.mode == "strict"}
    assert set(strict) == set(RHOS[:-1])
    assert strict[0.65] is not None
    assert strict[0.65].value == pytest.approx(bowl(0.65) + 0.005 - bowl(1.0), abs=0.004)


def test_a_diverged_run_takes_its_seed_off_the_curve_although_it_stopped_early() -> None:
    table = make_table(seeds=(0, 1, 2))
    bad = (table["arm"] == "allocation") & (table["rho"] == 0.5) & (table["seed"] == 2)
    table.loc[bad, ["status", "valid_loss", "valid_bpb", "train_tokens", "steps"]] = ["diverged", None, None, 8192, 1]
    study = study_of(table)
    assert (study.sweep.seeds, study.sweep.dropped_seeds) == ((0, 1), (2,))
    assert "| 2 (1 diverged) |" in tables.allocation(study)


def test_a_diverged_run_of_another_length_does_not_spoil_a_finished_study() -> None:
    other = make_table(train_tokens=8192, steps=1, status="diverged", valid_loss=None)
    study = study_of(pd.concat([make_table(), other.assign(run_id="s" + other["run_id"])]))
    assert study.sweep.dropped_seeds == ()
    assert all(arm.n_diverged == 0 for arm in study.arms)


# The figure


def test_the_figure_draws_every_mean_every_seed_and_both_fits() -> None:
    study = study_of(make_table())
    figure = draw(study)
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    np.testing.assert_array_equal(lines["mean of seeds (2)"].get_ydata(), study.sweep.loss.mean(axis=1))
    drawn = [line.get_ydata() for line in figure.axes[0].lines if len(np.asarray(line.get_xdata())) == len(RHOS)]
    for i in range(2):
        assert any(np.array_equal(y, study.sweep.loss[:, i]) for y in drawn)
    assert study.verdict.quadratic is not None
    assert f"quadratic: min at {study.verdict.quadratic.optimum:.2f}" in lines
    assert any(str(label).startswith("quadratic without rho = 1: min at 0.7") for label in lines)


def test_the_band_spans_the_bootstrap_interval() -> None:
    study = study_of(make_table())
    place = study.verdict.optimum
    figure = draw(study)
    [band] = figure.axes[0].patches
    assert isinstance(band, Rectangle)
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((place.low, place.high))
    assert f"minimum, 95% bootstrap: {place.low:.2f} to {place.high:.2f}" in legend(figure)


def test_the_controls_are_marked_at_their_mean_loss_and_named() -> None:
    study = study_of(make_table())
    figure = draw(study)
    assert set(margin(figure)) == {
        "dense",
        "module without memory",
        "random lookups, rho 0.80",
        "OverEncoding, rho 0.80",
    }
    means = {a.arm: (a.rho, float(np.mean(a.loss))) for a in study.arms if a.arm in CONTROLS}
    lines = figure.axes[0].lines
    level = [float(np.asarray(line.get_ydata())[0]) for line in lines if line.get_linestyle() == "-."]
    assert level == [means.pop("dense")[1]], "it has no rho, and so is a line"
    points = {tuple(map(float, line.get_xydata()[0])) for line in lines if line.get_marker() in ("^", "v", "D")}  # type: ignore[index]
    assert points == set(means.values()), "a run at one rho is a point there"


def test_a_paper_on_another_scale_is_said_to_be() -> None:
    _, ours, papers = draw(study_of(make_table(lambda rho: 4.2 + (rho - 0.7) ** 2))).axes
    low, high = papers.get_ylim()
    times = (ours.get_ylim()[1] - ours.get_ylim()[0]) / (high - low)
    assert times > 10
    assert f"{times:.2g} times less than (b)'s" in papers.get_title(loc="left")
    coarser = draw(study_of(make_table(lambda rho: 4.2 + 0.001 * rho, controls={}))).axes[2]
    assert "times more than (b)'s" in coarser.get_title(loc="left")


def test_a_control_far_above_is_named_with_its_loss_and_does_not_flatten_the_curve() -> None:
    study = study_of(make_table(controls={"dense": (None, 1.0)}))
    figure = draw(study)
    assert margin(figure) == [f"dense: {np.mean(study.arms[-1].loss):.3f}, above"]
    assert figure.axes[0].get_ylim()[1] < 4.5


def test_a_study_without_controls_draws_no_marks() -> None:
    assert margin(draw(study_of(make_table(controls={})))) == []


def test_an_edge_is_ringed_and_called_no_optimum() -> None:
    figure = draw(study_of(make_table(lambda rho: 4 + 0.1 * rho, controls={})))
    assert "lowest on the grid's edge: no optimum" in legend(figure)
    assert not any("local parabola" in label for label in legend(figure))
    assert "Verdict: no U" in str(figure.get_suptitle())


def test_the_offsets_carry_their_intervals_and_the_strict_curve() -> None:
    study = study_of(make_table(strict=True))
    above = draw(study).axes[1]
    bars = [c for c in above.collections if isinstance(c, LineCollection)]
    assert [len(c.get_segments()) for c in bars] == [6, 6]
    dots = [np.asarray(line.get_ydata()) for line in above.lines if line.get_alpha() is not None]
    np.testing.assert_array_equal(dots, (study.sweep.loss - study.sweep.loss[-1])[:-1].T)
    gain = study.verdict.gains[0]
    low, high = bars[0].get_segments()[1][:, 1]
    assert (low, high) == pytest.approx((-(gain.over_reference.high or 0), -(gain.over_reference.low or 0)))
    assert "strict: equal P_act" in legend(draw(study))


def test_one_seed_has_no_intervals() -> None:
    figure = draw(study_of(make_table(seeds=(0,))))
    assert len(figure.axes[1].collections) == 0
    assert "one seed: no intervals" in figure.axes[1].get_title(loc="left")
    assert not any("bootstrap" in label for label in legend(figure))


def test_the_papers_two_curves_are_drawn_as_offsets_from_their_own_rho_1() -> None:
    below = draw(study_of(make_table())).axes[2]
    curves = {line.get_label(): np.asarray(line.get_ydata()) for line in below.lines}
    assert curves["6e20 FLOPs"].min() == pytest.approx(1.70950 - 1.72480, abs=1e-9)
    assert curves["2e20 FLOPs"].min() == pytest.approx(1.81553 - 1.82922, abs=1e-9)
    assert curves["6e20 FLOPs"][-1] == 0


def test_labels_in_the_margin_keep_their_distance() -> None:
    placed = _apart([0.1, 0.11, 0.98, 0.99, 1.0], 0.05)
    assert np.diff(placed).min() >= 0.05 - 1e-12
    assert max(placed) <= 1.0


# Files


def test_saving_writes_image_and_numbers_and_the_same_bytes_again(tmp_path: Path) -> None:
    study = study_of(make_table())
    first = {path.name: path.read_bytes() for path in save(draw(study), caption(study), tmp_path / "x")}
    again = {path.name: path.read_bytes() for path in save(draw(study), caption(study), tmp_path / "x")}
    assert set(first) == {"x.png", "x.pdf", "x.json"}
    assert first == again
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(first)
    numbers = json.loads(first["x.json"])
    assert numbers["answer"] == "U"
    assert numbers["optimum"]["low"] == study.verdict.optimum.low
    assert {"dense", "allocation"} <= {arm["arm"] for arm in numbers["arms"]}


def test_the_table_lists_every_arm_with_mean_and_difference() -> None:
    study = study_of(make_table())
    text = tables.allocation(study)
    rows = [line for line in text.splitlines() if line.startswith(("| allocation", "| dense", "| module-only"))]
    assert [row.split("|")[2].strip() for row in rows[:7]] == [f"{rho:.3f}" for rho in reversed(RHOS)]
    dense = next(a for a in study.arms if a.arm == "dense")
    assert dense.difference is not None
    assert f"{np.mean(dense.loss):.4f}" in rows[7]
    assert f"{dense.difference.value:+.4f} ({dense.difference.low:+.4f} to {dense.difference.high:+.4f})" in rows[7]
    assert study.verdict.sentence in text


def test_the_command_draws_what_it_can_and_names_what_it_cannot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = make_table(budget="a")
    table = pd.concat([unfinished[unfinished["rho"] != 1], make_table()])
    write_table(table, tmp_path / "runs.csv")
    where = ["--table", str(tmp_path / "runs.csv"), "--out", str(tmp_path / "figures")]
    assert main(["figures", *where]) == 2
    printed = capsys.readouterr()
    assert "a: allocation: no finished run at rho = 1" in printed.err
    assert f"{tmp_path / 'figures' / 'b_allocation.png'}\n" in printed.out
    assert "\nU: the loss is lowest near rho" in printed.out
    assert main(["tables", *where, "--budget", "b"]) == 0
    assert (tmp_path / "figures" / "b_allocation.md").read_text().startswith("# b\n")
