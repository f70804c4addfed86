"""If these fail, speeds and memory are not those of the run's model."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_study import build_shards, study_run

from engram.counting import count_params
from experiments.finished import open_finished
from experiments.rundir import RunDir
from experiments.settings import Runtime
from experiments.speed import measure_all
from experiments.train import train


@pytest.mark.slow
def test_a_run_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    shards = build_shards(tmp_path)
    run_dir = RunDir.create(tmp_path / "runs", study_run(shards))
    assert train(run_dir, shards, Runtime(device="cpu"), lambda: False) == "final"
    finished = open_finished(run_dir.path, tmp_path / "data")
    (found,) = measure_all([finished], tmp_path / "data", "cpu", batch=2, prompt=16, new=4)
    counts = count_params(finished.run.spec.model)
    assert found["weights_bytes"] == 4 * counts.total
    assert found["tables_bytes"] == 4 * counts.tables
    # Three layers of 2 heads with 16 channels of keys and 12 of values, 20 slots; two convolutions that reach 9 back.
    assert found["state_bytes"] == 4 * (3 * 2 * 20 * 2 * (16 + 12) + 2 * 2 * 9 * 32)
    assert found["prefill_tokens_per_s"] > found["decode_tokens_per_s"] > 0
    assert found["peak_memory_bytes"] > found["weights_bytes"]
    assert len(list((run_dir.path / "evals").glob("*.speed"))) == 1
