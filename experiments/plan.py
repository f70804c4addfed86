"""The plan of a suite, counted without a tensor: what would run, how equal the budgets are, what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from rich.table import Table

from engram.counting import count_params, train_flops_per_token
from experiments.grid import notes
from experiments.settings import Budget, Run


@dataclass(frozen=True)
class PlannedPoint:
    """One point of a suite, all its seeds together."""

    arm: str
    variant: str | None
    mode: str
    rho_target: float | None
    rho: float | None
    n_routed_experts: int
    slots: tuple[int, int] | None
    """Rows of the smallest and of the largest table."""
    P_tot: int
    P_act: int
    P_tot_error: float
    """Relative to rho = 1; in `sparsity` to that of the same level."""
    P_act_error: float
    flops_per_token: int
    tokens: int
    hours: float
    """Of one run, at the budget's sustained speed."""
    seeds: int


def plan(budget: Budget, runs: Sequence[Run]) -> list[PlannedPoint]:
    """Count every point of a suite, in its order."""
    by_point: dict[str, list[Run]] = {}
    for run in runs:
        by_point.setdefault(repr((run.labels, run.spec.replicate)), []).append(run)
    pure = {run.labels.variant: run.spec.model for run in runs if _is_pure(run)}
    points = []
    for same in by_point.values():
        labels, spec = same[0].labels, same[0].spec
        counts, reference = count_params(spec.model), count_params(pure.get(labels.variant, budget.backbone))
        flops = train_flops_per_token(spec.model, spec.train.seq_len)
        tokens = spec.train.steps * spec.train.batch_tokens
        memory = spec.model.memory
        sizes = [size for layer in memory.tables.n_slots for size in layer] if memory else []
        points.append(
            PlannedPoint(
                arm=labels.arm,
                variant=labels.variant,
                mode=labels.mode,
                rho_target=labels.rho_target,
                rho=labels.rho,
                n_routed_experts=spec.model.moe.n_routed_experts if spec.model.moe else 0,
                slots=(min(sizes), max(sizes)) if sizes else None,
                P_tot=counts.P_tot,
                P_act=counts.P_act,
                P_tot_error=counts.P_tot / reference.P_tot - 1,
                P_act_error=counts.P_act / reference.P_act - 1,
                flops_per_token=flops,
                tokens=tokens,
                hours=flops * tokens / budget.flops_per_s / 3600,
                seeds=len(same),
            )
        )
    return points


def _no_reference(points: Sequence[PlannedPoint]) -> list[str]:
    """A note where a curve lacks the run that all its points are compared with."""
    on_curve = [point.rho for point in points if point.arm == "allocation"]
    if not on_curve or 1 in on_curve:
        return []
    return ["no point at rho = 1, with which all others are compared: the curve is judged once that run is there, too"]


def _is_pure(run: Run) -> bool:
    return run.labels.arm == "allocation" and run.labels.rho == 1


def as_dicts(points: Sequence[PlannedPoint]) -> list[dict[str, object]]:
    """For --json."""
    return [asdict(point) for point in points]


def as_table(budget: Budget, suite: str, points: Sequence[PlannedPoint]) -> Table:
    """The plan as people read it."""
    hours = sum(point.hours * point.seeds for point in points)
    runs = sum(point.seeds for point in points)
    speed = f"{budget.flops_per_s / 1e12:g} TFLOP/s"
    table = Table(
        title=f"{suite} on {budget.name}: {runs} runs, {_hours(hours)} of device time at {speed}",
        caption="\n".join(
            [budget.about, *notes(suite, budget.grid, budget.backbone.n_streams), *_no_reference(points)]
        ),
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
        box=None,
    )
    table.add_column("arm", no_wrap=True)
    named = any(point.variant for point in points)
    if named:
        table.add_column("variant", no_wrap=True)
    for name in ("rho", "experts", "slots/table", "P_tot", "", "P_act", "", "FLOPs/token", "tokens", "hours", "seeds"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in points:
        table.add_row(
            point.arm + (" (strict)" if point.mode == "strict" else ""),
            *([point.variant or "-"] if named else []),
            "-" if point.rho is None else f"{point.rho:.3f}",
            str(point.n_routed_experts) if point.n_routed_experts else "-",
            "-" if point.slots is None else f"{point.slots[0]:,}",
            short(point.P_tot),
            f"{point.P_tot_error:+.2%}",
            short(point.P_act),
            f"{point.P_act_error:+.2%}",
            short(point.flops_per_token),
            short(point.tokens),
            _hours(point.hours),
            str(point.seeds),
        )
    return table


def short(number: float) -> str:
    """Three or four significant digits and a letter: 568.2M."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.{1 if number / size >= 100 else 2}f}{letter}"
    return f"{number:g}"


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"
