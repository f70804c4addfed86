"""If these fail, a claim may be called reproduced that is not, or one may vanish because its runs are missing.

Every claim is tried on runs with a known truth: one that fits it, one that contradicts it, and one too noisy to tell.
"""

from __future__ import annotations

import csv
import re
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import synthetic as make
from synthetic import Place, rows_of

from analysis.claims import CLAIMS, Finding, judge, judge_all
from analysis.dossier import Dossier, read_dossiers
from analysis.errors import UserError
from analysis.fits import Difference
from analysis.rules import MARGIN, better, no_difference

PAPER = Path(__file__).parent.parent / "results" / "paper"

HORIZONS = (0.25, 1.0, 4.0)
LENGTHS = {
    f"horizon-{f:g}x": {"train_tokens": int(58.7e9 * f), "steps": int(14_000 * f), "tokens_per_P_tot": 10.3 * f}
    for f in HORIZONS
}
RATIOS = {f"sparsity-{r}": {"P_tot_per_P_act": float(r)} for r in (5, 10, 20)}
FACTS = {"infinite-memory": make.SLOT_FACTS, "horizon": LENGTHS, "sparsity": RATIOS}


def one(table: pd.DataFrame) -> Dossier:
    [dossier] = read_dossiers(table)
    return dossier


def found(dossier: Dossier, key: str) -> Finding:
    return judge(next(claim for claim in CLAIMS if claim.key == key), dossier)


def verdict(key: str, suite: str, places: list[Place], **how: Any) -> str:
    return found(one(rows_of(suite, places, facts=FACTS.get(suite), **how)), key).answer.verdict


SHARP = {0.25: 0.78, 1.0: 0.78, 4.0: 0.78}
CASES: dict[str, tuple[str, list[Place], list[Place]]] = {
    "u-shape": ("allocation", make.allocation(), make.allocation(at=2.0)),
    "optimum": ("allocation", make.allocation(at=0.77, depth=1.0), make.allocation(at=0.45, depth=1.0)),
    "rho-40": ("allocation", make.allocation(at=0.7), make.allocation(at=0.95, depth=0.3)),
    "first-step": ("allocation", make.allocation(jump=0.05), make.allocation(at=0.5, depth=0.5, jump=0.0)),
    "module-only": ("allocation", make.allocation(), make.allocation({"module-only": -0.015})),
    "random-ids": ("allocation", make.allocation(), make.allocation({"random-ids": -0.015})),
    "equal-compute": ("allocation", make.allocation(), make.allocation({"strict": 0.01})),
    "sparsity": (
        "sparsity",
        make.levels("sparsity", {5: 0.7, 10: 0.7, 20: 0.7}),
        make.levels("sparsity", {5: 0.5, 10: 0.65, 20: 0.8}),
    ),
    "horizon": ("horizon", make.levels("horizon", SHARP), make.levels("horizon", {0.25: 0.3, 1: 0.5, 4: 0.7})),
    "log-linear": ("infinite-memory", make.memory(), make.memory(bend=0.05)),
    "over-encoding": ("infinite-memory", make.memory(), make.memory(advantage=-0.01)),
    "layer-2": ("layers", make.placements(), make.placements(best=5)),
    "two-layers": ("layers", make.placements(), make.placements(two=0.01)),
    "fusion": ("ablation", make.parts(), make.parts(no_fusion=-0.01)),
    "compression": ("ablation", make.parts(), make.parts(no_compression=-0.01)),
    "gate": ("ablation", make.parts(), make.parts(no_gate=-0.01)),
    "convolution": ("ablation", make.parts(), make.parts(no_conv=0.01)),
    "4-grams": ("ablation", make.parts(), make.parts(plus_4_grams=-0.01)),
    "moe-over-dense": ("baselines", make.table_1(), make.table_1(dense=1.5)),
    "engram-over-moe": ("baselines", make.table_1(), make.table_1(engram=1.7)),
    "larger-memory": ("baselines", make.table_1(), make.table_1(large=1.7)),
}


def test_every_claim_is_tried() -> None:
    """`stable` needs two budgets and has a test of its own."""
    assert {claim.key for claim in CLAIMS} == set(CASES) | {"stable"}
    assert all(claim.rule and claim.text and claim.source and claim.paper for claim in CLAIMS)


@pytest.mark.parametrize("key", CASES)
def test_a_claim_is_reproduced_where_it_is_true(key: str) -> None:
    suite, true, _ = CASES[key]
    assert verdict(key, suite, true, sigma=0.0002) == "reproduced"


@pytest.mark.parametrize("key", CASES)
def test_a_claim_is_contradicted_where_it_is_false(key: str) -> None:
    suite, _, false = CASES[key]
    assert verdict(key, suite, false, sigma=0.0002) == "contradicted"


@pytest.mark.parametrize("key", CASES)
def test_a_claim_is_undecided_with_one_seed_and_with_much_noise(key: str) -> None:
    suite, true, _ = CASES[key]
    if key != "log-linear":  # a line has residuals of its own, seeds or not
        assert verdict(key, suite, true, seeds=(0,)) == "undecided"
    noisy = [verdict(key, suite, true, sigma=0.5, rng=np.random.default_rng(i)) for i in range(3)]
    assert noisy.count("undecided") >= 2


