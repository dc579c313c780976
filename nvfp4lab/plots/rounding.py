"""Rounding: what a decision changes, how often ties occur, the error over the quotient."""

from __future__ import annotations

import math
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from nvfp4lab.plots.common import MARKERS, NEUTRAL, legend_beside, recipe_colors

QUOTIENT = "|x| / scale"
OF_ERROR = {"mean_e": "mean error / scale", "mse": "mean squared error / scale²"}


def change_by_variant(
    frame: pd.DataFrame, x: str, label: str, linear_to: float, ax: Axes | None = None
) -> Axes:
    """What each variant changes: a row a variant, a dot a site, a colour and marker a set.

    frame: columns variant, set and x, the change; variants from the top in their order. label: of
    the axis. The axis is linear from -linear_to to linear_to and logarithmic beyond.
    """
    ax = ax or plt.gca()
    variants = list(dict.fromkeys(frame["variant"]))
    colors = recipe_colors(frame["set"])
    ax.axvline(0, color=NEUTRAL, lw=1, zorder=1)
    for i, ((name, color), marker) in enumerate(zip(colors.items(), cycle(MARKERS))):
        rows = frame[frame["set"] == name]
        beside = 0.4 * ((i + 0.5) / len(colors) - 0.5)
        height = [variants.index(variant) + beside for variant in rows["variant"]]
        ax.plot(rows[x], height, marker, color=color, ms=5, alpha=0.6, mew=0, label=name)
    ax.set_xscale("symlog", linthresh=linear_to)
    largest = max(linear_to, float(np.abs(frame[x].to_numpy()).max()))
    powers = [linear_to * 10**k for k in range(math.ceil(math.log10(largest / linear_to)) + 1)]
    low, high = ax.get_xlim()
    ax.set_xticks([t for t in (*(-p for p in powers), 0.0, *powers) if low <= t <= high])
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}".replace("-", "−"))
    ax.tick_params(axis="x", labelsize="small")
    ax.set_xlim(low, high)
    ax.set_yticks(range(len(variants)), variants)
    ax.set_ylim(len(variants) - 0.5, -0.5)
    ax.set_xlabel(label)
    return ax


def tie_shares(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Ties among the quotients near a midpoint, over the scale's significand.

    frame: columns midpoint, significand, counted (drawn as a line) and measured (as markers), both
    shares; a row for each midpoint and significand.
    """
    ax = ax or plt.gca()
    frame = frame.sort_values("significand", kind="stable")
    colors = recipe_colors(f"{m:g}" for m in sorted(frame["midpoint"]))
    for (name, color), marker in zip(colors.items(), cycle(MARKERS)):
        rows = frame[frame["midpoint"] == float(name)]
        ax.plot(rows["significand"], rows["counted"], color=color, lw=1.2)
        ax.plot(rows["significand"], rows["measured"], marker, color=color, ms=5, label=name)
    significands = np.unique(frame["significand"])
    ax.set_xticks(significands, [f"{s:g}" for s in significands])
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    ax.set(xlabel="significand of the scale", ylabel="ties, of the elements there")
    ax.legend(title="midpoint", loc="upper left", bbox_to_anchor=(1, 1))
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
    names = list(dict.fromkeys(frame["recipe"]))
    colors = recipe_colors(names)
    for name, rows in theory.groupby("recipe", sort=False):
        ax.plot(rows["quotient"], rows[y], color=colors.get(str(name), NEUTRAL), lw=1, zorder=1)
    for (name, color), marker in zip(colors.items(), cycle(MARKERS)):
        rows = frame[(frame["recipe"] == name) & np.isfinite(frame["quotient_to"])].dropna()
        middle = (rows["quotient_from"] + rows["quotient_to"]) / 2
        filled = name == names[0]
        (dots,) = ax.plot(middle, rows[y], marker, color=color, mew=0.8, label=name)
        dots.set(markersize=4 if filled else 5, markerfacecolor=color if filled else "none")
    ax.set(xlabel=QUOTIENT, ylabel=OF_ERROR[y], xlim=(0, 7))
    legend_beside(ax)
    return ax
