"""Results -> markdown. A ratio appears only where outputs agree; what could not be run is named."""

from __future__ import annotations

import datetime
import math
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import torch

from benchmarks.rounds import Result
from benchmarks.sweep_time import SweepTime
from experiments.final import cpu_name

SWEEP_TARGET = 1.05
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 products a second, by what a GPU's name holds (NVIDIA's data sheets, SXM)."""


def summary(results: Sequence[Result], sweep: SweepTime | None, large: str | None, rounds: int, threads: int) -> str:
    """The whole page."""
    lines = [
        "# Speed, side by side",
        "",
        "Written by `make bench`. Contenders do the same work on the same inputs and take turns; a ratio is taken in",
        f"each of {rounds} rounds; the median, smallest and largest are given. Where outputs differ there is none.",
        "",
        *machine(threads),
        "",
        "| part | work | ratio: median (smallest to largest) | against | target | met |",
        "| --- | --- | ---: | --- | ---: | --- |",
        *map(_row, results),
        *([_sweep_row(sweep)] if sweep else []),
        "",
        "A ratio of `at least` is how many times as fast as the fastest peer ours is; one of `at most` is our time",
        "over the other's. Where a speed-up is missed, the bound is what it would be if ours took no time but that of",
        "its matrix products.",
        "",
        "## Times and memory",
        "",
        "Products are matrix products and attention, from a profile of one more run. Memory is the peak of a step",
        "above weights and inputs, from a process of its own.",
        "",
        "| part | contender | median ms | fastest ms | products ms | peak MiB | |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
        *(line for result in results for line in _details(result)),
        "",
        *(f"* `{result.part.name}`: {result.part.note}." for result in results if result.part.note),
    ]
    if large:
        lines += ["", "## A table beyond the device", "", large + "."]
    return "\n".join(lines) + "\n"


def machine(threads: int) -> list[str]:
    """What ran it."""
    gpu = f", {_gpu()}" if torch.cuda.is_available() else ", no GPU: what needs one was not run"
    capability = torch.backends.cpu.get_cpu_capability()
    return [
        f"{datetime.date.today()}: {cpu_name()}, {threads} threads{gpu}; CPU capability {capability}; "
        f"Python {platform.python_version()}, torch {torch.__version__}, transformers {_version('transformers')}.",
    ]


def _row(result: Result) -> str:
    part = result.part
    target = "-" if math.isinf(part.target) else f"{'at least' if part.at_least else 'at most'} {part.target:g}"
    if (peer := result.best_peer) is None:
        why = "; ".join(result.missing.values()) or "no peer's outputs agree with ours"
        return f"| {part.name} | {part.what} | no ratio | {why} | {target} | - |"
    ratios = result.ratios(peer)
    median = statistics.median(ratios)
    met = "-" if math.isinf(part.target) else _met(median >= part.target if part.at_least else median <= part.target)
    if met == "no" and part.at_least and not math.isinf(bound := result.bound(peer)):
        met = f"no; bound {bound:.1f}"
    shown = f"{median:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"| {part.name} | {part.what} | {shown} | {peer} | {target} | {met} |"


def _sweep_row(sweep: SweepTime) -> str:
    what = f"sweep `{sweep.words}`: {sweep.n_runs} runs by {sweep.n_workers} workers, {sweep.wall_s:.0f} s"
    met = _met(sweep.ratio <= SWEEP_TARGET)
    return f"| sweep | {what} | {sweep.ratio:.3f} | its steps | at most {SWEEP_TARGET} | {met} |"


def _met(yes: bool) -> str:
    return "yes" if yes else "no"


def _details(result: Result) -> list[str]:
    lines = []
    for name, seconds in result.seconds.items():
        said = f"outputs differ by {result.differing[name]:.1e}: no ratio" if name in result.differing else ""
        said = said or utilisation(result.part.flops, statistics.median(seconds), _gpu())
        ms = [1e3 * s for s in seconds]
        products = f"{1e3 * result.product_seconds[name]:.1f}" if result.product_seconds.get(name) else "-"
        lines.append(
            f"| {result.part.name} | {name} | {statistics.median(ms):.1f} | {min(ms):.1f} | {products} | "
            f"{result.memory_mib[name]:,.0f} | {said} |"
        )
    return lines + [f"| {result.part.name} | {name} | - | - | - | - | {why} |" for name, why in result.missing.items()]


def utilisation(flops: float | None, seconds: float, gpu: str | None) -> str:
    """Share of a GPU's peak that the work reached, in words; nothing where the work or the peak is not known."""
    peaks = [peak for name, peak in PEAK_FLOPS.items() if gpu is not None and name in gpu]
    return f"MFU {flops / seconds / peaks[0]:.0%}" if flops and peaks else ""


def _gpu() -> str | None:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
