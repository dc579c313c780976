"""The steps of the staging kernel: those in plain Triton against the definitions, those of `packed`
against their twins, over all inputs.

A twin is compared inside a kernel that counts where the two differ, so that 10^9 inputs take a
moment: `gpu` only, as inline PTX is. May be changed: a step gets its test here.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import math

import pytest
import torch
import triton
import triton.language as tl

from nvfp4lab.formats import E2M1, E4M3
from nvfp4lab.kernels import packed, staging, steps

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BF16_INF = 0x7F80
SCALES = E4M3.decode(torch.arange(1, E4M3.code_of_max + 1, dtype=torch.uint8))
SIZE = tl.constexpr(8192)  # numbers that one program works on, 512 blocks of them


def bf16(bits: torch.Tensor) -> torch.Tensor:
    """The float32 of BF16 bits."""
    return (bits.to(torch.int32) << 16).view(torch.float32)


def vllm_outer_scales() -> torch.Tensor:
    """float32 [32641]: of every row amax, zero and Inf included."""
    amax = bf16(torch.arange(BF16_INF + 1))
    return amax.clamp_min(1e-12) * (torch.ones(()) / 2688)


# ---- Plain Triton ----


@triton.jit
def find_thresholds(outer, scale, out, count):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    o, s = tl.load(outer + at), tl.load(scale + at)
    t1, t2, t3, t4 = steps.thresholds(o, s, False)
    tl.store(out + at, t1)
    tl.store(out + count + at, t2)
    tl.store(out + 2 * count + at, t3)
    tl.store(out + 3 * count + at, t4)


def padded(values: torch.Tensor, device: str) -> torch.Tensor:
    """Whole programs of values, the last one repeated."""
    return torch.cat((values, values[-1:].expand(-len(values) % SIZE.value))).to(device)


def code_of_two_quotients(bits: torch.Tensor, outer: torch.Tensor, scale: torch.Tensor):
    return E2M1.encode(bf16(bits) / outer / scale)


def test_thresholds_are_where_codes_change_under_every_outer_scale_of_a_row_and_every_scale(device):
    outer = vllm_outer_scales().repeat_interleave(len(SCALES))
    scale = SCALES.repeat(len(outer) // len(SCALES))
    if device == "cpu":  # every third here, all compiled
        outer, scale = outer[::3], scale[::3]
    o, s = padded(outer, device), padded(scale, device)
    out = torch.empty(4, len(o), dtype=torch.int32, device=device)
    find_thresholds[(len(o) // SIZE.value,)](o, s, out, len(o))
    found = out[:, : len(outer)].cpu()
    above_inf = outer.isinf()
    assert (found[:, above_inf] > BF16_INF).all()
    found, outer, scale = found[:, ~above_inf], outer[~above_inf], scale[~above_inf]
    for first_code, binades, least in zip((1, 2, 3, 4), (1, 1, 3, 2), found, strict=True):
        for binade in range(binades):
            threshold = least + 0x80 * binade
            code = first_code + 2 * binade
            inside = threshold <= BF16_INF
            at, below = threshold.clamp(max=BF16_INF), (threshold - 1).clamp(max=BF16_INF - 1)
            reached = code_of_two_quotients(at, outer, scale)[inside]
            assert (reached >= code).all(), f"code {code} at its threshold"
            assert (code_of_two_quotients(below, outer, scale) < code).all(), f"code {code} below"


# ---- Twins: how often they differ ----


@triton.jit
def differ_scale(count):
    """Every nonnegative float32 and NaN: program p has the bits from p * SIZE."""
    bits = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    value = bits.to(tl.float32, bitcast=True)
    code, scale = packed.encode_scale(value)
    plain, plain_scale = steps.encode_scale(value, False)
    wrong = (code != plain) | (scale != plain_scale)
    tl.atomic_add(count, tl.sum((wrong & (bits <= 0x7F800000)).to(tl.int32)))


@triton.jit
def differ_quotient_scale(outers, first, count):
    """Every BF16 magnitude up to the row's amax, whose outer scale has its bits as index."""
    row_amax = first + tl.program_id(1)
    outer = tl.load(outers + row_amax)
    bits = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    amax = (bits << 16).to(tl.float32, bitcast=True)
    reciprocal = tl.div_rn(1.0, outer)
    mine = tl.maximum(packed.divide(amax, outer, reciprocal) * (1.0 / 6.0), 0.001953125)
    plain = tl.maximum(tl.div_rn(amax, outer) * (1.0 / 6.0), 0.001953125)
    code, _ = packed.encode_scale(mine)
    plain_code, _ = packed.encode_scale(plain)
    wrong = (code != plain_code) & (bits <= row_amax)
    tl.atomic_add(count, tl.sum(wrong.to(tl.int32)))


