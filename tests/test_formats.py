"""The formats against ml_dtypes, gfloat and exact rationals: all codes, midpoints and rules."""

import itertools
from fractions import Fraction

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch

from nvfp4lab.formats import E2M1, E4M3, E8M0, INT4, INT8, UE5M3, CodeClass, Format

FORMATS = (E2M1, E4M3, UE5M3, E8M0, INT4, INT8)
UE5M3_GFLOAT = gfloat.FormatInfo(
    name="ue5m3",
    k=8,
    precision=4,
    bias=15,
    is_signed=False,
    domain=gfloat.Domain.Finite,
    has_nz=False,
    num_high_nans=1,
    has_subnormals=True,
    is_twos_complement=False,
)
GFLOAT = {
    E2M1: gfloat.formats.format_info_ocp_e2m1,
    E4M3: gfloat.formats.format_info_ocp_e4m3,
    UE5M3: UE5M3_GFLOAT,
    E8M0: gfloat.formats.format_info_ocp_e8m0,
    INT8: gfloat.formats.format_info_ocp_int8,
}
INT8_STEP = 2.0**-6  # OCP's INT8 has 6 fraction bits, ours none
ML_DTYPES = {
    E2M1: ml_dtypes.float4_e2m1fn,
    E4M3: ml_dtypes.float8_e4m3fn,
    E8M0: ml_dtypes.float8_e8m0fnu,
    INT4: ml_dtypes.int4,
}


def every_code(fmt: Format) -> torch.Tensor:
    return torch.arange(2**fmt.bits).to(torch.uint8)


def finite_magnitudes(fmt: Format) -> list[Fraction]:
    return [Fraction(m) for m in fmt.magnitudes[: fmt.code_of_max + 1]]


@pytest.mark.parametrize("fmt", GFLOAT, ids=lambda f: f.name)
def test_every_code_decodes_as_in_gfloat(fmt):
    step = INT8_STEP if fmt is INT8 else 1.0
    want = [gfloat.decode_float(GFLOAT[fmt], c).fval / step for c in range(2**fmt.bits)]
    np.testing.assert_array_equal(fmt.decode(every_code(fmt)).numpy(), np.array(want, np.float32))


