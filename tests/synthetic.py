"""Tables of runs with a known truth, for tests of what `analysis` makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.collect import COLUMNS

Place = tuple[str, str | None, float | None, float]
"""Arm, variant, rho, true loss."""


def rows_of(
    suite: str,
    places: Sequence[Place],
    *,
    sigma: float = 0.0005,
    seeds: Sequence[int] = (0, 1, 2),
    rng: np.random.Generator | None = None,
    facts: dict[str, dict[str, Any]] | None = None,
    **fixed: Any,
) -> pd.DataFrame:
    """Rows of one suite: true losses, a shift per seed that all share, and noise of `sigma`.

    Args:
        suite: its name.
        places: the points.
        sigma: noise of one run, in nats.
        seeds: of every point.
        rng: for the noise.
        facts: variant -> columns that differ by it.
        fixed: columns that all rows share.
    """
    rng = rng or np.random.default_rng(0)
    shift = {seed: 0.02 * seed for seed in seeds}
    rows = []
    for arm, variant, rho, loss in places:
        for seed in seeds:
            row: dict[str, Any] = {
                "run_id": f"r{len(rows):04x}{abs(hash((suite, arm, variant, rho))) % 16**6:06x}",
                "status": "final",
                "schema": 1,
                "budget": "b",
                "suite": suite,
                "arm": "allocation" if arm == "strict" else arm,
                "variant": variant,
                "mode": "strict" if arm == "strict" else "paper",
                "rho": rho,
                "seed": seed,
                "P_tot": 5_700_000_000,
                "P_act": 568_000_000,
                "P_tot_per_P_act": 10.0,
                "train_tokens": 58_700_000_000,
                "tokens_per_P_tot": 10.3,
                "steps": 14_000,
                "flops": 2e20,
                "flops_per_token": 3.4e9,
                "n_slots": 0,
                "n_streams": 4,
                "data": "ab" * 32,
                "seconds": 3600.0,
                "commit": "0012e45",
                "torch": "2.13.0",
                "device": "cpu",
                "valid_loss": loss + shift[seed] + rng.normal(0, sigma),
            }
            row["valid_bpb"] = row["valid_loss"] / 3
            rows.append(row | fixed | (facts or {}).get(variant or "", {}))
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(dict(COLUMNS))


def bowl(rho: float, at: float = 0.78, depth: float = 0.13, jump: float = 0.01) -> float:
    """The paper's shape: a parabola that jumps up at rho = 1."""
    return 1.71 + depth * (rho - at) ** 2 + jump * (rho == 1)


RHOS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0)


def curve(**shape: float) -> list[Place]:
    """The allocation suite's points along a bowl."""
    return [("allocation", None, rho, bowl(rho, **shape)) for rho in RHOS]


def allocation(controls: dict[str, float] | None = None, **shape: float) -> list[Place]:
    """The same with controls, given as distances to the loss at rho = 1."""
    offsets = {"dense": 0.1, "module-only": 0.0, "random-ids": 0.001, "strict": -0.012} | (controls or {})
    rho = {"dense": None, "module-only": 1.0}
    top = bowl(1.0, **shape)
    return [*curve(**shape), *((arm, None, rho.get(arm, 0.8), top + offset) for arm, offset in offsets.items())]


def levels(suite: str, optima: dict[float, float]) -> list[Place]:
    """Curves of `sparsity` or `horizon`: number -> the best rho there."""
    word = {"sparsity": "sparsity-{:g}", "horizon": "horizon-{:g}x"}[suite]
    return [
        ("allocation", word.format(number), rho, bowl(rho, at))
        for number, at in optima.items()
        for rho in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    ]


SLOTS = (2, 5, 10, 20, 40, 80)


def memory(advantage: float = 0.012, slope: float = -0.03, bend: float = 0.0) -> list[Place]:
    """Points of `infinite-memory` on two lines, the first bent at will."""
    places: list[Place] = [("allocation", None, 1.0, 1.81)]
    for times in SLOTS:
        x = np.log10(times)
        places.append(("engram", f"slots-{times}x", 1.0, 1.80 + slope * x + bend * (x - 1.1) ** 2))
        places.append(("over-encoding", f"slots-{times}x", 1.0, 1.80 + advantage + slope * x))
    return places


SLOT_FACTS = {f"slots-{times}x": {"n_slots": times * 129_280} for times in SLOTS}


def placements(best: int = 2, two: float = -0.003) -> list[Place]:
    """Points of `layers`: one layer best, the others 0.004 a layer behind; two layers `two` from the best."""
    singles: list[Place] = [("engram", f"layer-{n}", 1.0, 1.77 + 0.004 * abs(n - best)) for n in range(1, 7)]
    return [("allocation", None, 1.0, 1.81), *singles, ("engram", "layer-2+4", 1.0, 1.77 + two)]


EFFECTS = {
    "no-fusion": 0.0064,
    "no-compression": 0.0057,
    "no-gate": 0.0046,
    "no-conv": 0.0005,
    "plus-4-grams": 0.0002,
    "plain-gate": 0.0,
}


def parts(**changes: float) -> list[Place]:
    """Points of `ablation` with the paper's effects; `no_gate=0.01` changes one."""
    effects = EFFECTS | {name.replace("_", "-"): effect for name, effect in changes.items()}
    found: list[Place] = [("ablation", name, 1.0, 1.768 + effect) for name, effect in effects.items()]
    return [("allocation", None, 1.0, 1.808), ("ablation", "reference", 1.0, 1.768), *found]


def table_1(dense: float = 1.768, moe: float = 1.634, engram: float = 1.622, large: float = 1.610) -> list[Place]:
    """Points of `baselines`."""
    return [
        ("dense", None, None, dense),
        ("allocation", None, 1.0, moe),
        ("allocation", None, 0.74, engram),
        ("engram-large", None, 0.74, large),
    ]
