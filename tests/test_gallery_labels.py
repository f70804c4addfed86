"""If these fail, a figure may show the right numbers and be misread: a mark without a name, an axis without a unit."""

from __future__ import annotations

import numpy as np
import pytest
import synthetic as make
from synthetic import rows_of
from test_claims import RATIOS
from test_gallery import RATES, everything, lr_places

from analysis.canvas import Drawn
from analysis.dossier import Dossier, read_dossiers
from analysis.gallery import draw, drawn_all


@pytest.fixture(scope="module")
def dossier() -> Dossier:
    [found] = read_dossiers(everything(), "b")
    return found


def test_every_mark_of_the_best_rho_is_named_in_room_without_data(dossier: Dossier) -> None:
    for name in ("sparsity", "compute"):
        figure = draw(dossier, name).figure
        axes = figure.axes[1]
        legend = axes.get_legend()
        assert legend is not None
        said = [text.get_text() for text in legend.get_texts()]
        assert {"lowest mean loss", "95% bootstrap", "the paper: 0.75 to 0.80"} <= set(said)
        assert any(text.startswith("line through them: ") for text in said)
        figure.draw_without_rendering()
        bottom = axes.transData.inverted().transform(legend.get_window_extent())[0, 1]
        assert bottom > 1, "no rho is larger"
        assert not axes.texts


def test_a_minimum_on_the_edge_is_named_as_none() -> None:
    table = rows_of("sparsity", make.levels("sparsity", {5: 1.6, 10: 0.6}), facts=RATIOS)
    [found] = read_dossiers(table)
    legend = draw(found, "sparsity").figure.axes[1].get_legend()
    assert legend is not None
    assert "lowest on the grid's edge: no optimum" in [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("layers", ["1", "1 4"])
def test_slots_are_counted_as_the_paper_does_and_a_line_moves_with_its_points(layers: str) -> None:
    tables = 16
    facts = {name: {"n_slots": tables * fact["n_slots"]} for name, fact in make.SLOT_FACTS.items()}
    fixed = {"vocab_size": 129_280, "engram_layers": layers}
    [found] = read_dossiers(rows_of("infinite-memory", make.memory(), facts=facts, **fixed))
    ours, papers = draw(found, "infinite-memory").figure.axes
    assert ours.get_xlabel().startswith(papers.get_xlabel())
    assert ("as many in all" in ours.get_xlabel()) == (" " in layers)
    marks = [line for line in ours.lines if line.get_label() in ("Engram", "OverEncoding")]
    fits = [line for line in ours.lines if line.get_linestyle() == "--"]
    for mark, fit in zip(marks, fits, strict=True):
        x, along = np.sort(np.asarray(mark.get_xdata())), np.asarray(fit.get_xdata())
        assert x == pytest.approx(129_280 * np.array(make.SLOTS), rel=0.04)
        assert (along[0], along[-1]) == pytest.approx((x[0], x[-1]))
    legend = ours.get_legend()
    assert legend is not None
    assert "drawn 3% aside" in legend.get_title().get_text()


def test_a_panel_of_the_paper_says_how_much_less_it_spans(dossier: Dossier) -> None:
    for name in ("infinite-memory", "layers"):
        ours, papers = draw(dossier, name).figure.axes
        ratio = np.ptp(ours.get_ylim()) / np.ptp(papers.get_ylim())
        said = f"{ratio:.2g} times less" if ratio >= 1 else f"{1 / ratio:.2g} times more"
        assert f"spans {said} than (a)'s" in papers.get_title(loc="left")


def test_rows_are_those_of_all_tables_where_the_number_of_tables_is_unknown(dossier: Dossier) -> None:
    assert draw(dossier, "infinite-memory").figure.axes[0].get_xlabel() == "rows of all tables"


def test_axes_of_losses_name_their_unit(dossier: Dossier) -> None:
    for name, drawn in drawn_all(dossier):
        assert isinstance(drawn, Drawn)
        for axes in drawn.figure.axes:
            for label in (axes.get_xlabel(), axes.get_ylabel()):
                assert "loss" not in label or "(nats per token)" in label, name


def test_each_side_of_the_learning_rates_names_its_own_P_act() -> None:
    table = rows_of("lr", lr_places(), facts=RATES)
    [found] = read_dossiers(table.assign(P_act=np.where(table["rho"] == 1, 47_800, 49_600)))
    axes = draw(found, "lr").figure.axes[0]
    names = {str(line.get_label()) for line in axes.lines if not str(line.get_label()).startswith("_")}
    assert names == {"rho 1.00: P_act 47.8k", "rho 0.80: P_act 49.6k"}
    assert "P_act" not in axes.get_title(loc="left")
