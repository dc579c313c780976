"""Scale bytes: which are written, and what they cost."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from nvfp4lab.formats import Format
from nvfp4lab.plots.common import LABELS, NAN_RED, NEUTRAL, recipe_colors


def scale_histogram(frame: pd.DataFrame, fmt: Format, ax: Axes | None = None) -> Axes:
    """How often each scale byte is written, a step line a recipe, the byte's classes marked.

    frame: columns recipe, scale_code, share, as `errors.scale_histogram` gives them.
    """
    ax = ax or plt.gca()
    sns.lineplot(
        frame,
        x="scale_code",
        y="share",
        hue="recipe",
        drawstyle="steps-mid",
        palette=recipe_colors(frame["recipe"]),
        ax=ax,
    )
    smallest_normal = fmt.magnitudes.index(fmt.smallest_normal)
    ax.axvspan(-0.5, smallest_normal - 0.5, color=NEUTRAL, alpha=0.12, lw=0)
    ax.axvspan(fmt.code_of_max + 0.5, fmt.code_of_max + 1.5, color=NAN_RED, alpha=0.25, lw=0)
    for position, text, color in (
        (0, "subnormal", NEUTRAL),
        (fmt.code_of_max + 1, "NaN", NAN_RED),
    ):
        ax.annotate(
            text,
            (position, 0.98),
            xycoords=("data", "axes fraction"),
            rotation=90,
            ha="center",
            va="top",
            fontsize="small",
            color=color,
        )
    ticks = range(0, len(fmt.magnitudes), 1 << (fmt.mantissa_bits + 1))
    ax.set_xticks(ticks, [f"0x{t:02X}\n{fmt.magnitudes[t]:.3g}" for t in ticks])
    ax.set(xlabel=f"{LABELS['scale_code']} and its value", ylabel=LABELS["share"])
    return ax
