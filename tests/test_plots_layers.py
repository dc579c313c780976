"""plots.layers, plots.scales, plots.blocks, plots.common: what is drawn is what the frame holds."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from nvfp4lab import plots
from nvfp4lab.formats import E4M3


def test_a_recipe_keeps_its_colour_and_ten_are_apart():
    alone, among = (plots.recipe_colors(n)["seed"] for n in (["seed"], ["mlx", "a", "seed"]))
    assert alone == among
    assert len(set(plots.recipe_colors(map(str, range(10))).values())) == 10
    assert len(plots.recipe_colors(map(str, range(30)))) == 30


def test_a_legend_moves_below_with_all_that_it_names():
    ax = Figure().subplots()
    ax.plot([0, 1], label="a")
    ax.plot([1, 0], label="b")
    plots.legend_below(ax)  # none is there yet
    assert ax.get_legend() is None
    ax.legend()
    plots.legend_below(ax)
    legend = ax.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    anchor = ax.transAxes.inverted().transform(legend.get_bbox_to_anchor().p0)
    assert anchor[1] < 0


@pytest.mark.parametrize(
    ("draw", "y", "hue"),
    [(plots.qsnr_by_layer, "qsnr_db", "recipe"), (plots.share_by_layer, "share", "kind")],
)
def test_a_line_over_the_layers_has_the_numbers_of_the_frame(draw, y, hue):
    rows = [
        {"layer": layer, "site": "mlp_input", hue: name, y: 0.125 * (1 + layer + i)}
        for layer in (0, 5, 9)
        for i, name in enumerate(("nvfp4", "seed"))
    ]
    frame = pd.DataFrame(rows)
    ax = draw(frame, Figure().subplots())
    lines = [line for line in ax.get_lines() if len(np.asarray(line.get_xdata())) == 3]
    for name, line in zip(("nvfp4", "seed"), lines, strict=True):
        assert line.get_color() == plots.recipe_colors(["nvfp4", "seed"])[name]
        own = frame[frame[hue] == name]
        assert np.array_equal(np.asarray(line.get_xdata()), own["layer"])
        assert np.array_equal(np.asarray(line.get_ydata()), own[y])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("layer", plots.LABELS[y])


def test_a_share_of_zero_is_not_drawn():
    frame = pd.DataFrame({"layer": [0, 1], "site": "a", "kind": "NaN", "share": [0.5, 0.0]})
    ax = plots.share_by_layer(frame, Figure().subplots())
    assert list(np.asarray(ax.get_lines()[0].get_ydata())) == [0.5]
    assert ax.get_yscale() == "log"


def test_the_scale_histogram_has_a_step_line_a_recipe_over_all_bytes():
    shares = np.linspace(0, 1, 128)
    frame = pd.DataFrame({"recipe": "seed", "scale_code": range(128), "share": shares})
    ax = plots.scale_histogram(frame, E4M3, Figure().subplots())
    line = ax.get_lines()[0]
    assert np.array_equal(np.asarray(line.get_xdata()), range(128))
    assert np.array_equal(np.asarray(line.get_ydata()), shares)
    assert {text.get_text() for text in ax.texts} == {"subnormal", "NaN"}


def test_a_block_shows_what_came_in_what_came_back_and_what_was_lost():
    frame = pd.DataFrame(
        {"element": [0, 1], "x": [1.0, -2.0], "recipe": "seed", "decoded": [1.5, np.nan]}
    )
    ax = plots.block(frame, Figure().subplots())
    assert [bar.get_height() for bar in ax.patches] == [1.0, -2.0]  # type: ignore[union-attr]
    kept, lost = ax.get_lines()
    assert list(np.asarray(kept.get_ydata())) == [1.5]
    assert (list(np.asarray(lost.get_xdata())), lost.get_label()) == ([1], "seed: NaN")
