"""Exact models of six recipes, one number at a time: the specification every implementation is held
against.

Written from the definitions alone, in `fractions.Fraction`: the nearest value by distance, each
float32 rounding of a definition spelled out. `oracles.py` holds the same definitions for whole
arrays; `test_oracles.py` holds the two together.

May be changed: wording. May not: importing anything from `nvfp4lab`, dividing or multiplying in
floating point, or turning a definition into thresholds; then it would no longer be an independent
witness.

Conventions: a number is given as the bits of a float32, which holds every bf16 and fp16 value; a
magnitude is a Fraction, INF, or None for NaN; blocks are 16 consecutive elements; scale codes are
E4M3 bytes, except for `nvfp4-exact-scale`, whose scales are magnitudes themselves.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np

BLOCK = 16
NAMES = ("nvfp4", "nvfp4-token", "nvfp4-tensor", "nvfp4-exact-scale", "seed", "seed-as-meant")
SEEDS = ("seed", "seed-as-meant")
INF = math.inf
LARGEST_FLOAT32 = (2 - Fraction(1, 2**23)) * 2**127
LARGEST_BFLOAT16 = (2 - Fraction(1, 2**7)) * 2**127
E2M1 = tuple(Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12))
SATURATED, NOT_A_NUMBER = 0x7E, 0x7F  # the two E4M3 bytes with a meaning of their own


def scale_value(code):
    """The value of an E4M3 code by the normal formula; 0x7F gives the 480 the seed divides by."""
    exponent, mantissa = code >> 3, Fraction(code & 7, 8)
    return mantissa / 2**6 if exponent == 0 else (1 + mantissa) * Fraction(2) ** (exponent - 7)


E4M3 = tuple(scale_value(code) for code in range(NOT_A_NUMBER))


# ---- The specification: one number at a time, in exact rationals ----


def split_float32(bits) -> tuple[bool, Any]:
    """(negative, magnitude) of a float32 bit pattern."""
    exponent, fraction = (bits >> 23) & 0xFF, bits & 0x7FFFFF
    if exponent == 0xFF:
        return bool(bits >> 31), None if fraction else INF
    significand = fraction if exponent == 0 else fraction | 1 << 23
    return bool(bits >> 31), Fraction(significand) * Fraction(2) ** (max(exponent, 1) - 150)


def floor_log2(value):
    """The largest integer n with 2 ** n <= value, for a positive Fraction."""
    n = value.numerator.bit_length() - value.denominator.bit_length()
    return n if Fraction(2) ** n <= value else n - 1


def round_float32(value):
    """The nearest float32 of a magnitude: ties to even, gradual underflow, overflow to INF."""
    if value == 0 or value == INF:
        return value
    step = Fraction(2) ** (max(floor_log2(value), -126) - 23)
    rounded = round(value / step) * step  # Fraction rounds half to even
    return rounded if rounded <= LARGEST_FLOAT32 else INF


def nearest(value, table, ties):
    """The index of the entry nearest to value; ties to the even index, or "away" to the larger."""
    if value == INF:
        return len(table) - 1
    return min(
        range(len(table)), key=lambda i: (abs(table[i] - value), i & 1 if ties == "even" else -i)
    )


def token_outer_exact(amax):
    """clamp(the smallest power of two >= amax / 2688, 2^-100, 2^117); 1 when amax is zero."""
    if amax == 0:
        return Fraction(1)
    exponent = -100
    while exponent < 117 and Fraction(2) ** exponent * 2688 < amax:
        exponent += 1
    return Fraction(2) ** exponent


def tensor_outer_exact(amax):
    """float32(amax / 2688); 1 when amax is zero."""
    return Fraction(1) if amax == 0 else round_float32(amax / 2688)


def seed_scale_code_exact(amax, as_meant):
    """The seed's conversion: exponent and mantissa treated apart, the mantissa rounded half up."""
    amax = max(amax, round_float32(Fraction(1, 10**4)))
    scale = round_float32(amax / 6) if amax != INF else INF
    if scale == INF:  # exponent field 255, mantissa field 0
        exponent, mantissa = 15, 0
    else:
        power = floor_log2(scale)
        mantissa = math.floor((scale / Fraction(2) ** power - 1) * 8 + Fraction(1, 2))
        exponent = power + 7
        if exponent < 0:  # as written, the unsigned difference wraps and is then clamped to the top
            exponent = 0 if as_meant else 15
        exponent = min(exponent, 15)
    if mantissa == 8:
        mantissa, exponent = 0, min(exponent + 1, 15)
    return exponent << 3 | mantissa


