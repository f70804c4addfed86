"""If these fail, speeds and memory are not those of the run's model, or of what they are said to be of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import build_shards, study_run

from analysis.speed import COLUMNS
from engram.config import OptimConfig
from engram.counting import count_params
from experiments import peak_memory
from experiments.finished import Finished, open_finished
from experiments.peak_memory import peak_of_process, peak_since, resident, restart_peak
from experiments.rundir import RunDir
from experiments.settings import Runtime, UserError
from experiments.speed import Load, in_words, measure_all, parse_places
from experiments.train import train

CPU = torch.device("cpu")
MIB = 2**20


def finished_run(folder: Path, **changes: Any) -> Finished:
    shards = build_shards(folder)
    run_dir = RunDir.create(folder / "runs", study_run(shards, **changes))
    assert train(run_dir, shards, Runtime(device="cpu"), lambda: False) == "final"
    return open_finished(run_dir.path, folder / "data")


@pytest.mark.slow
def test_a_run_is_measured_in_processes_of_its_own_once_for_each_place_of_its_tables(tmp_path: Path) -> None:
    finished = finished_run(tmp_path)
    load = Load(batch=2, prompt=16, new=4)
    found = [result for _, result in measure_all([finished], tmp_path / "data", load, ("device", "host"))]
    assert [result["tables_on"] for result in found] == ["device", "host"]
    counts = count_params(finished.run.spec.model)
    for result in found:
        assert set(COLUMNS) == set(result)
        assert result["weights_bytes"] == 4 * counts.total
        assert result["tables_bytes"] == 4 * counts.tables
        # Three layers of 2 heads with 16 channels of keys and 12 of values, 20 slots; two convolutions reach 9 back.
        assert result["state_bytes"] == 4 * (3 * 2 * 20 * 2 * (16 + 12) + 2 * 2 * 9 * 32)
        assert result["prefill_tokens_per_s"] > result["decode_tokens_per_s"] > 0
        assert result["prefill_device_bytes"] is result["decode_device_bytes"] is None
        assert result["process_host_bytes"] > 50 * MIB
        assert (result["device"], result["threads"], result["batch"]) == ("cpu", 1, 2)
    names = {path.name for path in (finished.run_dir.path / "evals").iterdir()}
    assert names == {f"speed_cpu_tables-{t}_threads-1_batch-2_prompt-16_new-4.speed" for t in ("device", "host")}


@pytest.mark.slow
def test_a_run_without_tables_is_measured_once(tmp_path: Path) -> None:
    finished = finished_run(tmp_path, model={"engram": None})
    [(_, result)] = measure_all([finished], tmp_path / "data", Load(batch=1, prompt=4, new=2), ("device", "host"))
    assert (result["tables_on"], result["tables_bytes"]) == (None, 0)
    assert in_words(result).startswith("prefill ")


@pytest.mark.slow
def test_tables_in_host_memory_are_the_runs_own_in_the_precision_they_were_trained_in(tmp_path: Path) -> None:
    finished = finished_run(tmp_path, optim=OptimConfig(lr=5e-3, table_dtype="bf16"))
    near, far = finished.load_model(), finished.load_model(tables_stay=True)
    tokens_BT = torch.randint(3, 320, (2, 30))
    with torch.inference_mode():
        assert torch.equal(near(tokens_BT), far(tokens_BT))
    kinds = {p.dtype for name, p in far.named_parameters() if name.endswith("table_SP")}
    assert kinds == {torch.bfloat16}


@pytest.mark.skipif(not restart_peak(CPU), reason="this machine does not let a process start its mark again")
def test_a_peak_is_told_from_the_one_before() -> None:
    """64 MiB held and freed, then 16: each peak is its own, above what the process holds anyway."""

    def peak_of(n_mib: int) -> int:
        restarted, before = restart_peak(CPU), resident()
        torch.ones(n_mib * MIB // 4)
        host = peak_since(CPU, restarted=restarted).host
        assert host is not None
        assert before is not None
        return round((host - before) / MIB)

    assert peak_of(64) == pytest.approx(64, abs=3)
    assert peak_of(16) == pytest.approx(16, abs=3)
    assert peak_since(CPU, restarted=True).device is None


def test_where_the_mark_cannot_start_again_there_is_only_that_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on macOS, and in containers whose /proc cannot be written to."""
    monkeypatch.setattr(peak_memory, "_PROC", tmp_path / "nothing")
    assert not restart_peak(CPU)
    assert peak_since(CPU, restarted=False).host is resident() is None
    assert peak_of_process() > 50 * MIB
    monkeypatch.setattr("sys.platform", "darwin")  # which counts bytes
    assert peak_of_process() > 50 * MIB / 1024


def test_what_could_not_be_told_is_not_said() -> None:
    sizes = {"weights_bytes": 3 * MIB, "tables_bytes": MIB, "state_bytes": MIB, "process_host_bytes": 300 * MIB}
    speeds = {"tables_on": "host", "prefill_tokens_per_s": 1000.0, "decode_tokens_per_s": 100.0}
    peaks: dict[str, Any] = {f"{phase}_{m}_bytes": None for phase in ("prefill", "decode") for m in ("device", "host")}
    assert in_words(speeds | sizes | peaks) == (
        "tables in host memory, prefill 1,000 tokens/s, decode 100 tokens/s, process 300.0 MiB at most "
        "(weights 3.0 MiB, of these tables 1.0 MiB, past 1.0 MiB)"
    )
    peaks |= {"prefill_device_bytes": 9 * MIB, "decode_device_bytes": 8 * MIB}
    assert "device memory 9.0 MiB in prefill, 8.0 MiB in decode (" in in_words(speeds | sizes | peaks)


def test_places_of_tables_are_words_joined_by_commas() -> None:
    assert parse_places("host, device,host") == ("host", "device")
    for text in ("", ",", "gpu", "host,gpu"):
        with pytest.raises(UserError, match=rf"--tables={text}: take device or host"):
            parse_places(text)


def test_what_a_model_is_asked_to_do_is_in_the_name_of_its_file() -> None:
    from experiments.speed import _file_name

    base = Load()
    others = [replace(base, **{key: 3}) for key in ("threads", "batch", "prompt", "new")]
    names = {_file_name(load, place) for load in (base, *others) for place in (None, "device", "host")}
    assert len(names) == 15
