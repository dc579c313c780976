"""plots.scales: what is drawn is what the frame holds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nvfp4lab import plots
from nvfp4lab.formats import E4M3


def line_of(ax, label):
    return next(line for line in ax.get_lines() if line.get_label() == label)


def points_of(line):
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def by_amax(recipe, values=(1.0, 2.0, 3.0)):
    return pd.DataFrame({"recipe": recipe, "amax_from": [0.0, 0.25, 0.5], "qsnr_db": values})


@pytest.mark.parametrize(
    "draw",
    [
        lambda colors, ax: plots.qsnr_by_amax(by_amax("a"), ax, colors),
        lambda colors, ax: plots.scale_over_amax(
            pd.DataFrame({"recipe": "a", "amax": [1.0], "scale_code": [56]}), E4M3, ax, colors
        ),
    ],
    ids=["qsnr_by_amax", "scale_over_amax"],
)
def test_colours_can_be_given(draw):
    assert draw({"a": "#123456"}, Figure().subplots()).get_lines()[0].get_color() == "#123456"


def test_a_nan_byte_is_a_cross_and_a_gap_in_its_line():
    frame = pd.DataFrame(
        {"recipe": "seed", "amax": [1.0, 2.0, 4.0], "scale_code": [0x78, 0x7F, 0x01]}
    )
    ax = plots.scale_over_amax(frame, E4M3, Figure().subplots())
    steps, crosses = ax.get_lines()
    assert np.array_equal(points_of(steps)[1], [0x78, np.nan, 0x01], equal_nan=True)
    assert [list(values) for values in points_of(crosses)] == [[2.0], [0x7F]]
    assert {text.get_text() for text in ax.texts} == {"subnormal", "NaN"}


def test_the_first_staircase_is_the_broadest():
    frame = pd.concat(
        pd.DataFrame({"recipe": name, "amax": [1.0, 2.0], "scale_code": [1, 2]})
        for name in ("nvfp4", "seed")
    )
    ax = plots.scale_over_amax(frame, E4M3, Figure().subplots())
    assert line_of(ax, "nvfp4").get_linewidth() > line_of(ax, "seed").get_linewidth()


def test_a_binade_has_its_marker_in_its_middle_and_blocks_of_zeros_have_none():
    frame = pd.concat([by_amax("nvfp4"), by_amax("seed", (4.0, 5.0, 6.0))])
    ax = plots.qsnr_by_amax(frame, Figure().subplots())
    x, y = points_of(line_of(ax, "seed"))
    assert np.allclose(x, np.array([0.25, 0.5]) * 2**0.5)
    assert np.array_equal(y, [5.0, 6.0])


def test_shares_stand_side_by_side_within_their_binade():
    frame = pd.DataFrame(
        {
            "amax_from": [0.0, 0.5, 1.0] * 2,
            "kind": ["of blocks"] * 3 + ["of energy"] * 3,
            "share": [0.5, 0.25, 0.25, 0.0, 0.125, 0.875],
        }
    )
    ax = plots.share_by_amax(frame, Figure().subplots())
    blocks, energy = ax.containers
    assert [bar.get_height() for bar in [*blocks, *energy]] == [0.25, 0.25, 0.125, 0.875]
    for one, other, low in zip(blocks, energy, (0.5, 1.0), strict=True):
        assert low < one.get_x() < one.get_x() + one.get_width() <= other.get_x()
        assert other.get_x() + other.get_width() < 2 * low
