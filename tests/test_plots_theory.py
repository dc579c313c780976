"""plots.theory: what is drawn is what the frames hold."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nvfp4lab import plots


@pytest.fixture
def frame() -> pd.DataFrame:
    rows = [
        {"recipe": name, "sigma": sigma, "qsnr_db": 20.0 + i + sigma}
        for i, name in enumerate(("seed", "nvfp4"))
        for sigma in (4.0, 1.0, 0.25)
    ]
    return pd.DataFrame(rows)


def drawn(line) -> list[tuple[float, float]]:
    return list(zip(np.asarray(line.get_xdata()), np.asarray(line.get_ydata()), strict=True))


def test_a_curve_has_the_numbers_of_its_name_in_the_order_of_x(frame):
    ax = plots.curves(frame, "sigma", ax=Figure().subplots())
    assert drawn(ax.get_lines()[0]) == [(0.25, 20.25), (1.0, 21.0), (4.0, 24.0)]
    assert [line.get_color() for line in ax.get_lines()] == list(
        plots.recipe_colors(["seed", "nvfp4"]).values()
    )


def test_points_lie_on_the_axes_with_their_standard_errors_in_their_names_colour(frame):
    points = frame[frame["recipe"] == "nvfp4"].assign(qsnr_db_error=0.5)
    ax = plots.curves(frame, "sigma", points=points, ax=Figure().subplots())
    (bars,) = ax.containers
    line, _, (stems,) = bars
    assert drawn(line) == [(4.0, 25.0), (1.0, 22.0), (0.25, 21.25)]
    assert line.get_color() == plots.recipe_colors(["seed", "nvfp4"])["nvfp4"]
    assert np.ptp(stems.get_segments()[0][:, 1]) == 1.0


def test_points_without_a_standard_error_are_markers_alone_in_the_legend_too(frame):
    points = frame.replace({"recipe": {"seed": "nvfp4-search"}})
    ax = plots.curves(frame, "sigma", points=points, ax=Figure().subplots())
    handles, labels = ax.get_legend_handles_labels()
    line, *_ = handles[labels.index("nvfp4-search")]  # type: ignore[misc]
    assert (line.get_marker(), line.get_linestyle()) == ("o", "None")
    assert drawn(line) == [(4.0, 24.0), (1.0, 21.0), (0.25, 20.25)]


def test_colours_can_be_given_also_of_names_that_are_not_drawn(frame):
    colors = {"nvfp4": "#123456", "seed": "#654321", "other": "#000000"}
    ax = plots.curves(frame, "sigma", points=frame, ax=Figure().subplots(), colors=colors)
    assert {line.get_color() for line in ax.get_lines()} == {"#123456", "#654321"}
    assert len(ax.get_legend().get_texts()) == 2  # type: ignore[union-attr]


def test_a_curve_beside_points_has_no_markers_of_its_own(frame):
    ax = plots.curves(frame, "sigma", points=frame, ax=Figure().subplots())
    assert [line.get_markevery() for line in ax.get_lines()[::2]] == [[], []]


def test_the_legend_has_every_name_once(frame):
    points = frame.replace({"recipe": {"seed": "a site"}})
    ax = plots.curves(frame, "sigma", points=points, ax=Figure().subplots())
    texts = [text.get_text() for text in ax.get_legend().get_texts()]  # type: ignore[union-attr]
    assert sorted(texts) == ["a site", "nvfp4", "seed"]


def test_axes_are_named_and_sigma_goes_in_octaves(frame):
    ax = plots.curves(frame, "sigma", ax=Figure().subplots())
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("σ of the elements", "QSNR (dB)")
    assert ax.get_xscale() == "log"
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["2⁻²", "2⁻¹", "2⁰", "2¹", "2²"]


def test_a_block_has_its_bits_an_element_under_it():
    frame = pd.DataFrame({"recipe": "nvfp4", "block": [8, 16], "qsnr_db": [21.0, 20.0]})
    ax = plots.curves(frame, "block", ax=Figure().subplots())
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["8\n5", "16\n4.5"]


def test_deviations_are_drawn_in_standard_errors_and_none_is_cut_off():
    frame = pd.DataFrame({"recipe": ["nvfp4", "seed"], "sigma": [1.0, 2.0], "z": [-1.5, 6.0]})
    ax = plots.deviations(frame, "sigma", ax=Figure().subplots())
    assert [drawn(line) for line in ax.get_lines()] == [[(1.0, -1.5)], [(2.0, 6.0)]]
    assert ax.get_ylim()[1] > 6 > -1.5 > ax.get_ylim()[0]


def test_deviations_of_fewer_places_cut_nothing_off_the_curves_above_them(frame):
    top, bottom = Figure().subplots(2, 1, sharex=True)
    plots.curves(frame, "sigma", ax=top)
    few = pd.DataFrame({"recipe": "seed", "sigma": [0.5, 1.0], "z": [0.0, 1.0]})
    plots.deviations(few, "sigma", ax=bottom)
    low, high = top.get_xlim()
    assert low < 0.25 and high > 4.0
