"""One function per table: a study in, markdown out."""

from __future__ import annotations

from statistics import mean, stdev

from analysis.fits import Difference
from analysis.study import ALLOCATION, Arm, Study
from analysis.style import count

HEADER = ["arm", "rho", "experts", "slots", "P_tot", "P_act", "FLOPs/token", "loss", "SD", "minus rho = 1 (95%)"]
HEADER += ["bpb", "seeds"]
NOTE = """\
Loss in nats per token, mean over the seeds that finished. SD: standard deviation over those seeds; paired differences
are free of what it has in common. `minus rho = 1`: loss minus the loss of the pure mixture of experts at equal seeds;
its interval is simultaneous over rho for `allocation` and a t interval for every other arm, from a pooled variance
(`analysis/fits.py`). Slots: rows of all tables. bpb: bits per byte.
"""


def allocation(study: Study) -> str:
    """List every arm and rho of a study: sizes, mean loss, spread over seeds, and the paired distance to rho = 1."""
    arms = sorted(study.arms, key=lambda a: (a.arm != ALLOCATION, a.arm, a.mode, -(a.rho if a.rho is not None else 2)))
    lines = [
        f"# {study.name}",
        "",
        study.verdict.sentence,
        "",
        "| " + " | ".join(HEADER) + " |",
        "| --- |" + " ---: |" * (len(HEADER) - 1),
        *("| " + " | ".join(_cells(arm)) + " |" for arm in arms),
        "",
        NOTE,
    ]
    return "\n".join(lines)


def _cells(arm: Arm) -> tuple[str, ...]:
    row, n = arm.first, len(arm.loss)
    sizes = (
        _whole(row["n_routed_experts"]),
        _whole(row["n_slots"]),
        *("-" if row[key] is None else count(row[key]) for key in ("P_tot", "P_act", "flops_per_token")),
    )
    return (
        arm.arm + (" (strict)" if arm.mode == "strict" else ""),
        "-" if arm.rho is None else f"{arm.rho:.3f}",
        *sizes,
        f"{mean(arm.loss):.4f}" if n else "-",
        f"{stdev(arm.loss):.4f}" if n > 1 else "-",
        _difference(arm),
        "-" if arm.bpb is None else f"{arm.bpb:.4f}",
        f"{n}" + (f" ({arm.n_diverged} diverged)" if arm.n_diverged else ""),
    )


def _whole(number: int | None) -> str:
    return "-" if number is None else f"{number:,}"


def _difference(arm: Arm) -> str:
    difference: Difference | None = arm.difference
    if difference is None:
        return "-"
    if arm.on_sweep and arm.rho == 1:
        return "0"
    if difference.low is None or difference.high is None:
        return f"{difference.value:+.4f}"
    return f"{difference.value:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"
