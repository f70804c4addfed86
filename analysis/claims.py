"""The paper's claims, and some of our own, each judged by a rule that was written down before the runs.

The claims stand in `claims_curve.py` and `claims_memory.py`, the rules that they share in `rules.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from analysis.claims_curve import CURVE
from analysis.claims_memory import MEMORY
from analysis.dossier import Dossier
from analysis.errors import UserError
from analysis.rules import Answer, Claim, not_run

CLAIMS: tuple[Claim, ...] = (*CURVE, *MEMORY)


@dataclass(frozen=True)
class Finding:
    """A claim and its answer on one budget."""

    claim: Claim
    answer: Answer
    warning: str
    """What stands beside the verdict if the runs are too small to carry one."""


def judge_all(dossier: Dossier) -> tuple[Finding, ...]:
    """Judge every claim on a budget's runs; nothing is left out."""
    return tuple(judge(claim, dossier) for claim in CLAIMS)


def judge(claim: Claim, dossier: Dossier) -> Finding:
    """Judge one claim; "not run", with the reason, where its runs are missing."""
    return Finding(claim, _answer(claim, dossier), dossier.warning)


def _answer(claim: Claim, dossier: Dossier) -> Answer:
    try:
        answer = claim.judge(dossier)
    except UserError as error:
        return not_run(str(error))
    if answer is not None:
        return answer
    if claim.suite in dossier.suites:
        return not_run(f"the {claim.suite} suite has no finished runs for it")
    return not_run(f"no runs: launch {claim.suite}")


def as_json(dossier: Dossier, findings: Sequence[Finding]) -> dict[str, Any]:
    """Every claim with its answer, for scripts."""
    return {
        "study": dossier.name,
        "warning": dossier.warning,
        "claims": [
            {
                "key": finding.claim.key,
                "claim": finding.claim.text,
                "source": finding.claim.source,
                "paper": finding.claim.paper,
                "rule": " ".join(finding.claim.rule.split()),
                **asdict(finding.answer),
            }
            for finding in findings
        ],
    }
