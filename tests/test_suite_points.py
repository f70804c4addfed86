"""If these fail, a suite beside `allocation` compares other models than it says, or two suites train one run twice."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, replace
from typing import Any

import pytest

from engram.allocation import with_sparsity
from engram.counting import count_params, train_flops_per_token
from experiments.grid import Grid
from experiments.loading import budget_names, load_budget
from experiments.plan import as_table, plan
from experiments.settings import Budget, Run, UserError
from experiments.suites import SUITES, about, runs_of

BUDGETS = budget_names()
DATA = "0" * 64


@functools.cache
def of(suite: str, name: str) -> tuple[Run, ...]:
    return tuple(runs_of(suite, load_budget(name), DATA))


def variants(runs: tuple[Run, ...], seed: int) -> dict[str | None, Run]:
    return {run.labels.variant: run for run in runs if run.spec.seed == seed}


def changed(one: Any, other: Any, path: str = "") -> set[str]:
    """Dotted paths of the settings in which two specs differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {p for key in one for p in changed(one[key], other[key], f"{path}.{key}" if path else key)}
    return set() if one == other else {path}


def differences(run: Run, other: Run) -> set[str]:
    return changed(asdict(run.spec), asdict(other.spec))


# All suites


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_says_its_figure_command_cost_and_expected_number(suite: str) -> None:
    text = SUITES[suite].__doc__ or ""
    assert about(suite).startswith(("Fig. ", "Table ", "Our own"))
    assert f"Command: python -m experiments launch {suite} " in text
    assert "Cost: " in text
    assert "Expected" in text


def test_suites_share_the_runs_they_have_in_common() -> None:
    """A point is trained once: the ablation's reference, ten slots of infinite-memory, and the two layers."""
    by_suite = {suite: {run.spec.run_id for run in of(suite, "cpu-small")} for suite in SUITES}
    memory, layers, ablation = by_suite["infinite-memory"], by_suite["layers"], by_suite["ablation"]
    seeds = len(load_budget("cpu-small").seeds)
    assert len(memory & ablation) == 2 * seeds, "the pure MoE and the reference"
    assert len(layers & ablation) == 2 * seeds
    assert len(by_suite["horizon"] & by_suite["allocation"]) == 5 * seeds, "one horizon is the budget's own"
    assert len(by_suite["noise"] & by_suite["allocation"]) == seeds
    assert not by_suite["lr"] & by_suite["allocation"], "rates are chosen on seeds that are not compared"


# sparsity


@pytest.mark.parametrize("name", BUDGETS)
def test_sparsity_reaches_its_ratios_and_every_level_holds_its_own_total(name: str) -> None:
    budget = load_budget(name)
    for ratio in budget.grid.sparsity_ratios:
        level = [run for run in of("sparsity", name) if run.labels.variant == f"sparsity-{ratio:g}"]
        totals = [count_params(run.spec.model) for run in level]
        pure = next(c for run, c in zip(level, totals, strict=True) if run.labels.rho == 1)
        assert pure.P_tot / pure.P_act == pytest.approx(ratio, rel=0.03)
        assert all(c.P_tot == pytest.approx(pure.P_tot, rel=1e-3) for c in totals)
        assert {run.labels.rho_target for run in level} == set(budget.grid.rhos)


def test_with_sparsity_finds_the_nearest_number_of_experts() -> None:
    backbone = load_budget("cpu-small").backbone
    assert backbone.moe is not None

    def ratio(n_routed: int) -> float:
        assert backbone.moe is not None
        counts = count_params(replace(backbone, moe=replace(backbone.moe, n_routed_experts=n_routed)))
        return counts.P_tot / counts.P_act

    for wanted in (3.0, 5.0, 7.452275379229872, 10.0):
        found = with_sparsity(backbone, wanted).moe
        assert found is not None
        best = min(range(7, 400), key=lambda n: abs(ratio(n) - wanted))
        assert found.n_routed_experts == best
    assert with_sparsity(backbone, ratio(102)) == backbone


@pytest.mark.parametrize("wanted", [0.5, 1e6])
def test_a_ratio_that_no_number_of_experts_gives_is_refused_with_what_is_possible(wanted: float) -> None:
    with pytest.raises(ValueError, match=r"this backbone reaches 1\.\d+ to 9\d\.\d+"):
        with_sparsity(load_budget("cpu-small").backbone, wanted)


# horizon


@pytest.mark.parametrize("name", BUDGETS)
def test_horizons_change_nothing_but_the_number_of_whole_steps(name: str) -> None:
    budget = load_budget(name)
    first = of("horizon", name)[0]
    steps = {}
    for run in of("horizon", name):
        if (run.spec.seed, run.labels.rho_target) == (first.spec.seed, first.labels.rho_target):
            assert differences(run, first) <= {"train.tokens"}
            steps[run.labels.variant] = run.spec.train.steps
    for factor in budget.grid.horizons:
        assert steps[f"horizon-{factor:g}x"] == pytest.approx(
            factor * budget.train.tokens / budget.train.batch_tokens, abs=1
        )


