"""The steps of `steps` on two BF16 numbers at a time: inline PTX, for sm_90 and up.

Arguments, results and bytes are those of the functions of the same names there, in plain Triton,
which call these where the target has them. Proved over all inputs in tests/test_steps.py, on a
GPU only; change one and run that. The four words of a call must be of one block.

Short they are because an addition and a clamp of 16-bit integers, and the minimum of three numbers,
are each one instruction, and a product and a sum of FP16 numbers are rounded once. One call does
four words, half a block; the text below is joined from pieces.
"""

# pyright: reportArgumentType=false

import struct

import triton
import triton.language as tl

from nvfp4lab.kernels.numerics import BF16_INF

WORDS = range(4)  # of one call


def _operands(arguments: int) -> list[list[str]]:
    """The names $1, $2, ... of the operands: a list of four, one a word, for each argument."""
    return [[f"${1 + 4 * argument + word}" for word in WORDS] for argument in range(arguments)]


def _magnitudes(words: list[str], nan_is_zero: bool) -> str:
    """x<j>: word j without its signs, NaN as zero if asked for."""
    text = "".join(f"and.b32 x{j}, {words[j]}, 0x7FFF7FFF;\n" for j in WORDS)
    if nan_is_zero:
        text += "mov.b32 y, 0;\n" + "".join(f"max.bf16x2 x{j}, x{j}, y;\n" for j in WORDS)
    return text


def _nibbles(words: list[str], keeps_sign_of_zero: bool, into: str) -> str:
    """The codes 0 to 7 in the bytes of c0 and c2, with the signs of the words: eight nibbles.

    c0 holds the codes of words 0 and 1 in the order even, even, odd, odd, c2 those of words 2 and
    3; s has their signs, each all over its byte.
    """
    text = ""
    for j in (0, 2):
        text += f"prmt.b32 s, {words[j]}, {words[j + 1]}, 0xFBD9;\n"
        if not keeps_sign_of_zero:  # 7 more reaches bit 3 from code 1 on
            text += f"add.u32 y, c{j}, 0x07070707; and.b32 s, s, y;\n"
        text += f"and.b32 s, s, 0x08080808; or.b32 c{j}, c{j}, s;\n"
    text += "prmt.b32 s, c0, c2, 0x5410; prmt.b32 y, c0, c2, 0x7632;\n"
    return text + f"mad.lo.u32 {into}, y, 16, s;\n"


_REGISTERS = ".reg .b32 x<4>, c<4>, y, a, b, s, one, two, three, five, half, last;\n"


def _companding(nan_is_zero: bool, keeps_sign_of_zero: bool) -> str:
    """As `encode_divided` says. The constants are 2, 1/2, 1, 3, 5 and 1023 in FP16."""
    words, shift, bound, reciprocal, spoiled = _operands(5)
    text = _REGISTERS + "mov.b32 two, 0x40004000; mov.b32 half, 0x38003800;\n"
    text += f"mul.f16x2 two, {reciprocal[0]}, two; mul.f16x2 half, {reciprocal[0]}, half;\n"
    text += "mov.b32 one, 0x3C003C00; mov.b32 three, 0x42004200; mov.b32 five, 0x45004500;\n"
    text += "mov.b32 last, 0x63FE63FE;\n" + _magnitudes(words, nan_is_zero)
    for j in WORDS:
        text += (
            f"add.s16x2 x{j}, x{j}, {shift[j]}; min.relu.s16x2 x{j}, x{j}, {bound[j]};\n"
            f"shl.b32 x{j}, x{j}, 3;\n"
            f"fma.rn.f16x2 c{j}, x{j}, two, one;\n"
            f"fma.rn.f16x2 y, x{j}, {reciprocal[j]}, three; min.f16x2 c{j}, c{j}, y;\n"
            f"fma.rn.f16x2 y, x{j}, half, five; min.f16x2 c{j}, c{j}, y;\n"
            f"add.f16x2 c{j}, c{j}, last;\n"
        )
    text += "prmt.b32 c0, c0, c1, 0x6240; prmt.b32 c2, c2, c3, 0x6240;\n"
    text += _nibbles(words, keeps_sign_of_zero, into="s")
    return "{\n" + text + f"lop3.b32 $0, s, {spoiled[0]}, 0x77777777, 0xB8;\n}}"


