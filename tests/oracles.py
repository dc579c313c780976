"""The independent models of `oracles_exact.py` for whole arrays, on int64 integers alone.

A magnitude is significand * 2 ** exponent; a float32 rounding is an integer shift with ties to
even; the nearest code is the one at the smallest exact distance, found by comparing integers. Fast
enough for proofs over every bf16 input.

May be changed: the speed. May not: importing anything from `nvfp4lab`, arithmetic in floating point
(apart from exact conversions at the end), or thresholds; then it would no longer be an independent
witness.

`quantize(name, x, outer=None)`: x float32 (..., K), K % 16 == 0 -> codes uint8 (..., K), one 4-bit
code to a byte; scale codes uint8 (..., K/16), float32 scales for `nvfp4-exact-scale`; the outer
scale, float32 (..., 1) for `nvfp4-token`, () for `nvfp4-tensor`, else None.
"""

from typing import Any, NamedTuple

import numpy as np
from oracles_exact import BLOCK, E2M1, E4M3, NAMES, NOT_A_NUMBER, SATURATED, SEEDS, scale_value

__all__ = [
    "BLOCK",
    "NAMES",
    "decode",
    "element_code",
    "outer_scale",
    "quantize",
    "scale_code",
    "scale_value",
]

CHUNK = 1 << 18  # elements at a time, so that the intermediates stay small
ELEMENTS = tuple(int(2 * value) for value in E2M1)  # E2M1 in units of 1/2
SCALES = tuple(int(512 * value) for value in E4M3)  # E4M3 in units of 2^-9
SCALE_UNITS = np.array(
    [int(512 * scale_value(code)) for code in range(128)]
)  # 0x7F: the seed's 480
BFLOAT16_MAX = 0x7F7F0000  # the largest finite bfloat16, as float32 bits
INFINITY = 0x7F800000


class Magnitude(NamedTuple):
    """significand * 2 ** exponent (int64 arrays, significand <= 2^24), unless inf."""

    significand: np.ndarray
    exponent: np.ndarray
    inf: np.ndarray


