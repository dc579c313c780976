"""What pictures share: the labels of columns, with units, and colours that stay with a recipe."""

from __future__ import annotations

from collections.abc import Iterable

import seaborn as sns
from matplotlib.axes import Axes

STYLE = "nvfp4lab.plots.study"  # for plt.style.use

LABELS = {
    "layer": "layer",
    "qsnr_db": "QSNR (dB)",
    "nmse": "NMSE, Σ(q − x)² / Σx²",
    "share": "share of blocks",
    "scale_code": "scale byte",
    "element": "element of the block",
    "tokens": "tokens",
    "GB/s": "read and written, GB/s",
    "of_yardstick": "share of the yardstick's speed",
}
NEUTRAL, NAN_RED = "0.35", "#c0392b"
MARKERS = "osD^vPX*<>"

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


def legend_beside(ax: Axes) -> None:
    """The legend to the right of the axes, where it covers nothing."""
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)


def legend_below(ax: Axes, columns: int = 2) -> None:
    """Moves the legend that is there under the axes, so that a narrow figure keeps its width."""
    legend = ax.get_legend()
    if legend is not None:
        handles = [h for h in legend.legend_handles if h is not None]
        labels = [text.get_text() for text in legend.get_texts()]
        place = {"loc": "upper left", "bbox_to_anchor": (0, -0.2)}
        ax.legend(handles, labels, ncols=columns, frameon=False, **place)
