"""The paper's claims, and some of our own, each judged by a rule that was written down before the runs.

The claims stand in `claims_curve.py` and `claims_memory.py`, the rules that they share in `rules.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    return tuple(Finding(claim, _answer(claim, dossier), dossier.warning) for claim in CLAIMS)


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
