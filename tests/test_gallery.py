"""If these fail, a figure, a table or the report of a suite may show other numbers than the runs gave, or hide some."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import synthetic as make
from matplotlib.collections import LineCollection
from synthetic import rows_of
from test_claims import FACTS, LENGTHS, RATIOS

from analysis.__main__ import main
from analysis.claims import CLAIMS, judge_all
from analysis.claims_memory import ablations
from analysis.collect import write_table
from analysis.compare import against
from analysis.dossier import Dossier, read_dossiers
from analysis.errors import UserError
from analysis.fits import offsets
from analysis.gallery import FIGURES, draw, drawn_all
from analysis.report import page
from analysis.tables import points

RATES = {f"lr-{f:g}x": {"lr": 4e-4 * f} for f in (0.5, 1.0, 2.0)}


def lr_places() -> list[make.Place]:
    return [
        ("allocation", name, rho, 1.8 + 0.1 * np.log2(facts["lr"] / 4e-4) ** 2)
        for name, facts in RATES.items()
        for rho in (1.0, 0.8)
    ]


def everything(**fixed: Any) -> pd.DataFrame:
    """Every suite on one budget."""
    suites: dict[str, list[make.Place]] = {
        "allocation": make.allocation(),
        "sparsity": make.levels("sparsity", {5: 0.5, 10: 0.6, 20: 0.7}),
        "horizon": make.levels("horizon", {0.25: 0.78, 1.0: 0.78, 4.0: 0.78}),
        "infinite-memory": make.memory(),
        "layers": make.placements(),
        "ablation": make.parts(),
        "baselines": make.table_1(),
        "lr": lr_places(),
    }
    facts = FACTS | {"lr": RATES}
    tables = [rows_of(suite, places, facts=facts.get(suite), **fixed) for suite, places in suites.items()]
    spread = rows_of("noise", [("allocation", None, 0.8, 1.8)], seeds=range(8), sigma=0.01, **fixed)
    again = spread.iloc[[0]].assign(variant="replicate", replicate=1, run_id="rreplicate0")
    larger = rows_of("allocation", make.allocation(at=0.7), budget="c", flops_per_token=3.4e10)
    return pd.concat([*tables, spread, again, larger], ignore_index=True)


@pytest.fixture(scope="module")
def dossier() -> Dossier:
    [found] = read_dossiers(everything(), "b")
    return found


def heights(axes: Any) -> list[tuple[float, float]]:
    """Upright or level intervals that were drawn, as (low, high)."""
    bars = [c for c in axes.collections if isinstance(c, LineCollection)]
    ends = [segment for bar in bars for segment in bar.get_segments()]
    return [tuple(sorted(s[:, 1] if s[0, 0] == s[1, 0] else s[:, 0])) for s in ends]


def test_every_figure_is_drawn_from_its_suite(dossier: Dossier) -> None:
    drawn = dict(drawn_all(dossier))
    assert list(drawn) == list(FIGURES)
    assert not [name for name, figure in drawn.items() if isinstance(figure, str)]


def test_a_figure_without_runs_is_refused_by_name_and_left_out_of_the_rest() -> None:
    [only] = read_dossiers(rows_of("layers", make.placements()))
    assert [name for name, _ in drawn_all(only)] == ["layers"]
    with pytest.raises(UserError, match="b has no finished runs for the figure ablation"):
        draw(only, "ablation")
    with pytest.raises(UserError, match="no figure 'layer': choose one of allocation"):
        draw(only, "layer")


def test_the_ablation_figure_shows_every_interval_and_the_papers_numbers(dossier: Dossier) -> None:
    drawn = draw(dossier, "ablation")
    axes = drawn.figure.axes[0]
    family = ablations(dossier.suites["ablation"])
    expected = sorted((c.difference.low or 0, c.difference.high or 0) for c in family)
    np.testing.assert_allclose(sorted(heights(axes)), expected, rtol=1e-9)
    [paper] = [line for line in axes.lines if line.get_label() == "the paper"]
    assert sorted(paper.get_xdata()) == pytest.approx([0.00052, 0.0017, 0.00456, 0.00572, 0.00644], abs=1e-9)
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert set(names) == set(make.EFFECTS)
    assert [entry["variant"] for entry in drawn.numbers["against_reference"]] == names


def test_slots_and_layers_are_drawn_as_distances_from_no_memory_with_their_intervals(dossier: Dossier) -> None:
    for name in ("infinite-memory", "layers"):
        runs = dossier.suites[name]
        table, pure = runs.paired(), runs.pure
        assert table is not None
        assert pure is not None
        family = against(table, pure.name, [n for n in table.names if n != pure.name])
        drawn = heights(draw(dossier, name).figure.axes[0])
        for c in family:
            assert any(pytest.approx((c.difference.low, c.difference.high)) == bar for bar in drawn), c.name


def test_the_papers_panels_hold_the_papers_points(dossier: Dossier) -> None:
    lines = {line.get_label(): line for line in draw(dossier, "infinite-memory").figure.axes[1].lines}
    assert min(lines["Engram"].get_ydata()) == pytest.approx(1.74316 - 1.80817)
    lines = {line.get_label(): line for line in draw(dossier, "layers").figure.axes[1].lines}
    assert np.argmin(lines["one layer"].get_ydata()) == 1
    assert lines["layers 2 and 6"].get_ydata()[0] == pytest.approx(1.76782 - 1.80817)


def test_levels_are_drawn_with_simultaneous_intervals_and_optima(dossier: Dossier) -> None:
    for name, facts in (("sparsity", RATIOS), ("horizon", LENGTHS)):
        figure = draw(dossier, name).figure
        drawn = heights(figure.axes[0])
        for level in dossier.levels(name):
            for difference in offsets(level.study.sweep)[:-1]:
                assert any(pytest.approx((difference.low, difference.high)) == bar for bar in drawn)
        optima = draw(dossier, name).numbers["optima"]
        assert len(optima) == len(facts)
        assert all(place["low"] <= place["rho"] <= place["high"] for place in optima)


def test_noise_names_spread_and_replicate(dossier: Dossier) -> None:
    drawn = draw(dossier, "noise")
    losses = list(dossier.suites["noise"].points[0].losses.values())
    assert drawn.numbers["sd"]["value"] == pytest.approx(float(np.std(losses, ddof=1)))
    assert drawn.numbers["replicates"] == (0.0,)
    assert "the same loss to the last bit" in drawn.caption
    title = drawn.figure.axes[0].get_title(loc="left")
    assert f"8 seeds: mean {np.mean(losses):.4f}, standard deviation {np.std(losses, ddof=1):.4f} (" in title


def test_rates_and_costs_are_those_of_the_table(dossier: Dossier) -> None:
    assert draw(dossier, "lr").numbers["best"] == {"rho 1.00": 4e-4, "rho 0.80": 4e-4}
    tokens = {point["train_tokens"] for point in draw(dossier, "cost").numbers["points"]}
    assert tokens == {facts["train_tokens"] for facts in LENGTHS.values()}


def test_a_points_table_lists_every_seed_and_run(dossier: Dossier) -> None:
    runs = dossier.suites["layers"]
    text = points(runs, "careful")
    assert "careful" in text
    for point in runs.points:
        row = next(line for line in text.splitlines() if line.startswith(f"| {point.name} |"))
        assert all(f"{seed}: {loss:.4f}" in row for seed, loss in point.losses.items())
        assert all(run_id in row for run_id in point.run_ids.values())


def test_a_diverged_run_is_named_in_its_point() -> None:
    table = rows_of("layers", make.placements())
    lost = (table["variant"] == "layer-3") & (table["seed"] == 2)
    table.loc[lost, ["status", "valid_loss", "steps", "train_tokens"]] = ["diverged", None, 5, 1000]
    [found] = read_dossiers(table)
    [point] = found.suites["layers"].find(variant="layer-3")
    assert (sorted(point.losses), point.diverged) == ([0, 1], (2,))
    assert "2: diverged" in points(found.suites["layers"], "")


# The report


def test_the_report_holds_claims_figures_runs_and_provenance_and_needs_nothing_else(dossier: Dossier) -> None:
    html = page(dossier)
    for claim in CLAIMS:
        assert claim.text.replace("'", "&#x27;") in html
    assert html.count('src="data:image/png;base64,') == len(FIGURES)
    assert not re.search(r'(src|href)="(?!data:|#)', html), "nothing is fetched"
    assert not re.search(r"<(script|link|iframe)", html)
    for run_id in dossier.rows["run_id"]:
        assert run_id in html
    assert "0012e45" in html


def test_the_report_escapes_what_comes_from_the_table() -> None:
    table = rows_of("layers", make.placements(), commit="<script>alert(1)</script>", corpus="a&b<c")
    [found] = read_dossiers(table)
    html = page(found)
    assert "<script" not in html
    assert "a&amp;b&lt;c" in html


def test_one_minute_runs_are_labelled_wherever_they_show() -> None:
    [small] = read_dossiers(rows_of("baselines", make.table_1(), steps=32))
    assert page(small).count("No conclusion is drawn from them.") == 1
    assert "(one-minute runs)" in page(small)
    [found] = read_dossiers(everything(steps=32, P_act=48_000), "b")
    for name, drawn in drawn_all(found):
        assert not isinstance(drawn, str), name
        shown = drawn.figure._supxlabel.get_text() if drawn.figure._supxlabel else ""  # type: ignore[attr-defined]
        shown += "".join(legend.get_title().get_text() for legend in drawn.figure.legends)
        assert "One-minute runs" in shown, name


def browser() -> str | None:
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


@pytest.mark.slow
@pytest.mark.skipif(browser() is None and not os.environ.get("ENGRAM_REQUIRE_BROWSER"), reason="needs Chromium")
def test_a_real_browser_shows_the_report(dossier: Dossier, tmp_path: Path) -> None:
    """It renders without a network: every image has a size, and the page is as long as a page with figures is."""
    path = tmp_path / "report.html"
    probe = (
        "<script>document.title = JSON.stringify([...document.images].map(i => i.naturalWidth)"
        ".concat([document.body.scrollHeight, document.documentElement.scrollWidth]))</script></body>"
    )
    path.write_text(page(dossier).replace("</body>", probe))
    command = [str(browser()), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-quic", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,900", "--virtual-time-budget=3000"]
    done = subprocess.run(
        [*command, "--dump-dom", f"file://{path}"], capture_output=True, text=True, timeout=120, check=True
    )
    title = re.search(r"<title>(\[.*?\])</title>", done.stdout)
    assert title is not None
    *widths, height, width = json.loads(title.group(1))
    assert len(widths) == len(FIGURES)
    assert min(widths) > 500
    assert height > 5000
    assert width <= 1200


# The commands


def test_the_commands_write_what_they_name_and_the_same_bytes_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = pd.concat([rows_of("layers", make.placements()), rows_of("ablation", make.parts())])
    write_table(table, tmp_path / "t.csv")
    where = ["--table", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out")]
    written: dict[str, bytes] = {}
    for turn in range(2):
        for command in ("tables", "figures", "claims", "report"):
            assert main([command, *where]) == 0
        printed = capsys.readouterr().out
        now = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert all(str(tmp_path / "out" / name) in printed for name in now)
        if turn:
            assert now == written
        written = now
    endings = ("layers.png", "layers.pdf", "layers.json", "layers.md", "claims.md", "report.html")
    assert {f"b_{ending}" for ending in endings} <= set(written)
    [found] = read_dossiers(table)
    said = json.loads(written["b_claims.json"])["claims"]
    assert [claim["verdict"] for claim in said] == [finding.answer.verdict for finding in judge_all(found)]
