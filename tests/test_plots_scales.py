"""plots.scales: what is drawn is what the frame holds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nvfp4lab import plots
from nvfp4lab.formats import E4M3

SIGMAS = np.array([2.0**-3, 2.0**-2, 2.0**-1])


def line_of(ax, label):
    return next(line for line in ax.get_lines() if line.get_label() == label)


def points_of(line):
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def over_sigma(recipe, *sources):
    rows = [
        {"recipe": recipe, "source": source, "sigma": s, "qsnr_db": 10.0 * i + j}
        for i, source in enumerate(sources)
        for j, s in enumerate(SIGMAS)
    ]
    return pd.DataFrame(rows)


def by_amax(recipe, values=(1.0, 2.0, 3.0)):
    return pd.DataFrame({"recipe": recipe, "amax_from": [0.0, 0.25, 0.5], "qsnr_db": values})


def test_theory_is_a_line_without_markers_and_the_sample_markers_without_a_line():
    frame = over_sigma("seed", "theory", "measured")
    theory, measured, _ = plots.qsnr_over_sigma(frame, Figure().subplots()).get_lines()
    assert [(t.get_marker(), t.get_linestyle()) for t in (theory, measured)] == [
        ("None", "-"),
        ("o", "None"),
    ]
    for i, line in enumerate((theory, measured)):
        x, y = points_of(line)
        assert np.array_equal(x, SIGMAS) and np.array_equal(y, 10 * i + np.arange(3))


def test_what_has_no_theory_is_markers_alone_in_the_legend_too():
    ax = plots.qsnr_over_sigma(over_sigma("nvfp4-search", "measured"), Figure().subplots())
    assert line_of(ax, "nvfp4-search").get_linestyle() == "None"


def test_the_legend_of_sigma_has_each_recipe_once():
    frame = pd.concat(over_sigma(name, "theory", "measured") for name in ("nvfp4", "seed"))
    legend = plots.qsnr_over_sigma(frame, Figure().subplots()).get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["nvfp4", "seed"]


def test_sigma_has_ticks_at_powers_of_two_that_read_as_such():
    ax = plots.qsnr_over_sigma(over_sigma("seed", "theory"), Figure().subplots())
    assert [text.get_text() for text in ax.get_xticklabels()] == ["2⁻³", "2⁻²", "2⁻¹"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("σ of the elements", "QSNR (dB)")


@pytest.mark.parametrize(
    "draw",
    [
        lambda colors, ax: plots.qsnr_over_sigma(over_sigma("a", "theory"), ax, colors),
        lambda colors, ax: plots.qsnr_by_amax(by_amax("a"), ax, colors),
        lambda colors, ax: plots.scale_over_amax(
            pd.DataFrame({"recipe": "a", "amax": [1.0], "scale_code": [56]}), E4M3, ax, colors
        ),
    ],
    ids=["qsnr_over_sigma", "qsnr_by_amax", "scale_over_amax"],
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
