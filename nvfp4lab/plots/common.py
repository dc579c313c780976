"""What pictures share: labels of columns, with units, colours and markers, legends and axes.

A column that a picture shows gets its label in LABELS, a recipe that most show its colour in _OWN.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import cycle
from typing import Any

import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis

STYLE = "nvfp4lab.plots.study"  # for plt.style.use

LABELS = {  # of columns, in every picture
    "layer": "layer",
    "qsnr_db": "QSNR (dB)",
    "nmse": "NMSE, Σ(q − x)² / Σx²",
    "share": "share of blocks",
    "scale_code": "scale byte",
    "element": "element of the block",
    "amax": "amax of the block",
    "crest": "crest factor of the block, amax / rms",
    "mean_crest": "mean crest factor",
    "rms_crest": "rms of amax / rms of x",
    "sigma": "σ of the elements",
    "block": "block, and bits an element with its scale",
    "divisor": "divisor d of amax / d",
    "quotient": "|x| / scale",
    "mean_e": "mean error / scale",
    "mse": "mean squared error / scale²",
    "gain_db": "QSNR over that of nvfp4 (dB)",
    "gained_db": "QSNR gained (dB)",
    "difference_db": "largest difference in QSNR (dB)",
    "above_rate_db": "QSNR less 6.02 dB a stored bit (dB)",
    "codes": "share of codes that differ",
    "step": "scale codes above that of nvfp4",
    "z": "deviation /\nstandard error",
    "tokens": "tokens",
    "GB/s": "read and written, GB/s",
    "of_yardstick": "share of the yardstick's speed",
}
NEUTRAL, NAN_RED = "0.35", "#c0392b"
MARKERS = "osD^vPX*<>"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

_PALETTE = sns.color_palette("colorblind").as_hex()
_OWN = {  # the recipes that most pictures show; others take what these leave
    "nvfp4": 0,
    "nvfp4-token": 9,
    "seed": 3,
    "vllm-megamoe": 2,
    "vllm-muse": 4,
    "nvint4": 5,
    "nvfp4-ue5m3": 1,
}


def recipe_colors(names: Iterable[str]) -> dict[str, str]:
    """A colour for each recipe, hexadecimal, that colour-blind readers can tell apart.

    The main recipes have the same colour in every picture. Up to ten names get ten colours; beyond
    that they repeat, so tell more of them apart by a marker too.

    >>> recipe_colors(["nvfp4", "seed"])["seed"] == recipe_colors(["seed"])["seed"]
    True
    """
    names = list(dict.fromkeys(names))
    taken = {_OWN[name] for name in names if name in _OWN}
    free = [i for i in range(len(_PALETTE)) if i not in taken] or list(range(len(_PALETTE)))
    others = [name for name in names if name not in _OWN]
    chosen = {name: free[i % len(free)] for i, name in enumerate(others)} | _OWN
    return {name: _PALETTE[chosen[name]] for name in names}


def series(
    frame: pd.DataFrame, by: str, colors: Mapping[str, str] | None = None
) -> Iterator[tuple[str, pd.DataFrame, dict[str, Any]]]:
    """For each name in the column `by`, in the frame's order: it, its rows, its color and marker.

    colors: of each name, where pictures are to agree; else those of `recipe_colors`.
    """
    names = list(dict.fromkeys(frame[by]))
    colors = recipe_colors(names) if colors is None else colors
    for name, marker in zip(names, cycle(MARKERS)):
        yield name, frame.loc[frame[by] == name], {"color": colors[name], "marker": marker}


def in_percent(axis: Axis) -> None:
    """Ticks of shares, read as percent."""
    axis.set_major_formatter(lambda value, _: f"{100 * value:g} %")


def in_octaves(ax: Axes, values: Iterable[float]) -> None:
    """A log2 axis of x with ticks at every first, second or fourth power, from the least of the
    values to the largest; what is drawn beyond them, on axes that share it too, stays in sight."""
    values = list(values)
    low, high = (math.log2(value) for value in (min(values), max(values)))
    ax.set_xscale("log", base=2)
    ax.margins(x=0.02)
    ax.autoscale_view(scaley=False)  # else the margins are those of the linear axis
    step = 1 if high - low <= 12 else 2 if high - low <= 20 else 4
    ticks = [k for k in range(math.ceil(low), math.floor(high) + 1) if k % step == 0]
    ax.set_xticks([2.0**k for k in ticks], [f"2{str(k).translate(_SUPERSCRIPTS)}" for k in ticks])
    ax.minorticks_off()


def legend_beside(ax: Axes, title: str | None = None) -> None:
    """The legend to the right of the axes, where it covers nothing."""
    ax.legend(title=title, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def legend_above(ax: Axes, columns: int) -> None:
    """The legend in one line, or few, on top of the axes."""
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False,
              borderaxespad=0.2, columnspacing=1.2, handletextpad=0.2)  # fmt: skip


def legend_below(ax: Axes, columns: int = 2) -> None:
    """Moves the legend that is there under the axes, so that a narrow figure keeps its width."""
    if ax.get_legend() is not None:
        place = {"bbox_to_anchor": (0, -0.2), "ncols": columns, "frameon": False}
        sns.move_legend(ax, "upper left", **place)
