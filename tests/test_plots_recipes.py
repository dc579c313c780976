"""plots.recipes: what is drawn is what the frame holds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PathCollection, QuadMesh
from matplotlib.figure import Figure

from nvfp4lab import plots

GAINS = pd.DataFrame(
    {
        "recipe": ["b", "a", "c", "b", "a", "c"],
        "set": ["one"] * 3 + ["two"] * 3,
        "kind": ["first", "second", "first"] * 2,
        "gain_db": [-2.0, 0.5, 0.0, 1.0, -0.25, 8.0],
        "note": ["", "NaN", ""] * 2,
    }
)


def dots_of(ax) -> dict[str, np.ndarray]:
    """The points (x, y) of each series, by its label."""
    found = [c for c in ax.collections if isinstance(c, PathCollection)]
    return {str(c.get_label()): np.asarray(c.get_offsets()) for c in found}


def test_dots_are_the_numbers_of_the_frame_in_the_line_of_their_row():
    ax = plots.dots(GAINS, "gain_db", ax=Figure().subplots())
    names = [text.get_text() for text in ax.get_yticklabels()]
    assert names == ["b", "a", "c"] and ax.yaxis_inverted()  # the first on top
    for name, points in dots_of(ax).items():
        own = GAINS[GAINS["set"] == name]
        assert list(points[:, 0]) == list(own["gain_db"])
        assert [names[round(y)] for y in points[:, 1]] == list(own["recipe"])


def test_dots_of_a_group_stand_together_under_its_name():
    ax = plots.dots(GAINS, "gain_db", group="kind", ax=Figure().subplots())
    places = {text.get_text().strip(): text.get_position()[1] for text in ax.texts}
    ticks = dict(zip([t.get_text() for t in ax.get_yticklabels()], ax.get_yticks(), strict=True))
    inside = places["first"] < ticks["b"] < ticks["c"] < places["second"] < ticks["a"]
    assert inside, (places, ticks)


def test_dots_write_the_note_in_the_line_of_its_row():
    ax = plots.dots(GAINS, "gain_db", ax=Figure().subplots())
    (note,) = [text for text in ax.texts if text.get_text() == "NaN"]
    assert note.get_position()[1] == 1  # of row a


def test_dots_beyond_linear_to_are_on_a_logarithmic_axis_with_a_tick_each_power():
    ax = plots.dots(GAINS, "gain_db", linear_to=0.1, ax=Figure().subplots())
    assert ax.get_xscale() == "symlog"
    assert ax.get_xlabel() == "QSNR over that of nvfp4 (dB)"
    labels = [text.get_text() for text in ax.get_xticklabels()]
    assert labels == ["−1", "−0.1", "0", "+0.1", "+1", "+10"]
    low, high = ax.get_xlim()  # with margins that are as wide on both sides to the eye
    assert low < 1.1 * min(GAINS["gain_db"]) and high > 1.1 * max(GAINS["gain_db"])


def test_dots_that_are_all_zero_are_drawn_with_zero_on_the_axis():
    frame = GAINS.assign(gain_db=0.0)
    ax = plots.dots(frame, "gain_db", linear_to=1e-3, ax=Figure().subplots())
    assert 0.0 in ax.get_xticks()


def test_dots_of_unlike_hues_have_unlike_colours_and_markers():
    ax = plots.dots(GAINS, "gain_db", ax=Figure().subplots())
    first, second = (c for c in ax.collections if isinstance(c, PathCollection))
    assert not np.array_equal(first.get_facecolor(), second.get_facecolor())
    one, other = (np.asarray(c.get_paths()[0].vertices) for c in (first, second))
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_the_matrix_has_codes_above_the_diagonal_and_scales_below_whatever_the_order(order):
    rows = [(*order, 0.25, 0.125), ("a", "c", 0.5, 0.0), ("b", "c", 0.01, 0.02)]
    frame = pd.DataFrame(rows, columns=["a", "b", "codes", "scales"])
    ax = plots.pair_matrix(frame, ax=Figure().subplots())
    (mesh,) = [c for c in ax.collections if isinstance(c, QuadMesh)]
    names = [text.get_text() for text in ax.get_yticklabels()]
    drawn = np.ma.array(mesh.get_array()).filled(np.nan).reshape(3, 3)
    shares = pd.DataFrame(drawn, names, names)
    i, j = sorted(("a", "b"), key=names.index)
    assert (shares.loc[i, j], shares.loc[j, i]) == (0.25, 0.125)
    assert shares.loc["a", "c"] == 0.5 and np.isnan(shares.loc["c", "a"])


def test_the_matrix_writes_every_share_zero_included():
    frame = pd.DataFrame({"a": ["x"], "b": ["y"], "codes": [0.0312], "scales": [0.0]})
    ax = plots.pair_matrix(frame, ax=Figure().subplots())
    assert sorted(text.get_text() for text in ax.texts if text.get_text()) == ["0", "3.1"]


def test_codes_and_decibels_are_those_of_the_frame_and_small_differences_lie_on_the_floor():
    frame = pd.DataFrame(
        {"codes": [0.01, 0.2], "difference_db": [0.0, 0.5], "kind": ["same", "other"],
         "label": ["", "far"], "above": [False, True]}
    )  # fmt: skip
    ax = plots.codes_and_decibels(frame, floor=1e-4, ax=Figure().subplots())
    points = dots_of(ax)
    assert points["same"].tolist() == [[0.01, 1e-4]] and points["other"].tolist() == [[0.2, 0.5]]
    assert [text.get_text() for text in ax.texts] == ["far"]
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")


def test_scale_steps_has_a_bar_for_each_recipe_and_step_as_high_as_its_share():
    frame = pd.DataFrame(
        {"recipe": ["a", "a", "b", "b"], "step": [-1, 0, 0, 5], "share": [0.25, 0.75, 0.5, 0.5]}
    )
    ax = plots.scale_steps(frame, ax=Figure().subplots())
    drawn = [
        [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in bars]
        for bars in ax.containers
    ]
    assert [[(round(at), height) for at, height in bars] for bars in drawn] == [
        [(-1, 0.25), (0, 0.75)],
        [(0, 0.5), (5, 0.5)],
    ]
    legend = ax.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["-1", "0", "+5"]
