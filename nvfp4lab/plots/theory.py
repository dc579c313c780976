"""What was expected beside what was measured: curves with points on them, and how far apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import cycle

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from nvfp4lab.plots.common import (
    LABELS,
    MARKERS,
    NEUTRAL,
    in_octaves,
    legend_beside,
    recipe_colors,
    series,
)

LINES = ("-", "--", "-.", ":")


def curves(
    frame: pd.DataFrame,
    x: str,
    y: str = "qsnr_db",
    name: str = "recipe",
    points: pd.DataFrame | None = None,
    ax: Axes | None = None,
    colors: Mapping[str, str] | None = None,
) -> Axes:
    """y over x: a line a name, and points where those are given, a marker a name.

    frame: columns x, y and name, a row a place of a line; without points its places are marked.
    points: the same columns, and `<y>_error`, a standard error, where there is one. A name that is
    in both has one colour; colors: of each name, where pictures are to agree. x "sigma" and "block"
    are on a logarithmic axis; a block has its bits an element under it, those of 4-bit elements and
    8-bit scales.
    """
    ax = ax or plt.gca()
    marked = frame if points is None else points
    names = dict.fromkeys([*frame[name], *marked[name]])
    colors = recipe_colors(names) if colors is None else colors
    line_of = dict(zip(dict.fromkeys(frame[name]), cycle(LINES)))
    marker_of = dict(zip(dict.fromkeys(marked[name]), cycle(MARKERS)))
    for one in names:
        color = colors[one]
        rows, style = frame.loc[frame[name] == one].sort_values(by=[x]), line_of.get(one, "")
        if len(rows):
            every = None if points is None else []  # no markers but in the legend
            ax.plot(rows[x], rows[y], style, marker=marker_of.get(one, ""), markevery=every,
                    ms=5, color=color, label=one)  # fmt: skip
        if points is not None and one in marker_of:
            rows = points[points[name] == one]
            ax.errorbar(rows[x], rows[y], rows.get(f"{y}_error"), fmt=marker_of[one], ms=5,
                        color=color, label=None if one in line_of else one)  # fmt: skip
    _set_x(ax, x, [*frame[x], *marked[x]])
    ax.set_ylabel(LABELS.get(y, y))
    legend_beside(ax)
    return ax


def deviations(frame: pd.DataFrame, x: str, name: str = "recipe", ax: Axes | None = None) -> Axes:
    """z over x, a marker a name: how many standard errors a sample lies above what was expected.

    frame: columns x, z and name. Of chance alone 95 % lie in the band from -2 to 2.
    """
    ax = ax or plt.gca()
    ax.axhspan(-2, 2, color=NEUTRAL, alpha=0.12, lw=0)
    for one, rows, style in series(frame, name):
        ax.plot(rows[x], rows["z"], ls="none", ms=5, label=one, **style)
    reach = max(4.0, 1.1 * frame["z"].abs().max())
    ax.set(ylim=(-reach, reach), ylabel=LABELS["z"])
    _set_x(ax, x, frame[x])
    legend_beside(ax)
    return ax


def _set_x(ax: Axes, x: str, values: Iterable[float]) -> None:
    """The x axis: its label, and its ticks where it is logarithmic."""
    ax.set_xlabel(LABELS.get(x, x))
    if x == "sigma":
        in_octaves(ax, values)
    elif x == "block":
        blocks = sorted(set(values))
        ax.set_xscale("log", base=2)
        ax.set_xticks(blocks, [f"{block}\n{4 + 8 / block:.4g}" for block in blocks])
        ax.minorticks_off()
