"""How the error is spread: over blocks, tokens and channels, crest factors, sizes and codes."""

from __future__ import annotations

from itertools import cycle

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from nvfp4lab.plots.common import LABELS, MARKERS, recipe_colors


def qsnr_spread(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """QSNR of many parts of a tensor, a row a tensor from the top down: a bar from a low to a high
    quantile, a mark at the median, an upright stroke at the QSNR of the whole.

    frame: columns name, set (which gives the colour), low, median, high, whole, all in dB. Names
    are drawn as they are; a row for each, in the frame's order.
    """
    ax = ax or plt.gca()
    colors = recipe_colors(frame["set"])
    for (name, color), marker in zip(colors.items(), cycle(MARKERS)):
        at = (frame["set"] == name).to_numpy().nonzero()[0]
        rows = frame.iloc[at]
        ax.hlines(at, rows["low"], rows["high"], color=color, lw=3, alpha=0.45)
        ax.plot(rows["median"], at, marker, color=color, ms=4.5, label=name)
        ax.plot(rows["whole"], at, "|", color="black", ms=11, mew=1.6, zorder=3)
    ax.get_lines()[-1].set_label("the whole tensor")
    ax.set_yticks(range(len(frame)), list(frame["name"]))
    ax.set_ylim(len(frame) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(LABELS["qsnr_db"])
    return ax


def qsnr_by_crest(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """QSNR of blocks over their crest factor, a line and a marker a name: the median, and of the
    first name the range from low to high as a band.

    frame: columns name, crest (amax / rms), low, median, high, the last three in dB.
    """
    ax = ax or plt.gca()
    colors, frame = recipe_colors(frame["name"]), frame.sort_values("crest")
    for (name, color), marker in zip(colors.items(), cycle(MARKERS)):
        rows = frame[frame["name"] == name]
        if name == next(iter(colors)):
            ax.fill_between(rows["crest"], rows["low"], rows["high"], color=color, alpha=0.15, lw=0)
        ax.plot(rows["crest"], rows["median"], color=color, marker=marker, ms=5, label=name)
    ax.set(xlabel="crest factor of the block, amax / rms", ylabel=LABELS["qsnr_db"])
    ax.legend(loc="best")
    return ax


def channels_by_size(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """QSNR of channels over their root mean square, a mark a channel, a colour and marker a group.

    frame: columns group, rms, qsnr_db. A channel without an error (Inf) is not drawn.
    """
    ax = ax or plt.gca()
    for (group, color), marker in zip(recipe_colors(frame["group"]).items(), cycle(MARKERS)):
        rows = frame[frame["group"] == group]
        ax.plot(
            rows["rms"], rows["qsnr_db"], marker, color=color, ms=4, mew=0, alpha=0.7, label=group
        )
    ax.set_xscale("log")
    ax.set(xlabel="root mean square of the channel", ylabel=LABELS["qsnr_db"])
    return ax


def code_shares(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How often each magnitude of the element format occurs, a line and a marker a name.

    frame: columns name, magnitude, share. Magnitudes are evenly spaced, as codes are.
    """
    ax = ax or plt.gca()
    magnitudes = sorted(frame["magnitude"].unique())
    for (name, color), marker in zip(recipe_colors(frame["name"]).items(), cycle(MARKERS)):
        rows = frame[frame["name"] == name]
        at = [magnitudes.index(m) for m in rows["magnitude"]]
        ax.plot(at, rows["share"], color=color, marker=marker, ms=5, label=name)
    ax.set_xticks(range(len(magnitudes)), [f"{m:g}" for m in magnitudes])
    ax.set_ylim(bottom=0)
    ax.set(xlabel="magnitude of the element, in scales", ylabel="share of elements")
    ax.legend(loc="best")
    return ax