def _counting() -> str:
    """As `encode_counted` says: one of the first and of the second term counts, of the third three
    binades, of the fourth two."""
    words, first, second, third, fourth = _operands(5)
    text = _REGISTERS + _magnitudes(words, nan_is_zero=False)
    text += "mov.b32 one, 0x00010001; mov.b32 two, 0x017F017F; mov.b32 three, 0x01FF01FF;\n"
    for j in WORDS:
        for register, term, most in (
            ("a", first[j], "one"),
            ("b", second[j], "one"),
            ("s", fourth[j], "two"),
            ("y", third[j], "three"),
        ):
            text += f"add.s16x2 {register}, x{j}, {term};\n"
            text += f"min.relu.s16x2 {register}, {register}, {most};\n"
        # Binades are 128 apart: twice as much has their number in the upper byte.
        text += "add.f16x2 a, a, b; mad.lo.u32 s, a, 128, s;\n"
        text += f"shl.b32 c{j}, s, 1; shl.b32 x{j}, y, 1;\n"
    for j in (0, 2):
        text += f"prmt.b32 a, c{j}, c{j + 1}, 0x7351; prmt.b32 b, x{j}, x{j + 1}, 0x7351;\n"
        text += f"add.u32 c{j}, a, b;\n"
    text += _nibbles(words, keeps_sign_of_zero=False, into="$0")
    return "{\n" + text + "}"


def _thresholds() -> str:
    """$4: outer, $5: scale. c is a midpoint times the scale, 2^-24 of its power of two half its
    last place."""
    text = ".reg .f32 c, h, last; .reg .b32 e;\n" + f"mul.f32 last, $4, {_float32(2.0**-24)};\n"
    for number, (midpoint, reached_at_tie) in enumerate(
        ((0.25, False), (0.75, True), (1.25, False), (1.75, True))
    ):
        text += f"mul.f32 c, $5, {_float32(midpoint)};\nmov.b32 e, c; and.b32 e, e, 0x7F800000;\n"
        text += "mov.b32 h, e; mul.f32 h, h, last;\n"
        if reached_at_tie:
            text += "neg.f32 h, h; fma.rp.f32 c, c, $4, h; mov.b32 e, c;\n"
            text += f"add.u32 e, e, 0xFFFF; shr.u32 ${number}, e, 16;\n"
        else:
            text += "fma.rm.f32 c, c, $4, h; mov.b32 e, c;\n"
            text += f"shr.u32 e, e, 16; add.u32 ${number}, e, 1;\n"
    return "{\n" + text + "}"


def _float32(number: float) -> str:
    """As PTX writes it."""
    return f"0f{struct.pack('>f', number).hex().upper()}"


SPOILED_BY_NAN = tl.constexpr(_companding(nan_is_zero=False, keeps_sign_of_zero=True))
NAN_IS_ZERO = tl.constexpr(_companding(nan_is_zero=True, keeps_sign_of_zero=False))
COUNTING = tl.constexpr(_counting())
THRESHOLDS = tl.constexpr(_thresholds())
OPERANDS = tl.constexpr("=r" + ",r" * 20)


@triton.jit
def _twice(half):
    """A number from 0 to 0x7FFF in both halves of a word."""
    return half * 0x10001


@triton.jit
def _twice_less(half, subtrahend):
    """half - subtrahend in both halves of a word, where it is below zero: the lower half borrows
    from the upper."""
    return half * 0x10001 + 0x10000 - subtrahend * 0x10001