def test_stability_over_compute_needs_two_budgets() -> None:
    def two(other: float) -> pd.DataFrame:
        larger = rows_of("allocation", make.allocation(at=other), sigma=0.0002, budget="c", flops_per_token=3.4e10)
        return pd.concat([rows_of("allocation", make.allocation(at=0.7), sigma=0.0002), larger])

    assert [found(d, "stable").answer.verdict for d in read_dossiers(two(0.72))] == ["reproduced"] * 2
    assert [found(d, "stable").answer.verdict for d in read_dossiers(two(0.35))] == ["contradicted"] * 2
    alone = found(one(rows_of("allocation", make.allocation())), "stable").answer
    assert (alone.verdict, alone.measured) == ("not run", "1 of at least two levels of FLOPs")


def test_stability_over_compute_takes_equal_text_and_code_and_one_curve_a_budget() -> None:
    def curve(**facts: Any) -> pd.DataFrame:
        rows = rows_of("allocation", make.allocation(at=0.7), sigma=0.0002, **facts)
        return rows.assign(run_id=rows["run_id"] + str(len(facts)) + str(facts.get("data", ""))[:4])

    own, larger = curve(corpus="python"), curve(corpus="python", budget="c", flops_per_token=3.4e10)
    other_text = curve(corpus="wiki", budget="d", flops_per_token=3.4e11)
    again = curve(corpus="python", budget="c", flops_per_token=3.4e10, data="cd" * 32)
    levels = [[level.label for level in d.across] for d in read_dossiers(pd.concat([own, larger, other_text]))]
    assert levels == [["b", "c"], ["b", "c"], ["d"]]
    dossiers = {d.name: d for d in read_dossiers(pd.concat([own, larger, again]))}
    assert [level.label for level in dossiers["b"].across] == ["b"], "which curve of c counts is not said"
    assert len(dossiers) == 3


def test_a_control_at_two_rho_is_not_judged_by_either() -> None:
    rows = rows_of("allocation", make.allocation({"random-ids": 1.71}))
    control = rows[rows["arm"] == "random-ids"]
    more = control.assign(rho=0.2, run_id=control["run_id"] + "b", valid_loss=control["valid_loss"] - 1)
    answer = found(one(pd.concat([rows, more])), "random-ids").answer
    assert answer.verdict == "not run"
    assert answer.measured.startswith("random-ids was run at rho = 0.20, ")


def test_suites_of_a_budget_find_each_other_where_one_of_them_was_run_on_two_corpora() -> None:
    curve, parts = rows_of("allocation", make.allocation()), rows_of("layers", make.placements())
    other = curve.assign(data="cd" * 32, run_id=curve["run_id"] + "b")
    by_name = {d.name: set(d.suites) for d in read_dossiers(pd.concat([curve, other, parts]))}
    assert by_name == {"b_data-abababababab": {"allocation", "layers"}, "b_data-cdcdcdcdcdcd": {"allocation"}}


def test_a_minimum_on_the_edge_decides_nothing_about_stability() -> None:
    edge = make.levels("sparsity", {5: 0.7, 10: 0.7, 20: -0.5})
    answer = found(one(rows_of("sparsity", edge, facts=RATIOS)), "sparsity").answer
    assert answer.verdict == "undecided"
    assert "1 with the minimum on an edge" in answer.measured


def test_a_claim_whose_runs_are_missing_is_not_run_and_never_dropped() -> None:
    findings = judge_all(one(rows_of("layers", make.placements())))
    assert [finding.claim.key for finding in findings] == [claim.key for claim in CLAIMS]
    by_key = {finding.claim.key: finding.answer for finding in findings}
    assert by_key["gate"].verdict == "not run"
    assert by_key["gate"].measured == "no runs: launch ablation"
    assert by_key["layer-2"].verdict == "reproduced"


def test_fusion_of_one_stream_is_not_run_and_says_why() -> None:
    places = [place for place in make.parts() if place[1] != "no-fusion"]
    answer = found(one(rows_of("ablation", places, n_streams=1)), "fusion").answer
    assert (answer.verdict, answer.measured) == (
        "not run",
        "the backbone has one residual stream: there is nothing to fuse",
    )


def test_equal_arms_are_seldom_called_better() -> None:
    """A family of ablations without any effect: some gate, fusion or compression claim is reproduced in 5 percent."""
    rng, n, wrong = np.random.default_rng(1), 30, 0
    flat = make.parts(**{name.replace("-", "_"): 0.0 for name in make.EFFECTS})
    for _ in range(n):
        dossier = one(rows_of("ablation", flat, sigma=0.002, rng=rng))
        answers = [claim.judge(dossier) for claim in CLAIMS if claim.key in ("gate", "fusion", "compression")]
        wrong += any(answer is not None and answer.verdict == "reproduced" for answer in answers)
    assert wrong / n <= 0.05 + 3 * sqrt(0.05 * 0.95 / n)