BF16_INF_ = tl.constexpr(BF16_INF)


@triton.jit
def differ_thresholds(outer, scale, count, n):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    o, s = tl.load(outer + at), tl.load(scale + at)
    a1, a2, a3, a4 = packed.thresholds(o, s)
    b1, b2, b3, b4 = steps.thresholds(o, s, False)
    wrong = (a1 != b1) | (a2 != b2) | (a3 != b3) | (a4 != b4)
    inf = o == float("inf")  # where they are need only be above it
    low = (a1 <= BF16_INF_) | (a2 <= BF16_INF_) | (a3 <= BF16_INF_) | (a4 <= BF16_INF_)
    tl.atomic_add(count, tl.sum((tl.where(inf, low, wrong) & (at < n)).to(tl.int32)))


@triton.jit
def _halves_of_program(numbers):
    """Its 512 blocks in halves, loaded as the staging kernel does, so that a thread has both."""
    block = tl.program_id(0) * 512 + tl.arange(0, 512)
    return staging._load_halves(numbers, block, block >= 0, True)


@triton.jit
def differ_divided(numbers, scales, first_exponent, count, NAN_SPOILS: tl.constexpr):
    """Under every scale (axis 1) and exponent of an outer scale (axis 2)."""
    first, second = _halves_of_program(numbers)
    exponent = tl.program_id(2) + first_exponent
    has_inf = True if NAN_SPOILS else None
    scale = tl.load(scales + tl.program_id(1)) + tl.zeros([512], tl.float32)
    spoiled = steps.block_amax(first, second, NAN_SPOILS, False) > BF16_INF_
    for half in tl.static_range(2):
        words = second if half else first
        mine = packed.encode_divided(words, scale, exponent, has_inf, spoiled, NAN_SPOILS)
        plain = steps.encode_divided(words, scale, exponent, None, spoiled, NAN_SPOILS, False)
        tl.atomic_add(count, tl.sum((mine != plain).to(tl.int32)))


@triton.jit
def differ_counted(numbers, count, TERM: tl.constexpr):
    """Against every threshold (axis 1, from 2^-125) of one term; there are none below 2^-63."""
    first, second = _halves_of_program(numbers)
    t = tl.program_id(1) + 0x100 + tl.zeros([512], tl.int32)
    never = tl.full([512], 0x8000, tl.int32)
    t1 = t if TERM == 1 else never
    t2 = t if TERM == 2 else never
    t3 = t if TERM == 3 else never
    t4 = t if TERM == 4 else never
    for half in tl.static_range(2):
        words = steps.without_nan(second if half else first)
        mine = packed.encode_counted(words, t1, t2, t3, t4)
        plain = steps.encode_counted(words, t1, t2, t3, t4, False)
        tl.atomic_add(count, tl.sum((mine != plain).to(tl.int32)))


@triton.jit
def differ_amax(numbers, count, NAN_SPOILS: tl.constexpr):
    first, second = _halves_of_program(numbers)
    mine = packed.block_amax(first, second, NAN_SPOILS)
    plain = steps.block_amax(first, second, NAN_SPOILS, False)
    if NAN_SPOILS:  # any NaN stands for NaN
        mine = tl.minimum(mine, BF16_INF_ + 1)
        plain = tl.minimum(plain, BF16_INF_ + 1)
    tl.atomic_add(count, tl.sum((mine != plain).to(tl.int32)))


