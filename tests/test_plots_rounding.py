"""plots.rounding: what is drawn is what the frame holds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nvfp4lab import plots

BINS = pd.DataFrame(
    {
        "recipe": ["nvfp4"] * 3 + ["seed"] * 3,
        "quotient_from": [0.0, 1.0, 7.0] * 2,
        "quotient_to": [1.0, 2.0, np.inf] * 2,
        "mean_e": [0.25, np.nan, 9.0, -0.25, 0.125, 9.0],
        "mse": [0.5, np.nan, 9.0, 0.75, 1.0, 9.0],
    }
)
THEORY = pd.DataFrame(
    {
        "recipe": ["nvfp4", "nvfp4", "other", "other"],
        "quotient": [0.0, 1.0] * 2,
        "mean_e": [0.0, 0.5, 0.0, -0.5],
        "mse": [0.0, 0.25, 0.0, 0.25],
    }
)


def drawn(line):
    return list(np.asarray(line.get_xdata())), list(np.asarray(line.get_ydata()))


def test_ties_are_a_line_counted_and_markers_measured_for_each_midpoint():
    frame = pd.DataFrame(
        {
            "midpoint": [0.25, 5.0, 0.25, 5.0],
            "significand": [1.5, 1.5, 1.0, 1.0],
            "counted": [0.01, 0.2, 0.02, 0.25],
            "measured": [0.011, 0.21, 0.021, 0.26],
        }
    )
    lines = plots.tie_shares(frame, Figure().subplots()).get_lines()
    assert [drawn(line) for line in lines] == [
        ([1.0, 1.5], [0.02, 0.01]),
        ([1.0, 1.5], [0.021, 0.011]),
        ([1.0, 1.5], [0.25, 0.2]),
        ([1.0, 1.5], [0.26, 0.21]),
    ]
    assert [line.get_label() for line in lines[1::2]] == ["0.25", "5"]


@pytest.mark.parametrize("y", ["mean_e", "mse"])
def test_the_error_is_a_marker_at_the_middle_of_each_closed_bin_that_holds_elements(y):
    ax = plots.error_by_quotient(BINS, THEORY, y, Figure().subplots())
    *_, first, second = ax.get_lines()
    assert drawn(first) == ([0.5], [BINS[y][0]])
    assert drawn(second) == ([0.5, 1.5], [BINS[y][3], BINS[y][4]])


@pytest.mark.parametrize("y", ["mean_e", "mse"])
def test_a_theory_has_its_recipes_colour_and_others_are_grey(y):
    ax = plots.error_by_quotient(BINS, THEORY, y, Figure().subplots())
    own, other = ax.get_lines()[:2]
    assert drawn(own) == ([0.0, 1.0], list(THEORY[y][:2]))
    assert (own.get_color(), other.get_color()) == (plots.recipe_colors(["nvfp4"])["nvfp4"], "0.35")
