"""The faults of the user's kernel, one test each, by what it writes; and that it is the user's.

The kernel runs in the interpreter and, marked `gpu`, compiled. The faults are kept on purpose; a
test here that fails means that `kernels/seed.py` was mended, or that Triton changed. Nothing may be
changed in an expectation: they are worked out by hand from the user's source.
"""

import hashlib
import math
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from kernel_runs import run
from packaging.version import Version

from nvfp4lab.benchmarks import compiled
from nvfp4lab.formats import E2M1, E4M3
from nvfp4lab.kernels import seed

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter

SEED = 77
SOURCE = Path(seed.__file__).read_text(encoding="utf-8")
AS_THE_USER_WROTE_IT = """\
    e2m1_flat = tl.reshape(e2m1_4bit, [BLOCK_K])
    e2m1_lo = e2m1_flat[0::2]  # even indices → low nibble
    e2m1_hi = e2m1_flat[1::2]  # odd indices → high nibble
"""
SHA256_OF_THE_USERS_TEXT = "751b6dacb8eec3e86011efe8d61f443253432bcbab7a6fbbea42f01847d3550b"


def source_without_the_repair() -> str:
    start, end = SOURCE.index("    # The one repair"), SOURCE.index("    e2m1_packed =")
    return SOURCE[:start] + AS_THE_USER_WROTE_IT + SOURCE[end:]


def stage_block(block: list[float], device: str) -> tuple[int, list[int]]:
    """The scale byte and the 16 codes of a block, in a row of 128 with seven blocks of zeros."""
    x = torch.zeros(1, 128)
    x[0, 16 : 16 + len(block)] = torch.tensor(block)
    codes, scales, _ = run("seed", x.to(torch.bfloat16).to(device))
    return int(scales[0, 1]), codes[0, 16:32].tolist()


def scale_byte(amax: float, device: str) -> int:
    return stage_block([amax], device)[0]


def test_all_but_the_repair_is_the_users_text():
    """From the first decorator to the end; line breaks and indentation, lost in it, set aside."""
    text = "".join(source_without_the_repair().partition("@triton.jit")[1:])
    assert hashlib.sha256("".join(text.split()).encode()).hexdigest() == SHA256_OF_THE_USERS_TEXT


def test_fault_1_a_strided_slice_does_not_compile(tmp_path):
    file = tmp_path / "as_written.py"
    file.write_text(source_without_the_repair(), encoding="utf-8")
    code, written = compiled.compile_file("seed", 90, file, tmp_path)
    assert code != 0
    assert "e2m1_flat[0::2]" in written
    assert "unsupported tensor index" in written


@pytest.mark.parametrize(
    ("amax", "byte"),
    [(0.0, 0x79), (0.01171875, 0x78), (0.0419921875, 0x7E), (0.0439453125, 0x7F)],
    ids=["a zero block: 288", "256", "448", "NaN"],
)
def test_fault_2_an_exponent_below_zero_wraps_to_the_largest(amax, byte, device):
    """0.01171875 / 6 is 1.0 * 2^-9, 0.0419921875 / 6 1.79 * 2^-8, 0.0439453125 / 6 1.875 * 2^-8."""
    assert stage_block([amax], device) == (byte, [0] * 16)


def test_fault_2_small_gaussian_blocks_lose_everything(device):
    print(f"seed {SEED}")
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(SEED)) * 2.0**-8
    codes, scales, _ = run("seed", x.to(torch.bfloat16).to(device))
    assert not (codes & 7).any()
    assert (scales >= 0x78).all()
    assert 0.05 < (scales == 0x7F).float().mean() < 0.11


def test_fault_3_the_implicit_bit_is_lost_below_the_normals(device):
    """6 * 2^-7 has the scale 2^-7, four subnormal steps; its mantissa alone is 0."""
    assert stage_block([6 * 2.0**-7, -(2.0**-7)], device) == (0x00, [7, 15] + [0] * 14)
    assert scale_byte(6 * 1.5 * 2.0**-7, device) == 0x04  # 1.5 * 2^-7 is 0x06


@pytest.mark.parametrize(
    ("amax", "byte"),
    [(2784.0, 0x7F), (2960.0, 0x7F), (2976.0, 0x78), (3072.0, 0x78), (4608.0, 0x7C)],
    ids=["464: NaN", "493: NaN", "496: 256", "512: 256", "768: 384"],
)
def test_fault_4_a_scale_above_448_does_not_saturate(amax, byte, device):
    assert scale_byte(amax, device) == byte


def test_fault_4_the_kernel_itself_divides_by_480_where_the_consumer_reads_nan(device):
    byte, codes = stage_block([2880, -1440, 480], device)
    assert byte == 0x7F
    assert codes[:3] == [7, 13, 2]


@pytest.mark.parametrize(
    ("amax", "byte"), [(6.375, 0x39), (7.125, 0x3A)], ids=["17/16, up", "19/16, up to even"]
)
def test_fault_5_scale_ties_round_away_from_zero(amax, byte, device):
    assert scale_byte(amax, device) == byte


def test_fault_6_element_ties_round_away_from_zero(device):
    """Ties to even would give 0, 2, 2, 4, 4, 6, 6."""
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    byte, codes = stage_block([6.0, *ties, *(-t for t in ties)], device)
    assert byte == 0x38
    assert codes[1:15] == [1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15]


