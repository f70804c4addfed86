"""If these fail, a notebook does not run, or shows what other rows or other code gave."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def printed(notebook: dict[str, Any]) -> list[str]:
    """What code cells printed, without images."""
    outputs = [output for cell in cells(notebook) for output in cell["outputs"]]
    return ["".join(o.get("text") or o["data"].get("text/plain", "")) for o in outputs]


def test_there_are_five() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == list("12345")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_committed_executed_and_holds_no_code_of_its_own(path: Path) -> None:
    notebook = json.loads(path.read_text())
    code = cells(notebook)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "executed once, from the top"
    assert not [o for cell in code for o in cell["outputs"] if o["output_type"] == "error" or o.get("name") == "stderr"]
    text = "\n".join(source(cell) for cell in code)
    assert not re.search(r"^\s*(def|class) ", text, re.MULTILINE)
    allowed = 0 if path.name[0] != "5" else 1  # its training steps
    assert len(re.findall(r"^\s*(?:for|while) .*:$", text, re.MULTILINE)) == allowed
    packages = set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.MULTILINE))
    assert packages <= {"pathlib", "pandas", "numpy", "analysis"} | (
        {"torch", "tokenizers", "engram"} if path.name[0] == "5" else set()
    )
    explained = "".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")
    assert "**What is seen.**" in explained
    if "one-minute" in text:
        assert "No conclusion is drawn from them." in "".join(printed(notebook))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_afresh_and_says_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text outputs as committed; the fifth trains, and its last digits depend on the processor."""
    pytest.importorskip("nbclient")
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    from execute import execute

    again = json.loads(json.dumps(execute(path)))
    committed = json.loads(path.read_text())
    for cell in again["cells"]:
        cell["source"] = [cell["source"]]
    assert [source(cell) for cell in cells(again)] == [source(cell) for cell in cells(committed)]
    assert [len(cell["outputs"]) for cell in cells(again)] == [len(cell["outputs"]) for cell in cells(committed)]
    if path.name[0] != "5":
        assert printed(again) == printed(committed)
