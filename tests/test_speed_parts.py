"""If these fail, `make bench` compares different work, or reports a speed-up where outputs differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import engram_layer, experts, rounds
from benchmarks.parts import worth_running
from benchmarks.products import product_seconds
from benchmarks.report import summary, utilisation
from benchmarks.rounds import Contender, Part, Result, run_part

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_memory_of", lambda *_: 1.0)


def quiet(_: str) -> None: ...


def test_experts_of_all_contenders_agree() -> None:
    pytest.importorskip("transformers")
    part = experts.experts_part(CPU, experts.Shape(N=64, D=32, F=16, E=8, K=2))
    result = run_part(part, CPU, 2, quiet)
    assert not result.differing
    assert not result.missing
    assert {"transformers grouped_mm", "transformers eager", "sorted loop"} <= set(result.seconds)


def test_the_engram_layers_read_the_same_rows_and_agree() -> None:
    pytest.importorskip("transformers")
    shape = engram_layer.Shape(B=2, T=32, D=32, M=4, Q=32, rows=500, heads=2)
    result = run_part(engram_layer.engram_part(CPU, shape), CPU, 2, quiet)
    assert not result.differing
    assert result.best_peer is not None


def part_of(**outputs: list[float]) -> Part:
    def build(values: list[float]) -> Contender:
        return Contender(lambda: None, lambda: [Tensor(values)])

    contenders: dict[str, Any] = {name: lambda values=values: build(values) for name, values in outputs.items()}
    return Part(name="p", what="work", target=2.0, at_least=True, contenders=contenders)


def test_there_is_no_ratio_where_outputs_differ() -> None:
    result = run_part(part_of(ours=[1.0, 2.0], other=[1.0, 2.1]), CPU, 2, quiet)
    assert result.best_peer is None
    page = summary([result], None, None, 2, 1)
    assert "| p | work | no ratio | no peer's outputs agree with ours |" in page
    assert "outputs differ by" in page


def test_outputs_that_are_not_numbers_differ() -> None:
    assert run_part(part_of(ours=[1.0], other=[float("nan")]), CPU, 1, quiet).best_peer is None


def test_a_ratio_is_taken_within_a_round_against_the_fastest_peer() -> None:
    part = part_of(ours=[1.0], slow=[1.0], fast=[1.0])
    result = Result(part, {"ours": [1.0, 2.0, 4.0], "slow": [9.0, 9.0, 9.0], "fast": [3.0, 4.0, 4.0]})
    result.memory_mib.update(ours=1.0, slow=1.0, fast=1.0)
    assert result.best_peer == "fast"
    assert result.ratios("fast") == [3.0, 2.0, 1.0]
    assert "| 2.00 (1.00 to 3.00) | fast | at least 2 | yes |" in summary([result], None, None, 3, 1)


def test_a_missed_speed_up_is_told_with_the_bound_that_products_set() -> None:
    result = Result(part_of(ours=[1.0], peer=[1.0]), {"ours": [4.0, 4.0], "peer": [6.0, 6.0]}, {"ours": 2.5})
    result.memory_mib.update(ours=1.0, peer=1.0)
    page = summary([result], None, None, 2, 1)
    assert "| 1.50 (1.50 to 1.50) | peer | at least 2 | no; bound 2.4 |" in page
    assert "| p | ours | 4000.0 | 4000.0 | 2500.0 | 1 |" in page


def test_products_are_told_from_the_work_around_them() -> None:
    a = torch.randn(512, 512)

    def run() -> None:
        torch.bmm(a[None], a[None]).exp_()

    with_product = product_seconds(run, CPU)
    assert 0 < with_product < 1
    assert product_seconds(lambda: a.exp(), CPU) == 0


def test_bf16_parts_run_only_where_they_say_something() -> None:
    assert not worth_running("experts-bf16", torch.device("cuda"))
    assert worth_running("experts", CPU)


def test_utilisation_is_told_only_where_work_and_peak_are_known() -> None:
    assert utilisation(989e12, 2.0, "NVIDIA H100 80GB HBM3") == "MFU 50%"
    assert utilisation(None, 2.0, "NVIDIA H100 80GB HBM3") == ""
    assert utilisation(989e12, 2.0, None) == ""
    assert utilisation(989e12, 2.0, "another") == ""


def test_a_peer_that_is_not_installed_is_named() -> None:
    def build() -> Contender:
        raise ImportError("No module named 'sonicmoe'")

    part = part_of(ours=[1.0])
    part.contenders["sonic-moe"] = build
    result = run_part(part, CPU, 1, quiet)
    assert result.missing == {"sonic-moe": "No module named 'sonicmoe'"}
    assert "| p | sonic-moe | - | - | - | - | No module named 'sonicmoe' |" in summary([result], None, None, 1, 1)


def test_on_a_gpu_every_peer_takes_part() -> None:
    peers = set(experts.experts_part(torch.device("cuda")).contenders)
    assert {"sonic-moe sonicmoe", "sonic-moe scattermoe", "sonic-moe torch", "transformers grouped_mm"} < peers
