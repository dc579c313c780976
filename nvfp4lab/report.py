"""report: a capture in, one page out that says where which recipe is safe.

`write_report` sweeps the capture, then runs notebooks/report.ipynb on what was counted and writes
the page. The judgements are here (`verdicts`, `summary`, `table`, `channels`), the order of the
page and its figures are the notebook's. To judge by another rule, change `Limits` or `_reasons`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.io.formats.style import Styler

from nvfp4lab import files
from nvfp4lab.statistics import Statistics, bins
from nvfp4lab.sweeps import Swept, sweep_statistics

BASELINE = "nvfp4-exact-scale"  # E2M1 alone: no scale was rounded, clamped or saturated
VERDICTS = ("safe", "lossy", "broken")
WORST_TOKENS = 0.01  # the share of tokens that `Limits.token_short_db` is about
GONE_DB = 1  # of a token or a channel with less QSNR than this nothing is left; zeros have 0 dB


@dataclass(frozen=True)
class Limits:
    """What is still safe, each against BASELINE at the same site.

    short_db: by how much the QSNR may fall short of it; token_short_db: the same of the worst 1 %
    of tokens, in whole dB, and of a channel of which nothing is left; gain: how far <x, q> / <x, x>
    may be from 1.
    """

    short_db: float = 1.0
    token_short_db: float = 3.0
    gain: float = 0.02


def verdicts(swept: Swept, limits: Limits = Limits()) -> pd.DataFrame:
    """Which recipe is safe at which site: a row a layer, site and recipe other than BASELINE.

    Columns: layer, site, recipe, verdict, why, qsnr_db, short_db (of the baseline's QSNR),
    token_qsnr_db (that the worst 1 % of tokens do not exceed; NaN where one of them is lost), gain,
    lost (finite elements that decode to NaN or Inf), own_nan (elements of x that are NaN or Inf),
    blocks_lost and tokens_lost (shares of blocks with a NaN scale, and of tokens with a lost
    element), tokens_gone and channels_gone (how many, beyond those of the baseline, have nothing
    left: an error about as large as they are).

    broken: a finite element decodes to NaN or Inf. lossy: beyond one of the limits, or a token or a
    channel has nothing left. safe: neither. A site without a finite element, or without the
    baseline, has no row: see `not_judged`.

    Raises: ValueError if the sweep lacks the baseline, or has no site to judge.
    """
    if all(recipe != BASELINE for _, _, recipe in swept.statistics):
        raise ValueError(f"expected a sweep with {BASELINE}, by which the others are judged")
    left_out = not_judged(swept)
    rows = []
    for (layer, site, recipe), own in swept.statistics.items():
        if recipe == BASELINE or (layer, site) in left_out:
            continue
        exact = swept.statistics[layer, site, BASELINE]
        tokens_lost = own.token_qsnr[-1] / max(1, own.token_qsnr.sum())
        row: dict[str, Any] = {
            "qsnr_db": own.qsnr_db,
            "short_db": exact.qsnr_db - own.qsnr_db if own.qsnr_db < exact.qsnr_db else 0.0,
            "token_qsnr_db": own.qsnr_quantile("token", WORST_TOKENS),
            "gain": own.gain,
            "lost": own.nonfinite_output,
            "own_nan": own.nonfinite_input,
            "blocks_lost": own.scale_shares["nan"],
            "tokens_lost": tokens_lost,
            "tokens_gone": max(0, _tokens_gone(own) - _tokens_gone(exact)),
            "channels_gone": _channels_gone(own, exact, limits),
        }
        token_short = exact.qsnr_quantile("token", WORST_TOKENS) - row["token_qsnr_db"]
        reasons = list(_reasons(row, token_short, limits))
        verdict = "broken" if row["lost"] else "lossy" if reasons else "safe"
        place = {"layer": layer, "site": site, "recipe": recipe, "verdict": verdict}
        rows.append(place | {"why": "; ".join(reasons)} | row)
    if not rows:
        why = "; ".join(f"layer {at} {site}: {text}" for (at, site), text in left_out.items())
        raise ValueError(f"expected a recipe and a site to judge it at, got none: {why}")
    return pd.DataFrame(rows)


def not_judged(swept: Swept) -> dict[tuple[int, str], str]:
    """The (layer, site) that no recipe can be judged at, and why."""
    reasons = {}
    for layer, site in swept.planned:
        exact = swept.statistics.get((layer, site, BASELINE))
        if exact is None:
            reasons[layer, site] = f"its rows can no longer be read, and without {BASELINE} before"
        elif exact.tokens == 0:
            reasons[layer, site] = "no tokens"
        elif exact.elements == exact.nonfinite_input:
            reasons[layer, site] = "every element is NaN or Inf"
    return reasons


def _tokens_gone(statistics: Statistics) -> int:
    below = bins.qsnr_edges()[1:] <= GONE_DB
    return int(statistics.token_qsnr[:-1][below].sum())  # the last are lost to NaN


def _channels_gone(own: Statistics, exact: Statistics, limits: Limits) -> int:
    gone = own.channel_ee > 10 ** (-GONE_DB / 10) * own.channel_xx
    least = 10 ** (limits.token_short_db / 10) * exact.channel_ee * own.channel_xx
    return int((gone & (own.channel_ee * exact.channel_xx > least)).sum())


def _reasons(row: dict[str, Any], token_short: float, limits: Limits) -> Iterable[str]:
    if row["lost"]:
        yield (
            f"NaN in {_percent(row['tokens_lost'])} of the tokens"
            + (f", by {_percent(row['blocks_lost'])} NaN scales" if row["blocks_lost"] else "")
            + (f" ({row['own_nan']} elements were NaN or Inf before)" if row["own_nan"] else "")
        )
    if row["short_db"] > limits.short_db:
        short = f"{row['short_db']:.1f} dB short of exact scales"
        yield short if math.isfinite(row["short_db"]) else "exact scales make no error"
    if token_short > limits.token_short_db:
        yield f"the worst tokens {token_short:.0f} dB short"
    for what in ("token", "channel"):
        if count := row[f"{what}s_gone"]:
            yield f"nothing is left of {count:,} {what}{'s' * (count > 1)}"
    if abs(row["gain"] - 1) > limits.gain:
        yield f"gain {row['gain']:.3f}"


def _percent(share: float) -> str:
    """Two decimals, or one digit of what would be 0.00 %."""
    return f"{share:.2%}" if share >= 5e-5 or not share else f"{100 * share:.1g}%"


def summary(judged: pd.DataFrame) -> pd.DataFrame:
    """What `verdicts` come to: a row a recipe, the safest first.

    Columns: recipe; safe, lossy and broken, at how many sites it is; worst, which site and why, or
    by how much a safe one falls short.
    """
    rows = []
    for recipe, own in judged.groupby("recipe", sort=False):
        verdicts = list(own["verdict"])
        own = own.assign(rank=own["verdict"].map(VERDICTS.index))
        order = ["rank", "lost", "short_db"]
        worst = own.sort_values(order, ascending=False, kind="stable").to_dict("records")[0]
        short = f"{worst['short_db']:.2f} dB short of exact scales" if worst["short_db"] else ""
        said = worst["why"] or short
        where = f"layer {worst['layer']} {worst['site']}: {said}" if said else ""
        counts = {verdict: verdicts.count(verdict) for verdict in VERDICTS}
        rows.append({"recipe": recipe, **counts, "worst": where})
    frame = pd.DataFrame(rows)
    return frame.sort_values(["broken", "lossy"], kind="stable", ignore_index=True)


def table(judged: pd.DataFrame) -> Styler:
    """`verdicts` as a table to look at: a row a site, a column a recipe, in each cell the QSNR (or
    exact), or the share of tokens with a NaN; lossy and broken say so, and are coloured."""

    def said(row: dict[str, Any]) -> str:
        if row["verdict"] == "broken":
            return f"NaN in {_percent(row['tokens_lost'])} of tokens"
        if row["qsnr_db"] == math.inf:
            return "exact"
        text = f"{round(row['qsnr_db'], 1) + 0.0:.1f} dB"  # no -0.0
        return text + (", lossy" if row["verdict"] == "lossy" else "")

    rows = judged.to_dict("records")
    cells = judged.assign(said=[said(row) for row in rows])
    order = {"index": ["layer", "site"], "columns": "recipe"}
    text = cells.pivot(**order, values="said")[list(dict.fromkeys(judged["recipe"]))]
    colors = cells.pivot(**order, values="verdict").reindex_like(text).replace(_COLORS)
    text.columns.name = None
    styled = text.style
    styled.apply(lambda _: colors, axis=None)
    styled.format(escape="html")
    for axis in ("index", "columns"):
        styled.format_index(escape="html", axis=axis)
    return styled


_INK = "color: #1c1f23; background-color: "  # on a dark page too
_COLORS = {"safe": f"{_INK}#dcebf7", "lossy": f"{_INK}#fdf0c8", "broken": f"{_INK}#f8d0bd"}


def channels(swept: Swept, recipe: str) -> pd.DataFrame:
    """Which channels pay under a recipe, and for whom: a row a layer, site and channel, the
    costliest first.

    Columns: those of `Statistics.by_channel`, with xx_share, the channel's share of the site's
    energy; loudest, the channel with the most energy in its block, which sets most of its scales;
    and under_loudest_db, how far its root mean square lies under that one's (0 for itself).
    """
    own = {key: one for key, one in swept.statistics.items() if key[2] == recipe}
    frame = replace(swept, statistics=own).concat(lambda s: s.by_channel().assign(block=s.block))
    frame["block"] = frame["channel"] // frame["block"]
    xx, channel = frame["xx"].to_numpy(), frame["channel"].to_numpy()
    energy = frame.groupby(["layer", "site"])["xx"].transform("sum").to_numpy()
    loudest = frame.groupby(["layer", "site", "block"])["xx"].transform("idxmax").to_numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        frame["xx_share"] = np.where(energy > 0, xx / energy, 0.0)
        frame["loudest"] = channel[loudest]
        frame["under_loudest_db"] = -10 * np.log10(xx / xx[loudest]) + 0.0
    return frame.sort_values("share", ascending=False, ignore_index=True)


def notebook() -> Path:
    """The report's notebook: inside an installed wheel, else beside the package."""
    packaged = Path(__file__).parent / "_notebooks" / "report.ipynb"
    return packaged if packaged.is_file() else Path(__file__).parents[1] / "notebooks/report.ipynb"


def write_report(
    captures: str | Path | Sequence[str | Path],
    out: str | Path,
    recipes: Sequence[str],
    executor: Executor | None = None,
    *,
    state: str | Path,
    limits: Limits = Limits(),
    progress: bool = True,
    on_cell: Callable[[int, int], None] | None = None,
) -> Swept:
    """Sweep captures, or go on with a sweep, and write the report as one HTML file.

    captures: record files or capture folders; recipes: by name, the first is looked at closest;
    executor, state, progress: as of `sweep`, and memory is bounded as there; on_cell: called as
    on_cell(done, total) while the page is made. The file is written whole or not at all, and loads
    nothing. Returns what was counted, BASELINE with it.

    Raises: ValueError for no recipe or no site to judge; what `sweep_statistics` raises;
    `runs.NotebookError` if the page cannot be made.
    """
    from nvfp4lab import publish, runs

    several = [captures] if isinstance(captures, (str, Path)) else list(captures)
    paths, folder = [os.path.abspath(path) for path in several], os.path.abspath(state)
    names = [name for name in recipes if name != BASELINE]
    if not names:
        raise ValueError(f"expected a recipe to judge beside {BASELINE}, got {list(recipes)}")
    swept = sweep_statistics(paths, [*names, BASELINE], executor, state=folder, progress=progress)
    verdicts(swept, limits)  # refuses here what the page could not show
    given = {"CAPTURE": paths, "RECIPES": names, "STATE": folder}
    given |= {name.upper(): value for name, value in asdict(limits).items()}
    page = publish.to_html(runs.execute(notebook(), given, on_cell=on_cell))
    with files.replacing(out) as partial:
        partial.write_text(page, encoding="utf-8")
    return swept