@pytest.mark.parametrize(
    ("low", "high", "gain", "same"),
    [
        (0.001, 0.002, "reproduced", "reproduced"),
        (-0.002, -0.001, "contradicted", "reproduced"),
        (0.003, 0.009, "reproduced", "contradicted"),
        (-0.001, 0.009, "undecided", "undecided"),
        (None, None, "undecided", "undecided"),
    ],
)
def test_the_shared_rules(low: float | None, high: float | None, gain: str, same: str) -> None:
    difference = Difference(0.001, low, high)
    assert (better(difference), no_difference(difference)) == (gain, same)
    assert MARGIN == 0.0025


def test_tiny_and_one_minute_runs_are_labelled_and_larger_ones_are_not() -> None:
    assert one(rows_of("ablation", make.parts())).warning == ""
    tiny = one(rows_of("ablation", make.parts(), P_act=274_000))
    assert tiny.warning.startswith("Tiny models (P_act at most 0.274M)")
    minute = one(rows_of("ablation", make.parts(), P_act=274_000, steps=32))
    assert minute.warning.startswith("One-minute runs")
    assert all(finding.warning == minute.warning for finding in judge_all(minute))


def test_a_short_horizon_among_long_ones_makes_no_one_minute_study() -> None:
    short = {"horizon-0.25x": {"steps": 73}, "horizon-1x": {"steps": 292}, "horizon-4x": {"steps": 1168}}
    table = rows_of("horizon", make.levels("horizon", SHARP), facts=short, P_act=274_000)
    assert one(table).warning.startswith("Tiny models")


def test_a_shared_run_counts_in_each_suite_and_an_unknown_budget_is_refused() -> None:
    table = pd.concat([rows_of("layers", make.placements()), rows_of("ablation", make.parts())])
    assert set(one(table).suites) == {"layers", "ablation"}
    with pytest.raises(UserError, match="no finished runs of budget c: the table holds b"):
        read_dossiers(table, "c")


# The paper's numbers beside ours


def column(name: str, key: str, value: str) -> dict[str, float]:
    with open(PAPER / name, encoding="utf-8") as file:
        return {row[key]: float(row[value]) for row in csv.DictReader(file)}


def test_the_papers_numbers_are_those_of_its_figures() -> None:
    said = {claim.key: claim.paper for claim in CLAIMS}
    parts = column("fig5_ablation.csv", "variant", "val_loss")
    for key, name in {
        "fusion": "without_multi_branch",
        "compression": "without_token_compression",
        "gate": "without_gating",
        "convolution": "without_short_conv",
        "4-grams": "with_4gram",
    }.items():
        assert float(said[key].split()[0]) == pytest.approx(parts[name] - parts["reference"], abs=6e-5), key
    layers = column("fig5_layer_sweep.csv", "layer_1based", "val_loss")
    ranked = sorted(layers, key=lambda layer: layers[layer])
    assert ranked[:2] == ["2", "1"]
    assert f"{layers['2']:.4f}" in said["layer-2"]
    assert float(said["layer-2"].rpartition("+")[2]) == pytest.approx(layers["1"] - layers["2"], abs=6e-5)
    assert f"{layers['2'] - parts['reference']:.4f}" in said["two-layers"]
    with open(PAPER / "table1_benchmarks.csv", encoding="utf-8") as file:
        loss = next(row for row in csv.DictReader(file) if row["benchmark"] == "Validation set")
    pairs = {
        "moe-over-dense": ("dense_4b", "moe_27b"),
        "engram-over-moe": ("moe_27b", "engram_27b"),
        "larger-memory": ("engram_27b", "engram_40b"),
    }
    for key, (high, low) in pairs.items():
        assert float(said[key].split()[0]) == pytest.approx(float(loss[high]) - float(loss[low]), abs=1e-9)


def test_the_papers_curves_say_what_the_claims_quote() -> None:
    said = {claim.key: claim.paper for claim in CLAIMS}
    with open(PAPER / "fig3_left_allocation.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    gains: dict[str, dict[float, float]] = {"2e20": {}, "6e20": {}}
    for budget, gain in gains.items():
        loss = {float(row["rho"]): float(row["val_loss"]) for row in rows if row["flops_budget"] == budget}
        gain |= {rho: loss[1.0] - value for rho, value in loss.items()}
    shares = sorted(round(100 * gain[max(r for r in gain if r < 1)] / max(gain.values())) for gain in gains.values())
    assert re.findall(r"(\d+)%", said["first-step"]) == [str(share) for share in shares]
    at_40 = sorted(gain[min(gain, key=lambda r: abs(r - 0.4))] for gain in gains.values())
    assert [float(text) for text in re.findall(r"0\.\d+", said["rho-40"])[:2]] == pytest.approx(at_40, abs=1e-4)
    assert all(round(max(gain, key=lambda r: gain[r]), 2) == 0.85 for gain in gains.values())
