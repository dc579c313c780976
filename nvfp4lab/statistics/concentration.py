"""How much of a sum a few terms hold: of the energy or the error, by block, token or channel.

For notebooks and the report. To add another measure of it, add its function.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike


def top_share(values: ArrayLike, of: float) -> float:
    """The share of the sum that the largest terms hold, `of` of all terms and at least one.

    values: terms from 0 up, of any shape. NaN of no terms, and of terms that add up to 0.

    Raises: ValueError for `of` outside 0 to 1.

    >>> top_share([6, 1, 1, 2], of=0.25)
    0.6
    """
    if not 0 <= of <= 1:
        raise ValueError(f"of is a share from 0 to 1, got {of!r}")
    ordered = np.sort(np.ravel(np.asarray(values, float)))[::-1]
    total = ordered.sum()
    return float(ordered[: max(1, round(of * len(ordered)))].sum() / total) if total else math.nan


def effective_count(values: ArrayLike) -> float:
    """(sum v)^2 / sum v^2: how many equal terms would be as concentrated.

    values: terms from 0 up, of any shape. n for n equal terms, 1 for one that outweighs all others.
    NaN of no terms, and of terms that add up to 0.

    >>> effective_count([2.0, 2.0, 0.0])
    2.0
    """
    v = np.ravel(np.asarray(values, float))
    return float(v.sum() ** 2 / np.square(v).sum()) if v.sum() else math.nan