# infinite-memory


@pytest.mark.parametrize("name", BUDGETS)
def test_both_methods_have_equal_rows_at_every_size_and_the_papers_multiples_of_the_vocabulary(name: str) -> None:
    budget = load_budget(name)
    sizes: dict[str | None, dict[str, int]] = {}
    for run in of("infinite-memory", name):
        if run.labels.arm != "allocation":
            memory = run.spec.model.memory
            assert memory is not None
            assert run.spec.model.moe == budget.backbone.moe, "all experts stay"
            sizes.setdefault(run.labels.variant, {})[run.labels.arm] = memory.tables.n_rows
    assert len(sizes) == len(budget.grid.slot_multiples)
    tables = len(budget.engram.layer_ids) * budget.engram.tables.n_lookups
    for multiple in budget.grid.slot_multiples:
        here = sizes[f"slots-{multiple:g}x"]
        rows = multiple * budget.backbone.vocab_size * tables
        assert here["engram"] == pytest.approx(rows, rel=0.01)
        assert here["over-encoding"] == pytest.approx(here["engram"], rel=0.002)


def test_the_papers_3b_backbone_and_its_memory_have_the_papers_sizes() -> None:
    """3B total, 0.56B active, 1.6B of memory in layers 2 and 6, 10 slots per token of the vocabulary in every table."""
    by_variant = variants(of("ablation", "paper-3b"), 0)
    pure, reference = (count_params(by_variant[key].spec.model) for key in (None, "reference"))
    assert pure.P_tot == pytest.approx(3.0e9, rel=0.01)
    assert pure.P_act == pytest.approx(568e6, rel=0.01)
    assert reference.tables == pytest.approx(1.655e9, rel=0.005)
    engram = by_variant["reference"].spec.model.engram
    assert engram is not None
    assert [layer + 1 for layer in engram.layer_ids] == [2, 6]
    assert engram.tables.n_slots[0][0] == pytest.approx(1_292_800, rel=0.001)


# layers


@pytest.mark.parametrize("name", BUDGETS)
def test_placements_hold_equal_memory_of_equal_cost_and_every_layer_is_tried(name: str) -> None:
    budget = load_budget(name)
    places = {v: run.spec.model for v, run in variants(of("layers", name), budget.seeds[0]).items() if v}
    assert len(places) == budget.backbone.n_layers + 1
    counted = [count_params(model) for model in places.values()]
    for model, counts in zip(places.values(), counted, strict=True):
        assert counts.tables == pytest.approx(counted[0].tables, rel=0.002)
        assert counts.P_act == pytest.approx(counted[0].P_act, rel=0.01)
        flops = train_flops_per_token(model, budget.train.seq_len)
        assert flops == train_flops_per_token(next(iter(places.values())), budget.train.seq_len)
    for variant, model in places.items():
        assert model.engram is not None
        assert variant == "layer-" + "+".join(str(layer + 1) for layer in model.engram.layer_ids)


# ablation

PARTS = {
    "no-fusion": {"one_stream"},
    "no-compression": {"tables.compress_tokens"},
    "no-gate": {"gate"},
    "no-conv": {"conv_kernel"},
    "plus-4-grams": {"tables.ngram_orders"},
    "plain-gate": {"gate"},
    "half-heads": {"tables.n_hash_heads"},
    "double-heads": {"tables.n_hash_heads"},
    "table-lr-1x": {"table_lr_mult"},
    "table-lr-2.5x": {"table_lr_mult"},
    "table-lr-10x": {"table_lr_mult"},
    "dense-adam": {"tables"},
    "rowwise-adam": {"tables"},
    "cross-documents": {"tables.stop_at_documents"},
}
FOLLOW = {"tables.d_mem", "tables.n_slots"}
"""What gives way so that the number of parameters stays."""


@pytest.mark.parametrize("name", ["paper-3b", "gpu-medium", "cpu-small", "cpu-smoke"])
def test_each_ablation_changes_its_part_and_keeps_the_size_of_the_memory(name: str) -> None:
    budget = load_budget(name)
    found = variants(of("ablation", name), budget.seeds[0])
    reference = found.pop("reference")
    found.pop(None)
    size = count_params(reference.spec.model).tables
    for variant, run in found.items():
        assert variant is not None
        paths = {p.removeprefix("model.engram.").removeprefix("train.optim.") for p in differences(run, reference)}
        assert PARTS[variant] <= paths <= PARTS[variant] | FOLLOW, variant
        if variant not in ("plus-4-grams", "half-heads", "double-heads"):
            assert paths == PARTS[variant], variant
        assert count_params(run.spec.model).tables == pytest.approx(size, rel=0.005), variant
    missing = set(PARTS) - set(found)
    allowed = {"no-fusion"} if budget.backbone.n_streams == 1 else set()
    allowed |= {v for v in PARTS if v.startswith("table-lr") and float(v[9:-1]) not in budget.grid.table_lr_mults}
    assert missing == allowed


# noise and lr


def test_noise_is_one_spec_with_eight_seeds_and_its_first_once_more() -> None:
    runs = of("noise", "cpu-small")
    assert [run.spec.seed for run in runs] == [*range(8), 0]
    first, replicate = runs[0], runs[-1]
    assert all(differences(run, first) <= {"seed"} for run in runs[:-1])
    assert differences(replicate, first) == {"replicate"}
    assert replicate.spec.run_id != first.spec.run_id


def test_rates_are_tried_on_both_sides_and_move_nothing_else() -> None:
    budget = load_budget("cpu-small")
    runs = of("lr", "cpu-small")
    first = runs[0]
    rates = {(run.labels.rho_target, run.spec.train.optim.lr) for run in runs}
    assert rates == {
        (rho, budget.train.optim.lr * f) for rho in (1.0, budget.control_rho) for f in budget.grid.lr_factors
    }
    pure = [run for run in runs if run.labels.rho == 1 and run.spec.seed == first.spec.seed]
    assert all(differences(run, first) <= {"train.optim.lr"} for run in pure)


# Grids and plans


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rhos": (1.2,)}, r"grid\.rhos must lie in \[0, 1\], not \[1\.2\]"),
        ({"horizons": (0.0, 1.0)}, r"grid\.horizons must be positive, not \[0\.0\]"),
        ({"noise_seeds": 1}, r"grid\.noise_seeds=1 shows no noise"),
        ({"lr_seeds": ()}, r"grid\.lr_seeds is empty"),
        ({"fixed_slots": 0.0}, r"grid\.fixed_slots=0\.0 must be positive"),
    ],
)
def test_impossible_grids_are_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Grid(**change)


def test_a_control_rho_that_leaves_no_memory_is_refused_with_the_highest_that_does() -> None:
    budget = load_budget("cpu-small")
    for suite in ("allocation", "baselines", "noise", "lr"):
        with pytest.raises(
            UserError, match=r"control_rho=0\.999 leaves all 102 experts and no memory: take at most 0\.989"
        ):
            runs_of(suite, replace(budget, control_rho=0.999), "0")
    assert runs_of("baselines", replace(budget, control_rho=0.989), "0")


def test_a_point_that_is_asked_for_twice_keeps_what_it_was_first_asked_for() -> None:
    budget = load_budget("cpu-small")
    doubled = replace(budget, rhos=(*budget.rhos, 0.9999), seeds=(0,))
    labels = [run.labels for run in runs_of("allocation", doubled, "0")]
    assert labels == [run.labels for run in runs_of("allocation", replace(budget, seeds=(0,)), "0")]


def test_another_learning_rate_is_another_budget_under_the_same_name_and_other_seeds_are_not() -> None:
    budget = load_budget("cpu-small")
    hashes = [
        {run.labels.budget_hash for run in runs_of("allocation", load_budget("cpu-small", words), "0")}
        for words in ((), ("seeds=[5]", "rhos=[1.0,0.3]", "control_rho=0.5"), ("train.optim.lr=6.0e-3",))
    ]
    assert hashes[0] == hashes[1] == {budget.content}
    assert hashes[2] != hashes[0]
    assert {run.labels.budget_hash for run in runs_of("lr", budget, "0")} == hashes[0], (
        "what a suite varies is no budget"
    )


def said_of(suite: str, budget: Budget) -> str:
    return str(as_table(budget, suite, plan(budget, runs_of(suite, budget, DATA))).caption)


def test_a_plan_says_what_is_smaller_than_the_default_and_what_does_not_exist() -> None:
    smoke = load_budget("cpu-smoke")
    assert "grid.horizons is 0.5, 1, 2, the default 0.25, 0.5, 1, 2, 4" in said_of("horizon", smoke)
    assert "no-fusion is left out: the backbone has one residual stream" in said_of("ablation", smoke)
    assert "no-fusion" not in said_of("ablation", load_budget("paper-3b"))
    assert said_of("allocation", smoke) == smoke.about


def test_a_plan_without_rho_1_says_what_is_missing() -> None:
    assert "no point at rho = 1" in said_of("allocation", load_budget("cpu-smoke", ["rhos=[0.5]"]))
    assert "no point at rho = 1" not in said_of("allocation", load_budget("cpu-smoke"))


def test_a_plan_of_sparsity_measures_every_level_against_its_own_pure_moe() -> None:
    budget = load_budget("paper-2e20")
    points = plan(budget, runs_of("sparsity", budget, DATA))
    assert all(abs(point.P_tot_error) < 1e-3 for point in points)
    assert math.isclose(points[0].P_tot / points[0].P_act, 5, rel_tol=0.02)
