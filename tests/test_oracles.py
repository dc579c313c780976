"""The oracle itself: its two forms against each other, against literals worked by hand, numpy,
ml_dtypes and gfloat.

May be changed: literals may be added, each with its working beside it.
"""

import math
from fractions import Fraction

import gfloat
import ml_dtypes
import numpy as np
import oracles
import oracles_exact
import proofs
import pytest
import torch
from gfloat.formats import format_info_ocp_e2m1, format_info_ocp_e4m3

SEED = 4821
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INF, NAN = math.inf, math.nan


def require_same(got, want):
    """Equal shape, dtype and bits; any NaN equals any NaN."""
    assert (got is None) == (want is None)
    if want is not None:
        want = np.asarray(want)
        proofs.require_equal("vectorised form", got, want, want, np.zeros(want.shape, np.int64))


def random_float32(count, rng):
    return rng.integers(0, 1 << 32, count, dtype=np.uint32).view(np.float32)


# ---- Literals: (recipe, input, expected), the working beside each ----

SCALES = [
    ("nvfp4", 0.0, 0x00),  # a zero block has scale 0
    ("nvfp4", 6.0, 0x38),  # 6/6 = 1 = 2^(7-7): exponent field 7
    ("nvfp4", 6 * 17 / 16, 0x38),  # 1.0625, halfway between 0x38 and 0x39: even
    ("nvfp4", 6 * 19 / 16, 0x3A),  # 1.1875, halfway between 0x39 and 0x3A: even
    ("nvfp4", 6 * 2**-10, 0x00),  # half of the smallest subnormal: even is zero
    ("nvfp4", 6 * 3 * 2**-10, 0x02),  # 1.5 * 2^-9, halfway between 1 and 2: even
    ("nvfp4", 6 * 1.5 * 2**-7, 0x06),  # 1.5 * 2^-7 = 6 * 2^-9
    ("nvfp4", 2688.0, 0x7E),  # 448
    ("nvfp4", 2784.0, 0x7E),  # 464, where a format with 480 would tie: saturates
    ("nvfp4", 3.0e38, 0x7E),
    ("nvfp4", INF, 0x7E),
    ("nvfp4", NAN, 0x7F),
    (
        "seed",
        0.0,
        0x79,
    ),  # 1e-4/6 = 1.0923 * 2^-16: exponent -9 wraps to 15, 0.738 eighths round to 1
    ("seed", NAN, 0x79),  # a block of nothing but NaN is a zero block
    ("seed", 6 * 2**-7, 0x00),  # exponent 0, mantissa 0
    (
        "seed",
        6 * 1.5 * 2**-7,
        0x04,
    ),  # exponent 0 with the mantissa 4 of a normal: 4 * 2^-9, not 6 * 2^-9
    ("seed", 6 * 2**-8, 0x78),  # exponent -1 wraps to 15
    ("seed", 6 * 1.875 * 2**-8, 0x7F),  # exponent -1 wraps to 15, mantissa 7: NaN
    ("seed", 6 * 17 / 16, 0x39),  # 1.0625: half an eighth rounds up
    ("seed", 6 * 31 / 16, 0x40),  # 1.9375: 7.5 eighths round up to 8 and carry into the exponent
    ("seed", 2784.0, 0x7F),  # 464 = 1.8125 * 2^8: 6.5 eighths round up to 7
    ("seed", 2976.0, 0x78),  # 496 = 1.9375 * 2^8: carry, exponent held at 15, mantissa 0
    ("seed", 3456.0, 0x79),  # 576 = 1.125 * 2^9: exponent clamped from 16 to 15, mantissa 1 kept
    ("seed", INF, 0x78),  # exponent field 255, mantissa field 0
    ("seed-as-meant", 0.0, 0x01),  # as seed, but exponent -9 is clamped to 0
    ("seed-as-meant", 6 * 2**-7, 0x00),  # a scale of 2^-7 still becomes 0
    ("seed-as-meant", 6 * 2**-8, 0x00),
    ("seed-as-meant", 6 * 31 / 16 * 2**-8, 0x08),  # exponent clamped to 0, then the carry: 2^-6
    ("seed-as-meant", 2784.0, 0x7F),
    ("nvfp4-exact-scale", 1.0, np.float32(11184811 * 2.0**-26)),  # 2^26 / 6 = 11184810.67
    ("nvfp4-exact-scale", 0.0, np.float32(0)),
]


