"""Quantizers as other teams write them, in numpy, for `identify`; they share no code with nvfp4lab.

`kernel` is one quantizer whose decisions are switches of its own; the functions after it take its
result and spoil the buffers. May be changed: more switches, more faults. May not: an import from
nvfp4lab.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch

F32 = np.float32
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = np.arange(0x7F, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)


def nearest(values: np.ndarray, steps: np.ndarray, tie: str) -> np.ndarray:
    """Index of the nearest of sorted steps, saturating; values >= 0. tie: even, odd, away, zero,
    cut (toward zero), ceil."""
    low = np.clip(np.searchsorted(steps, values, side="right") - 1, 0, len(steps) - 2)
    off, gap = values - steps[low], steps[low + 1] - steps[low]
    up = {
        "even": (2 * off > gap) | ((2 * off == gap) & (low % 2 == 1)),
        "odd": (2 * off > gap) | ((2 * off == gap) & (low % 2 == 0)),
        "away": 2 * off >= gap,
        "zero": 2 * off > gap,
        "cut": off >= gap,
        "ceil": off > 0,
    }[tie]
    return low + up


def kernel(
    x: torch.Tensor,
    *,
    tie: str = "even",
    scale_tie: str = "even",
    floor: float = 0.0,
    ceiling: float = np.inf,
    divisor: float = 6.0,
    factor: float = 1.0,
    of_zero_block: float = 0.0,
    unrounded: bool = False,
    zero_sign: str = "kept",
    outer: Callable[[np.ndarray], np.ndarray] | None = None,
    order: str = "x / (s * g)",
    scales_forget: bool = False,
) -> dict[str, Any]:
    """codes (T, K / 2), scales (T, K / 16), and the decode scale that `outer` makes of |x|."""
    a = x.float().numpy()
    blocks = a.reshape(len(a), -1, 16)
    g = F32(1) if outer is None else outer(np.abs(a)).astype(F32)
    by_block = g if np.ndim(g) == 0 else g.reshape(-1, 1)
    amax = np.abs(blocks).max(-1)
    raw = amax / F32(divisor) if scales_forget else amax / F32(divisor) / by_block
    raw = np.clip(raw * F32(factor), F32(floor), F32(min(ceiling, 3e38)))
    raw = np.where(amax == 0, np.maximum(F32(of_zero_block), F32(floor)), raw)
    code = nearest(raw.astype(np.float64), E4M3, scale_tie)
    s = raw if unrounded else E4M3[code].astype(F32)
    g_of_element = np.expand_dims(by_block, -1) if np.ndim(by_block) else by_block
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        one, s = F32(1), s[..., None]
        y = {
            "x / (s * g)": lambda: blocks / (s * g_of_element),
            "x * (1 / (s * g))": lambda: blocks * (one / (s * g_of_element)),
            "x * (G * (1 / s))": lambda: blocks * ((one / g_of_element) * (one / s)),
            "x / s": lambda: blocks / s,
        }[order]()
    y = np.where((E4M3[code] == 0)[..., None], np.copysign(F32(0), blocks), y)
    if tie in ("plus", "minus"):  # ties towards +Inf or -Inf
        grows = (y > 0) == (tie == "plus")
        index = np.where(grows, nearest(abs(y), GRID, "away"), nearest(abs(y), GRID, "zero"))
    else:
        index = nearest(abs(y).astype(np.float64), GRID, tie)
    negative = np.signbit(y) & ((index > 0) | (zero_sign == "kept"))
    elements = (index | negative << 3).astype(np.uint8).reshape(a.shape)
    packed = elements[:, 0::2] | elements[:, 1::2] << 4
    return {
        "codes": torch.from_numpy(packed),
        "scales": torch.from_numpy(code.astype(np.uint8)),
        "outer": None if outer is None else torch.from_numpy(np.asarray(g)),
    }


def of_tensor(n: float = 2688.0):
    return lambda a: F32(a.max()) / F32(n)


def of_token(n: float = 2688.0):
    return lambda a: np.where(a.max(-1) > 0, a.max(-1) / F32(n), F32(1))


def power_of_two(a: np.ndarray) -> np.ndarray:
    """amax / 2688 of each token, down to a power of two."""
    return np.exp2(np.floor(np.log2(of_token()(a).astype(np.float64))))


def swapped_rows(q):
    order = torch.arange(len(q["codes"]))
    order[7], order[40] = 40, 7
    return q | {"codes": q["codes"][order], "scales": q["scales"][order]}


def stale_tail(q):
    return q | {"codes": torch.cat([q["codes"][:-3], q["codes"][:3]])}


def flipped_bits(q):
    codes, scales = q["codes"].clone(), q["scales"].clone()
    codes[11, 5] ^= 0x04
    scales[30, 2] ^= 0x01
    return q | {"codes": codes, "scales": scales}


def lost_signs(q):
    return q | {"codes": q["codes"] & 0x77}


def inverted_signs(q):
    return q | {"codes": q["codes"] ^ 0x88}


def rolled_codes(q):
    elements = torch.stack([q["codes"] & 0xF, q["codes"] >> 4], -1).flatten(-2).roll(1, -1)
    return q | {"codes": elements[:, 0::2] | elements[:, 1::2] << 4}


def big_endian(q):
    return q | {"codes": q["codes"].unflatten(-1, (-1, 4)).flip(-1).flatten(-2)}


def transposed_scales(q):
    return q | {"scales": q["scales"].T.contiguous()}


def transposed_words(q):
    return q | {"scales": q["scales"].contiguous().view(torch.int32).T.contiguous()}


def padded_rows(q):
    rows = -(-len(q["scales"]) // 128) * 128
    return q | {"scales": torch.cat([q["scales"], q["scales"].new_zeros(rows, 32)])[:rows]}


def powers_of_two(q):
    """E8M0 bytes where E4M3 ones are asked for."""
    s = torch.from_numpy(E4M3).float()[q["scales"].long()]
    return q | {"scales": (s.log2().ceil() + 127).to(torch.uint8)}
