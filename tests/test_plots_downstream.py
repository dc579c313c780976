"""plots.downstream: the bars and lines are the errors of the frame."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nvfp4lab import plots


def test_a_bar_an_operand_and_model_from_the_top():
    frame = pd.DataFrame(
        {
            "operand": ["inputs", "hidden"] * 2,
            "model": ["a", "a", "b", "b"],
            "nmse": [0.01, 0.02, 0.03, 0.04],
            "qsnr_db": [20.0, 17.0, 15.2, 14.0],
        }
    )
    ax = plots.error_by_operand(frame, Figure().subplots())
    bars = {
        group.get_label(): [bar.get_width() for bar in group.patches]  # type: ignore[attr-defined]
        for group in ax.containers
    }
    assert bars == {"a": [0.01, 0.02], "b": [0.03, 0.04]}
    assert [t.get_text() for t in ax.get_yticklabels()] == ["inputs", "hidden"]
    assert [t.get_text() for t in ax.texts] == ["20.0 dB", "17.0 dB", "15.2 dB", "14.0 dB"]
    bottom, top = ax.get_ylim()
    assert bottom > top  # the first operand is the topmost


def test_a_line_a_kind_over_the_stages():
    frame = pd.DataFrame(
        {
            "stage": ["inputs", "hidden", "inputs", "hidden"],
            "kind": ["captured", "captured", "gauss", "gauss"],
            "nmse": [0.1, 0.2, 0.3, 0.4],
        }
    )
    ax = plots.error_by_stage(frame, Figure().subplots())
    drawn = {line.get_label(): list(np.asarray(line.get_ydata())) for line in ax.get_lines()}
    assert drawn == {"captured": [0.1, 0.2], "gauss": [0.3, 0.4]}
    assert [t.get_text() for t in ax.get_xticklabels()] == ["inputs", "hidden"]
    assert len({str(line.get_marker()) for line in ax.get_lines()}) == 2
    assert ax.get_ylabel() == plots.LABELS["nmse"]


def test_more_kinds_than_colours_and_markers_are_drawn_all():
    rows = [{"stage": "output", "kind": str(i), "nmse": 0.1 + i} for i in range(12)]
    ax = plots.error_by_stage(pd.DataFrame(rows), Figure().subplots())
    assert [line.get_label() for line in ax.get_lines()] == [str(i) for i in range(12)]


def test_more_models_than_colours_have_a_bar_each():
    rows = [{"operand": "inputs", "model": str(i), "nmse": 0.1, "qsnr_db": 10} for i in range(12)]
    assert len(plots.error_by_operand(pd.DataFrame(rows), Figure().subplots()).containers) == 12
