"""One self-contained HTML page for a budget: question, verdicts, figures, tables, every run, provenance.

It needs no network and no other file: images are inside, and the style is a dozen lines. The same runs give the same
bytes. Everything that comes from a table is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import pandas as pd

from analysis.canvas import png
from analysis.claims import Finding, judge_all
from analysis.dossier import Dossier
from analysis.gallery import FIGURES, drawn_all
from analysis.tables import CLAIM_HEADER, POINT_HEADER, claim_cells, point_cells

QUESTION = """\
At equal total parameters, active parameters and training tokens, which share rho of the inactive parameters should be
experts, and which share n-gram memory (Engram, arXiv 2601.07372)? And what do the memory's size, place and parts
contribute? Losses are validation cross-entropy in nats per token. Intervals are 95 percent, from runs that share
initial weights and data order wherever they share a seed."""

CSS = """\
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; font-size: 13px; margin: 1rem 0; }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem; border-bottom: 1px solid #ddd; }
th { background: #f3f3f3; } td.mono { font-family: ui-monospace, monospace; }
.scroll { overflow-x: auto; } figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: #444; max-width: 60rem; }
.warning { background: #fff4dc; border-left: 4px solid #7F4F24; padding: .6rem 1rem; }
.reproduced { color: #00684c; font-weight: 600; } .contradicted { color: #a33f00; font-weight: 600; }
nav a { margin-right: 1rem; } details summary { cursor: pointer; }
@media print { body { max-width: none; font-size: 11px; } figure, tr { break-inside: avoid; } nav { display: none } }"""

RUN_COLUMNS = (
    "run_id",
    "suite",
    "arm",
    "variant",
    "mode",
    "rho",
    "seed",
    "status",
    "valid_loss",
    "valid_bpb",
    "seconds",
)
PROVENANCE = ("commit", "dirty", "schema", "data", "corpus", "torch", "python", "device", "host_cpu", "threads")


def page(dossier: Dossier) -> str:
    """Write the page of one budget."""
    findings = judge_all(dossier)
    warning = f'<p class="warning">{escape(dossier.warning)}</p>' if dossier.warning else ""
    verdict = f"<p>{escape(dossier.study.verdict.sentence)}</p>" if dossier.study is not None else ""
    links = ("claims", "figures", "points", "runs", "provenance")
    nav = "".join(f'<a href="#{link}">{link.capitalize()}</a>' for link in links)
    n_seeds = f"{dossier.n_seeds} seed" + "s" * (dossier.n_seeds > 1)
    body = [
        f"<h1>{escape(dossier.name)}: experts or memory?</h1>",
        f"<nav>{nav}</nav>",
        f"<p>{escape(QUESTION)}</p>",
        warning,
        f"<p>Suites with finished runs: {escape(', '.join(dossier.suites))}. At most {n_seeds} a point.</p>",
        verdict,
        *(f'<p class="warning">{escape(trouble)}</p>' for trouble in dossier.troubles),
        '<h2 id="claims">Claims</h2>',
        _claims(findings),
        _rules(findings),
        '<h2 id="figures">Figures</h2>',
        *_figures(dossier),
        '<h2 id="points">Points</h2>',
        *_points(dossier),
        '<h2 id="runs">Runs</h2>',
        _runs(dossier.rows),
        '<h2 id="provenance">Provenance</h2>',
        _provenance(dossier.rows),
    ]
    title = f"<title>{escape(dossier.name)}: experts or memory?</title>"
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}{title}<style>{CSS}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n' + "\n".join(body) + "\n</body></html>\n"


def _claims(findings: Sequence[Finding]) -> str:
    rows = []
    for finding in findings:
        cells = claim_cells(finding)
        # A verdict that carries no conclusion is not set in colour.
        kind = "" if finding.warning else f' class="{finding.answer.verdict.replace(" ", "-")}"'
        rows.append([("", cell) if i != 3 else (kind, cell) for i, cell in enumerate(cells)])
    return _table(CLAIM_HEADER, rows)


def _rules(findings: Sequence[Finding]) -> str:
    items = "".join(
        f"<li><b>{escape(f.claim.text)}</b> {escape(' '.join(f.claim.rule.split()))}</li>" for f in findings
    )
    return f"<details><summary>The rules of the verdicts</summary><ul>{items}</ul></details>"


def _figures(dossier: Dossier) -> Iterable[str]:
    for name, drawn in drawn_all(dossier):
        about = " ".join((FIGURES[name].__doc__ or "").partition("\n\n")[0].split())
        if isinstance(drawn, str):
            yield f'<h3>{escape(name)}</h3><p class="warning">not drawn: {escape(drawn)}</p>'
            continue
        image = base64.b64encode(png(drawn.figure)).decode()
        text = f"{escape(about)} {escape(drawn.caption)}"
        yield (
            f'<h3>{escape(name)}</h3><figure><img alt="{escape(about)}" src="data:image/png;base64,{image}">'
            f"<figcaption>{text}</figcaption></figure>"
        )


def _points(dossier: Dossier) -> Iterable[str]:
    for suite, runs in dossier.suites.items():
        rows = [[("", cell) for cell in point_cells(point)] for point in runs.points]
        yield f"<h3>{escape(suite)}</h3>{_table(POINT_HEADER, rows)}"


def _runs(rows: pd.DataFrame) -> str:
    body = [
        [(' class="mono"' if name == "run_id" else "", _cell(row[name])) for name in RUN_COLUMNS]
        for row in rows.to_dict("records")
    ]
    many = f"{rows['run_id'].nunique()} runs, {len(rows)} lines: a run that several suites share has one for each"
    return f"<details><summary>{many}</summary>{_table(RUN_COLUMNS, body)}</details>"


def _provenance(rows: pd.DataFrame) -> str:
    body = []
    for name in PROVENANCE:
        known = sorted({_cell(value) for value in rows[name]})
        body.append([("", name), (' class="mono"', ", ".join(known))])
    return _table(("column", "values"), body)


def _table(header: Sequence[str], body: Sequence[Sequence[tuple[str, str]]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = "".join("<tr>" + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in row) + "</tr>" for row in body)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def _cell(value: Any) -> str:
    if pd.isna(value):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
