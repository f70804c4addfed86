"""If these fail, the documents promise a file, a command or a number that is not there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from analysis.__main__ import _parser as analysis_parser
from analysis.baselines_table import baselines
from analysis.benchmark_figure import numbers as benchmark_numbers
from analysis.benchmark_figure import points
from analysis.benchmarks import read_table as read_benchmarks
from analysis.canvas import Drawn
from analysis.claims import as_json as claims_as_json
from analysis.claims import judge_all
from analysis.collect import read_table
from analysis.dossier import read_dossiers
from analysis.figures import caption
from analysis.gallery import as_json, drawn_all
from analysis.speed import read_table as read_speeds
from analysis.study import read_study, split
from experiments.__main__ import parse
from experiments.study import parse_study

ROOT = Path(__file__).parent.parent
PAGES = sorted(path for path in ROOT.rglob("*.md") if not {".venv", "data", "runs", "code"} & set(path.parts))
REFERENCE = ROOT / "results" / "reference"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)", page.read_text())
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def commands() -> list[str]:
    """Every command for our two packages that stands in a code block or between backticks."""
    quoted = []
    for page in PAGES:
        text = page.read_text()
        blocks = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
        spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for line in [line for block in blocks for line in block.splitlines()] + spans:
            for part in re.split(r"\s{2,}#|&&|\s{3,}", line):
                if (part := part.strip()).startswith(("python -m experiments ", "python -m analysis ")):
                    quoted.append(part)
    return sorted(set(quoted))


@pytest.mark.parametrize("command", commands())
def test_quoted_commands_are_understood(command: str) -> None:
    _, _, package, *words = shlex.split(command.replace("SUITE", "allocation").replace("BUDGET", "cpu-small"))
    if package == "analysis":
        analysis_parser().parse_args(words)
        return
    if words == ["run"]:
        return  # named, not spelled out: it is what launch calls
    args = parse(words)
    if args.command != "run":
        parse_study(args.words)


def test_the_documents_quote_commands() -> None:
    assert len(commands()) > 5


def numbers(value: Any, path: str = "") -> dict[str, Any]:
    """Every leaf of a JSON document by its path."""
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in numbers(inner, f"{path}.{key}").items()}
    if isinstance(value, list):
        return {k: v for i, inner in enumerate(value) for k, v in numbers(inner, f"{path}[{i}]").items()}
    return {path: value}


def test_the_committed_figures_follow_from_the_committed_rows() -> None:
    """To a millionth: the last digits of a fit depend on the processor."""
    studies = split(read_table(REFERENCE / "runs.csv"))
    for name, rows in studies.items():
        stored = numbers(json.loads((REFERENCE / f"{name}_allocation.json").read_text()))
        again = numbers(json.loads(json.dumps(caption(read_study(name, rows)))))
        assert stored.keys() == again.keys()
        for path, value in stored.items():
            assert again[path] == (pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value), (
                path
            )


@pytest.mark.parametrize("folder", [REFERENCE, REFERENCE / "one-minute"], ids=lambda folder: folder.name)
def test_every_committed_number_and_verdict_follows_from_the_committed_rows(folder: Path) -> None:
    for dossier in read_dossiers(read_table(folder / "runs.csv")):
        again = {name: as_json(drawn, dossier, name) for name, drawn in drawn_all(dossier) if isinstance(drawn, Drawn)}
        again["claims"] = claims_as_json(dossier, judge_all(dossier))
        scores = read_benchmarks(folder / "benchmarks.csv")
        if not (scored := points(dossier.of_one_backbone, scores)).empty:
            again["benchmarks"] = benchmark_numbers(dossier.name, scored)
        table_1 = folder / f"{dossier.name}_table1.md"
        speeds = read_speeds(folder / "speed.csv")
        assert baselines(dossier.name, dossier.of_one_backbone, scores, speeds) == (
            table_1.read_text() if table_1.exists() else None
        )
        stored = {path.stem.removeprefix(f"{dossier.name}_") for path in folder.glob(f"{dossier.name}_*.json")}
        assert stored == set(again)
        for name, found in again.items():
            then = numbers(json.loads((folder / f"{dossier.name}_{name}.json").read_text()))
            now = numbers(json.loads(json.dumps(found)))
            assert then.keys() == now.keys()
            for path, value in then.items():
                same = pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value
                assert now[path] == same, (name, path)


def test_the_readme_states_the_verdict_that_was_measured() -> None:
    sentence = json.loads((REFERENCE / "cpu-small_allocation.json").read_text())["sentence"]
    assert sentence in " ".join((ROOT / "README.md").read_text().replace("> ", "").split())
