"""Every figure of a dossier by name: what `figures`, `report` and the notebooks show."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from analysis.canvas import Drawn
from analysis.dossier import Dossier
from analysis.errors import UserError
from analysis.figures import allocation, caption, read_paper
from analysis.figures_levels import compute, cost, horizon, sparsity
from analysis.figures_memory import ablation, infinite_memory, layers
from analysis.figures_models import baselines, gain, lr, noise_over_seeds

Drawer = Callable[[Dossier], Drawn | None]


def the_curve(dossier: Dossier) -> Drawn | None:
    """Fig. 3 (left): loss over rho with fits, controls and intervals, and the paper's beside."""
    if (study := dossier.study) is None:
        return None
    # The sentence of the verdict says by itself that models are tiny.
    warning = dossier.warning if dossier.is_one_minute else ""
    numbers = caption(study) | ({"warning": warning} if warning else {})
    return Drawn(allocation(study, read_paper(), warning), study.verdict.sentence, numbers)


FIGURES: dict[str, Drawer] = {
    "allocation": the_curve,
    "gain": gain,
    "compute": compute,
    "sparsity": sparsity,
    "horizon": horizon,
    "cost": cost,
    "infinite-memory": infinite_memory,
    "layers": layers,
    "ablation": ablation,
    "baselines": baselines,
    "noise": noise_over_seeds,
    "lr": lr,
}
"""Figure -> what draws it. None where its runs are missing."""


def draw(dossier: Dossier, name: str) -> Drawn:
    """Draw one figure.

    Raises:
        UserError: no such figure, or its runs are missing.
    """
    if name not in FIGURES:
        raise UserError(f"no figure {name!r}: choose one of {', '.join(FIGURES)}")
    drawn = FIGURES[name](dossier)
    if drawn is None:
        raise UserError(f"{dossier.name} has no finished runs for the figure {name}")
    return drawn


def drawn_all(dossier: Dossier) -> Iterator[tuple[str, Drawn | str]]:
    """Every figure whose runs are there; in place of one that cannot be judged, why not."""
    for name, drawer in FIGURES.items():
        try:
            drawn: Drawn | str | None = drawer(dossier)
        except UserError as error:
            drawn = str(error)
        if drawn is not None:
            yield name, drawn


def as_json(drawn: Drawn, dossier: Dossier, name: str) -> dict[str, Any]:
    """The numbers of a figure for the file beside it."""
    if name == "allocation":
        return drawn.numbers
    return {"study": dossier.name, "warning": dossier.warning, "caption": drawn.caption, **drawn.numbers}
