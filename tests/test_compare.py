"""If these fail, arms may be called different that are not, or a trend, a slope or a jump found where there is none.

Simulations have fixed seeds. A nominal 95 percent is held to three binomial standard errors of the number of trials.
"""

from __future__ import annotations

import csv
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from test_fits import GRID, bowl, paper_points, simulate, three_errors, two_way_rss

from analysis.compare import Paired, against, contrast, holm, many_to_one, paired
from analysis.errors import UserError
from analysis.fits import Difference, Floats, Sweep
from analysis.jump import jump
from analysis.loglinear import scaling
from analysis.seeds import noise
from analysis.trend import trend

PAPER = Path(__file__).parent.parent / "results" / "paper" / "fig3_right_infinite_memory.csv"


def table(means: Floats, sigma: float, n_seeds: int, rng: np.random.Generator) -> Paired:
    eps = rng.normal(0, sigma, (len(means), n_seeds)) + rng.normal(0, 10 * sigma, n_seeds)
    return Paired(tuple("abcdefgh"[: len(means)]), tuple(range(n_seeds)), means[:, None] + eps)


def holds(difference: Difference, truth: float) -> bool:
    return difference.low is not None and difference.high is not None and difference.low <= truth <= difference.high


# Arms


def test_only_seeds_that_every_arm_has_finished_are_compared() -> None:
    found = paired({"a": {0: 1.0, 1: 2.0, 3: 9.0}, "b": {1: 2.5, 0: float("nan"), 3: 9.5}})
    assert found is not None
    assert (found.seeds, found.dropped_seeds) == ((1, 3), (0,))
    assert found.loss.tolist() == [[2.0, 9.0], [2.5, 9.5]]
    assert paired({"a": {0: 1.0}, "b": {1: 1.0}}) is None


def test_a_contrast_of_two_arms_and_two_seeds_is_the_paired_t_interval() -> None:
    """By hand: differences 0.1 and 0.3, mean 0.2, standard error 0.1, t of one degree of freedom 12.706."""
    found = contrast(Paired(("a", "b"), (0, 1), np.array([[1.0, 2.0], [1.1, 2.3]])), {"b": 1, "a": -1})
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.2 - 1.27062, 0.2 + 1.27062), abs=1e-4)


def test_sigma_equals_a_regression_on_arm_and_seed() -> None:
    found = table(np.array([1.0, 1.2, 0.9]), 0.01, 4, np.random.default_rng(0))
    assert found.sigma == pytest.approx(sqrt(two_way_rss(found.loss) / 6), rel=1e-9)


def test_one_seed_gives_values_without_intervals_or_p() -> None:
    one = Paired(("a", "b"), (0,), np.array([[1.0], [1.5]]))
    [comparison] = against(one, "a", ["b"])
    assert comparison.difference == Difference(0.5, None, None)
    assert comparison.p is None
    assert contrast(one, {"b": 1, "a": -1}).low is None


def test_holm_equals_its_definition() -> None:
    """Holm 1979, table 1's recipe by hand: 0.01 * 4, 0.02 * 3, 0.03 * 2 kept rising, 0.9."""
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.8, 0.9]) == [1.0, 1.0]


def test_the_simultaneous_quantile_is_dunnetts() -> None:
    """Dunnett 1955, two-sided 5 percent: 10 and 20 degrees of freedom with 3 arms, and Student's t with one."""
    assert many_to_one(1, 10) == pytest.approx(2.228, rel=0.01)
    assert many_to_one(3, 10) == pytest.approx(2.76, rel=0.01)
    assert many_to_one(3, 20) == pytest.approx(2.54, rel=0.01)