@pytest.mark.parametrize(("recipe", "amax", "want"), SCALES)
def test_scale_of_a_block_worked_by_hand(recipe, amax, want):
    block = np.full((1, 16), amax, np.float32)
    assert oracles.scale_code(recipe, np.array([amax], np.float32))[0] == want
    assert oracles.quantize(recipe, block)[1][0, 0] == want
    assert oracles_exact.quantize_exact(recipe, block)[1][0, 0] == want


ELEMENTS = [
    # Scale 1 (0x38): the seven midpoints, to the even code, and away from zero in the seed.
    *[
        ("nvfp4", x, 0x38, c)
        for x, c in zip((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5), (0, 2, 2, 4, 4, 6, 6), strict=True)
    ],
    *[
        ("seed", x, 0x38, c)
        for x, c in zip((0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5), range(1, 8), strict=True)
    ],
    ("nvfp4", 5.03125, 0x38, 7),
    ("nvfp4", 1000.0, 0x38, 7),  # saturates at 6
    ("nvfp4", -0.0, 0x38, 8),  # the sign bit is x's own
    ("nvfp4", -0.125, 0x38, 8),
    ("nvfp4", -5.0, 0x38, 14),
    ("nvfp4", 5.0, 0x00, 0),  # scale 0: every code +-0
    ("nvfp4", -5.0, 0x00, 8),
    ("nvfp4", 2.0**-9, 0x01, 2),  # one subnormal step over itself is 1
    ("nvfp4", 112.0, 0x7E, 0),  # 112/448 = 0.25, ties to even
    ("nvfp4", -INF, 0x7E, 15),
    ("nvfp4", -1.0, 0x7F, 7),  # a NaN block has no signs
    ("seed", -0.0, 0x38, 0),  # the sign is that of scaled < 0
    ("seed", -0.125, 0x38, 8),
    ("seed", NAN, 0x38, 15),  # max(NaN, -6) is -6
    ("seed", INF, 0x78, 7),
    ("seed", -INF, 0x78, 15),
    ("seed", 120.0, 0x7F, 1),  # 120/480 = 0.25, away: 0x7F divides by 480
    ("seed", 6 * 2**-7, 0x00, 7),  # value 0 is raised to 1e-6, so everything saturates
    ("seed", 2.0**-23, 0x00, 0),  # 1.19e-7 * 1e6 = 0.119
    ("seed", -(2.0**-149), 0x7E, 0),  # 2^-149 / 448 underflows to -0, which is not negative
    ("seed", -(2.0**-149), 0x38, 8),
    ("seed-as-meant", 0.25, 0x38, 1),
]


@pytest.mark.parametrize(("recipe", "x", "scale_code", "want"), ELEMENTS)
def test_code_of_an_element_worked_by_hand(recipe, x, scale_code, want):
    value, scale = np.array([x], np.float32), np.array([scale_code], np.uint8)
    assert oracles.element_code(recipe, value, scale)[0] == want
    bits = int(value.view(np.uint32)[0])
    assert oracles_exact.element_code_exact(recipe, bits, scale_code) == want


OUTERS = [
    ("nvfp4-token", 0.0, 1.0),
    ("nvfp4-token", 2688.0, 1.0),  # exactly 2688 * 1
    ("nvfp4-token", 2704.0, 2.0),  # the bf16 above
    ("nvfp4-token", 1344.0, 0.5),
    ("nvfp4-token", 1352.0, 1.0),
    ("nvfp4-token", 2.0**-133, 2.0**-100),  # the floor
    ("nvfp4-token", INF, 2.0**117),  # counted as 1.9921875 * 2^127, 1.518 * 2^116 times 2688
    ("nvfp4-token", NAN, 1.0),  # skipped, so a zero row
    ("nvfp4-tensor", 0.0, 1.0),
    ("nvfp4-tensor", 2688.0, 1.0),
    ("nvfp4-tensor", 1.0, 12782641 * 2.0**-35),  # 2^35 / 2688 = 12782640.76
    ("nvfp4-tensor", 2.0**-133, 24 * 2.0**-149),  # 2^16 / 2688 = 24.38 of the smallest subnormal
]


@pytest.mark.parametrize(("recipe", "amax", "want"), OUTERS)
def test_outer_scale_worked_by_hand(recipe, amax, want):
    x = np.array([[amax] + [0] * 15], np.float32)
    assert np.ravel(oracles.quantize(recipe, x)[2]) == [want]
    assert np.ravel(oracles_exact.quantize_exact(recipe, x)[2]) == [want]