def scale_code_exact(name, amax, outer: Any = None) -> Any:
    """The scale of a block of magnitude amax: a byte, for `nvfp4-exact-scale` a magnitude."""
    if name in SEEDS:  # its maximum skips NaN, so a block of nothing else is a zero block
        return seed_scale_code_exact(Fraction(0) if amax is None else amax, name == "seed-as-meant")
    if amax is None:
        return None if name == "nvfp4-exact-scale" else NOT_A_NUMBER
    if amax == INF:
        return INF if name == "nvfp4-exact-scale" else SATURATED
    scale = round_float32((amax / outer if name == "nvfp4-token" else amax) / 6)
    if name == "nvfp4-exact-scale":
        return scale
    if name == "nvfp4-tensor":
        if outer == 0:
            return SATURATED if scale else 0
        scale = round_float32(scale / outer)
    return nearest(scale, E4M3, "even")


def element_code_exact(name, bits, scale_code: Any, outer: Any = None) -> int:
    """The 4-bit code of one float32 bit pattern in a block of this scale."""
    negative, magnitude = split_float32(bits)
    if name in SEEDS:
        if magnitude is None:
            return 15
        reciprocal = round_float32(
            1 / max(scale_value(scale_code), round_float32(Fraction(1, 10**6)))
        )
        scaled = INF if magnitude == INF else round_float32(magnitude * reciprocal)
        return nearest(scaled, E2M1, "away") | (8 if negative and scaled != 0 else 0)
    sign = 8 if negative else 0
    if scale_code is None or (name != "nvfp4-exact-scale" and scale_code == NOT_A_NUMBER):
        return 7
    scale = scale_code if name == "nvfp4-exact-scale" else scale_value(scale_code)
    if name == "nvfp4-token":
        scale = scale * outer
    if name == "nvfp4-tensor":
        scale = round_float32(scale * outer)
    if scale == 0:
        return sign
    if magnitude == INF:
        return sign | 7
    if scale == INF:
        return sign
    quotient = magnitude / scale
    if name in ("nvfp4-tensor", "nvfp4-exact-scale"):  # the others divide exactly
        quotient = round_float32(quotient)
    return sign | nearest(quotient, E2M1, "even")


def quantize_exact(name, x, outer: Any = None) -> tuple[np.ndarray, np.ndarray, Any]:
    """`quantize`, one number at a time; for small arrays."""
    x = np.ascontiguousarray(x, np.float32)
    rows = x.view(np.uint32).reshape(-1, x.shape[-1]).tolist()
    sizes = [[split_float32(bits)[1] for bits in row] for row in rows]
    outers: list[Any] = [Fraction(float(outer)) if outer is not None else None] * len(rows)
    if name == "nvfp4-token":
        outers = [token_outer_exact(outer_amax_exact(row)) for row in sizes]
    if name == "nvfp4-tensor" and outer is None:
        outers = [tensor_outer_exact(outer_amax_exact([m for row in sizes for m in row]))] * len(
            rows
        )
    codes: list[int] = []
    scales: list[Any] = []
    for row, magnitudes, row_outer in zip(rows, sizes, outers, strict=True):
        for k in range(0, len(row), BLOCK):
            amax = block_amax_exact(name, magnitudes[k : k + BLOCK])
            scales.append(scale_code_exact(name, amax, row_outer))
            codes += [
                element_code_exact(name, b, scales[-1], row_outer) for b in row[k : k + BLOCK]
            ]
    if name == "nvfp4-exact-scale":
        scales = [math.nan if s is None else float(s) for s in scales]
    shape = (*x.shape[:-1], x.shape[-1] // BLOCK)
    outer_array = None
    if name == "nvfp4-token":
        outer_array = np.array([float(o) for o in outers], np.float32).reshape((*x.shape[:-1], 1))
    if name == "nvfp4-tensor":
        outer_array = np.float32(float(outers[0]))
    kind = np.float32 if name == "nvfp4-exact-scale" else np.uint8
    scale_array = np.array(scales, kind).reshape(shape)
    return np.array(codes, np.uint8).reshape(x.shape), scale_array, outer_array


def block_amax_exact(name, magnitudes):
    """The largest magnitude; NaN (None) wins except in the seed, which skips it."""
    numbers = [m for m in magnitudes if m is not None]
    if len(numbers) < len(magnitudes) and name not in SEEDS:
        return None
    return max(numbers, default=Fraction(0))


def outer_amax_exact(magnitudes):
    """The largest magnitude for an outer scale: NaN skipped, INF taken for LARGEST_BFLOAT16."""
    return max(
        (LARGEST_BFLOAT16 if m == INF else m for m in magnitudes if m is not None),
        default=Fraction(0),
    )


def decode_exact(name, code, scale_code, outer=None):
    """The float32 that a code stands for, as a Python float: E2M1 * scale * outer, rounded once."""
    if scale_code is None or (name != "nvfp4-exact-scale" and scale_code == NOT_A_NUMBER):
        return math.nan
    scale = scale_code if name == "nvfp4-exact-scale" else scale_value(scale_code)
    if scale == INF:
        return math.nan if code & 7 == 0 else math.copysign(INF, -1 if code & 8 else 1)
    value = round_float32(E2M1[code & 7] * scale * (1 if outer is None else outer))
    if name == "nvfp4-token":
        value = min(value, LARGEST_FLOAT32)
    return math.copysign(float(value), -1 if code & 8 else 1)