@pytest.mark.parametrize("n_seeds", [2, 4])
def test_a_familys_intervals_hold_together_and_holm_seldom_errs(n_seeds: int) -> None:
    rng, n = np.random.default_rng(1), 1500
    means = np.array([1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    together = false_alarms = 0
    for _ in range(n):
        family = against(table(means, 0.01, n_seeds, rng), "a", ["b", "c", "d", "e", "f"])
        together += all(holds(c.difference, 0.0) for c in family)
        false_alarms += any(c.p_holm is not None and c.p_holm < 0.05 for c in family)
    assert together / n == pytest.approx(0.95, abs=three_errors(n))
    assert false_alarms / n <= 0.05 + three_errors(n)


def test_a_weighted_contrast_covers_its_truth() -> None:
    rng, n = np.random.default_rng(2), 2000
    means = np.array([1.0, 1.3, 1.1])
    weights = {"a": 0.5, "b": -1.0, "c": 0.5}
    held = sum(holds(contrast(table(means, 0.02, 3, rng), weights), 0.5 - 1.3 + 0.55) for _ in range(n))
    assert held / n == pytest.approx(0.95, abs=three_errors(n))


# The jump at rho = 1


@pytest.mark.parametrize(("budget", "continued", "height"), [("6e20", 1.7142, 0.0106), ("2e20", 1.8205, 0.0087)])
def test_the_papers_jump_is_found(budget: str, continued: float, height: float) -> None:
    rho, loss = paper_points(budget)
    found = jump(Sweep(rho, (0,), loss[:, None]))
    assert found is not None
    assert found.continued == pytest.approx(continued, abs=1e-4)
    assert found.height.value == pytest.approx(height, abs=1e-4)
    assert found.height.low is None
    assert found.share == pytest.approx(height / {"6e20": 0.0153, "2e20": 0.0137}[budget], abs=0.01)


def test_the_jumps_interval_covers_and_a_smooth_curve_has_none() -> None:
    rng, n = np.random.default_rng(3), 1500
    for height in (0.0, 0.02):
        found = [jump(simulate(lambda r, h=height: bowl(r) + h * (r == 1), 0.004, 2, rng)) for _ in range(n)]  # type: ignore[misc]
        assert sum(j is not None and holds(j.height, height) for j in found) / n == pytest.approx(
            0.95, abs=three_errors(n)
        )


def test_four_points_in_all_have_no_jump() -> None:
    assert jump(Sweep(np.array([0.0, 0.4, 0.8, 1.0]), (0,), np.ones((4, 1)))) is None


# Loss against slots


def paper_slots() -> tuple[list[str], list[float], list[int], list[float]]:
    with PAPER.open() as file:
        rows = [row for row in csv.DictReader(file) if row["method"] != "moe"]
    return (
        [row["method"] for row in rows],
        [float(row["slots"]) for row in rows],
        [0] * len(rows),
        [float(row["val_loss"]) for row in rows],
    )


def test_the_papers_two_lines_are_recovered() -> None:
    """Slopes, intercepts and R^2 of the drawn lines; and the slots at equal loss that its points imply, 2.4 to 4."""
    found = scaling(*paper_slots())
    engram, over = found.lines
    assert (engram.method, over.method) == ("engram", "overencoding")
    assert engram.slope.value == pytest.approx(-0.028395, abs=6e-6)
    assert over.slope.value == pytest.approx(-0.030186, abs=6e-6)
    assert engram.intercept == pytest.approx(1.94178, abs=4e-5)
    assert over.intercept == pytest.approx(1.96650, abs=4e-5)
    assert engram.r2 == pytest.approx(0.994, abs=5e-4)
    assert over.r2 == pytest.approx(0.971, abs=5e-4)
    assert found.ratio is not None
    assert found.ratio.low is not None
    assert found.ratio.high is not None
    assert 2.4 < found.ratio.value < 4
    assert 1 < found.ratio.low < found.ratio.value < found.ratio.high


def slots_table(
    rng: np.random.Generator, sigma: float, curvature: float = 0.0
) -> tuple[list[str], list[float], list[int], list[float]]:
    """Engram at 2.0 - 0.03 x, the other 0.012 above, with seeds that shift both."""
    rows: list[tuple[str, float, int, float]] = []
    shifts = rng.normal(0, 10 * sigma, 2)
    for method, offset in (("engram", 0.0), ("other", 0.012)):
        for x in (4.0, 4.5, 5.0, 5.5, 6.0):
            for seed in (0, 1):
                loss = 2.0 + offset - 0.03 * x + curvature * (x - 5) ** 2 + shifts[seed] + rng.normal(0, sigma)
                rows.append((method, 10**x, seed, loss))
    return tuple(list(column) for column in zip(*rows, strict=True))  # type: ignore[return-value]


def test_slopes_curvatures_and_the_ratio_of_slots_cover_their_truth() -> None:
    rng, n = np.random.default_rng(4), 400
    slope = ratio = curvature = 0
    for _ in range(n):
        found = scaling(*slots_table(rng, 0.002))
        slope += holds(found.lines[1].slope, -0.03)
        curvature += found.lines[0].curvature is not None and holds(found.lines[0].curvature, 0.0)
        ratio += found.ratio is not None and holds(found.ratio, 10 ** (0.012 / 0.03))
    for held in (slope, ratio, curvature):
        assert held / n == pytest.approx(0.95, abs=three_errors(n))


def test_a_curve_that_is_no_line_is_seen_in_curvature_and_r2() -> None:
    line = scaling(*slots_table(np.random.default_rng(5), 0.0005, curvature=0.03)).lines[0]
    assert line.curvature is not None
    assert line.curvature.low is not None
    assert line.curvature.low > 0.02
    assert line.r2 < 0.97


def test_two_sizes_are_no_line() -> None:
    with pytest.raises(UserError, match="engram has 2 sizes"):
        scaling(["engram"] * 2, [10.0, 100.0], [0, 0], [1.0, 0.9])


def test_rising_losses_have_no_ratio() -> None:
    method, slots, seed, loss = slots_table(np.random.default_rng(6), 0.001)
    assert scaling(method, slots, seed, [-v for v in loss]).ratio is None


# Trends of the optimum


def test_a_moving_optimum_is_seen_and_a_fixed_one_is_not() -> None:
    """The optimum at 0.5, 0.6 and 0.7 for tenfold x each: a slope of 0.1."""
    rng, n = np.random.default_rng(7), 60
    moved = still = excluded = 0
    for _ in range(n):
        level = [simulate(lambda r, c=c: 0.2 * (r - c) ** 2, 0.001, 3, rng) for c in (0.5, 0.6, 0.7)]  # type: ignore[misc]
        found = trend([1, 10, 100], level)
        assert found is not None
        moved += holds(found.slope, 0.1)
        excluded += found.slope.low is not None and found.slope.low > 0
        fixed = trend([5, 10, 20], [simulate(bowl, 0.001, 3, rng) for _ in range(3)])
        still += fixed is not None and holds(fixed.slope, 0.0)
    assert min(moved, still) / n >= 0.95 - three_errors(n)
    assert excluded == n


def test_a_trend_needs_two_levels_and_says_which_optima_lie_on_an_edge() -> None:
    rng = np.random.default_rng(8)
    assert trend([10, 10], [simulate(bowl, 0.001, 2, rng)] * 2) is None
    found = trend([5, 20], [simulate(bowl, 0.001, 2, rng), simulate(lambda r: r, 0.001, 2, rng)])
    assert found is not None
    assert found.at_edge == (20.0,)
    single = trend([5, 20], [Sweep(GRID, (0,), bowl(GRID)[:, None])] * 2)
    assert single is not None
    assert single.slope.value == pytest.approx(0.0, abs=1e-12)
    assert single.slope.low is None


# Noise


def test_the_spread_over_seeds_has_its_chi_square_interval() -> None:
    """Eight seeds: 0.6612 and 2.0353 times the standard deviation, from chi-square tables with 7 degrees of freedom."""
    found = noise({seed: 1.0 + 0.01 * seed for seed in range(8)}, [(0, 1.0), (3, 1.04)])
    assert found is not None
    sd = float(np.std([0.01 * s for s in range(8)], ddof=1))
    assert found.sd.value == pytest.approx(sd)
    assert (found.sd.low, found.sd.high) == pytest.approx((0.6612 * sd, 2.0353 * sd), rel=1e-3)
    assert found.replicates == pytest.approx((0.0, 0.01))
    assert noise({0: 1.0}) is None


def test_the_interval_of_the_spread_covers() -> None:
    rng, n = np.random.default_rng(9), 2000
    found = [noise(dict(enumerate(rng.normal(4, 0.02, 8)))) for _ in range(n)]
    assert sum(f is not None and holds(f.sd, 0.02) for f in found) / n == pytest.approx(0.95, abs=three_errors(n))
