"""The formats as Triton functions: E4M3 and E2M1 encoders, the outer scale of a token.

Integer and float32 arithmetic only, without inline PTX and without `.to(tl.float8e4nv)` (which
Triton's interpreter mis-rounds), so that every target and the interpreter give the same bits. Each
function is proved over all its inputs in tests/test_kernels.py; change one and run that.
"""

import triton
import triton.language as tl

BF16_INF = tl.constexpr(0x7F80)


@triton.jit
def encode_e4m3(value):
    """float32 >= 0 -> E4M3 code, int32: to nearest even, gradual subnormals, saturating at 0x7E.

    The code is the float32's bits from the 20th up, exponent and mantissa as one number, so that a
    carry runs on into the exponent. Below 2^-6 the significand, its leading bit shown, is shifted
    until its last place is 2^-9 instead. NaN is the caller's.

    All in integers: a float32 sum with 2^14 would round a subnormal as well, but a compiler may
    fuse it with the multiplication that made `value`, and a tie then no longer is one.
    """
    bits = value.to(tl.int32, bitcast=True)
    significand = (bits & 0x7FFFFF) | 0x800000
    to_last_place = tl.minimum(141 - (bits >> 23), 31)
    is_subnormal = value < 0.015625
    kept = tl.where(is_subnormal, significand, bits)
    dropped = tl.where(is_subnormal, to_last_place, 20)
    code = (kept + (1 << (dropped - 1)) - 1 + ((kept >> dropped) & 1)) >> dropped
    return tl.minimum(tl.where(is_subnormal, code, code - (120 << 3)), 0x7E)


@triton.jit
def decode_e4m3(code):
    """E4M3 code 0 to 0x7E, int32 -> float32, exactly."""
    normal = ((code << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    return tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)


@triton.jit
def encode_e2m1(magnitude, reciprocal):
    """The E2M1 code, int32 0 to 7, of magnitude * reciprocal = y: to nearest even, saturating.

    magnitude: float32 that is a BF16 number, or Inf; reciprocal: 1 / scale rounded to float32,
    times a power of two if wanted, or 0.

    The steps of E2M1 are 1/2, 1 and 2, so its code is rne(min(2y, y + 2, y/2 + 4)), at most 7. All
    of it is doubled here and 16 added: min(4y + 16, 2y + 20, y + 24, 30) lies in [16, 32), where
    one last place is 2^-19. At a tie the first product is at most 7, so the error of the reciprocal
    and of a product that is rounded on its own is below 7 * 2^-23, less than half a last place: a y
    that is a tie by exact division becomes the tie exactly. Any other quotient of a BF16 number and
    an E4M3 value is further than 2^-9 from one. Adding 2^24, whose last place is 2, then rounds
    ties to even, and the code is left in the last three bits.
    """
    steps_of_half = tl.fma(magnitude, 4 * reciprocal, 16.0)
    steps_of_one = tl.fma(magnitude, 2 * reciprocal, 20.0)
    steps_of_two = tl.fma(magnitude, reciprocal, 24.0)
    doubled = tl.minimum(tl.minimum(steps_of_half, steps_of_one), tl.minimum(steps_of_two, 30.0))
    return (doubled + 16777216.0).to(tl.int32, bitcast=True) & 7


@triton.jit
def token_outer_exponent(amax_bits):
    """The exponent field of the smallest power of two >= a / 2688, clamped to 2^-100 .. 2^117.

    amax_bits: the bits of the row's amax a as BF16, int32, finite. 2688 is 2^11 (1 + 40/128), so
    dividing takes 11 off the exponent field, and rounding up adds 1 where the mantissa is above
    40: adding 87 carries then. 1.0 for a zero row.
    """
    exponent = ((amax_bits + 87) >> 7) - 11
    return tl.where(amax_bits == 0, 127, tl.minimum(tl.maximum(exponent, 27), 244))


@triton.jit
def power_of_two(exponent):
    """The float32 with this exponent field (1 to 254) and mantissa 0."""
    return (exponent << 23).to(tl.float32, bitcast=True)