@pytest.fixture
def count(gpu):
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the packed steps are for compute capability 9.0 and up")
    return torch.zeros((), dtype=torch.int32, device=gpu)


def test_scales_of_every_float32(count):
    differ_scale[((1 << 31) // SIZE.value,)](count)
    assert count.item() == 0


def test_scales_of_every_block_amax_under_the_outer_scale_of_every_row_amax(count):
    outer = vllm_outer_scales()[:-1].cuda()
    for first in range(0, len(outer), 1 << 14):
        rows = min(len(outer) - first, 1 << 14)
        differ_quotient_scale[(32768 // SIZE.value, rows)](outer, first, count)
    assert count.item() == 0


def test_thresholds_under_the_outer_scale_of_every_row_amax_and_every_scale(count):
    outer = vllm_outer_scales().repeat_interleave(len(SCALES))
    scale = SCALES.repeat(len(outer) // len(SCALES))
    o, s = padded(outer, "cuda"), padded(scale, "cuda")
    differ_thresholds[(len(o) // SIZE.value,)](o, s, count, len(outer))
    assert count.item() == 0


def every_bf16(last: int = 0x7FFF) -> torch.Tensor:
    """The magnitudes up to `last` with both signs, the block's numbers far from each other."""
    bits = torch.arange(last + 1, dtype=torch.int32)
    bits = torch.cat((bits, bits | 0x8000)).to(torch.int16)
    return bits.view(16, -1).T.contiguous().view(torch.bfloat16).cuda()


ONE = 127  # the exponent field of 1.0


@pytest.mark.parametrize(
    ("nan_spoils", "exponents"), [(True, range(27, 245)), (False, range(ONE, ONE + 1))], ids=str
)
def test_codes_of_every_bf16_under_every_scale_and_outer_scale(nan_spoils, exponents, count):
    numbers = every_bf16()
    if nan_spoils:  # NaN beside every number would leave nothing to see
        numbers = torch.where(numbers.isnan(), 1.0, numbers)
    finite = torch.where(numbers.isinf(), 1.0, numbers)  # Inf only meets a scale that is not zero
    for part, scales in ((numbers, SCALES.cuda()), (finite, torch.zeros(1, device="cuda"))):
        grid = (numbers.numel() // SIZE.value, len(scales), len(exponents))
        differ_divided[grid](part, scales, exponents[0], count, nan_spoils)
    assert count.item() == 0


def test_codes_of_blocks_with_nan(count):
    scales = torch.cat((torch.zeros(1), SCALES)).cuda()
    numbers = every_bf16()[:, :1].expand(-1, 16).contiguous()
    numbers[::2, 3] = math.nan
    numbers[1::2] = torch.where(numbers[1::2].isinf() | numbers[1::2].isnan(), 1.0, numbers[1::2])
    grid = (numbers.numel() // SIZE.value, len(scales), 1)
    differ_divided[grid](numbers, scales, ONE, count, True)
    assert count.item() == 0


@pytest.mark.parametrize("term", [1, 2, 3, 4])
def test_codes_of_every_bf16_against_every_threshold(term, count):
    numbers = every_bf16()
    differ_counted[(numbers.numel() // SIZE.value, 0x8001 - 0x100)](numbers, count, term)
    assert count.item() == 0


@pytest.mark.parametrize("nan_spoils", [True, False])
def test_amax_of_blocks_of_any_bits(nan_spoils, count):
    generator = torch.Generator("cuda").manual_seed(1405)
    shape = (1 << 12, SIZE.value)
    bits = torch.randint(0, 1 << 16, shape, device="cuda", generator=generator)
    small = torch.rand(shape, device="cuda", generator=generator) < 0.99  # else nearly all hold NaN
    for numbers in (bits, torch.where(small, bits & 0xBFFF, bits)):
        numbers = numbers.to(torch.int16).view(torch.bfloat16)
        differ_amax[(len(numbers),)](numbers, count, nan_spoils)
    assert count.item() == 0
