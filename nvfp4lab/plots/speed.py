"""How fast, against the copy that bounds it."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from nvfp4lab.plots.common import LABELS, NEUTRAL, legend_beside, series


def speed_over_tokens(frame: pd.DataFrame, y: str = "GB/s", ax: Axes | None = None) -> Axes:
    """A benchmark over the number of tokens, a line and a marker a name, the yardstick dashed.

    frame: columns name, role, tokens and y, which is "GB/s" or "of_yardstick", as
    `benchmarks.Result.frame` gives them for one part and width.
    """
    ax = ax or plt.gca()
    frame = frame.sort_values("tokens", kind="stable")
    limit, rest = frame.query("role == 'yardstick'"), frame.query("role != 'yardstick'")
    ax.plot(limit["tokens"], limit[y], "--", color=NEUTRAL, lw=1.5, label="yardstick")
    for name, rows, style in series(rest, "name"):
        ax.plot(rows["tokens"], rows[y], ms=5, label=name, **style)
    tokens = sorted(frame["tokens"].unique())
    ax.set_xscale("log", base=2)
    ax.set_xticks(tokens, [str(t) for t in tokens])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set(xlabel=LABELS["tokens"], ylabel=LABELS[y])
    legend_beside(ax)
    return ax