def split(x):
    """(negative, nan, Magnitude) of a float32 array; a NaN has an arbitrary magnitude."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.int64)
    size = bits & 0x7FFFFFFF
    return bits >> 31 == 1, size > INFINITY, magnitude_of_bits(size)


def magnitude_of_bits(size):
    """The Magnitude of float32 bits without a sign."""
    field, fraction = size >> 23, size & 0x7FFFFF
    significand = np.where(field == 0, fraction, fraction | 1 << 23)
    return Magnitude(significand, np.maximum(field, 1) - 150, size == INFINITY)


def as_float32(value):
    """The float32 array of a Magnitude that float32 holds exactly."""
    result = np.ldexp(value.significand.astype(np.float64), value.exponent.astype(np.int32))
    return np.where(value.inf, np.inf, result).astype(np.float32)


def count_bits(n):
    """The bit length of non-negative int64."""
    n, length = n.copy(), np.zeros_like(n)
    for step in (32, 16, 8, 4, 2, 1):
        large = n >= 1 << step
        length += np.where(large, step, 0)
        n = np.where(large, n >> step, n)
    return length + n


def normalise(value):
    """The same Magnitude with a significand of 24 bits (zero stays zero)."""
    shift = 24 - count_bits(value.significand)
    return Magnitude(value.significand << shift, value.exponent - shift, value.inf)


def round_float32(significand, exponent, inf):
    """significand * 2 ** exponent to the nearest float32: ties to even, overflow to inf.

    Exact for a significand below 2^61.
    """
    drop = np.maximum(count_bits(significand) - 24, -149 - exponent)
    drop = np.clip(drop, 0, 62)  # at 62 half a unit exceeds any significand: the result is zero
    kept, rest, half = significand >> drop, significand & ((1 << drop) - 1), (1 << drop) >> 1
    up = (rest > half) | ((rest == half) & (kept & 1 == 1))
    kept = kept + (up & (drop > 0))
    exponent = exponent + drop
    carried = kept == 1 << 24
    kept, exponent = np.where(carried, kept >> 1, kept), np.where(carried, exponent + 1, exponent)
    return Magnitude(kept, exponent, inf | (count_bits(kept) + exponent > 128))


def divide(a, b):
    """float32(a / b) for finite nonzero b."""
    a, b = normalise(a), normalise(b)
    quotient, rest = np.divmod(a.significand << 36, np.maximum(b.significand, 1))
    odd_if_inexact = quotient << 1 | (rest != 0)
    return round_float32(odd_if_inexact, a.exponent - 37 - b.exponent, a.inf)


def multiply(a, b):
    """float32(a * b) for finite b."""
    return round_float32(a.significand * b.significand, a.exponent + b.exponent, a.inf)


def integer(n, exponent=0):
    """The Magnitude n * 2 ** exponent, as 0-d arrays."""
    return Magnitude(np.asarray(n), np.asarray(exponent), np.asarray(False))


# The seed's two literals as float32: 13743895 is the integer nearest 1e-4 * 2^37, 8796093 that
# nearest 1e-6 * 2^43.
AMAX_FLOOR, SCALE_FLOOR = integer(13743895, -37), integer(8796093, -43)


def nearest(value, table, unit, ties):
    """The index i of the table[i] * unit nearest to value; ties to the even index, or "away" to the
    larger one.

    Once aligned to a common exponent the two sides are integers. An alignment beyond (-28, 30) bits
    is cut there: by then the value is below half of any nonzero candidate, or above twice the
    largest.
    """
    shift = value.exponent - unit.exponent
    left = value.significand << np.clip(shift, 0, 30)
    scale = unit.significand << np.clip(-shift, 0, 28)
    order = sorted(range(len(table)), key=lambda i: i & 1 if ties == "even" else -i)
    best = np.full(left.shape, order[0], np.uint8)
    closest = np.abs(left - table[order[0]] * scale)
    for i in order[1:]:
        distance = np.abs(left - table[i] * scale)
        best = np.where(distance < closest, np.uint8(i), best)
        closest = np.minimum(closest, distance)
    return np.where(value.inf, np.uint8(len(table) - 1), best)


def outer_scale(name, x):
    """The outer scale: float32 (..., 1) for `nvfp4-token`, () for `nvfp4-tensor`, else None."""
    size = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.int64) & 0x7FFFFFFF
    size = np.where(size == INFINITY, BFLOAT16_MAX, np.where(size > INFINITY, 0, size))
    if name == "nvfp4-token":
        amax = normalise(magnitude_of_bits(size.max(axis=-1, keepdims=True)))
        power = (
            amax.exponent + 12
        )  # 2^power * 2688 is 0.656 * 2^24 * 2^exponent, the significand 0.5 .. 1
        power = np.where(amax.significand <= 21 << 19, power, power + 1)
        power = np.where(amax.significand == 0, 0, np.clip(power, -100, 117))
        return as_float32(Magnitude(np.ones_like(power), power, power > 999))
    if name == "nvfp4-tensor":
        amax = magnitude_of_bits(size.max())
        return (
            np.float32(1) if amax.significand == 0 else as_float32(divide(amax, integer(2688)))[()]
        )
    return None


def scale_code(name, amax, outer=None):
    """The scale codes of blocks of magnitude amax (float32; NaN: a NaN in the block), elementwise.

    `outer` broadcasts against amax. For `nvfp4-exact-scale` the scales themselves, float32.
    """
    _, nan, size = split(amax)
    if name in SEEDS:
        return seed_scale_code(size, nan, name == "seed-as-meant")
    if name == "nvfp4-token":
        size = size._replace(exponent=size.exponent - power_of(outer))
    scale = divide(size, integer(6))
    if name == "nvfp4-exact-scale":
        return np.where(nan, np.float32(np.nan), as_float32(scale))
    saturated = size.inf
    if name == "nvfp4-tensor":
        divisor = split(outer)[2]
        saturated = saturated | ((divisor.significand == 0) & (scale.significand != 0))
        scale = divide(scale, divisor)
        scale = scale._replace(significand=np.where(divisor.significand == 0, 0, scale.significand))
    code = nearest(scale, SCALES, integer(1, -9), "even")
    return np.where(nan, np.uint8(NOT_A_NUMBER), np.where(saturated, np.uint8(SATURATED), code))


def power_of(outer):
    """The exponent of a power of two."""
    size = normalise(split(outer)[2])
    assert np.all(size.significand == 1 << 23)
    return size.exponent + 23


def seed_scale_code(amax, nan, as_meant):
    """The seed's scale byte; a NaN amax stands for a block of nothing but NaN, taken for zero."""
    amax = normalise(amax)
    small = nan | (amax.exponent < -37) | ((amax.exponent == -37) & (amax.significand < 13743895))
    amax = Magnitude(
        np.where(small, AMAX_FLOOR.significand, amax.significand),
        np.where(small, AMAX_FLOOR.exponent, amax.exponent),
        amax.inf & ~nan,
    )
    scale = divide(amax, integer(6))
    mantissa = (scale.significand - (1 << 23) + (1 << 19)) >> 20  # eighths above 1, half up
    exponent = scale.exponent + 23 + 7
    exponent = np.where(exponent < 0, 0 if as_meant else 15, np.minimum(exponent, 15))
    mantissa = np.where(amax.inf, 0, mantissa)
    exponent = np.where(amax.inf, 15, exponent)
    exponent = np.where(mantissa == 8, np.minimum(exponent + 1, 15), exponent)
    return (exponent << 3 | mantissa & 7).astype(np.uint8)


