"""Timing two or more ways of doing the same work, fairly.

Outputs are compared first: no ratio is given where they differ. Then the contenders take turns, round after round, so
that whatever else the machine is doing meets all of them; a ratio is taken within each round, and the median of the
ratios is what is reported, with the smallest and the largest. A profile of one more run says how much of the time
matrix products take, and memory is measured in a process of its own for each.
"""

from __future__ import annotations

import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.products import product_seconds
from experiments.peak_memory import peak_since, resident, restart_peak

ROUNDS = 7
MEMORY_RUNS = 3


@dataclass(frozen=True)
class Contender:
    """One way of doing the work. What it needs is built when it is made, outside the timing."""

    run: Callable[[], None]
    """The work that is timed; called many times, each time with the same result."""
    outputs: Callable[[], Sequence[Tensor]] | None = None
    """What must equal the other contenders' outputs; None where the contenders compute different things by design."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One line of the results: ours against peers."""

    name: str
    what: str
    """The work and its shape, for the table."""
    target: float
    at_least: bool
    """Whether `target` is a speed-up to reach, or a slow-down not to exceed."""
    contenders: dict[str, Callable[[], Contender]]
    """Ours first. The ratio is the fastest peer's time over ours, or ours over the peer's for a slow-down."""
    tolerance: float = 1e-4
    """Largest difference of outputs, relative to their norm."""
    flops: float | None = None
    """Floating-point operations of the work; with them and a GPU's peak the utilisation (MFU) is told."""
    note: str = ""
    """What a reader must know to read the ratio."""


@dataclass(frozen=True)
class Result:
    """What came out of a part."""

    part: Part
    seconds: dict[str, list[float]] = field(default_factory=dict)
    product_seconds: dict[str, float] = field(default_factory=dict)
    """Of one run, inside matrix products."""
    memory_mib: dict[str, float] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """Contenders that could not be built, and why."""
    differing: dict[str, float] = field(default_factory=dict)
    """Contenders whose outputs differ from ours, and by how much."""

    @property
    def ours(self) -> str:
        return next(iter(self.part.contenders))

    def ratios(self, peer: str) -> list[float]:
        """Per round: how many times faster ours was than the peer, or how many times slower for a slow-down."""
        pairs = zip(self.seconds[self.ours], self.seconds[peer], strict=True)
        return [theirs / own if self.part.at_least else own / theirs for own, theirs in pairs]

    def bound(self, peer: str) -> float:
        """The ratio if ours took no time but that of its matrix products; infinite where it has none."""
        products = self.product_seconds.get(self.ours, 0.0)
        return statistics.median(self.seconds[peer]) / products if products else float("inf")

    @property
    def best_peer(self) -> str | None:
        """The fastest peer whose outputs agree."""
        peers = [name for name in self.seconds if name != self.ours and name not in self.differing]
        return min(peers, key=lambda name: statistics.median(self.seconds[name])) if peers else None


def takes_bf16(device: torch.device, said: bool | None) -> bool:
    """Whether a part runs in bf16: on GPUs yes, on CPUs no, unless it is said."""
    return device.type != "cpu" if said is None else said


def in_bf16(name: str, bf16: bool) -> str:
    """Name of a part in that precision."""
    return f"{name}-bf16" if bf16 else name


def run_part(part: Part, device: torch.device, rounds: int, say: Callable[[str], None]) -> Result:
    """Build, compare, time and weigh all contenders of a part."""
    result, built = Result(part), {}
    for name, build in part.contenders.items():
        say(f"{part.name}: building {name}")
        try:
            built[name] = build()
        except ImportError as error:
            result.missing[name] = str(error)
    if result.ours not in built:
        return result
    reference = built[result.ours].outputs
    for name, contender in built.items():
        contender.run()  # warm: buffers, caches, compilation
        if name != result.ours and reference is not None and contender.outputs is not None:
            gap = largest_gap(contender.outputs(), reference())
            if not gap <= part.tolerance:
                result.differing[name] = gap
        result.seconds[name] = []
    for i in range(rounds):
        say(f"{part.name}: round {i + 1} of {rounds}")
        # Each round begins with another contender, so that none always follows the same one.
        for name in (*list(built)[i % len(built) :], *list(built)[: i % len(built)]):
            result.seconds[name].append(_time(built[name].run, device))
    for name, contender in built.items():
        say(f"{part.name}: profile of {name}")
        result.product_seconds[name] = product_seconds(contender.run, device)
    del built
    gc.collect()
    for name in result.seconds:
        say(f"{part.name}: memory of {name}")
        result.memory_mib[name] = _memory_of(part.name, name, device)
    return result


def largest_gap(here: Sequence[Tensor], there: Sequence[Tensor]) -> float:
    """Largest relative difference, in norm, between paired tensors; infinite where shapes or counts differ."""
    if [t.shape for t in here] != [t.shape for t in there]:
        return float("inf")
    gaps = [(a.double() - b.double()).norm() / b.double().norm() for a, b in zip(here, there, strict=True)]
    return float(torch.stack(gaps).max())


def _time(work: Callable[[], None], device: torch.device) -> float:
    gc.collect()
    _wait(device)
    began = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _memory_of(part: str, contender: str, device: torch.device) -> float:
    """Peak memory of the work above what its weights and inputs take, in MiB, from a fresh process."""
    command = [sys.executable, "-m", "benchmarks", "memory", part, contender, "--device", device.type]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent.parent)
    return float(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


def peak_memory(build: Callable[[], Contender], device: torch.device) -> float:
    """Peak of a few runs above the memory held before, in MiB; nan where the system does not tell. Call it in a fresh
    process."""
    contender = build()
    gc.collect()
    restarted = restart_peak(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else resident()
    for _ in range(MEMORY_RUNS):
        contender.run()
    peak = peak_since(device, restarted=restarted)
    most = peak.device if device.type == "cuda" else peak.host
    return float("nan") if most is None or before is None else (most - before) / 2**20
