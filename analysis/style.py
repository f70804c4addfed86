"""Colours, sizes and words that all figures share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# Okabe and Ito's palette (https://jfly.uni-koeln.de/color), told apart with any common colour blindness; the second
# line is darker than theirs because labels are set in it. Marks and dashes differ as well.
BLUE, ORANGE, GREEN, VERMILLION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, BLACK, GREY, BROWN = "#AA4499", "#000000", "#767676", "#7F4F24"
SKY = "#56B4E9"  # too light for text

RC: Any = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "pdf.fonttype": 42,
    "svg.fonttype": "none",
}
DPI = 150

RHO_LABEL = "rho: share of the sparse parameters that are experts"
LOSS_LABEL = "validation loss (nats per token)"
OFFSET_LABEL = "loss minus that at rho = 1\n(nats per token)"

ARMS: dict[str, tuple[str, str]] = {
    "dense": ("dense", BLACK),
    "module-only": ("module without memory", PURPLE),
    "random-ids": ("random lookups", BROWN),
    "over-encoding": ("OverEncoding", GREY),
}
"""Arms drawn beside the curve over rho: label and colour."""


def count(number: float) -> str:
    """Write a count with a unit: 2_612_000 as `2.61M`; beyond a thousand T as `2e+20`."""
    if abs(number) >= 1e15:
        return f"{number:.3g}"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def numbers_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown lines: a first column of words, then columns of numbers."""
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]
