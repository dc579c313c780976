"""plots.distributions: what is drawn is what the frame holds."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from nvfp4lab import plots


def of(line) -> tuple[list, list]:
    return list(np.asarray(line.get_xdata())), list(np.asarray(line.get_ydata()))


SPREAD = pd.DataFrame(
    {
        "name": ["a", "b", "c"],
        "set": ["one", "two", "one"],
        "low": [17.0, 18.0, 19.0],
        "median": [20.0, 21.0, 22.0],
        "high": [23.0, 24.0, 25.0],
        "whole": [20.5, 24.5, 22.5],
    }
)


def test_a_spread_has_a_row_a_name_from_the_top_down():
    ax = plots.qsnr_spread(SPREAD, Figure().subplots())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["a", "b", "c"]
    bottom, top = ax.get_ylim()
    assert top < 0 and bottom > 2
    assert ax.get_xlabel() == "QSNR (dB)"


def test_a_spread_shows_quantiles_median_and_whole_of_its_own_row():
    ax = plots.qsnr_spread(SPREAD, Figure().subplots())
    bars = [b for b in ax.collections if isinstance(b, LineCollection)]
    segments = [[s.tolist() for s in b.get_segments()] for b in bars]
    assert segments == [[[[17, 0], [23, 0]], [[19, 2], [25, 2]]], [[[18, 1], [24, 1]]]]
    assert [of(line) for line in ax.get_lines()] == [
        ([20, 22], [0, 2]),
        ([20.5, 22.5], [0, 2]),
        ([21], [1]),
        ([24.5], [1]),
    ]


def test_a_set_of_a_spread_has_its_colour_and_marker():
    medians = plots.qsnr_spread(SPREAD, Figure().subplots()).get_lines()[::2]
    colors = plots.recipe_colors(["one", "two"])
    assert {line.get_label(): line.get_color() for line in medians} == colors
    assert len({str(line.get_marker()) for line in medians}) == 2


def test_a_spread_names_the_whole_once():
    ax = plots.qsnr_spread(SPREAD, Figure().subplots())
    names = [text for text in ax.get_legend_handles_labels()[1] if text != "the whole tensor"]
    assert len(ax.get_legend_handles_labels()[1]) == len(names) + 1 == 3


def test_crest_factors_are_drawn_in_order_and_the_first_name_has_the_band():
    frame = pd.DataFrame(
        {
            "name": ["a", "a", "b", "b"],
            "crest": [3.0, 2.0, 2.0, 3.0],
            "low": [18.0, 17.0, 1.0, 1.0],
            "median": [21.0, 20.0, 19.0, 22.0],
            "high": [24.0, 23.0, 50.0, 50.0],
        }
    )
    ax = plots.qsnr_by_crest(frame, Figure().subplots())
    assert [of(line) for line in ax.get_lines()] == [([2, 3], [20, 21]), ([2, 3], [19, 22])]
    (band,) = ax.collections
    corners = band.get_paths()[0].vertices  # type: ignore[union-attr]
    assert (np.min(corners, axis=0)[1], np.max(corners, axis=0)[1]) == (17, 24)


def test_every_channel_of_a_group_is_a_mark():
    frame = pd.DataFrame(
        {"group": ["out", "near", "near"], "rms": [8.0, 1.0, 2.0], "qsnr_db": [30.0, 9.0, 12.0]}
    )
    ax = plots.channels_by_size(frame, Figure().subplots())
    assert {line.get_label(): of(line) for line in ax.get_lines()} == {
        "out": ([8], [30]),
        "near": ([1, 2], [9, 12]),
    }
    assert ax.get_xscale() == "log"


def test_code_shares_are_evenly_spaced_by_magnitude():
    frame = pd.DataFrame(
        {"name": ["a"] * 3 + ["b"] * 3, "magnitude": [0, 0.5, 6] * 2, "share": [0.2, 0.3, 0.5] * 2}
    )
    ax = plots.code_shares(frame, Figure().subplots())
    assert [of(line) for line in ax.get_lines()] == [([0, 1, 2], [0.2, 0.3, 0.5])] * 2
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "0.5", "6"]
