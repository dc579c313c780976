"""The steps that take blocks to bytes: amax, scale code, element codes.

Each is here in plain Triton, one number at a time, for every target and the interpreter; where
PACKED, on sm_90 and up, `packed` does the same two numbers at a time. Both are proved over all
inputs in tests/test_steps.py. Words are int32 [BLOCKS, 4]: the BF16 pairs of the first or of the
second halves of blocks, the even element low.

NAN_SPOILS: a NaN makes the block's scale NaN and all its codes 7, and zero keeps its sign. If not,
NaN is passed over in the amax and has code 0, and zero has no sign. Whoever changes a step changes
it in `packed` too, and runs those tests.
"""

import triton
import triton.language as tl

from nvfp4lab.kernels import packed
from nvfp4lab.kernels.numerics import (
    BF16_INF,
    decode_e4m3,
    encode_e2m1,
    encode_e4m3,
    power_of_two,
)


@triton.jit
def block_amax(first, second, NAN_SPOILS: tl.constexpr, PACKED: tl.constexpr):
    """The bits of each block's largest magnitude, int32 [BLOCKS]; NaN above Inf."""
    if PACKED:
        return packed.block_amax(first, second, NAN_SPOILS)
    if not NAN_SPOILS:
        first, second = without_nan(first), without_nan(second)
    even = tl.maximum(first & 0x7FFF, second & 0x7FFF)
    odd = tl.maximum((first >> 16) & 0x7FFF, (second >> 16) & 0x7FFF)
    return tl.max(tl.maximum(even, odd), axis=1)


@triton.jit
def without_nan(words):
    """The same with 0 for NaN."""
    even, odd = words & 0xFFFF, words & -0x10000
    even = tl.where((even & 0x7FFF) > BF16_INF, 0, even)
    return even | tl.where(((odd >> 16) & 0x7FFF) > BF16_INF, 0, odd)


@triton.jit
def divide(x, y, reciprocal, PACKED: tl.constexpr):
    """x / y, rounded to nearest; reciprocal: 1 / y, rounded to nearest."""
    return packed.divide(x, y, reciprocal) if PACKED else tl.div_rn(x, y)


@triton.jit
def encode_scale(raw, PACKED: tl.constexpr):
    """float32 >= 0 [BLOCKS] -> E4M3 code, int32, to nearest even, saturating, and its value."""
    if PACKED:
        return packed.encode_scale(raw)
    code = encode_e4m3(raw)
    return code, decode_e4m3(code)


@triton.jit
def encode_divided(
    words, scale, outer_exponent, has_inf, spoiled, NAN_SPOILS: tl.constexpr, PACKED: tl.constexpr
):
    """The codes of x / (scale * outer), to nearest even as if divided exactly, two to a byte.

    scale: float32 [BLOCKS], the value of an E4M3 code; outer_exponent: the exponent field of the
    power of two that is the outer scale; has_inf: whether there may be an Inf, None where the outer
    scale is 1; spoiled: bool [BLOCKS]. -> uint8 [BLOCKS, 4].
    """
    if PACKED:
        return packed.encode_divided(words, scale, outer_exponent, has_inf, spoiled, NAN_SPOILS)
    if not NAN_SPOILS:
        words = without_nan(words)
    inverse = tl.div_rn(1.0, tl.where(scale == 0, 1.0, scale)) * power_of_two(254 - outer_exponent)
    reciprocal = tl.where(scale == 0, 0.0, inverse)[:, None]
    even = _divided(words, reciprocal, NAN_SPOILS)
    odd = _divided(words >> 16, reciprocal, NAN_SPOILS)
    return tl.where(spoiled[:, None], 0x77, even | (odd << 4)).to(tl.uint8)


@triton.jit
def _divided(bits, reciprocal, NAN_SPOILS: tl.constexpr):
    """The code with its sign of the BF16 number in the lower half of each word."""
    code = encode_e2m1(((bits & 0x7FFF) << 16).to(tl.float32, bitcast=True), reciprocal)
    signed = code | ((bits >> 12) & 8)
    return signed if NAN_SPOILS else tl.where(code == 0, 0, signed)


@triton.jit
def thresholds(outer, scale, PACKED: tl.constexpr):
    """The BF16 magnitudes, as bits, from which on (x / outer) / scale rounds to 0.5, 1, 1.5 and 2.

    Both quotients are rounded to float32 first, and ties are to even codes. outer: float32, normal
    or Inf (then all four are above Inf); scale: float32 [BLOCKS], the value of an E4M3 code that is
    not zero. -> four int32 [BLOCKS]. The next codes come 1 (from 1.5 and 2) and 2 (from 1.5)
    binades higher: 2.5 and 5 are 2 and 4 times 1.25, and 3.5 is twice 1.75.

    A midpoint t times the scale s has so few bits that the second quotient is above, at or below t
    just as the first is above, at or below ts. So the first decides, and of the BF16 numbers only
    the one nearest to ts * outer is in doubt.
    """
    if PACKED:
        return packed.thresholds(outer, scale)
    t1 = _least_magnitude(0.25 * scale, outer, False)
    t2 = _least_magnitude(0.75 * scale, outer, True)
    t3 = _least_magnitude(1.25 * scale, outer, False)
    t4 = _least_magnitude(1.75 * scale, outer, True)
    return t1, t2, t3, t4


@triton.jit
def _least_magnitude(limit, outer, TIE_REACHES: tl.constexpr):
    """The bits of the least BF16 number whose quotient by outer is above the limit, or at it."""
    nearest = ((limit * outer).to(tl.int32, bitcast=True) + 0x8000) >> 16
    quotient = tl.div_rn((nearest << 16).to(tl.float32, bitcast=True), outer)
    reaches = (quotient >= limit) if TIE_REACHES else (quotient > limit)
    return tl.where(reaches, nearest, nearest + 1)


@triton.jit
def encode_counted(words, t1, t2, t3, t4, PACKED: tl.constexpr):
    """The codes that `thresholds` give, two to a byte: zero has no sign.

    words: no NaN. -> uint8 [BLOCKS, 4].
    """
    if PACKED:
        return packed.encode_counted(words, t1, t2, t3, t4)
    even, odd = _counted(words, t1, t2, t3, t4), _counted(words >> 16, t1, t2, t3, t4)
    return (even | (odd << 4)).to(tl.uint8)


@triton.jit
def _counted(bits, t1, t2, t3, t4):
    """The code with its sign of the BF16 number in the lower half of each word."""
    magnitude = bits & 0x7FFF
    code = _reached(magnitude, t1) + _reached(magnitude, t2)
    code += _reached(magnitude, t3) + _reached(magnitude, t3 + 0x80)
    code += _reached(magnitude, t3 + 0x100)
    code += _reached(magnitude, t4) + _reached(magnitude, t4 + 0x80)
    return tl.where(code == 0, 0, code | ((bits >> 12) & 8))


@triton.jit
def _reached(magnitude, threshold):
    return (magnitude >= threshold[:, None]).to(tl.int32)
