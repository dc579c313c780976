"""What users read of `Statistics`: measures and tidy frames, all derived from its contents.

To add a measure that counts and sums already give, add a property and name it in DERIVED. A measure
of nothing counted is NaN; one of zeros that stay zero is that of a perfect copy (no error, gain 1).
"""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Literal

import numpy as np
import pandas as pd

from nvfp4lab.statistics import bins
from nvfp4lab.statistics.contents import Contents

DERIVED = (
    "mse",
    "mae",
    "bias",
    "nmse",
    "qsnr_db",
    "gain",
    "cosine",
    "flushed_share",
    "saturated_share",
    "entropy_bits",
    "crest",
)


class Measures(Contents):
    """The contents with everything that is derived from them."""

    @property
    def counted(self) -> int:
        """The elements in the sums."""
        return self.elements - self.nonfinite_input - self.nonfinite_output

    @property
    def mse(self) -> float:
        """Mean of e^2 over the counted elements."""
        return self._ratio(self.sum_ee, self.counted)

    @property
    def mae(self) -> float:
        """Mean of |e|."""
        return self._ratio(self.sum_abs_e, self.counted)

    @property
    def bias(self) -> float:
        """Mean of e, with its sign."""
        return self._ratio(self.sum_e, self.counted)

    @property
    def nmse(self) -> float:
        """Sum of e^2 over sum of x^2; 0 for a zero tensor that stays zero."""
        return self._ratio(self.sum_ee, self.sum_xx)

    @property
    def qsnr_db(self) -> float:
        """-10 log10(NMSE), in dB; Inf without any error."""
        return float(_decibels(np.float64(self.nmse)))

    @property
    def gain(self) -> float:
        """<x, q> / <x, x>: 1 for an unbiased magnitude. Cosine alone does not see it."""
        return self._ratio(self.sum_xq, self.sum_xx, of_zeros=1.0)

    @property
    def cosine(self) -> float:
        """<x, q> / (|x| |q|)."""
        norms = math.sqrt(self.sum_xx) * math.sqrt(self.sum_qq)
        return self._ratio(self.sum_xq, norms, of_zeros=1.0)

    @property
    def flushed_share(self) -> float:
        """The share of the counted nonzero elements that decode to zero."""
        return self._ratio(self.flushed, self.nonzero)

    @property
    def saturated_share(self) -> float:
        """The share of the counted elements that are clipped to their block's largest value."""
        return self._ratio(self.saturated, self.counted)

    @property
    def scale_shares(self) -> dict[str, float]:
        """The share of blocks whose scale is zero, subnormal, normal, saturated, nan."""
        classes = ("zero", "subnormal", "normal", "saturated", "nan")
        return {name: self._ratio(getattr(self, f"scale_{name}"), self.blocks) for name in classes}

    @property
    def code_shares(self) -> np.ndarray:
        """The share of the elements at each code: float64 [2**bits]."""
        return self.element_codes / max(1, self.elements)

    @property
    def magnitude_shares(self) -> np.ndarray:
        """The share of the elements at each of `Format.magnitudes`, signs folded.

        The code below -max of two's complement, which no recipe writes, is left out.
        """
        known = self.magnitude_of_code >= 0
        return np.bincount(self.magnitude_of_code[known], weights=self.code_shares[known])

    @property
    def entropy_bits(self) -> float:
        """The entropy of the element codes, in bits an element."""
        if not self.elements:
            return math.nan
        share = self.code_shares[self.element_codes > 0]
        return float(-(share * np.log2(share)).sum()) + 0.0  # no -0

    @property
    def crest(self) -> float:
        """The mean of amax / rms over the blocks that are finite and not all zero."""
        return self.sum_crest / self.crest_blocks if self.crest_blocks else math.nan

    def to_frame(self) -> pd.DataFrame:
        """One row: every number in it and every derived measure under its name, and the shares of
        scale classes as scale_zero_share and so on."""
        numbers = {f.name: getattr(self, f.name) for f in fields(self)}
        row = {name: value for name, value in numbers.items() if not isinstance(value, _NESTED)}
        shares = {f"scale_{name}_share": share for name, share in self.scale_shares.items()}
        return pd.DataFrame([row | {name: getattr(self, name) for name in DERIVED} | shares])

    def by_amax(self) -> pd.DataFrame:
        """The error by the block's largest finite |x|: a row a binade that occurs, the first of 0.

        Columns: amax_from, amax_to (0 to 0, or a power of two to the next one, left out), blocks,
        lost (finite elements that decode to NaN or Inf), xx, ee, nmse, qsnr_db. Every block is in
        one row, and the columns add up to the totals.
        """
        edges = bins.amax_edges()
        frame = pd.DataFrame(
            {
                "amax_from": [0.0, *edges[1:-1]],
                "amax_to": [0.0, *edges[2:]],
                "blocks": self.amax_blocks,
                "lost": self.amax_lost,
                "xx": self.amax_xx,
                "ee": self.amax_ee,
            }
        )
        return with_ratios(frame.query("blocks > 0").reset_index(drop=True))

    def by_quotient(self) -> pd.DataFrame:
        """The error by |x| / (s g), what is rounded to an element: a row a bin.

        Columns: quotient_from, quotient_to (Inf in the last row), elements, mean_e and mse: the
        means of e / (s g), positive away from zero, and of its square; NaN where no element is.
        """
        edges = bins.quotient_edges(self.quotient_width)
        count = np.where(self.quotient_elements > 0, self.quotient_elements, np.nan)
        return pd.DataFrame(
            {
                "quotient_from": edges[:-1],
                "quotient_to": edges[1:],
                "elements": self.quotient_elements,
                "mean_e": self.quotient_e / count,
                "mse": self.quotient_ee / count,
            }
        )

    def qsnr_histogram(self, of: Literal["block", "token"]) -> pd.DataFrame:
        """How many blocks or tokens have which QSNR: columns qsnr_from, qsnr_to, count, share.

        In dB: below -20, bins of 1 up to 100, from there on (no error at all included); the last
        row, NaN, has those in which a finite element decodes to NaN or Inf.

        Raises: ValueError for anything but "block" and "token".
        """
        if of not in ("block", "token"):
            raise ValueError(f"expected 'block' or 'token', got {of!r}")
        counts = self.block_qsnr if of == "block" else self.token_qsnr
        edges = bins.qsnr_edges()
        return pd.DataFrame(
            {
                "qsnr_from": [*edges[:-1], np.nan],
                "qsnr_to": [*edges[1:], np.nan],
                "count": counts,
                "share": counts / max(1, counts.sum()),
            }
        )

    def qsnr_quantile(self, of: Literal["block", "token"], share: float) -> float:
        """The QSNR in dB that a share of the blocks or tokens does not exceed.

        To the 1 dB of `qsnr_histogram`: the lower edge of the bin that holds it, so -Inf below -20.
        Those in which a finite element decodes to NaN or Inf are the worst, and give NaN; of no
        blocks it is NaN too.

        Raises: ValueError for a share outside 0 to 1, and as `qsnr_histogram`.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"expected a share from 0 to 1, got {share}")
        frame = self.qsnr_histogram(of)
        edges, counts = (np.roll(frame[name], 1) for name in ("qsnr_from", "count"))  # lost first
        needed = max(1, math.ceil(share * counts.sum() - 1e-9))  # 0.07 of 100 is 7
        reached = np.flatnonzero(np.cumsum(counts) >= needed)
        return float(edges[reached[0]]) if len(reached) else math.nan

    def crest_histogram(self) -> pd.DataFrame:
        """How many blocks have which crest factor: columns crest_from, crest_to, count, share."""
        edges, counts = bins.crest_edges(), self.crest_counts
        share = counts / max(1, counts.sum())
        return pd.DataFrame(
            {"crest_from": edges[:-1], "crest_to": edges[1:], "count": counts, "share": share}
        )

    def by_channel(self) -> pd.DataFrame:
        """A row a channel: columns channel, xx, ee, xq, nmse, qsnr_db, gain, share (of sum_ee).

        Raises: ValueError if the channels were dropped.
        """
        if self.width is None:
            raise ValueError("the channels of these statistics were dropped by without_channels()")
        frame = pd.DataFrame(
            {
                "channel": np.arange(self.width),
                "xx": self.channel_xx,
                "ee": self.channel_ee,
                "xq": self.channel_xq,
            }
        )
        total = self.channel_ee.sum()
        return with_ratios(frame).assign(share=frame.ee / (total if total else 1.0))

    def worst_blocks(self) -> pd.DataFrame:
        """Up to ten blocks that have an error, those that lost most elements to NaN or Inf first,
        then by squared error: columns source, token (row in the source), block (in the row), lost,
        ee, amax, scale_code (None where scales are float32), scale, outer (None without one), x.

        x is float32 [block]; `explain_block(torch.tensor(row.x), recipe, row.outer)` shows why (in
        the input's own dtype where the recipe computes in it).
        """
        columns: dict = {name: list(column) for name, column in self.worst.items()}
        if self.scale_format is None:
            columns["scale_code"] = [None] * len(columns["x"])
        columns["outer"] = [None if np.isnan(g) else float(g) for g in columns["outer"]]
        as_objects = {n: pd.Series(columns[n], dtype=object) for n in ("scale_code", "outer", "x")}
        return pd.DataFrame(columns | as_objects)

    def _ratio(self, part: float, whole: float, of_zeros: float = 0.0) -> float:
        if not self.counted:
            return math.nan
        return part / whole if whole else (of_zeros if part == 0 else math.inf)


_NESTED = (np.ndarray, dict)


def with_ratios(frame: pd.DataFrame) -> pd.DataFrame:
    """With nmse and qsnr_db of its columns xx and ee, and gain where it has xq; of zeros that stay
    zero 0, Inf and 1."""
    xx, ee = frame["xx"].to_numpy(), frame["ee"].to_numpy()
    nmse = _divided(ee, xx, of_zeros=0.0)
    frame = frame.assign(nmse=nmse, qsnr_db=_decibels(nmse))
    return frame.assign(gain=_divided(frame["xq"], xx, of_zeros=1.0)) if "xq" in frame else frame


def _divided(part, whole, of_zeros: float) -> np.ndarray:
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    of_none = np.where(part == 0, of_zeros, np.inf)
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), of_none)


def _decibels(nmse) -> np.ndarray:
    """-10 log10, Inf for 0, NaN for NaN."""
    with np.errstate(divide="ignore"):
        return -10 * np.log10(nmse)
