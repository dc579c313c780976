"""Many recipes side by side: what each does to the error, and in which bytes two of them differ."""

from __future__ import annotations

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm

from nvfp4lab.plots.common import (
    LABELS,
    NAN_RED,
    NEUTRAL,
    in_percent,
    legend_above,
    recipe_colors,
    series,
)


def dots(
    frame: pd.DataFrame,
    x: str,
    row: str = "recipe",
    hue: str = "set",
    group: str | None = None,
    linear_to: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A line of dots for each `row`, the first on top, a colour and a marker for each `hue`.

    frame: columns row, hue and x; of a group, if it is given, rows stand together under its name.
    A column `note` is written, in red, at the end of its row where it is not empty.
    linear_to: the axis is logarithmic on both sides beyond that magnitude (symlog).
    """
    ax = ax or plt.gca()
    places, headings = _places(frame, row, group)
    hues = len(set(frame[hue]))
    for i, (name, own, style) in enumerate(series(frame, hue)):
        offset = 0.36 * ((i + 0.5) / hues - 0.5)  # so that hues do not hide one another
        heights = [places[line] + offset for line in own[row]]
        ax.scatter(own[x], heights, s=22, alpha=0.75, lw=0, label=name, zorder=3, **style)
    ax.set_yticks(list(places.values()), list(places))
    ax.set_ylim(max(places.values()) + 0.7, min([*places.values(), *headings.values()]) - 0.7)
    ax.tick_params(axis="y", length=0)
    beside = ax.get_yaxis_transform()
    for name, place in headings.items():
        ax.text(0, place, f" {name}", transform=beside, va="center", color=NEUTRAL, style="italic",
                fontsize="small")  # fmt: skip
    notes = dict(zip(frame[row], frame["note"], strict=True)) if "note" in frame else {}
    for name, note in notes.items():
        ax.text(0.99, places[name], note, transform=beside, va="center", ha="right",
                color=NAN_RED, fontsize="small")  # fmt: skip
    if linear_to is not None:
        _symlog(ax, linear_to, max(map(abs, frame[x])))
    ax.axvline(0, color=NEUTRAL, lw=0.8, zorder=1)
    ax.set_xlabel(LABELS.get(x, x))
    legend_above(ax, columns=4)
    return ax


def pair_matrix(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Pairs of recipes: above the diagonal the codes that differ, below it the scales, in percent.

    frame: columns a, b, codes, scales (shares), a row a pair, each pair once. Colours are
    logarithmic; a share of zero is written 0 and has none.
    """
    ax = ax or plt.gca()
    names = list(dict.fromkeys([*frame["a"], *frame["b"]]))
    shares = pd.DataFrame(np.nan, index=names, columns=names)
    for a, b, codes, scales in frame[["a", "b", "codes", "scales"]].itertuples(index=False):
        above, below = sorted((names.index(a), names.index(b)))
        shares.iloc[above, below], shares.iloc[below, above] = codes, scales
    positive = shares.where(shares > 0)
    norm = LogNorm(float(np.nanmin(positive)), float(np.nanmax(positive)))
    written = shares.map(lambda share: "" if np.isnan(share) else f"{100 * share:.2g}")
    sns.heatmap(positive, annot=written, fmt="", norm=norm, cmap="cividis", cbar=False, square=True,
                linewidths=1, annot_kws={"fontsize": "x-small"}, ax=ax)  # fmt: skip
    for i, j in np.argwhere((shares == 0).to_numpy()):  # seaborn writes only where there is colour
        ax.text(j + 0.5, i + 0.5, "0", ha="center", va="center", fontsize="x-small", color=NEUTRAL)
    ax.grid(False)
    ax.tick_params(length=0)
    ax.set_xticks(ax.get_xticks(), names, rotation=35, ha="right", rotation_mode="anchor")
    ax.set(xlabel="% that differ: codes above the diagonal, scale bytes below", ylabel="")
    return ax


def codes_and_decibels(frame: pd.DataFrame, floor: float = 1e-5, ax: Axes | None = None) -> Axes:
    """What two recipes differ in: codes across, QSNR upwards, both logarithmic, a marker a kind.

    frame: columns codes (a share), difference_db, kind, label (written where it is not empty) and
    above (whether that is above its point, or below). What is under `floor` dB is drawn there.
    """
    ax = ax or plt.gca()
    frame = frame.assign(difference_db=frame["difference_db"].clip(lower=floor))
    for kind, own, style in series(frame, "kind"):
        points = {"s": 30, "alpha": 0.75, "lw": 0, "label": kind, "zorder": 3}
        ax.scatter(own["codes"], own["difference_db"], **points, **style)
    ax.set(xscale="log", yscale="log", xlabel=LABELS["codes"], ylabel=LABELS["difference_db"])
    ax.set_ylim(floor / 4)
    in_percent(ax.xaxis)
    points = frame.loc[frame["label"] != "", ["label", "codes", "difference_db", "above"]]
    for label, codes, decibels, above in points.itertuples(index=False):
        ax.annotate(label, (codes, decibels), ha="center", xytext=(0, 8 if above else -14),
                    textcoords="offset points", fontsize="small", color=NEUTRAL)  # fmt: skip
    legend_above(ax, columns=3)
    return ax


def scale_steps(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How many scale codes from that of `nvfp4` a search goes: bars for each recipe.

    frame: columns recipe, step, share; a row a recipe and step.
    """
    ax = ax or plt.gca()
    sns.barplot(frame, x="step", y="share", hue="recipe", palette=recipe_colors(frame["recipe"]),
                native_scale=True, saturation=1, ax=ax)  # fmt: skip
    in_percent(ax.yaxis)
    steps = sorted(frame["step"].unique())
    ax.set_xticks(steps, [f"{step:+d}" if step else "0" for step in steps])
    ax.set(xlabel=LABELS["step"], ylabel=LABELS["share"])
    ax.legend(title=None, loc="upper right", frameon=False)
    return ax


def _places(
    frame: pd.DataFrame, row: str, group: str | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Where each row stands, and where the name of each group stands above its rows."""
    if group is None:
        return {name: float(i) for i, name in enumerate(dict.fromkeys(frame[row]))}, {}
    places, headings, at = {}, {}, 0.0
    for name, own in frame.groupby(group, sort=False):
        headings[name] = at
        for row_name in dict.fromkeys(own[row]):
            at += 1
            places[row_name] = at
        at += 1
    return places, headings


def _symlog(ax: Axes, linear_to: float, largest: float) -> None:
    """An axis of x that is linear to that magnitude and logarithmic beyond, a tick each power."""
    ax.set_xscale("symlog", linthresh=linear_to)
    ax.autoscale_view(scaley=False)  # else the margins are those of the linear axis
    decades = math.ceil(math.log10(max(1.0, largest / linear_to)))
    powers = [linear_to * 10**k for k in range(decades + 1)]
    low, high = ax.get_xlim()
    ticks = [*(-power for power in reversed(powers)), 0.0, *powers]
    ax.set_xticks([tick for tick in ticks if low <= tick <= high])
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:+g}".replace("-", "−") if value else "0")
    ax.set_xlim(low, high)
