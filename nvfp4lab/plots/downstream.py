"""Behind the experts: what becomes of the error of staging."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nvfp4lab.plots.common import LABELS, recipe_colors, series


def error_by_operand(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The output's error by what is quantized: a group of bars an operand, a colour a model.

    frame: columns operand, model, nmse, qsnr_db; one row for each combination, drawn from the top
    in their order. The bars are NMSE, in which independent errors add; the numbers at them are dB.
    """
    ax = ax or plt.gca()
    operands, models = list(frame["operand"].unique()), list(frame["model"].unique())
    height = 0.8 / len(models)
    for i, (model, color) in enumerate(recipe_colors(models).items()):
        own = frame[frame["model"] == model].set_index("operand").loc[operands]
        place = np.arange(len(operands)) + (i - (len(models) - 1) / 2) * height
        bars = ax.barh(place, own["nmse"], height=0.9 * height, color=color, label=model)
        ax.bar_label(bars, [f"{db:.1f} dB" for db in own["qsnr_db"]], padding=3, fontsize="small")
    ax.set_yticks(range(len(operands)), operands)
    ax.invert_yaxis()
    ax.grid(False, axis="y")
    ax.set_xlim(right=1.15 * max(frame["nmse"]))
    ax.set_xlabel("NMSE of the experts' output")
    ax.legend(loc="upper right")
    return ax


def error_by_stage(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How the error changes on its way through the experts, a line and a marker a kind.

    frame: columns stage, kind, nmse; stages from left to right in the order of the frame.
    """
    ax = ax or plt.gca()
    stages = list(frame["stage"].unique())
    for kind, own, style in series(frame, "kind"):
        place = [stages.index(stage) for stage in own["stage"]]
        ax.plot(place, own["nmse"], label=kind, **style)
    ax.set_xticks(range(len(stages)), stages)
    ax.set_ylim(bottom=0)
    ax.set_ylabel(LABELS["nmse"])
    ax.legend(loc="best")
    return ax
