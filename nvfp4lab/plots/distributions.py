"""How the error is spread: over blocks, tokens and channels, crest factors, sizes and codes."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from nvfp4lab.plots.common import LABELS, series


def qsnr_spread(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """QSNR of many parts of a tensor, a row a tensor from the top down: a bar from a low to a high
    quantile, a mark at the median, an upright stroke at the QSNR of the whole.

    frame: columns name, set (which gives the colour), low, median, high, whole, all in dB. Names
    are drawn as they are; a row for each, in the frame's order.
    """
    ax = ax or plt.gca()
    frame = frame.reset_index(drop=True)
    for name, rows, style in series(frame, "set"):
        at = rows.index
        ax.hlines(at, rows["low"], rows["high"], color=style["color"], lw=3, alpha=0.45)
        ax.plot(rows["median"], at, ls="none", ms=4.5, label=name, **style)
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
    for name, rows, style in series(frame, "name"):
        rows = rows.sort_values("crest")
        if name == frame["name"].iloc[0]:
            band = {"color": style["color"], "alpha": 0.15, "lw": 0}
            ax.fill_between(rows["crest"], rows["low"], rows["high"], **band)
        ax.plot(rows["crest"], rows["median"], ms=5, label=name, **style)
    ax.set(xlabel=LABELS["crest"], ylabel=LABELS["qsnr_db"])
    ax.legend(loc="best")
    return ax


def channels_by_size(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """QSNR of channels over their root mean square, a mark a channel, a colour and marker a group.

    frame: columns group, rms, qsnr_db. A channel without an error (Inf) is not drawn.
    """
    ax = ax or plt.gca()
    for group, rows, style in series(frame, "group"):
        faint = {"ls": "none", "ms": 4, "mew": 0, "alpha": 0.7}
        ax.plot(rows["rms"], rows["qsnr_db"], label=group, **faint, **style)
    ax.set_xscale("log")
    ax.set(xlabel="root mean square of the channel", ylabel=LABELS["qsnr_db"])
    return ax


def code_shares(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How often each magnitude of the element format occurs, a line and a marker a name.

    frame: columns name, magnitude, share. Magnitudes are evenly spaced, as codes are.
    """
    ax = ax or plt.gca()
    magnitudes = sorted(frame["magnitude"].unique())
    for name, rows, style in series(frame, "name"):
        at = [magnitudes.index(m) for m in rows["magnitude"]]
        ax.plot(at, rows["share"], ms=5, label=name, **style)
    ax.set_xticks(range(len(magnitudes)), [f"{m:g}" for m in magnitudes])
    ax.set_ylim(bottom=0)
    ax.set(xlabel="magnitude of the element, in scales", ylabel="share of elements")
    ax.legend(loc="best")
    return ax