def codes_of_all_pairs(rounding, multiply: bool) -> torch.Tensor:
    """E2M1 codes of every BF16 magnitude under every scale byte that is not zero, 0x7F as 480."""
    x = torch.arange(0x7F80, dtype=torch.int16).view(torch.bfloat16).float()
    scales = E4M3.decode_as_number(torch.arange(1, 128, dtype=torch.uint8))[:, None]
    quotient = x * (torch.ones(()) / scales) if multiply else x / scales
    return E2M1.encode(quotient, rounding)


def test_fault_7_the_reciprocal_changes_no_code_while_ties_round_away():
    multiplied, divided = (codes_of_all_pairs("ties-away", how) for how in (True, False))
    assert torch.equal(multiplied, divided)


def test_fault_7_the_reciprocal_would_change_42_codes_if_ties_went_to_even():
    differ = codes_of_all_pairs("ties-to-even", True) != codes_of_all_pairs("ties-to-even", False)
    assert differ[:-1].sum() == 42  # of the 882 ties under the 126 finite scales


def test_fault_7_every_tie_under_every_scale_byte_rounds_away(device):
    """126 blocks, one for each finite byte: the amax that yields it, and the seven ties."""
    scales = E4M3.decode(torch.arange(1, 127, dtype=torch.uint8))
    amax = torch.where(scales >= 2.0**-6, 6 * scales, 6 * (2.0**-7 + scales / 2))
    x = torch.zeros(128, 16)
    x[:126, 0] = amax
    x[:126, 1:8] = scales[:, None] * torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert torch.equal(x.to(torch.bfloat16).float(), x), "amax and ties are exact in BF16"
    codes, got_scales, _ = run("seed", x.to(torch.bfloat16).view(16, 128).to(device))
    assert got_scales.flatten()[:126].tolist() == list(range(1, 127))
    assert (codes.view(128, 16)[:126, 1:8].cpu() == torch.arange(1, 8)).all()


def bf16_below(value: float) -> float:
    bits = torch.tensor(value, dtype=torch.bfloat16).view(torch.int16) - 1
    return bits.view(torch.bfloat16).item()


def test_fault_8_without_an_outer_scale_the_range_ends_at_both_sides(device):
    """A scale byte is the nearest only for amax / 6 from 31/32 * 2^-6 to below 464."""
    lowest, beyond = 6 * 31 / 32 * 2.0**-6, 2784.0
    amax = [bf16_below(lowest), lowest, bf16_below(beyond), beyond]
    assert amax[1] == pytest.approx(0.091, abs=2e-4)
    got = [scale_byte(value, device) for value in amax]
    nearest = E4M3.encode(torch.tensor(amax) / 6, "ties-away").tolist()
    assert [a == b for a, b in zip(got, nearest, strict=True)] == [False, True, True, False]


def test_fault_8_every_amax_below_the_floor_gives_the_same_byte(device):
    assert {scale_byte(a, device) for a in (0.0, 1e-30, 1e-6, 9.9e-5)} == {0x79}


def test_fault_9_a_nan_is_not_seen_by_the_amax_and_becomes_minus_6_when_compiled(gpu):
    byte, codes = stage_block([math.nan, 6.0, -3.0], gpu)
    assert byte == 0x38
    assert codes[:3] == [15, 7, 13]


def test_fault_9_a_nan_becomes_plus_6_in_the_interpreter_of_older_tritons(interpreter):
    """Why NaN inputs to the seed are held against the compiled kernel only."""
    _, codes = stage_block([math.nan, 6.0, -3.0], interpreter)
    assert codes[0] == (7 if Version(triton.__version__) < Version("3.8") else 15)


def test_fault_9_one_inf_makes_the_scale_256_and_zeroes_its_neighbours_below_64(device):
    byte, codes = stage_block([math.inf, 63.75, 64.0, -63.75, -math.inf], device)
    assert byte == 0x78
    assert codes[:5] == [7, 0, 1, 8, 15]


@triton.jit
def find_row(token, offset, as_in_the_seed, stride: tl.constexpr):
    """The seed's arithmetic, `token_id * stride`, and with the token widened first."""
    token_id = tl.load(token)
    tl.store(as_in_the_seed, (token_id * stride).to(tl.int64))
    tl.store(offset, token_id.to(tl.int64) * stride)


@pytest.mark.parametrize(("token", "wraps"), [(299_593, False), (299_594, True)])
def test_fault_10_row_offsets_are_32_bits_wide(token, wraps, device):
    tokens = torch.tensor([token], dtype=torch.int32, device=device)  # as tl.program_id is
    wide, narrow = torch.zeros(2, 1, dtype=torch.int64, device=device)
    find_row[(1,)](tokens, wide, narrow, 7168)  # pyright: ignore[reportArgumentType]
    assert wide.item() == token * 7168
    assert narrow.item() == token * 7168 - (2**32 if wraps else 0)


def test_the_sign_of_a_small_negative_is_kept_and_that_of_minus_zero_dropped(device):
    assert stage_block([6.0, -0.0, -0.125], device)[1][:3] == [7, 0, 8]
