"""The fixed bins of the histograms: which bin a value is in, and where bins end.

`in_torch` asks for the bin of each value, `measures` for the edges; `kernels.errors` finds the same
bins by the same numbers. They are fixed so that any two histograms add up. To change one, change
its numbers here and `merging.VERSION`, so that files saved before are refused. Only comparisons and
IEEE operations decide on a bin, so a value is in the same one on every machine. Bins are int64 of
their argument's shape.
"""

from __future__ import annotations

import functools

import numpy as np
import torch

CREST_PER_UNIT, CREST_FROM, CREST_TO = 8, 1, 17
AMAX_EXPONENTS = range(-148, 129)  # of frexp, over all float32 above 0
QUOTIENT_BINS = 112  # closed ones; 7 units of E2M1 in sixteenths
QSNR_FROM, QSNR_TO = -20, 100

CREST_COUNT = (CREST_TO - CREST_FROM) * CREST_PER_UNIT
AMAX_COUNT = 1 + len(AMAX_EXPONENTS)  # bin 0: no finite element but zeros
QUOTIENT_COUNT = QUOTIENT_BINS + 1  # the last one is open
QSNR_COUNT = QSNR_TO - QSNR_FROM + 3  # below, 1 dB each, above or exact, lost


def crest_bin(crest: torch.Tensor) -> torch.Tensor:
    """Of float64 crest factors; those outside 1 to 17 are counted in the bin at that end."""
    return ((crest - CREST_FROM) * CREST_PER_UNIT).clamp(0, CREST_COUNT - 1).long()


def crest_edges() -> np.ndarray:
    """float64 [129]."""
    return np.linspace(CREST_FROM, CREST_TO, CREST_COUNT + 1)


def amax_bin(amax: torch.Tensor) -> torch.Tensor:
    """Of finite float32 magnitudes, as float64: 0 for zero, else by e, 2**(e-1) <= amax < 2**e."""
    exponent = torch.frexp(amax).exponent.long()
    return (exponent - AMAX_EXPONENTS[0] + 1).where(amax > 0, 0)


def amax_edges() -> np.ndarray:
    """float64 [279]: 0, then the powers of two at which the bins from 1 up begin, and the end."""
    return np.array([0.0, *(2.0 ** (e - 1) for e in AMAX_EXPONENTS), 2.0 ** AMAX_EXPONENTS[-1]])


def quotient_width(max_element: float) -> float:
    """The width of a bin of x / (s g) for elements up to `max_element`."""
    return max(1 / 16, max_element / QUOTIENT_BINS)


def quotient_bin(quotient: torch.Tensor, width: float) -> torch.Tensor:
    """Of float64 quotients from 0 up."""
    return (quotient * (1 / width)).clamp(max=QUOTIENT_BINS).long()


def quotient_edges(width: float) -> np.ndarray:
    """float64 [114], the last one Inf."""
    return np.array([*(width * i for i in range(QUOTIENT_COUNT)), np.inf])


def qsnr_bin(xx: torch.Tensor, ee: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
    """Of sums of x^2 and (q - x)^2, float64, and the count of elements that became NaN or Inf.

    Nothing lost and no error: exact. An error on nothing but zeros: below.
    """
    nmse = (ee / xx).where(ee > 0, 0.0)
    above = torch.bucketize(nmse, nmse_edges(xx.device))  # how many edges are below it
    return (QSNR_COUNT - 2 - above).where(lost == 0, QSNR_COUNT - 1)


@functools.cache  # copying it to a GPU would wait for all that goes on there
def nmse_edges(device: torch.device) -> torch.Tensor:
    """Where QSNR bins begin and end, as NMSE: float64 [121], rising."""
    edges = [10 ** (-db / 10) for db in range(QSNR_TO, QSNR_FROM - 1, -1)]
    return torch.tensor(edges, dtype=torch.float64, device=device)


def qsnr_edges() -> np.ndarray:
    """float64 [123] in dB, -Inf and Inf at the ends; of all bins but that of the lost."""
    return np.array([-np.inf, *range(QSNR_FROM, QSNR_TO + 1), np.inf])
