"""If these fail, a machine is overloaded or left idle, or two workers share one GPU while another is free."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from experiments.pool import places
from experiments.settings import Runtime, UserError


@pytest.mark.parametrize(
    ("visible", "workers", "pinned"),
    [
        ("3,5", 0, ["3", "5"]),
        ("3,5", 3, ["3", "5", "3"]),
        ("3, GPU-ab", 1, ["3"]),
        ("3,-1,5", 0, ["3"]),
    ],
)
def test_gpu_workers_are_pinned_to_one_visible_gpu_each(
    monkeypatch: pytest.MonkeyPatch, visible: str, workers: int, pinned: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(Runtime(workers=workers))] == pinned


def test_a_run_of_several_processes_gets_as_many_gpus_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    assert [p["CUDA_VISIBLE_DEVICES"] for p in places(Runtime(processes=2))] == ["0,1", "2,3"]
    with pytest.raises(UserError, match=r"runtime.processes=8 takes as many GPUs, and here are 5"):
        places(Runtime(processes=8))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert len(places(Runtime(device="cpu", threads=2, processes=2))) == 2


def test_without_a_list_gpus_are_named_by_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho GPU-aa\necho GPU-bb\n")
    smi.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(Runtime())] == ["GPU-aa", "GPU-bb"]
    assert all("CUDA_VISIBLE_DEVICES" not in place for place in places(Runtime(device="cpu")))
    smi.write_text("#!/bin/sh\necho no driver\nexit 9\n")
    assert all("CUDA_VISIBLE_DEVICES" not in place for place in places(Runtime()))


@pytest.mark.parametrize(("cores", "threads", "workers"), [(8, 1, 8), (8, 3, 2), (2, 4, 1)])
def test_cpu_workers_share_the_usable_cores(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: int, workers: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    assert len(places(Runtime(device="cpu", threads=threads))) == workers


def test_impossible_numbers_of_workers_and_threads_are_refused() -> None:
    for runtime in (Runtime(workers=-1), Runtime(threads=0)):
        with pytest.raises(UserError, match="at least"):
            places(runtime)
