"""One function per table: a study, a suite or a list of findings in, markdown out."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from analysis.claims import Finding
from analysis.dossier import Dossier
from analysis.fits import Difference
from analysis.points import Point, SuiteRuns
from analysis.study import ALLOCATION, Arm, Study
from analysis.style import count

HEADER = ["arm", "rho", "experts", "slots", "P_tot", "P_act", "FLOPs/token", "loss", "SD", "minus rho = 1 (95%)"]
HEADER += ["bpb", "seeds"]
NOTE = """\
Loss in nats per token, mean over the seeds that finished at every rho. SD: standard deviation over those seeds; paired
differences are free of what it has in common. `minus rho = 1`: loss minus the loss of the pure mixture of experts at
equal seeds; its interval is simultaneous over rho for `allocation` and a t interval for every other arm, from a pooled
variance (`analysis/fits.py`). Slots: rows of all tables. bpb: bits per byte.
"""


def allocation(study: Study, warning: str = "") -> str:
    """List every arm and rho of a study: sizes, mean loss, spread over seeds, and the paired distance to rho = 1."""
    arms = sorted(study.arms, key=lambda a: (a.arm != ALLOCATION, a.arm, a.mode, -(a.rho if a.rho is not None else 2)))
    lines = [
        f"# {study.name}",
        "",
        *([warning, ""] if warning else []),
        study.verdict.sentence,
        "",
        "| " + " | ".join(HEADER) + " |",
        "| --- |" + " ---: |" * (len(HEADER) - 1),
        *("| " + " | ".join(_cells(arm)) + " |" for arm in arms),
        "",
        NOTE,
    ]
    return "\n".join(lines)


POINT_HEADER = ["point", "P_tot", "P_act", "tokens", "slots", "loss", "SD", "seeds: loss", "runs"]
POINT_NOTE = """\
Loss in nats per token, mean over the seeds that finished; SD: their standard deviation. Comparisons between points are
paired by seed and stand in the figures' JSON and in the claims, with intervals.
"""


def points(runs: SuiteRuns, warning: str) -> str:
    """List every point of a suite: sizes, mean loss, spread, every seed's loss and run."""
    body = [point_cells(point) for point in runs.points]
    return "\n".join(
        [
            f"# {runs.name}: {runs.suite}",
            "",
            *([warning, ""] if warning else []),
            *_markdown(POINT_HEADER, body),
            "",
            POINT_NOTE,
        ]
    )


def point_cells(point: Point) -> list[str]:
    """A point's row under POINT_HEADER."""
    facts, losses = point.facts, list(point.losses.values())
    sizes = ["-" if facts[key] is None else count(facts[key]) for key in ("P_tot", "P_act", "train_tokens")]
    seeds = [f"{seed}: {loss:.4f}" for seed, loss in sorted(point.losses.items())]
    seeds += [f"{seed}: diverged" for seed in point.diverged]
    return [
        point.name,
        *sizes,
        _whole(facts["n_slots"]),
        f"{mean(losses):.4f}" if losses else "-",
        f"{stdev(losses):.4f}" if len(losses) > 1 else "-",
        ", ".join(seeds),
        " ".join(point.run_ids[seed] for seed in sorted(point.run_ids)),
    ]


CLAIM_HEADER = ["claim", "paper", "ours", "verdict", "seeds"]


def claims(dossier: Dossier, findings: Sequence[Finding]) -> str:
    """List every claim with the paper's number, ours, the verdict, and the rule behind it."""
    body = [claim_cells(finding) for finding in findings]
    rules = [f"* **{f.claim.text}** ({f.claim.source}) {' '.join(f.claim.rule.split())}" for f in findings]
    warning = [dossier.warning, ""] if dossier.warning else []
    head = [f"# {dossier.name}: claims", "", *warning, *_markdown(CLAIM_HEADER, body)]
    return "\n".join([*head, "", "## Rules", "", *rules, ""])


def claim_cells(finding: Finding) -> list[str]:
    """A claim's row under CLAIM_HEADER."""
    claim, answer = finding.claim, finding.answer
    return [
        f"{claim.text} ({claim.source})",
        claim.paper,
        answer.measured,
        verdict(finding),
        str(answer.n_seeds or "-"),
    ]


def verdict(finding: Finding) -> str:
    """The verdict, and beside it what its runs are if they are too small to carry one."""
    kind = finding.warning.partition(":")[0].partition(" (")[0].lower()
    return finding.answer.verdict + (f" ({kind})" if kind and finding.answer.n_seeds else "")


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rows = [header, ["---"] * len(header), *body]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def _cells(arm: Arm) -> tuple[str, ...]:
    row, losses, n = arm.first, arm.side_by_side, len(arm.side_by_side)
    sizes = (
        _whole(row["n_routed_experts"]),
        _whole(row["n_slots"]),
        *("-" if row[key] is None else count(row[key]) for key in ("P_tot", "P_act", "flops_per_token")),
    )
    return (
        arm.arm + (" (strict)" if arm.mode == "strict" else ""),
        "-" if arm.rho is None else f"{arm.rho:.3f}",
        *sizes,
        f"{mean(losses):.4f}" if n else "-",
        f"{stdev(losses):.4f}" if n > 1 else "-",
        _difference(arm),
        "-" if arm.bpb is None else f"{arm.bpb:.4f}",
        (f"{n} of {len(arm.loss)}" if n < len(arm.loss) else f"{n}")
        + (f" ({arm.n_diverged} diverged)" if arm.n_diverged else ""),
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
