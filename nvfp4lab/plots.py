"""Pictures: a tidy frame in, matplotlib Axes out.

The only module that imports seaborn. A function here computes nothing but positions on the page:
frames come from `errors` and from the notebooks. Each takes `ax=None`, draws into the current Axes
where none is given, and returns the Axes; none sets a theme or opens a figure of its own.
"""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes

from nvfp4lab.diagnose import Explanation
from nvfp4lab.formats import Format

LABELS = {
    "layer": "layer",
    "qsnr_db": "QSNR (dB)",
    "share": "share of blocks",
    "scale_code": "scale byte",
    "element": "element of the block",
    "tokens": "tokens",
    "GB/s": "read and written, GB/s",
    "of_yardstick": "share of the yardstick's speed",
}
NEUTRAL, NAN_RED = "0.35", "#c0392b"


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
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
    return ax


def scale_histogram(frame: pd.DataFrame, fmt: Format, ax: Axes | None = None) -> Axes:
    """How often each scale byte is written, a step line a recipe, the byte's classes marked.

    frame: columns recipe, scale_code, share, as `errors.scale_histogram` gives them.
    """
    ax = ax or plt.gca()
    sns.lineplot(frame, x="scale_code", y="share", hue="recipe", drawstyle="steps-mid", ax=ax)
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


def block(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """One block's elements, as they came in and as each recipe gives them back.

    frame: columns element, x, recipe, decoded; a NaN is marked on the zero line.
    """
    ax = ax or plt.gca()
    recipes = list(frame["recipe"].unique())
    first = frame[frame["recipe"] == recipes[0]]
    ax.bar(first["element"], first["x"], color=NEUTRAL, alpha=0.25, width=0.9, label="x")
    for recipe, color in zip(recipes, sns.color_palette(n_colors=len(recipes)), strict=True):
        rows = frame[frame["recipe"] == recipe]
        finite, lost = rows.query("decoded == decoded"), rows.query("decoded != decoded")
        if len(finite):
            ax.plot(finite["element"], finite["decoded"], "o", color=color, ms=5, label=recipe)
        if len(lost):
            label = f"{recipe}: NaN"
            ax.plot(lost["element"], 0 * lost["x"], "x", color=color, ms=7, mew=2, label=label)
    ax.set(xlabel=LABELS["element"], ylabel="value", xticks=range(len(first)))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return ax


def explained_block(explanation: Explanation, ax: Axes | None = None) -> Axes:
    """One block: each element's quotient, the value that it was rounded to, and the ties.

    explanation: what `explain_block` gives. The lines are the magnitudes of the element format
    that occur as neighbours, with both signs.
    """
    ax = ax or plt.gca()
    elements = explanation.elements
    neighbours = elements[["below", "above"]].to_numpy()
    steps = np.unique(neighbours[np.isfinite(neighbours)])
    for step in steps:
        for sign in (1, -1):
            ax.axhline(sign * step, color=NEUTRAL, alpha=0.2, lw=0.8, zorder=0)
    ax.vlines(elements.index, elements["quotient"], elements["value"], color=NEUTRAL, lw=1)
    ax.scatter(elements.index, elements["quotient"], marker="x", label="x / scale", zorder=3)
    ax.scatter(elements.index, elements["value"], marker="o", label="rounded", zorder=2)
    tied = elements[elements["tie"]]
    if len(tied):
        ax.scatter(tied.index, tied["quotient"], s=150, marker="s", facecolors="none",
                   edgecolors=NAN_RED, label="tie", zorder=4)  # fmt: skip
    scale = explanation.scale.iloc[0]
    ax.set_title(f"{explanation.recipe.name}, scale {scale['scale']:g}")
    ax.set_xlabel(LABELS["element"])
    ax.set_ylabel("in units of the scale")
    ax.legend(loc="best")
    return ax


def speed_over_tokens(frame: pd.DataFrame, y: str = "GB/s", ax: Axes | None = None) -> Axes:
    """A benchmark over the number of tokens, a line and a marker a name, the yardstick dashed.

    frame: columns name, role, tokens and y, which is "GB/s" or "of_yardstick", as
    `benchmarks.Result.frame` gives them for one part and width.
    """
    ax = ax or plt.gca()
    frame = frame.sort_values("tokens", kind="stable")
    limit, rest = frame.query("role == 'yardstick'"), frame.query("role != 'yardstick'")
    ax.plot(limit["tokens"], limit[y], "--", color=NEUTRAL, lw=1.5, label="yardstick")
    names = list(rest["name"].unique())
    colors = sns.color_palette("colorblind", len(names))
    for name, color, marker in zip(names, colors, "osD^vPX*"[: len(names)], strict=True):
        rows = rest[rest["name"] == name]
        ax.plot(rows["tokens"], rows[y], color=color, marker=marker, ms=5, label=name)
    tokens = sorted(frame["tokens"].unique())
    ax.set_xscale("log", base=2)
    ax.set_xticks(tokens, [str(t) for t in tokens])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set(xlabel=LABELS["tokens"], ylabel=LABELS[y])
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return ax


def _over_layers(frame: pd.DataFrame, y: str, hue: str, ax: Axes | None) -> Axes:
    ax = ax or plt.gca()
    sns.lineplot(frame, x="layer", y=y, hue=hue, style="site", markers=True, dashes=False, ax=ax)
    layers = sorted(frame["layer"].unique())
    margin = 0.04 * (layers[-1] - layers[0]) or 0.5
    ax.set(xlabel=LABELS["layer"], ylabel=LABELS[y], xticks=layers)
    ax.set_xlim(layers[0] - margin, layers[-1] + margin)  # also where nothing is drawn
    sns.move_legend(ax, "upper left", bbox_to_anchor=(1, 1), frameon=False)
    return ax
