"""What part of a contender's time goes into matrix products: the part that no better code around them can save."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

PRODUCTS = (
    "aten::mm",
    "aten::bmm",
    "aten::addmm",
    "aten::baddbmm",
    "aten::_grouped_mm",
    "aten::_scaled_dot_product_",
)
"""Beginnings of operators' names; attention's hold its softmax too."""


def product_seconds(run: Callable[[], None], device: torch.device) -> float:
    """Seconds of one run inside matrix products, as the profiler attributes them."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities) as profiled:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    column = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return sum(getattr(row, column) for row in profiled.key_averages() if row.key.startswith(PRODUCTS)) / 1e6
