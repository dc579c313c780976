"""Scales: which bytes are written, of what amax, and what their range costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from nvfp4lab.formats import Format
from nvfp4lab.plots.common import (
    LABELS,
    MARKERS,
    NAN_RED,
    NEUTRAL,
    legend_beside,
    recipe_colors,
)

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


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
    _log2_axis(ax, frame["amax"].to_numpy())
    ticks = range(0, len(fmt.magnitudes), 1 << (fmt.mantissa_bits + 1))
    ax.set_yticks(ticks, [f"0x{t:02X} = {fmt.magnitudes[t]:.3g}" for t in ticks])
    ax.set(xlabel="amax of the block", ylabel=f"{LABELS['scale_code']} and its value")
    legend_beside(ax)
    return ax


def qsnr_over_sigma(
    frame: pd.DataFrame, ax: Axes | None = None, colors: Mapping[str, str] | None = None
) -> Axes:
    """QSNR over the sigma of the elements: theory as a line, what was measured as markers.

    frame: columns recipe, source ("theory" or "measured"), sigma, qsnr_db. colors: of each recipe,
    where pictures are to agree.
    """
    ax = ax or plt.gca()
    colors = recipe_colors(frame["recipe"]) if colors is None else colors
    for recipe, marker in zip(dict.fromkeys(frame["recipe"]), cycle(MARKERS)):
        rows, color = frame.query("recipe == @recipe").sort_values("sigma"), colors[recipe]
        theory, measured = (rows.query("source == @s") for s in ("theory", "measured"))
        line, points = ("-" if len(theory) else "none"), {"marker": marker, "ms": 5}
        ax.plot(theory["sigma"], theory["qsnr_db"], color=color)
        ax.plot(measured["sigma"], measured["qsnr_db"], color=color, ls="none", **points)
        ax.plot([], [], color=color, ls=line, label=recipe, **points)
    _log2_axis(ax, frame["sigma"].to_numpy())
    ax.set(xlabel="σ of the elements", ylabel=LABELS["qsnr_db"])
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
    frame = frame.query("amax_from > 0")
    colors = recipe_colors(frame["recipe"]) if colors is None else colors
    for recipe, marker in zip(dict.fromkeys(frame["recipe"]), cycle(MARKERS)):
        rows = frame.query("recipe == @recipe").sort_values("amax_from")
        middle, color = rows["amax_from"] * math.sqrt(2), colors[recipe]
        ax.plot(middle, rows["qsnr_db"], color=color, marker=marker, ms=5, label=recipe)
    _log2_axis(ax, _binade_edges(frame))
    ax.set(xlabel="amax of the block", ylabel=LABELS["qsnr_db"])
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
    _log2_axis(ax, _binade_edges(frame))
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    ax.set(xlabel="amax of the block", ylabel="share")
    legend_beside(ax)
    return ax


def _binade_edges(frame: pd.DataFrame) -> np.ndarray:
    low = frame["amax_from"].to_numpy()
    return np.concatenate([low, 2 * low])


def _log2_axis(ax: Axes, values: np.ndarray) -> None:
    """A log2 axis of x around the values, with ticks at every first, second or fourth power."""
    low, high = (math.log2(value) for value in (np.min(values), np.max(values)))
    margin = 0.02 * (high - low) or 0.5
    ax.set_xscale("log", base=2)
    ax.set_xlim(2 ** (low - margin), 2 ** (high + margin))
    step = 1 if high - low <= 12 else 2 if high - low <= 20 else 4
    ticks = [k for k in range(math.ceil(low), math.floor(high) + 1) if k % step == 0]
    ax.set_xticks([2.0**k for k in ticks], [f"2{str(k).translate(_SUPERSCRIPTS)}" for k in ticks])
    ax.minorticks_off()
