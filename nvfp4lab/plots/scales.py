"""Scales: which bytes are written, of what amax, and what blocks of that amax lose."""

from __future__ import annotations

import math
from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from nvfp4lab.formats import Format
from nvfp4lab.plots.common import (
    LABELS,
    NAN_RED,
    NEUTRAL,
    in_octaves,
    in_percent,
    legend_beside,
    recipe_colors,
    series,
)


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


def scale_over_amax(
    frame: pd.DataFrame,
    fmt: Format,
    ax: Axes | None = None,
    colors: Mapping[str, str] | None = None,
) -> Axes:
    """Which scale byte a block's amax gets, a step line a recipe; a NaN byte is a cross.

    frame: columns recipe, amax (above 0, rising within a recipe), scale_code. The first recipe's
    line is the broadest, so that those that agree with it run inside. colors: of each recipe, where
    pictures are to agree. On a log axis of amax a right encoder is a straight staircase that bends
    where scales are subnormal.
    """
    ax = ax or plt.gca()
    names = list(dict.fromkeys(frame["recipe"]))
    colors = recipe_colors(names) if colors is None else colors
    for i, recipe in enumerate(names):
        rows = frame.query("recipe == @recipe")
        amax, code, color = rows["amax"].to_numpy(), rows["scale_code"].to_numpy(), colors[recipe]
        nan = code == fmt.nan_code
        width = 1.2 if i else 3.5
        steps = np.where(nan, np.nan, code)
        ax.plot(amax, steps, drawstyle="steps-post", color=color, lw=width, label=recipe)
        ax.plot(amax[nan], code[nan], "x", color=color, ms=4, mew=1)
    smallest_normal = fmt.magnitudes.index(fmt.smallest_normal)
    ax.axhspan(-0.5, smallest_normal - 0.5, color=NEUTRAL, alpha=0.12, lw=0)
    ax.axhspan(fmt.code_of_max + 0.5, fmt.code_of_max + 1.5, color=NAN_RED, alpha=0.25, lw=0)
    for position, text, color in (
        (smallest_normal / 2, "subnormal", NEUTRAL),
        (fmt.code_of_max + 1, "NaN", NAN_RED),
    ):
        ax.annotate(
            text,
            (0.62, position),
            xycoords=("axes fraction", "data"),
            ha="center",
            va="center",
            fontsize="small",
            color=color,
            bbox={"fc": "white", "ec": "none", "pad": 1} if text == "NaN" else None,
        )
    in_octaves(ax, frame["amax"].to_numpy())
    ticks = range(0, len(fmt.magnitudes), 1 << (fmt.mantissa_bits + 1))
    ax.set_yticks(ticks, [f"0x{t:02X} = {fmt.magnitudes[t]:.3g}" for t in ticks])
    ax.set(xlabel=LABELS["amax"], ylabel=f"{LABELS['scale_code']} and its value")
    legend_beside(ax)
    return ax


def qsnr_by_amax(
    frame: pd.DataFrame, ax: Axes | None = None, colors: Mapping[str, str] | None = None
) -> Axes:
    """QSNR of the blocks in each binade of amax, a line and a marker a recipe.

    frame: columns recipe, amax_from, qsnr_db, as `Statistics.by_amax` gives them; the row of blocks
    of zeros (amax_from 0) is not drawn. Markers stand in the middle of their binade. colors: of
    each recipe, where pictures are to agree.
    """
    ax = ax or plt.gca()
    frame = frame.query("amax_from > 0").sort_values("amax_from", kind="stable")
    for recipe, rows, style in series(frame, "recipe", colors):
        middle = rows["amax_from"] * math.sqrt(2)
        ax.plot(middle, rows["qsnr_db"], ms=5, label=recipe, **style)
    in_octaves(ax, _binade_edges(frame))
    ax.set(xlabel=LABELS["amax"], ylabel=LABELS["qsnr_db"])
    legend_beside(ax)
    return ax


def share_by_amax(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Shares by the binade of a block's amax, a bar a kind, side by side within the binade.

    frame: columns amax_from, kind, share (of blocks, of energy, ...; each kind's add up to 1); the
    row of blocks of zeros (amax_from 0) is not drawn.
    """
    ax = ax or plt.gca()
    frame = frame.query("amax_from > 0")
    kinds = list(dict.fromkeys(frame["kind"]))
    for i, kind in enumerate(kinds):
        rows = frame.query("kind == @kind")
        left, right = (rows["amax_from"] * 2 ** ((i + at) / len(kinds)) for at in (0.1, 0.9))
        grey = str(0.75 - 0.5 * i / max(1, len(kinds) - 1))
        ax.bar(left, rows["share"], right - left, align="edge", color=grey, label=kind)
    in_octaves(ax, _binade_edges(frame))
    in_percent(ax.yaxis)
    ax.set(xlabel=LABELS["amax"], ylabel="share")
    legend_beside(ax)
    return ax


def _binade_edges(frame: pd.DataFrame) -> np.ndarray:
    low = frame["amax_from"].to_numpy()
    return np.concatenate([low, 2 * low])