def element_code(name, x, scale_codes, outer=None):
    """The 4-bit codes of x under these scale codes and outer scales, elementwise."""
    negative, nan, size = split(x)
    sign = np.where(negative, np.uint8(8), np.uint8(0))
    if name == "nvfp4-exact-scale":
        _, bad, unit = split(scale_codes)
    else:
        scale_codes = np.asarray(scale_codes)
        bad, units = scale_codes == NOT_A_NUMBER, SCALE_UNITS[scale_codes]
        unit = Magnitude(units, np.full_like(units, -9), np.zeros_like(bad))
    if name in SEEDS:
        below = unit.significand == 0  # zero is the only scale below 1e-6
        unit = Magnitude(
            np.where(below, SCALE_FLOOR.significand, unit.significand),
            np.where(below, SCALE_FLOOR.exponent, unit.exponent),
            unit.inf,
        )
        scaled = multiply(size, divide(integer(1), unit))
        code = nearest(scaled, ELEMENTS, integer(1, -1), "away")
        code = code | np.where(scaled.inf | (scaled.significand != 0), sign, np.uint8(0))
        return np.where(nan, np.uint8(15), code)
    if name == "nvfp4-token":
        unit = unit._replace(exponent=unit.exponent + power_of(outer))
    if name == "nvfp4-tensor":
        unit = multiply(unit, split(outer)[2])
    flat = unit.inf | (unit.significand == 0)
    if name in ("nvfp4-tensor", "nvfp4-exact-scale"):
        code = nearest(divide(size, unit), ELEMENTS, integer(1, -1), "even")
    else:
        code = nearest(size, ELEMENTS, unit._replace(exponent=unit.exponent - 1), "even")
    code = np.where(flat & ~(size.inf & unit.inf), np.uint8(0), code)
    return np.where(bad, np.uint8(7), sign | code)


def quantize(name, x, outer=None) -> tuple[np.ndarray, np.ndarray, Any]:
    """Codes, scale codes and outer scale of x; `outer` is taken by `nvfp4-tensor` alone."""
    if outer is not None and name != "nvfp4-tensor":
        raise ValueError(
            f"an outer scale was given for {name!r}; expected it for 'nvfp4-tensor' alone"
        )
    x = np.ascontiguousarray(x, np.float32)
    outer = outer_scale(name, x) if outer is None else np.float32(outer)
    blocks = x.reshape(-1, BLOCK)
    size = blocks.view(np.uint32).astype(np.int64) & 0x7FFFFFFF
    if name in SEEDS:
        size = np.where(size > INFINITY, 0, size)
    amax = size.max(axis=1).astype(np.uint32).view(np.float32)
    by_block = np.broadcast_to(
        np.float32(1) if outer is None else outer, (*x.shape[:-1], x.shape[-1] // BLOCK)
    )
    by_block = np.ascontiguousarray(by_block).reshape(-1)
    codes, scales = [], []
    for k in range(0, len(blocks), CHUNK // BLOCK):
        part = slice(k, k + CHUNK // BLOCK)
        scales.append(scale_code(name, amax[part], by_block[part]))
        codes.append(element_code(name, blocks[part], scales[-1][:, None], by_block[part, None]))
    shape = (*x.shape[:-1], x.shape[-1] // BLOCK)
    return np.concatenate(codes).reshape(x.shape), np.concatenate(scales).reshape(shape), outer


def decode(name, codes, scale_codes, outer=None):
    """E2M1 * scale * outer, rounded once to float32: (..., K); codes (..., K), scale codes (...,
    K/16).

    A scale of NaN (0x7F) gives NaN. `nvfp4-token` is clamped to the largest finite float32.
    """
    scale_codes = np.repeat(scale_codes, BLOCK, axis=-1)
    element = np.array(ELEMENTS)[codes & 7]
    if name == "nvfp4-exact-scale":
        _, nan, scale = split(scale_codes)
    else:
        nan, units = scale_codes == NOT_A_NUMBER, SCALE_UNITS[scale_codes]
        scale = Magnitude(units, np.full_like(units, -9), np.zeros_like(nan))
    nan = nan | (scale.inf & (element == 0))
    factor = integer(1) if outer is None else split(outer)[2]
    product = element * scale.significand * factor.significand  # 4 + 24 or 4 + 18 + 24 bits
    value = round_float32(product, scale.exponent + factor.exponent - 1, scale.inf)
    result = as_float32(value)
    if name == "nvfp4-token":
        result = np.minimum(result, np.finfo(np.float32).max)
    result = np.where(codes & 8, -result, result)
    return np.where(nan, np.float32(np.nan), result)