DECODED = [
    ("nvfp4", 15, 0x7E, None, -2688.0),
    ("nvfp4", 1, 0x01, None, 2.0**-10),
    ("nvfp4", 8, 0x38, None, -0.0),
    ("nvfp4", 0, 0x7F, None, NAN),
    ("seed", 7, 0x7F, None, NAN),  # the consumer reads NaN where the kernel divided by 480
    ("nvfp4-token", 7, 0x7E, 2.0**117, float(np.finfo(np.float32).max)),  # 2688 * 2^117 > 2^128
    ("nvfp4-token", 9, 0x01, 2.0**-100, -(2.0**-110)),
    ("nvfp4-tensor", 3, 0x01, 2.0**-149, 0.0),  # 1.5 * 2^-9 * 2^-149 underflows
    ("nvfp4-exact-scale", 3, 2.0**-149, None, 2.0**-148),  # 1.5 smallest subnormals: even
]


@pytest.mark.parametrize(("recipe", "code", "scale", "outer", "want"), DECODED)
def test_decoded_value_worked_by_hand(recipe, code, scale, outer, want):
    kind = np.float32 if recipe == "nvfp4-exact-scale" else np.uint8
    got = oracles.decode(
        recipe,
        np.full((1, 16), code, np.uint8),
        np.array([[scale]], kind),
        None if outer is None else np.full((1, 1), outer, np.float32),
    )
    require_same(got, np.full((1, 16), want, np.float32))


# ---- The two forms against each other ----


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("recipe", oracles.NAMES)
def test_vectorised_form_equals_the_rationals_on_seeded_bit_patterns(recipe, dtype):
    print(f"seed {SEED}")
    for bits in proofs.random_tensors(dtype, 8 * 32 * 32, 32, SEED):
        x = proofs.float32_of(bits, dtype)
        want = oracles_exact.quantize_exact(recipe, x)
        for got, wanted in zip(oracles.quantize(recipe, x), want, strict=True):
            require_same(got, wanted)


@pytest.mark.parametrize("outer", [1.0, 2.0**-149, 3.7e-5, 1e-30, 3e38])
def test_vectorised_form_equals_the_rationals_under_a_given_outer_scale(outer):
    for bits in proofs.random_tensors(torch.float32, 4 * 32 * 32, 32, SEED, min(outer, 1e34)):
        x = proofs.float32_of(bits, torch.float32)
        want = oracles_exact.quantize_exact("nvfp4-tensor", x, np.float32(outer))
        got = oracles.quantize("nvfp4-tensor", x, np.float32(outer))
        for part, wanted in zip(got, want, strict=True):
            require_same(part, wanted)


@pytest.mark.parametrize(("recipe", "step"), [("nvfp4", 17), ("seed", 3), ("seed-as-meant", 3)])
def test_vectorised_scales_equal_the_rationals_on_bf16_amax(recipe, step):
    """Every 17th amax (every third for the seed), and all 128 from 2048 to 4096."""
    magnitudes = proofs.ALL_MAGNITUDES[: proofs.BF16_INFINITY + 1]
    keep = (magnitudes % step == 0) | ((magnitudes >= 0x4500) & (magnitudes < 0x4580))
    x = proofs.float32_of(magnitudes[keep], torch.bfloat16)
    exact = [oracles_exact.split_float32(int(bits))[1] for bits in x.view(np.uint32)]
    want = [oracles_exact.scale_code_exact(recipe, amax) for amax in exact]
    require_same(oracles.scale_code(recipe, x), np.array(want, np.uint8))