@pytest.mark.parametrize("fmt", ML_DTYPES, ids=lambda f: f.name)
def test_every_code_decodes_as_in_ml_dtypes(fmt):
    codes = every_code(fmt).numpy()
    want = codes.view(ML_DTYPES[fmt]).astype(np.float32)
    np.testing.assert_array_equal(fmt.decode(torch.from_numpy(codes)).numpy(), want)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_every_value_encodes_to_its_own_code(fmt):
    values = fmt.decode(every_code(fmt))
    codes = every_code(fmt)
    encodable = values.abs() <= fmt.max
    torch.testing.assert_close(fmt.encode(values[encodable]), codes[encodable], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("fmt", "smallest_subnormal", "smallest_normal", "largest"),
    [
        (E2M1, 0.5, 1.0, 6.0),
        (E4M3, 2.0**-9, 2.0**-6, 448.0),
        (UE5M3, 2.0**-17, 2.0**-14, 114688.0),
        (E8M0, None, 2.0**-127, 2.0**127),
        (INT4, None, 1.0, 7.0),
        (INT8, None, 1.0, 127.0),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_limits(fmt, smallest_subnormal, smallest_normal, largest):
    limits = (fmt.smallest_subnormal, fmt.smallest_normal, fmt.max)
    assert limits == (smallest_subnormal, smallest_normal, largest)


@pytest.mark.parametrize(
    ("fmt", "zero", "subnormal", "normal", "nan"),
    [
        (E2M1, 2, 2, 12, 0),
        (E4M3, 2, 14, 238, 2),
        (UE5M3, 1, 7, 247, 1),
        (E8M0, 0, 0, 255, 1),
        (INT4, 1, 0, 15, 0),
        (INT8, 1, 0, 255, 0),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_classes_are_counted(fmt, zero, subnormal, normal, nan):
    classes = fmt.class_of(every_code(fmt)).tolist()
    assert [classes.count(c) for c in CodeClass] == [zero, subnormal, normal, nan]


@pytest.mark.parametrize(
    ("fmt", "code", "expected"),
    [
        (E2M1, 0x8, CodeClass.ZERO),
        (E2M1, 0x1, CodeClass.SUBNORMAL),
        (E4M3, 0x07, CodeClass.SUBNORMAL),
        (E4M3, 0x08, CodeClass.NORMAL),
        (E4M3, 0x7F, CodeClass.NAN),
        (E4M3, 0xFF, CodeClass.NAN),
        (UE5M3, 0xFE, CodeClass.NORMAL),
        (E8M0, 0x00, CodeClass.NORMAL),
        (E8M0, 0xFF, CodeClass.NAN),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_class_of_a_code(fmt, code, expected):
    assert fmt.class_of(torch.tensor(code, dtype=torch.uint8)).item() == expected


def rounded(fmt: Format, value: Fraction, rounding: str) -> int:
    """The code of a magnitude by exact distances, saturating; value's neighbours tell all."""
    magnitudes = finite_magnitudes(fmt)
    if value >= magnitudes[-1]:
        return len(magnitudes) - 1
    above = next(i for i, m in enumerate(magnitudes) if m > value)
    if above == 0:
        return 0  # E8M0 has no zero
    below = above - 1
    if value == magnitudes[below]:
        return below
    to_below, to_above = value - magnitudes[below], magnitudes[above] - value
    if rounding in ("up", "down", "toward-zero"):
        return above if rounding == "up" else below
    if to_below != to_above:
        return below if to_below < to_above else above
    even = below if below % 2 == 0 else above
    at_ties = {
        "ties-to-even": even,
        "ties-to-odd": below + above - even,
        "ties-away": above,
        "ties-up": above,
        "ties-to-zero": below,
        "ties-down": below,
    }
    return at_ties[rounding]


ROUNDINGS = (
    "ties-to-even",
    "ties-to-odd",
    "ties-away",
    "ties-to-zero",
    "ties-up",
    "ties-down",
    "up",
    "down",
    "toward-zero",
)


def probes(fmt: Format) -> list[Fraction]:
    """Every magnitude and every midpoint, the float32 on either side of each, and beyond max."""
    magnitudes = finite_magnitudes(fmt)
    middles = [(a + b) / 2 for a, b in itertools.pairwise(magnitudes)]
    points = np.array([float(p) for p in [*magnitudes, *middles]], dtype=np.float32)
    around = [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))]
    extra = [3e38] if fmt is E8M0 else [1e-45, fmt.max * 1.9, 3e38]
    return [Fraction(float(p)) for p in np.concatenate([*around, np.array(extra, np.float32)])]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_every_magnitude_and_midpoint_rounds_as_exact_rationals_do(fmt, rounding):
    points = probes(fmt)
    x = torch.tensor([float(p) for p in points])
    want = [rounded(fmt, p, rounding) for p in points]
    assert fmt.encode(x, rounding).tolist() == want


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("fmt", [E2M1, E4M3, INT4, INT8], ids=lambda f: f.name)
def test_negative_values_mirror_and_directions_swap(fmt, rounding):
    x = torch.tensor([float(p) for p in probes(fmt)])
    opposite = {"up": "down", "down": "up", "ties-up": "ties-down", "ties-down": "ties-up"}
    mirrored = opposite.get(rounding, rounding)
    magnitude = fmt.encode(x, mirrored).int()
    want = magnitude | fmt.sign_mask if fmt.sign_mask else -magnitude & (2**fmt.bits - 1)
    assert fmt.encode(-x, rounding).tolist() == want.tolist()


@pytest.mark.parametrize("fmt", [E2M1, E4M3], ids=lambda f: f.name)
def test_ties_to_even_agrees_with_gfloat_and_ml_dtypes(fmt):
    x = np.array([float(p) for p in probes(fmt) if p <= Fraction(fmt.max)], dtype=np.float32)
    ours = fmt.encode(torch.from_numpy(x)).tolist()
    assert ours == x.astype(ML_DTYPES[fmt]).view(np.uint8).tolist()
    rounded_values = [gfloat.round_float(GFLOAT[fmt], float(v), sat=True) for v in x]
    assert fmt.decode(torch.tensor(ours).to(torch.uint8)).tolist() == rounded_values


@pytest.mark.parametrize("fmt", [E2M1, E4M3, UE5M3, INT4], ids=lambda f: f.name)
def test_stochastic_rounding_picks_a_neighbour_with_the_right_chance(fmt):
    generator = torch.Generator().manual_seed(1)
    low, high = fmt.magnitudes[2], fmt.magnitudes[3]
    draws, share = 20_000, 0.25
    x = torch.full((draws,), low + share * (high - low))
    codes = fmt.encode(x, "stochastic", generator=generator)
    assert set(codes.tolist()) == {2, 3}
    standard_error = (share * (1 - share) / draws) ** 0.5
    assert abs((codes == 3).double().mean().item() - share) < 5 * standard_error


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_stochastic_rounding_keeps_what_is_representable(fmt):
    x = torch.tensor((*fmt.magnitudes[: fmt.code_of_max + 1], fmt.max))
    codes = fmt.encode(x, "stochastic", generator=torch.Generator().manual_seed(2))
    assert codes.tolist() == [*range(fmt.code_of_max + 1), fmt.code_of_max]


@pytest.mark.parametrize(
    ("fmt", "x", "overflow", "code"),
    [
        (E4M3, 464.0, "nan", 0x7E),  # the tie between 448 and 480 goes to the even 0x7E
        (E4M3, 464.1, "nan", 0x7F),
        (E4M3, float("inf"), "nan", 0x7F),
        (E4M3, float("inf"), "saturate", 0x7E),
        (E4M3, float("nan"), "saturate", 0x7F),
        (E2M1, float("nan"), "saturate", 0x7),  # PTX cvt.rn.satfinite gives +6
        (E2M1, -float("inf"), "saturate", 0xF),
        (E2M1, -0.0, "saturate", 0x8),
        (INT4, -0.0, "saturate", 0x0),
        (INT4, -9.0, "saturate", 0x9),  # -7: symmetric
        (E4M3, 495.0, "mantissa-kept", 0x7F),  # 480 as a number, NaN as a byte
        (E4M3, 496.0, "mantissa-kept", 0x78),
        (E4M3, 1.5 * 512, "mantissa-kept", 0x7C),
        (UE5M3, 1e9, "nan", 0xFF),
    ],
    ids=lambda v: getattr(v, "name", None),
)
def test_overflow_and_specials(fmt, x, overflow, code):
    assert fmt.encode(torch.tensor(x), overflow=overflow).item() == code


@pytest.mark.parametrize(
    ("x", "subnormals", "code"),
    [
        (2.0**-7, "gradual", 0x04),
        (2.0**-7, "flush", 0x00),
        (2.0**-6, "flush", 0x08),
        (2.0**-7, "implicit-bit-lost", 0x00),
        (1.5 * 2.0**-7, "implicit-bit-lost", 0x04),
        (1.99 * 2.0**-7, "implicit-bit-lost", 0x08),  # the mantissa carries into the exponent
        (1.5 * 2.0**-20, "implicit-bit-lost", 0x04),
        (1.5 * 2.0**-7, "exponent-wraps", 0x04),
        (1.5 * 2.0**-8, "exponent-wraps", 0x7C),
        (1.875 * 2.0**-8, "exponent-wraps", 0x7F),
        (1.99 * 2.0**-8, "exponent-wraps", 0x78),
    ],
)
def test_subnormal_rules_of_e4m3(x, subnormals, code):
    assert E4M3.encode(torch.tensor(x), subnormals=subnormals).item() == code


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.ones(1).half()}, TypeError, "x of E2M1.encode is float32, got torch.float16"),
        ({"rounding": "nearest"}, ValueError, "'nearest' is not one of ties-to-even"),
        ({"overflow": "nan"}, ValueError, "needs a NaN code; E2M1 has none"),
        ({"generator": torch.Generator()}, ValueError, "a generator is for rounding='stochastic'"),
        (
            {"rounding": "stochastic", "overflow": "mantissa-kept"},
            ValueError,
            "does not do so at random",
        ),
    ],
)
def test_encode_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        E2M1.encode(**({"x": torch.ones(1)} | arguments))


@pytest.mark.parametrize("fmt", [E4M3, UE5M3, E8M0], ids=lambda f: f.name)
def test_every_code_is_in_one_class(fmt):
    """Counted by hand: the classes of each format's 256 codes."""
    counts = fmt.by_class(np.ones(256, dtype=np.int64))
    assert {k: int(v) for k, v in counts.items()} == {
        "E4M3": {"zero": 2, "subnormal": 14, "normal": 236, "saturated": 2, "nan": 2},
        "UE5M3": {"zero": 1, "subnormal": 7, "normal": 246, "saturated": 1, "nan": 1},
        "E8M0": {"zero": 0, "subnormal": 0, "normal": 254, "saturated": 1, "nan": 1},
    }[fmt.name]


@pytest.mark.parametrize("rounding", ["ties-to-even", "ties-up", "up", "down", "toward-zero"])
@pytest.mark.parametrize("fmt", [E2M1, E4M3, INT4], ids=lambda f: f.name)
def test_codes_step_up_at_the_boundaries(fmt, rounding):
    edges = torch.from_numpy(fmt.boundaries(rounding)[: fmt.code_of_max])
    below, above = (edges * f for f in (1 - 2.0**-20, 1 + 2.0**-20))
    below = below.where(edges > 0, edges)  # "up" leaves 0 at once
    index = torch.arange(fmt.code_of_max, dtype=torch.uint8)
    assert torch.equal(fmt.encode(below.float(), rounding), index)
    above = above.where(edges > 0, 2.0**-20)
    assert torch.equal(fmt.encode(above.float(), rounding), index + 1)
