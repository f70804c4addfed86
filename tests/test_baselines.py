"""If this fails, the way from nothing to a table of baselines on benchmarks, offline, is broken somewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")
ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_one_minute_of_baselines_is_trained_measured_scored_exported_and_tabled(tmp_path: Path) -> None:
    """BLiMP's real files where they are there, else two paradigms of the test's own."""
    if shared := os.environ.get("ENGRAM_SHARED_DATA"):
        data = Path(shared) / "benchmarks"
    else:
        (data := tmp_path / "benchmarks").joinpath("blimp").mkdir(parents=True)
        for name, good, bad in (("wh_island", "It runs.", "It run."), ("causative", "They return.", "They returns.")):
            line = json.dumps({"sentence_good": good, "sentence_bad": bad})
            (data / "blimp" / f"{name}.jsonl").write_text(f"{line}\n" * 12)
    places = [f"runtime.runs_dir={tmp_path / 'runs'}", f"runtime.data_dir={tmp_path / 'data'}", "runtime.device=cpu"]
    words = ["baselines", "cpu-smoke", "seeds=[0]", "train.tokens=16384", *places]

    def call(module: str, *argv: str) -> str:
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
        command = [sys.executable, "-m", module, *argv]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    call("experiments", "launch", *words)
    said = call("experiments", "speed", *words, "--batch", "2", "--prompt", "32", "--new", "8")
    assert (said.count("tables on the device"), said.count("tables in host memory"), said.count("\n")) == (2, 2, 6)
    said = call("experiments", "eval", *words, "--tasks", "blimp,popqa_15shot", "--data", str(data), "--limit", "10")
    assert "skipped popqa_15shot: the harness has no such task" in said
    assert "4 results of 4 runs, 1 benchmarks skipped" in said
    (first, *_) = sorted((tmp_path / "runs").glob("r*"))
    call("experiments", "export", str(first), str(tmp_path / "model"), *places[1:2])
    assert (tmp_path / "model" / "model.safetensors").is_file()
    table = ["--table", str(tmp_path / "runs.csv")]
    call("analysis", "collect", "--runs", str(tmp_path / "runs"), *table)
    call("analysis", "tables", *table, "--out", str(tmp_path))
    call("analysis", "figures", *table, "--out", str(tmp_path))
    text = (tmp_path / "cpu-smoke_table1.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("| blimp") and "| 0.5000 |" in line]
    assert len(line.split("|")) == 8
    assert "-" not in [cell.strip() for cell in line.split("|")]
    assert "batch 2, prompt 32 tokens" in text
    for measured in ("prefill, tokens/s", "decode, tokens/s", "host memory ever", "tables, MiB", "seeds"):
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {measured}") and len(line.split("|")) == 9]
        assert "-" not in [cell.strip() for cell in line.split("|")]
    assert (tmp_path / "cpu-smoke_benchmarks.png").is_file()