@triton.jit
def _larger_or_nan(a, b):
    return tl.inline_asm_elementwise(
        "max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _larger_number(a, b):
    return tl.inline_asm_elementwise(
        "max.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def block_amax(first, second, NAN_SPOILS: tl.constexpr):
    first, second = first & 0x7FFF7FFF, second & 0x7FFF7FFF
    if NAN_SPOILS:
        pair = tl.reduce(_larger_or_nan(first, second), 1, _larger_or_nan)
        return tl.maximum(pair & 0xFFFF, pair >> 16)
    pair = tl.reduce(_larger_number(first, second), 1, _larger_number)
    even, odd = pair & 0xFFFF, pair >> 16  # NaN where there is nothing else
    return tl.maximum(tl.where(even > BF16_INF, 0, even), tl.where(odd > BF16_INF, 0, odd))


@triton.jit
def divide(x, y, reciprocal):
    """Markstein's: right while the quotient, and its last place times y, are normal numbers."""
    quotient = x * reciprocal
    return tl.fma(tl.fma(-quotient, y, x), reciprocal, quotient)


@triton.jit
def encode_scale(raw):
    return tl.inline_asm_elementwise(
        """{
        .reg .b16 code, low, high; .reg .b32 values; .reg .f32 zero;
        mov.f32 zero, 0f00000000;
        cvt.rn.satfinite.e4m3x2.f32 code, zero, $2;
        cvt.u32.u16 $0, code;
        cvt.rn.f16x2.e4m3x2 values, code;
        mov.b32 {low, high}, values;
        cvt.f32.f16 $1, low;
        }""",
        "=r,=f,f",
        [raw],
        dtype=(tl.int32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _reciprocal_in_fp16(significand):
    """float32 in [1, 2) of four bits -> FP16 of 1 / itself, to nearest, in both halves."""
    return tl.inline_asm_elementwise(
        "{ .reg .f32 r; rcp.approx.ftz.f32 r, $1; cvt.rn.f16x2.f32 $0, r, r; }",
        "=r,f",
        [significand],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _inf_above_all(words):
    """The same with a NaN for Inf, which is a larger magnitude yet."""
    even = tl.where((words & 0x7FFF) == BF16_INF, 0x7F, 0)
    return words | even | tl.where((words & 0x7FFF0000) == (0x7F80 << 16), 0x7F << 16, 0)


@triton.jit
def encode_divided(words, scale, outer_exponent, has_inf, spoiled, NAN_SPOILS: tl.constexpr):
    """With scale * outer = m 2^e and m in [1, 2), e is taken off the exponents of a pair by one
    subtraction and the rest shifted up by 3, which makes FP16 of BF16. What falls below FP16 is far
    below the first step, and what lies above 6 m or so is cut off there. Then, with i = FP16(1/m),
    v = min(2xi + 1, xi + 3, xi/2 + 5), each rounded once, is the code plus 1 before rounding, and
    adding 1023 leaves it, rounded to even, in the last three bits: see `numerics.encode_e2m1`.
    Inf has the exponent after the largest, which under a large outer scale is too little.
    """
    if has_inf is not None:
        tl.static_assert(NAN_SPOILS)
        if has_inf:
            words = _inf_above_all(words)
    bits = scale.to(tl.int32, bitcast=True)
    as_bf16 = bits >> 16
    exponent = (as_bf16 & 0x7F80) + ((outer_exponent - 127) << 7)
    bound = (as_bf16 & 0x7F) + ((15 << 7) + 0x140)  # 2.5 binades above m: between 5 m and 7 m
    significand = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    reciprocal = tl.where(scale == 0, 0, _reciprocal_in_fp16(significand))
    return tl.inline_asm_elementwise(
        SPOILED_BY_NAN if NAN_SPOILS else NAN_IS_ZERO,
        OPERANDS,
        [
            words,
            _twice_less(15 << 7, exponent)[:, None],
            _twice(bound)[:, None],
            reciprocal[:, None],
            tl.where(spoiled, -1, 0)[:, None],
        ],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def thresholds(outer, scale):
    """x / outer rounds to more than c where x > outer * c + h, with h half a last place of c times
    outer, and to c or more where x >= outer * c - h. Rounded down or up, and to BF16 so again,
    neither passes a BF16 number."""
    return tl.inline_asm_elementwise(
        THRESHOLDS,
        "=r,=r,=r,=r,f,f",
        [outer, scale],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def encode_counted(words, t1, t2, t3, t4):
    """Each term is the magnitude less a threshold, cut off at 0 and where nothing more counts."""
    return tl.inline_asm_elementwise(
        COUNTING,
        OPERANDS,
        [
            words,
            _twice_less(1, t1)[:, None],
            _twice_less(1, t2)[:, None],
            _twice_less(128, t3)[:, None],
            _twice_less(128, t4)[:, None],
        ],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )
