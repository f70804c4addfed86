"""What the suites beside `allocation` vary, and what a plan says about a grid that was made smaller.

A budget fixes backbone, memory template and training; a suite derives its points from these and from the numbers here.
The defaults are the whole grid; a budget that cannot afford it takes fewer points, and `notes` says which.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

Ablation = Literal[
    "no-fusion",
    "no-compression",
    "no-gate",
    "no-conv",
    "plus-4-grams",
    "plain-gate",
    "half-heads",
    "double-heads",
    "table-lr",
    "dense-adam",
    "rowwise-adam",
    "cross-documents",
]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Points of the suites. Multiples are of the budget's own numbers, so that one grid serves every budget."""

    rhos: tuple[float, ...] = (1.0, 0.9, 0.8, 0.6, 0.4)
    """rho of every level of `sparsity` and `horizon`."""
    sparsity_ratios: tuple[float, ...] = (5.0, 10.0, 20.0)
    """P_tot / P_act of `sparsity`; the number of routed experts follows."""
    horizons: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """Training lengths of `horizon`, as multiples of train.tokens."""
    slot_multiples: tuple[float, ...] = (2.0, 5.0, 10.0, 20.0, 40.0, 80.0)
    """Rows of each of Engram's tables in `infinite-memory`, as multiples of the vocabulary; the paper's 2 to 80."""
    fixed_slots: float = 10.0
    """The same of `layers` and `ablation` (the paper's 1.6B parameters are 10)."""
    layers: tuple[int, ...] = ()
    """Layers of the single Engram of `layers`, counted from 0; empty takes every layer."""
    ablations: tuple[Ablation, ...] = get_args(Ablation)
    """Variants of `ablation` beside its reference; the first five are the paper's."""
    table_lr_mults: tuple[float, ...] = (1.0, 2.5, 10.0)
    """Values of optim.table_lr_mult in the variant `table-lr`."""
    noise_seeds: int = 8
    """Seeds of `noise`: 0, 1, 2 and so on."""
    lr_factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """Learning rates of `lr`, as multiples of optim.lr."""
    lr_seeds: tuple[int, ...] = (100, 101)
    """Seeds of `lr`: no seed of any other suite, so that nothing is tuned on the runs that are compared."""

    def __post_init__(self) -> None:
        if bad := [rho for rho in self.rhos if not 0 <= rho <= 1]:
            raise ValueError(f"grid.rhos must lie in [0, 1], not {bad}")
        multiples = ("sparsity_ratios", "horizons", "slot_multiples", "table_lr_mults", "lr_factors")
        for name in multiples:
            if bad := [value for value in getattr(self, name) if value <= 0]:
                raise ValueError(f"grid.{name} must be positive, not {bad}")
        if self.fixed_slots <= 0:
            raise ValueError(f"grid.fixed_slots={self.fixed_slots} must be positive")
        if self.noise_seeds < 2:
            raise ValueError(f"grid.noise_seeds={self.noise_seeds} shows no noise: take at least 2")
        if empty := [f.name for f in fields(self) if f.name != "layers" and getattr(self, f.name) == ()]:
            raise ValueError(f"grid.{empty[0]} is empty: give at least one value")


USED: dict[str, tuple[str, ...]] = {
    "sparsity": ("rhos", "sparsity_ratios"),
    "horizon": ("rhos", "horizons"),
    "infinite-memory": ("slot_multiples",),
    "layers": ("layers", "fixed_slots"),
    "ablation": ("ablations", "table_lr_mults", "fixed_slots"),
    "noise": ("noise_seeds",),
    "lr": ("lr_factors", "lr_seeds"),
}
"""Suite -> the fields it reads."""


def notes(suite: str, grid: Grid, n_streams: int) -> list[str]:
    """What a reader of a plan should know: fields that differ from the whole grid, and variants that do not exist.

    Args:
        suite: a suite's name; one that reads no grid has no notes.
        grid: the budget's.
        n_streams: residual streams of its backbone.
    """
    said = []
    for name in USED.get(suite, ()):
        here, whole = getattr(grid, name), getattr(Grid(), name)
        if here != whole:
            said.append(f"grid.{name} is {_words(here)}, the default {_words(whole)}")
    if suite == "ablation" and "no-fusion" in grid.ablations and n_streams == 1:
        said.append("no-fusion is left out: the backbone has one residual stream, and nothing to fuse")
    return said


def _words(value: Any) -> str:
    if not isinstance(value, tuple):
        return f"{value:g}"
    return ", ".join(item if isinstance(item, str) else f"{item:g}" for item in value) or "every one"
