"""If these fail, runs train at another learning rate than the paper's schedule says, or end on another one.

Factors are compared with closed forms to 1e-12 (relative), and exactly where the schedule is piecewise constant.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from engram.config import OptimConfig
from engram.schedule import lr_factor


def factors(total_steps: int, **changes: Any) -> list[float]:
    config = OptimConfig(lr=1.0, **changes)
    return [lr_factor(step, total_steps, config) for step in range(total_steps)]


@pytest.mark.parametrize("schedule", ["step", "cosine", "wsd"])
def test_warmup_rises_linearly_from_above_zero_to_the_peak(schedule: str) -> None:
    warm = factors(1000, schedule=schedule, warmup_frac=0.02)[:21]
    assert warm == pytest.approx([(step + 1) / 21 for step in range(21)], rel=1e-12)


@pytest.mark.parametrize("schedule", ["step", "cosine", "wsd"])
def test_without_warmup_the_first_step_is_at_the_peak(schedule: str) -> None:
    assert factors(1000, schedule=schedule, warmup_frac=0.0)[0] == 1.0


@pytest.mark.parametrize("total_steps", [10, 50, 1000, 50_000])
def test_step_decay_falls_exactly_at_80_and_90_percent(total_steps: int) -> None:
    tenth = total_steps // 10
    expected = [1.0] * (8 * tenth) + [0.316] * tenth + [0.1] * tenth
    assert factors(total_steps, schedule="step", warmup_frac=0.0) == expected


def test_step_decay_of_an_uneven_number_of_steps_falls_at_the_first_step_past_the_share() -> None:
    # 0.8 * 7 = 5.6 and 0.9 * 7 = 6.3: step 6 is the first past 80 percent, none is past 90.
    assert factors(7, schedule="step", warmup_frac=0.0) == [1.0] * 6 + [0.316]


def test_cosine_is_half_a_cosine_from_the_end_of_warmup_to_the_last_step() -> None:
    after_warmup = factors(111, schedule="cosine", warmup_frac=10 / 111, final_lr_frac=0.2)[10:]
    expected = [0.6 + 0.4 * math.cos(math.pi * k / 100) for k in range(101)]
    assert after_warmup == pytest.approx(expected, rel=1e-12)


def test_wsd_stays_at_the_peak_and_then_falls_linearly_to_the_last_step() -> None:
    got = factors(100, schedule="wsd", warmup_frac=0.0, wsd_decay_frac=0.2, final_lr_frac=0.1)
    assert got[:80] == [1.0] * 80
    assert got[80:] == pytest.approx([1 - 0.9 * (k + 1) / 20 for k in range(20)], rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "final_lr_frac", "last"), [("step", 0.5, 0.1), ("cosine", 0.03, 0.03), ("wsd", 0.03, 0.03)]
)
def test_the_last_step_is_at_the_final_share(schedule: str, final_lr_frac: float, last: float) -> None:
    got = factors(500, schedule=schedule, final_lr_frac=final_lr_frac)
    assert got[-1] == pytest.approx(last, rel=1e-12)


@pytest.mark.parametrize("schedule", ["step", "cosine", "wsd"])
def test_after_warmup_the_factor_never_rises(schedule: str) -> None:
    got = factors(317, schedule=schedule, warmup_frac=0.05)
    assert max(got) == 1.0
    peak = got.index(1.0)
    assert all(later <= earlier for earlier, later in zip(got[peak:], got[peak + 1 :], strict=False))


@pytest.mark.parametrize("step", [-1, 100])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(AssertionError, match=f"step {step} is outside a run of 100 steps"):
        lr_factor(step, 100, OptimConfig(lr=1.0))
