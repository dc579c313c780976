"""Rounding: how often ties occur, and the error over the quotient."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nvfp4lab.plots.common import (
    LABELS,
    NEUTRAL,
    in_percent,
    legend_beside,
    recipe_colors,
    series,
)


def tie_shares(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Ties among the quotients near a midpoint, over the scale's significand.

    frame: columns midpoint, significand, counted (drawn as a line) and measured (as markers), both
    shares; a row for each midpoint and significand.
    """
    ax = ax or plt.gca()
    frame = frame.sort_values(["midpoint", "significand"])
    for midpoint, rows, style in series(frame, "midpoint"):
        ax.plot(rows["significand"], rows["counted"], color=style["color"], lw=1.2)
        points = {"ls": "none", "ms": 5, "label": f"{midpoint:g}"} | style
        ax.plot(rows["significand"], rows["measured"], **points)
    significands = np.unique(frame["significand"])
    ax.set_xticks(significands, [f"{s:g}" for s in significands])
    ax.set_yscale("log")
    in_percent(ax.yaxis)
    ax.set(xlabel="significand of the scale", ylabel="ties, of the elements there")
    legend_beside(ax, "midpoint")
    return ax


def error_by_quotient(
    frame: pd.DataFrame, theory: pd.DataFrame, y: str = "mean_e", ax: Axes | None = None
) -> Axes:
    """The error over the quotient: a marker a bin and recipe, a line a theory.

    frame: columns recipe, quotient_from, quotient_to and y, as `Statistics.by_quotient` gives them
    (the open bin and empty ones are not drawn); the first recipe's markers are filled. theory:
    columns recipe, quotient and y; a theory that has the name of a measured recipe has its colour,
    any other is grey. y: "mean_e" or "mse".
    """
    ax = ax or plt.gca()
    colors = recipe_colors(frame["recipe"])
    for name, rows in theory.groupby("recipe", sort=False):
        ax.plot(rows["quotient"], rows[y], color=colors.get(str(name), NEUTRAL), lw=1, zorder=1)
    for name, rows, style in series(frame, "recipe"):
        rows = rows[np.isfinite(rows["quotient_to"])].dropna()
        middle = (rows["quotient_from"] + rows["quotient_to"]) / 2
        first = name == frame["recipe"].iloc[0]
        look = {"ms": 4} if first else {"ms": 5, "mfc": "none"}
        ax.plot(middle, rows[y], ls="none", mew=0.8, label=name, **look, **style)
    ax.set(xlabel=LABELS["quotient"], ylabel=LABELS[y], xlim=(0, 7))
    legend_beside(ax)
    return ax
