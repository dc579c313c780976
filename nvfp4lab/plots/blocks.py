"""One block, element by element."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nvfp4lab.diagnose import Explanation
from nvfp4lab.plots.common import LABELS, NAN_RED, NEUTRAL, legend_beside, recipe_colors


def block(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """One block's elements, as they came in and as each recipe gives them back.

    frame: columns element, x, recipe, decoded; a NaN is marked on the zero line.
    """
    ax = ax or plt.gca()
    colors = recipe_colors(frame["recipe"])
    first = frame[frame["recipe"] == next(iter(colors))]
    ax.bar(first["element"], first["x"], color=NEUTRAL, alpha=0.25, width=0.9, label="x")
    for recipe, color in colors.items():
        rows = frame[frame["recipe"] == recipe]
        finite, lost = rows.query("decoded == decoded"), rows.query("decoded != decoded")
        if len(finite):
            ax.plot(finite["element"], finite["decoded"], "o", color=color, ms=5, label=recipe)
        if len(lost):
            label = f"{recipe}: NaN"
            ax.plot(lost["element"], 0 * lost["x"], "x", color=color, ms=7, mew=2, label=label)
    ax.set(xlabel=LABELS["element"], ylabel="value", xticks=range(len(first)))
    legend_beside(ax)
    return ax


def explained_block(explanation: Explanation, ax: Axes | None = None) -> Axes:
    """One block: each element's quotient, the value that it was rounded to, and the ties.

    explanation: what `explain_block` gives. The lines are the magnitudes of the element format
    that occur as neighbours, with both signs.
    """
    ax = ax or plt.gca()
    elements = explanation.elements
    neighbours = elements[["below", "above"]].to_numpy()
    steps = np.unique(neighbours[np.isfinite(neighbours)])
    for step in steps:
        for sign in (1, -1):
            ax.axhline(sign * step, color=NEUTRAL, alpha=0.2, lw=0.8, zorder=0)
    ax.vlines(elements.index, elements["quotient"], elements["value"], color=NEUTRAL, lw=1)
    ax.scatter(elements.index, elements["quotient"], marker="x", label="x / scale", zorder=3)
    ax.scatter(elements.index, elements["value"], marker="o", label="rounded", zorder=2)
    tied = elements[elements["tie"]]
    if len(tied):
        ax.scatter(tied.index, tied["quotient"], s=150, marker="s", facecolors="none",
                   edgecolors=NAN_RED, label="tie", zorder=4)  # fmt: skip
    scale = explanation.scale.iloc[0]
    ax.set_title(f"{explanation.recipe.name}, scale {scale['scale']:g}")
    ax.set_xlabel(LABELS["element"])
    ax.set_ylabel("in units of the scale")
    ax.legend(loc="best")
    return ax
