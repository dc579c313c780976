"""Over the layers of a model: a line a recipe, a marker a site."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from nvfp4lab.plots.common import LABELS, in_percent, recipe_colors

TICKS = 14  # at most so many layers are named


def qsnr_by_layer(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """QSNR over the layers, a line a recipe, a marker a site.

    frame: columns layer, site, recipe, qsnr_db; one row for each combination.
    """
    return _over_layers(frame, "qsnr_db", "recipe", ax)


def share_by_layer(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The share of blocks that something happens to, on a log axis, a line a kind, a marker a site.

    frame: columns layer, site, kind, share; a share of zero is not drawn (there is no log of it).
    """
    ax = _over_layers(frame.assign(share=frame["share"].replace(0.0, np.nan)), "share", "kind", ax)
    ax.set_yscale("log")
    in_percent(ax.yaxis)
    return ax


def _over_layers(frame: pd.DataFrame, y: str, hue: str, ax: Axes | None) -> Axes:
    ax = ax or plt.gca()
    sns.lineplot(
        frame,
        x="layer",
        y=y,
        hue=hue,
        style="site",
        markers=True,
        dashes=False,
        palette=recipe_colors(frame[hue]),
        ax=ax,
    )
    layers = sorted(frame["layer"].unique())
    margin = 0.04 * (layers[-1] - layers[0]) or 0.5
    ax.set(xlabel=LABELS["layer"], ylabel=LABELS[y], xticks=layers[:: -(-len(layers) // TICKS)])
    ax.set_xlim(layers[0] - margin, layers[-1] + margin)  # also where nothing is drawn
    sns.move_legend(ax, "upper left", bbox_to_anchor=(1, 1), frameon=False)
    return ax