@pytest.mark.parametrize("recipe", oracles.NAMES)
def test_vectorised_decode_equals_the_rationals(recipe):
    rng = np.random.default_rng(SEED)
    codes = np.tile(np.arange(16, dtype=np.uint8), 128)
    scales = np.arange(128, dtype=np.uint8)
    exact_scales = scales.tolist()
    if recipe == "nvfp4-exact-scale":
        scales = np.abs(random_float32(128, rng))
        exact_scales = [oracles_exact.split_float32(int(b))[1] for b in scales.view(np.uint32)]
    outers = {
        "nvfp4-token": [2.0**-100, 1.0, 2.0**116, 2.0**117],
        "nvfp4-tensor": [1.0, 2.0**-149, 1e-40, 3.7e-5, 1.2e35],
    }.get(recipe, [None])
    for outer in outers:
        outer = None if outer is None else np.float32(outer)
        exact_outer = None if outer is None else Fraction(float(outer))
        want = [
            oracles_exact.decode_exact(recipe, int(code), exact_scales[i // 16], exact_outer)
            for i, code in enumerate(codes)
        ]
        require_same(oracles.decode(recipe, codes, scales, outer), np.array(want, np.float32))


# ---- The float32 roundings against IEEE hardware ----


def test_round_float32_equals_ieee_division():
    rng = np.random.default_rng(SEED)
    a, b = np.abs(random_float32(4000, rng)), np.abs(random_float32(4000, rng))
    b[::2] = (a[::2].view(np.uint32) ^ rng.integers(0, 1 << 23, 2000, dtype=np.uint32)).view(
        np.float32
    )
    good = np.isfinite(a) & np.isfinite(b) & (b > 0)
    with np.errstate(all="ignore"):
        want = a[good] / b[good]
    got = [
        oracles_exact.round_float32(Fraction(float(p)) / Fraction(float(q)))
        for p, q in zip(a[good], b[good], strict=True)
    ]
    require_same(np.array([float(value) for value in got], np.float32), want)


@pytest.mark.parametrize("operation", ["divide", "multiply"])
def test_integer_arithmetic_equals_ieee(operation):
    rng = np.random.default_rng(SEED)
    a, b = np.abs(random_float32(400_000, rng)), np.abs(random_float32(400_000, rng))
    a[:1000] = np.arange(1000, dtype=np.uint32).view(np.float32)  # subnormals
    good = np.isfinite(a) & np.isfinite(b) & (b > 0)
    a, b = a[good], b[good]
    with np.errstate(all="ignore"):
        want = getattr(np, operation)(a, b)
    p, q = oracles.split(a)[2], oracles.split(b)[2]
    require_same(oracles.as_float32(getattr(oracles, operation)(p, q)), want)


# ---- Against ml_dtypes and gfloat (both: number formats only) ----


def test_tables_equal_ml_dtypes_and_gfloat():
    scales = np.array([float(value) for value in oracles_exact.E4M3], np.float32)
    elements = np.array([float(value) for value in oracles_exact.E2M1], np.float32)
    bytes_ = np.arange(127, dtype=np.uint8)
    require_same(bytes_.view(ml_dtypes.float8_e4m3fn).astype(np.float32), scales)
    require_same(bytes_[:8].view(ml_dtypes.float4_e2m1fn).astype(np.float32), elements)
    assert [gfloat.decode_float(format_info_ocp_e4m3, i).fval for i in range(127)] == list(scales)
    assert [gfloat.decode_float(format_info_ocp_e2m1, i).fval for i in range(8)] == list(elements)


def test_nvfp4_scale_of_every_bf16_amax_equals_ml_dtypes():
    x = proofs.float32_of(proofs.ALL_MAGNITUDES[: proofs.BF16_INFINITY + 1], torch.bfloat16)
    clamped = np.minimum(x / np.float32(6), np.float32(448))  # ml_dtypes overflows to NaN
    require_same(
        oracles.scale_code("nvfp4", x), clamped.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    )


def test_nvfp4_code_of_every_reachable_pair_equals_ml_dtypes():
    for byte, blocks in proofs.pair_blocks("nvfp4", with_nan=False):
        if byte == 0:
            continue  # no division by zero to compare with
        x = proofs.float32_of(blocks, torch.bfloat16)
        scale = np.uint8(byte).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        quotient = np.clip(x / scale, np.float32(-6), np.float32(6))
        want = quotient.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
        require_same(oracles.element_code("nvfp4", x, np.uint8(byte)), want)


@pytest.mark.parametrize(
    ("recipe", "mode"),
    [("nvfp4", gfloat.RoundMode.TiesToEven), ("seed", gfloat.RoundMode.TiesToAway)],
)
def test_codes_at_scale_one_equal_gfloat(recipe, mode):
    """Every bf16 from 2^-5 to 8 of both signs; dividing by scale 1 leaves the element format."""
    magnitudes = np.arange(0x3D00, 0x4101, dtype=np.uint16)
    values = np.concatenate((magnitudes, magnitudes | np.uint16(0x8000)))
    x = proofs.float32_of(values, torch.bfloat16)
    want = [
        gfloat.encode_float(
            format_info_ocp_e2m1, gfloat.round_float(format_info_ocp_e2m1, float(v), mode, sat=True)
        )
        for v in x
    ]
    require_same(oracles.element_code(recipe, x, np.uint8(0x38)), np.array(want, np.uint8))


def test_an_outer_scale_for_a_recipe_without_one_is_refused():
    with pytest.raises(ValueError, match="outer scale was given for 'nvfp4'"):
        oracles.quantize("nvfp4", np.zeros((1, 16), np.float32), np.float32(1))
