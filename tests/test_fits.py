"""If these fail, the suite may call noise a U, miss one that is there, or print intervals that do not hold.

Simulations have fixed seeds. A nominal 95 percent is held to three binomial standard errors of the number of trials.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

from analysis.errors import UserError
from analysis.fits import Floats, Sweep, against_reference, gains, offsets, optimum, pair, parabola
from analysis.verdict import judge

PAPER = Path(__file__).parent.parent / "results" / "paper" / "fig3_left_allocation.csv"
GRID = np.array([0.0, 0.25, 0.5, 0.65, 0.8, 0.9, 1.0])
BIG = 600e6
"""P_act above the threshold of the warning about tiny models."""


def bowl(rho: Floats) -> Floats:
    return 0.2 * (rho - 0.7) ** 2


def jumping_bowl(rho: Floats) -> Floats:
    """The paper's shape: a bowl whose right end jumps up."""
    return 0.13 * (rho - 0.78) ** 2 + 0.01 * (rho == 1)


def simulate(curve: Callable[[Floats], Floats], sigma: float, n_seeds: int, rng: np.random.Generator) -> Sweep:
    """Draw from the model of the data; the seed's main effect is ten times the rest."""
    noise = rng.normal(0, sigma, (len(GRID), n_seeds)) + rng.normal(0, 10 * sigma, n_seeds)
    return Sweep(GRID, tuple(range(n_seeds)), curve(GRID)[:, None] + noise)


def three_errors(n: int) -> float:
    return 3 * sqrt(0.95 * 0.05 / n)


def paper_points(budget: str) -> tuple[Floats, Floats]:
    with PAPER.open() as file:
        points = [(float(p["rho"]), float(p["val_loss"])) for p in csv.DictReader(file) if p["flops_budget"] == budget]
    rho, loss = np.array(sorted(points)).T
    return rho, loss


def two_way_rss(loss: Floats) -> float:
    """Residual sum of squares of a regression on rho and seed dummies: slow and independent."""
    n_rho, n_seeds = loss.shape
    design = np.hstack([np.kron(np.eye(n_rho), np.ones((n_seeds, 1))), np.kron(np.ones((n_rho, 1)), np.eye(n_seeds))])
    fitted = design @ np.linalg.lstsq(design, loss.ravel(), rcond=None)[0]
    return float(np.sum((loss.ravel() - fitted) ** 2))


# Pairing


def test_sigma_equals_a_regression_on_rho_and_seed() -> None:
    sweep = simulate(bowl, 0.01, 4, np.random.default_rng(0))
    assert sweep.df == 6 * 3
    assert sweep.sigma == pytest.approx(sqrt(two_way_rss(sweep.loss) / 18), rel=1e-9)


def test_a_seed_that_is_missing_or_diverged_somewhere_is_dropped_and_named() -> None:
    runs = [(rho, seed, 1.0) for rho in (0.0, 0.5, 1.0) for seed in (0, 1, 2)]
    runs.remove((0.5, 1, 1.0))
    runs[runs.index((0.0, 2, 1.0))] = (0.0, 2, float("nan"))
    sweep = pair(*zip(*runs, strict=True))
    assert sweep.seeds == (0,)
    assert sweep.dropped_seeds == (1, 2)
    assert "2 more left out" in judge(sweep, BIG).sentence


def test_a_rho_where_every_run_diverged_is_dropped_and_named() -> None:
    sweep = pair([0.0, 0.4, 0.8, 1.0], [0] * 4, [float("nan"), 1.0, 2.0, 3.0])
    assert sweep.rho.tolist() == [0.4, 0.8, 1.0]
    assert "no run finished at rho 0.00" in judge(sweep, BIG).sentence


def test_a_sweep_without_rho_1_is_refused() -> None:
    with pytest.raises(UserError, match="no finished run at rho = 1"):
        pair([0.4, 0.8], [0, 0], [1.0, 2.0])


def test_no_complete_seed_is_refused_with_the_holes_named() -> None:
    with pytest.raises(UserError, match=r"rho 0\.5 seed 1"):
        pair([0.5, 1.0, 0.0, 1.0], [0, 0, 1, 1], [1.0, 1.0, 1.0, 1.0])


# Parabolas


@pytest.mark.parametrize(
    ("budget", "all_points", "without"), [("6e20", 0.738, 0.807), ("2e20", 0.725, 0.779)], ids=["6e20", "2e20"]
)
def test_the_papers_points_give_its_minimum_and_another_one_without_rho_1(
    budget: str, all_points: float, without: float
) -> None:
    verdict = judge(Sweep(paper_points(budget)[0], (0,), paper_points(budget)[1][:, None]), BIG)
    assert verdict.quadratic is not None
    assert verdict.quadratic_without_reference is not None
    assert verdict.quadratic.optimum == pytest.approx(all_points, abs=5e-4)
    assert verdict.quadratic_without_reference.optimum == pytest.approx(without, abs=5e-4)
    assert verdict.quadratic_without_reference.rms < verdict.quadratic.rms / 2
    assert verdict.answer == "undecided"


def test_the_papers_printed_parabola_is_recovered() -> None:
    fit = parabola(*paper_points("6e20"))
    assert fit is not None
    assert (fit.a, fit.b, fit.c) == pytest.approx((0.134464, -0.198439, 1.783912), abs=2e-4)
    assert fit.value == pytest.approx(1.71070, abs=1e-5)


def test_a_parabola_that_opens_downward_has_no_optimum() -> None:
    fit = parabola(GRID, -bowl(GRID))
    assert fit is not None
    assert fit.optimum is None
    assert fit.why_not == "opens downward"


def test_a_vertex_outside_the_fitted_points_is_no_optimum() -> None:
    fit = parabola(GRID, (GRID - 1.4) ** 2)
    assert fit is not None
    assert fit.optimum is None
    assert "1.40" in fit.why_not


def test_three_points_are_not_fitted() -> None:
    assert parabola(GRID[:3], bowl(GRID[:3])) is None


# Optimum


def test_the_local_minimum_of_a_parabola_is_exact_on_an_uneven_grid() -> None:
    place = optimum(Sweep(GRID, (0,), bowl(GRID)[:, None]))
    assert (place.rho, place.loss) == pytest.approx((0.7, 0.0), abs=1e-12)
    assert place.edge is None
    assert place.low is None


@pytest.mark.parametrize(("slope", "edge", "rho"), [(1.0, "smallest", 0.0), (-1.0, "largest", 1.0)])
def test_a_minimum_on_the_edge_is_called_an_edge(slope: float, edge: str, rho: float) -> None:
    place = optimum(simulate(lambda r: slope * r, 1e-4, 2, np.random.default_rng(0)))
    assert (place.edge, place.rho, place.low, place.high) == (edge, rho, rho, rho)
    assert place.edge_share == 1.0


def test_the_minimum_of_noisy_curves_is_recovered() -> None:
    rng = np.random.default_rng(0)
    places = [optimum(simulate(bowl, 0.002, 3, rng), resamples=1).rho for _ in range(200)]
    assert np.mean(places) == pytest.approx(0.7, abs=0.01)
    assert np.std(places) < 0.06


@pytest.mark.parametrize("n_seeds", [2, 3])
@pytest.mark.parametrize("sigma", [0.0005, 0.002, 0.01])
@pytest.mark.parametrize(("curve", "truth"), [(bowl, 0.7), (jumping_bowl, 0.78)], ids=["bowl", "jump"])
def test_the_bootstrap_interval_covers_the_optimum(
    curve: Callable[[Floats], Floats], truth: float, sigma: float, n_seeds: int
) -> None:
    rng, n = np.random.default_rng(1), 300
    places = [optimum(simulate(curve, sigma, n_seeds, rng), resamples=800) for _ in range(n)]
    covered = np.mean([p.low is not None and p.high is not None and p.low <= truth <= p.high for p in places])
    assert covered >= 0.95 - three_errors(n)
    if sigma == 0.0005:
        assert np.mean([(p.high or 0) - (p.low or 0) for p in places]) < 0.1


# Differences


@pytest.mark.parametrize("n_seeds", [2, 4])
def test_simultaneous_intervals_hold_together_95_percent_of_the_time(n_seeds: int) -> None:
    rng, n, held = np.random.default_rng(2), 2000, 0
    truth = bowl(GRID)
    for _ in range(n):
        sweep = simulate(bowl, 0.003, n_seeds, rng)
        pairs = [(d, truth[i] - truth[-1]) for i, d in enumerate(offsets(sweep)[:-1])]
        pairs += [(g.over_smallest, truth[0] - truth[i]) for i, g in enumerate(gains(sweep), start=1)]
        held += all(d.low is not None and d.high is not None and d.low <= t <= d.high for d, t in pairs)
    assert held / n == pytest.approx(0.95, abs=three_errors(n))


@pytest.mark.parametrize("sigma", [0.001, 0.01])
def test_the_depth_interval_covers_although_the_best_rho_is_chosen_after_looking(sigma: float) -> None:
    rng, n, held = np.random.default_rng(3), 1000, 0
    truth = jumping_bowl(GRID)
    depth = truth[-1] - truth[1:-1].min()
    for _ in range(n):
        best = max((g.over_reference for g in gains(simulate(jumping_bowl, sigma, 2, rng))), key=lambda d: d.value)
        held += best.low is not None and best.high is not None and best.low <= depth <= best.high
    assert held / n >= 0.95 - three_errors(n)


def test_an_arms_interval_equals_a_two_way_table_with_one_row_more() -> None:
    rng = np.random.default_rng(4)
    whole = simulate(bowl, 0.01, 3, rng)
    arm = whole.loss[2] + rng.normal(0.1, 0.01, 3)
    difference = against_reference(whole, (0, 1, 2), arm.tolist())
    sigma = sqrt(two_way_rss(np.vstack([whole.loss, arm])) / (7 * 2))
    half = 2.144787 * sigma * sqrt(2 / 3)  # t table: 97.5 percent, 14 degrees of freedom
    assert difference is not None
    assert difference.value == pytest.approx(float(np.mean(arm - whole.loss[-1])))
    assert difference.low == pytest.approx(difference.value - half, rel=1e-5)


def test_an_arms_interval_covers_with_two_seeds() -> None:
    rng, n, held = np.random.default_rng(5), 2000, 0
    for _ in range(n):
        noise = rng.normal(0, 0.003, (len(GRID) + 1, 2)) + rng.normal(0, 0.03, 2)
        sweep = Sweep(GRID, (0, 1), bowl(GRID)[:, None] + noise[:-1])
        difference = against_reference(sweep, (0, 1), (bowl(GRID)[-1] + 0.02 + noise[-1]).tolist())
        assert difference is not None
        held += difference.low is not None and difference.high is not None and difference.low <= 0.02 <= difference.high
    assert held / n == pytest.approx(0.95, abs=three_errors(n))


def test_an_arm_is_compared_over_shared_finished_seeds_only() -> None:
    sweep = Sweep(np.array([0.0, 0.5, 1.0]), (0, 1), np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]))
    difference = against_reference(sweep, (1, 7, 0), (2.5, 9.0, float("nan")))
    assert difference is not None
    assert difference.value == 0.5
    assert against_reference(sweep, (7,), (9.0,)) is None


# Verdict


def test_a_clear_bowl_is_a_u_with_its_depth_and_interval_in_the_sentence() -> None:
    verdict = judge(simulate(bowl, 0.0005, 2, np.random.default_rng(6)), BIG)
    assert verdict.answer == "U"
    assert verdict.best is not None
    depth = verdict.best.over_reference
    assert f"{depth.value:.4f} ({depth.low:.4f} to {depth.high:.4f}) below rho = 1" in verdict.sentence
    assert "2 seeds" in verdict.sentence
    assert "tiny" not in verdict.sentence


@pytest.mark.parametrize("slope", [0.1, -0.1])
def test_a_monotone_curve_is_no_u(slope: float) -> None:
    verdict = judge(simulate(lambda rho: slope * rho, 0.001, 2, np.random.default_rng(7)), BIG)
    assert verdict.answer == "no U"
    assert "which is no optimum" in verdict.sentence


def test_a_gain_over_one_end_only_is_not_a_u() -> None:
    """Interior points far below rho = 1 but level with the smallest rho."""
    verdict = judge(simulate(lambda rho: 0.1 * (rho == 1), 0.001, 2, np.random.default_rng(8)), BIG)
    assert verdict.answer == "undecided"


NO_SHAPE: dict[str, Callable[[Floats], Floats]] = {
    "flat": lambda rho: 0 * rho,
    "best interior ties with the smallest rho": lambda rho: 0.1 * np.maximum(rho - 0.25, 0),
    "best interior ties with rho = 1": lambda rho: 0.1 * np.maximum(0.9 - rho, 0),
}


@pytest.mark.parametrize("curve", NO_SHAPE.values(), ids=NO_SHAPE)
def test_a_curve_without_a_shape_is_seldom_given_one(curve: Callable[[Floats], Floats]) -> None:
    rng, n = np.random.default_rng(9), 400
    answers = [judge(simulate(curve, 0.003, 2, rng), BIG).answer for _ in range(n)]
    assert answers.count("U") / n <= 0.05
    assert answers.count("no U") / n <= 0.05


def test_one_seed_is_undecided_and_without_intervals() -> None:
    verdict = judge(Sweep(GRID, (0,), bowl(GRID)[:, None]), BIG)
    assert verdict.answer == "undecided"
    assert verdict.optimum.low is None
    assert all(g.over_reference.low is None for g in verdict.gains)
    assert "one seed, so no intervals" in verdict.sentence


def test_a_grid_without_interior_is_undecided() -> None:
    verdict = judge(Sweep(np.array([0.5, 1.0]), (0, 1), np.array([[1.0, 2.0], [3.0, 4.1]])), BIG)
    assert verdict.answer == "undecided"
    assert "no interior rho" in verdict.sentence


def test_tiny_models_are_said_to_be_tiny() -> None:
    verdict = judge(simulate(bowl, 0.0005, 2, np.random.default_rng(6)), 262e3)
    assert "tiny models (P_act 0.262M): says little about the paper's scale" in verdict.sentence
