"""What all figures of a dossier share: a title, room for its warning, points with intervals, labels that stay apart."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from analysis import style
from analysis.dossier import Dossier
from analysis.fits import Difference

COLOURS = (style.BLUE, style.VERMILLION, style.GREEN, style.PURPLE, style.BROWN, style.BLACK)
MARKS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True, eq=False, repr=False)
class Drawn:
    """A figure, what it shows in a sentence or two, and the numbers behind it. A notebook shows the figure."""

    figure: Figure
    caption: str
    numbers: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return self.caption

    def _repr_png_(self) -> bytes:
        return png(self.figure)


def png(figure: Figure) -> bytes:
    """The figure as a PNG image."""
    image = io.BytesIO()
    with mpl.rc_context(style.RC):
        figure.savefig(image, format="png", dpi=style.DPI)
    return image.getvalue()


def new_figure(dossier: Dossier, what: str, size: tuple[float, float]) -> Figure:
    """An empty figure with a title and, where the runs are small, its warning below."""
    return titled_figure(f"{dossier.name}: {what}", size, dossier.warning)


def titled_figure(title: str, size: tuple[float, float], warning: str) -> Figure:
    """The same for what is drawn from other tables than a dossier's; no warning if it is empty."""
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11.5, fontweight="bold")
    if warning:
        figure.supxlabel(warning, x=0.01, ha="left", fontsize=8, color=style.BROWN)
    return figure


def seeds(n: int) -> str:
    """`1 seed, no intervals` or `3 seeds, 95% intervals`."""
    return "1 seed, no intervals" if n == 1 else f"{n} seeds, 95% intervals"


def spread(axes: Axes, x: float, loss: Sequence[float], colour: str, mark: str = "o", label: str | None = None) -> None:
    """One point's mean as a mark and its seeds as dots."""
    axes.plot([x] * len(loss), list(loss), ".", color=colour, alpha=0.45, ms=5, zorder=2)
    axes.plot([x], [sum(loss) / len(loss)], mark, color=colour, ms=6.5, zorder=3, label=label)


def bars(
    axes: Axes,
    x: Sequence[float],
    values: Sequence[Difference],
    colour: str,
    mark: str = "o",
    *,
    line: str = "",
    label: str | None = None,
) -> None:
    """Differences as marks with upright intervals, joined by a line if asked."""
    axes.plot(x, [v.value for v in values], mark + line, color=colour, ms=5.5, lw=1.3, zorder=3, label=label)
    barred = [(at, v.low, v.high) for at, v in zip(x, values, strict=True) if v.low is not None and v.high is not None]
    if barred:
        axes.vlines(*zip(*barred, strict=True), color=colour, lw=1.3, zorder=2)


def rows(
    axes: Axes,
    names: Sequence[str],
    values: Sequence[Difference],
    *,
    paper: Sequence[float | None] | None = None,
    colours: Sequence[str] | None = None,
) -> None:
    """Differences as horizontal intervals, one line of text each, the first on top; the paper's as open diamonds."""
    height = range(len(names) - 1, -1, -1)
    for y, value, colour in zip(height, values, colours or [style.BLUE] * len(names), strict=True):
        axes.plot([value.value], [y], "o", color=colour, ms=6, zorder=3)
        if value.low is not None and value.high is not None:
            axes.hlines(y, value.low, value.high, color=colour, lw=1.6, zorder=2)
    if paper is not None:
        known = [(p, y) for p, y in zip(paper, height, strict=True) if p is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "D", mfc="white", mec=style.BLACK, ms=5.5, zorder=4, label="the paper")
    axes.axvline(0, color=style.GREY, lw=1)
    axes.set_yticks(list(height), list(names))
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(axis="y", visible=False)


def legend_above(axes: Axes, title: str | None = None) -> None:
    """A legend over the points, in room made for it: `best` does not see intervals."""
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + (0.24 if title else 0.16) * (high - low))
    axes.legend(loc="upper center", ncols=5 if title else 3, title=title)


def compare_scales(ours: Axes, papers: Axes, name: str) -> None:
    """Say below the paper's title how much less its loss axis spans than ours: side by side they look alike."""
    spans = [high - low for low, high in (ours.get_ylim(), papers.get_ylim())]
    ratio = spans[0] / spans[1]
    said = f"{ratio:.2g} times less" if ratio >= 1 else f"{1 / ratio:.2g} times more"
    papers.set_title(f"{papers.get_title(loc='left')};\nits loss axis spans {said} than {name}'s")


def log_ticks(axis: Axis) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, written as counts: 50k."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: style.count(value)))
    axis.set_minor_formatter(NullFormatter())


def as_numbers(value: Difference | None) -> dict[str, float | None] | None:
    """For the JSON file beside a figure."""
    return None if value is None else {"value": value.value, "low": value.low, "high": value.high}
