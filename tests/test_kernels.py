"""The numerics of the kernels over all their inputs; our kernel and the seed's against `quantize`
and against the oracles.

Every kernel test runs in the interpreter and, marked `gpu`, compiled; what is too long for the
interpreter says so and is `gpu` only. May be changed: shapes, recipes and special blocks may be
added to the tables.
"""

import math

import kernel_runs
import numpy as np
import proofs
import pytest
import torch
import triton
import triton.language as tl
from kernel_runs import bit_patterns, run

from nvfp4lab import layouts
from nvfp4lab.codec import quantize
from nvfp4lab.formats import E2M1, E4M3
from nvfp4lab.kernels import numerics, staging

# The interpreter computes with numpy, which warns of the NaN and overflows that are tested here.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

SEED = 1405
OURS = ("nvfp4", "nvfp4-token", "vllm-megamoe", "vllm-muse")
SIZE = 1 << 13  # values that one program of a test kernel works on
BF16_INF, BF16_MAX = 0x7F80, 0x7F7F
INF, NAN = math.inf, math.nan


# ---- numerics.py ----


@triton.jit
def encode_scales(value, code, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(code + at, numerics.encode_e4m3(tl.load(value + at)))


@triton.jit
def decode_scales(code, value, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(value + at, numerics.decode_e4m3(tl.load(code + at)))


@triton.jit
def encode_elements(magnitude, reciprocal, code, SIZE: tl.constexpr):
    """Program (p, c): run c of the magnitudes with reciprocal number p."""
    at = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    codes = numerics.encode_e2m1(tl.load(magnitude + at), tl.load(reciprocal + tl.program_id(0)))
    tl.store(code + tl.program_id(0) * tl.num_programs(1) * SIZE + at, codes)


@triton.jit
def find_outer(amax_bits, exponent, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(exponent + at, numerics.token_outer_exponent(tl.load(amax_bits + at)))


@triton.jit
def make_powers(exponent, value, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(value + at, numerics.power_of_two(tl.load(exponent + at)))


def apply(kernel, values: torch.Tensor, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A kernel of one input over all values, padded to whole programs with the last one."""
    padded = torch.cat((values, values[-1:].expand(-len(values) % SIZE))).to(device)
    out = torch.full(padded.shape, -1, dtype=dtype, device=device)
    kernel[(len(padded) // SIZE,)](padded, out, SIZE=SIZE)
    return out[: len(values)].cpu()


def bf16_magnitudes(last: int) -> torch.Tensor:
    """float32 of the BF16 bits 0 to `last`."""
    return torch.arange(last + 1, dtype=torch.int16).view(torch.bfloat16).float()


def floats_around_every_e4m3_step() -> torch.Tensor:
    """Every magnitude and midpoint with both neighbours, all BF16, and every 4099th float32."""
    values = torch.tensor([*E4M3.values[: E4M3.code_of_max + 1], 464.0, 480.0])
    steps = torch.cat((values, (values[1:] + values[:-1]) / 2))
    bits = steps.view(torch.int32)
    near = torch.cat((bits, bits + 1, (bits - 1).clamp(min=0)))
    spread = torch.arange(0, 0x7F800001, 4099, dtype=torch.int64).to(torch.int32)
    return torch.cat((near, spread)).view(torch.float32)


def test_encode_e4m3_agrees_with_the_format_around_every_step(device):
    values = torch.cat((floats_around_every_e4m3_step(), bf16_magnitudes(BF16_INF)))
    got = apply(encode_scales, values, torch.int32, device)
    assert torch.equal(got, E4M3.encode(values).int())


def test_decode_e4m3_agrees_with_the_format_for_every_finite_code(device):
    codes = torch.arange(E4M3.code_of_max + 1, dtype=torch.int32)
    got = apply(decode_scales, codes, torch.float32, device)
    assert torch.equal(got, E4M3.decode(codes))


@pytest.mark.parametrize("exponent", [27, 127, 244], ids=["2^-100", "1", "2^117"])
def test_encode_e2m1_divides_every_bf16_by_every_scale_as_if_exactly(exponent, device):
    """All 4.1 million pairs, each under the least, the unit and the largest outer scale."""
    scales = E4M3.decode(torch.arange(1, E4M3.code_of_max + 1))
    inverse_outer = torch.tensor(2.0 ** (127 - exponent))
    reciprocals = torch.cat((torch.zeros(1), torch.ones(()) / scales * inverse_outer))
    magnitudes = bf16_magnitudes(BF16_INF)
    padded = torch.nn.functional.pad(magnitudes, (0, -len(magnitudes) % SIZE))
    finite = padded.where(padded.isfinite(), 0.0)  # Inf only meets a scale that is not zero
    codes = torch.full((len(reciprocals), len(padded)), -1, dtype=torch.int32, device=device)
    for part, span in ((finite, slice(0, 1)), (padded, slice(1, None))):
        grid = len(reciprocals[span]), len(padded) // SIZE
        r = reciprocals[span].to(device)
        encode_elements[grid](part.to(device), r, codes[span], SIZE)  # pyright: ignore[reportArgumentType]
    got = codes[:, : len(magnitudes)].cpu()
    assert not got[0].any(), "a reciprocal of 0 gives code 0"
    outer = 2.0 ** (exponent - 127)
    for scale, codes_of_scale in zip(scales.double(), got[1:], strict=True):
        # In float64 ties stay ties and nothing else comes near one.
        quotient = (magnitudes.double() / (scale * outer)).float()
        assert torch.equal(codes_of_scale, E2M1.encode(quotient).int()), f"scale {scale}"


def test_the_outer_scale_is_the_least_power_of_two_for_every_row_amax(device):
    amax_bits = torch.arange(BF16_MAX + 1, dtype=torch.int32)
    got = apply(find_outer, amax_bits, torch.int32, device)
    fraction, power = np.frexp(bf16_magnitudes(BF16_MAX).double().numpy() / 2688)
    want = np.clip(power + 127 - (fraction == 0.5), 127 - 100, 127 + 117)
    want[0] = 127
    assert torch.equal(got, torch.from_numpy(want.astype(np.int32)))


def test_powers_of_two_from_every_exponent_field(device):
    exponents = torch.arange(1, 255, dtype=torch.int32)
    got = apply(make_powers, exponents, torch.float32, device)
    assert got.tolist() == [2.0 ** (e - 127) for e in range(1, 255)]


def scales_by_constant(amax: torch.Tensor, sixth: torch.Tensor) -> torch.Tensor:
    return E4M3.encode(amax * sixth)


def test_multiplying_by_a_sixth_gives_the_scale_byte_of_dividing_by_six_for_every_amax():
    amax = bf16_magnitudes(BF16_INF)
    divided = E4M3.encode(amax / torch.full_like(amax, 6.0))
    assert torch.equal(scales_by_constant(amax, torch.tensor(1.0 / 6.0)), divided)


def test_a_sixth_that_is_one_ulp_off_changes_scale_bytes():
    """So that the test above is known to be able to fail."""
    amax = bf16_magnitudes(BF16_INF)
    sixth = torch.tensor(1.0 / 6.0)
    below = torch.nextafter(sixth, torch.tensor(0.0))
    changed = scales_by_constant(amax, below) != scales_by_constant(amax, sixth)
    assert changed.sum() == 63


# ---- The kernels against quantize ----


def assert_equals_quantize(recipe: str, x: torch.Tensor, device: str) -> None:
    codes, scales, outer = run(recipe, x.to(device))
    q = quantize(x, recipe)
    want = {"code": (codes, q.element_codes()), "scale": (scales, q.scales)}
    if q.outer is not None:
        want["outer scale"] = (outer, q.outer)
    values, bits = x.float().numpy(), x.view(torch.int16).numpy().view(np.uint16)
    for what, (got, expected) in want.items():
        step = x.shape[-1] // expected.shape[-1]
        proofs.require_equal(
            f"{recipe} {what}", got, expected.numpy(), values[:, ::step], bits[:, ::step]
        )


@pytest.mark.parametrize("shape", [(1, 128), (3, 384), (17, 7168)], ids=str)
@pytest.mark.parametrize("recipe", OURS)
def test_our_kernel_gives_the_bytes_of_quantize_on_any_bits(recipe, shape, device):
    print(f"seed {SEED}")
    assert_equals_quantize(recipe, bit_patterns(*shape, seed=SEED), device)


@pytest.mark.parametrize("shape", [(1, 128), (3, 384), (17, 7168)], ids=str)
def test_the_seed_gives_the_bytes_of_quantize_on_any_normal_numbers(shape, device):
    """NaN and BF16 subnormals are left to the compiled kernel: see the two tests below."""
    print(f"seed {SEED}")
    x = bit_patterns(*shape, seed=SEED, largest=BF16_INF)
    assert_equals_quantize("seed", x.where(x.abs() >= 2.0**-126, 0.0), device)


def test_the_seed_compiled_gives_the_bytes_of_quantize_on_any_bits(gpu):
    print(f"seed {SEED}")
    assert_equals_quantize("seed", bit_patterns(17, 7168, SEED), gpu)


def test_the_interpreter_reads_a_bf16_subnormal_without_its_leading_bit(interpreter):
    """Triton's own fault, in its BF16 to float32: what the seed's sign of -2^-133 shows."""
    x = torch.zeros(1, 128, dtype=torch.bfloat16)
    x[0, 0], x[0, 1] = 4096.0, -(2.0**-133)
    assert run("seed", x.to(interpreter))[0][0, 1] == 0
    assert quantize(x, "seed").element_codes()[0, 1] == 8


BLOCKS = {
    "zeros of both signs": [0, -0.0],
    "Inf": [INF, -INF, 1, -1, 130, -3e38],
    "NaN": [NAN, -INF, 1, -1],
    "nothing but NaN": [NAN] * 16,
    "BF16 subnormals": [2.0**-133, -(2.0**-132), -(2.0**-127)],
    "a scale that rounds to zero": [2.0**-8, -(2.0**-9), -0.0],
    "the least scale": [3.03125 * 2.0**-9, -(2.0**-9)],
    "subnormal scales": [6 * 5 * 2.0**-9, -(2.0**-7), 2.0**-9],
    "the last subnormal scale rounds up to a normal": [6 * 7.75 * 2.0**-9, 0.03],
    "the largest scale": [2688, -448, 112, -112.5],
    "saturating": [2784, -2800, 112, 3e38],
    "the largest finite values": [3.38e38, -3.38e38, 1e36, -1e35],
    "ties of E2M1": [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, -0.25, -0.75, -1.25, -1.75, -2.5, -5],
    "ties of E4M3": [6.375, 0.25, -0.25],
}


def row_of(block: list[float], beside: float = 0.0) -> torch.Tensor:
    """One row of 128: the block fourth, `beside` in the first."""
    row = torch.zeros(1, 128)
    row[0, 48 : 48 + len(block)] = torch.tensor(block)
    row[0, 5] = beside
    return row.to(torch.bfloat16)


@pytest.mark.parametrize("beside", [0.0, 1.0, 2.0**60], ids=["alone", "beside 1", "beside 2^60"])
@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("recipe", OURS)
def test_special_blocks_give_the_bytes_of_quantize(recipe, case, beside, device):
    assert_equals_quantize(recipe, row_of(BLOCKS[case], beside), device)


@pytest.mark.parametrize("case", [c for c in BLOCKS if "NaN" not in c and "BF16 sub" not in c])
def test_special_blocks_give_the_bytes_of_quantize_in_the_seed(case, device):
    assert_equals_quantize("seed", row_of(BLOCKS[case]), device)


@pytest.mark.parametrize(
    ("block", "scale", "codes"),
    [
        ([NAN, -1, 2], 0x7F, [7] * 16),
        ([-NAN], 0x7F, [7] * 16),
        ([INF, -INF, -1, 448], 0x7E, [7, 15, 8, 2] + [0] * 12),
        ([0, -0.0], 0x00, [0, 8] + [0] * 14),
        ([0.001, -0.001], 0x00, [0, 8] + [0] * 14),
    ],
    ids=["NaN", "-NaN", "Inf", "zero", "zero scale"],
)
def test_nvfp4_special_blocks_by_hand(block, scale, codes, device):
    got_codes, got_scales, _ = run("nvfp4", row_of(block).to(device))
    assert (got_scales[0, 3].item(), got_codes[0, 48:64].tolist()) == (scale, codes)


@pytest.mark.parametrize("recipe", OURS)
def test_a_row_of_zeros_between_others(recipe, device):
    x = bit_patterns(3, 384, SEED, largest=BF16_MAX)
    x[1] = 0
    assert_equals_quantize(recipe, x, device)


@pytest.mark.parametrize(
    ("row", "outer"),
    [
        ([0.0, -0.0], 1.0),
        ([NAN, -NAN], 1.0),
        ([2688.0], 1.0),
        ([2704.0], 2.0),
        ([NAN, 1344.0], 0.5),
        ([INF], 2.0**117),
        ([2.0**-133], 2.0**-100),
    ],
    ids=str,
)
def test_nvfp4_token_outer_scales_by_hand(row, outer, device):
    assert run("nvfp4-token", row_of(row).to(device))[2].item() == outer


# ---- Strides ----


def guarded(shape: tuple[int, int], dtype: torch.dtype, fill: int, device: str):
    """(whole, view): a view with longer rows and an odd offset inside a tensor full of `fill`."""
    whole = torch.full((shape[0] + 2, shape[1] + 7), fill, dtype=dtype, device=device)
    return whole, whole[1:-1, 3:-4]


@pytest.mark.parametrize("recipe", OURS)
def test_views_with_longer_rows_and_odd_offsets_are_filled_and_nothing_beside_them(recipe, device):
    tokens, width, top_k = 3, 384, 5
    x = bit_patterns(tokens, width, SEED)
    _, hidden = guarded((tokens, width), torch.bfloat16, 0, device)
    hidden.copy_(x)
    whole_codes, x_fp4 = guarded((tokens, width // 2), torch.uint8, 0xAA, device)
    whole_words, x_sf = guarded((tokens, width // 64), torch.int32, -7, device)
    ids = torch.arange(tokens * top_k, dtype=torch.int32, device=device).view(top_k, tokens).T
    weights = torch.arange(tokens * top_k * 2.0, device=device).view(tokens, -1)[:, ::2]
    whole_idx, idx_out = guarded((tokens, top_k), torch.int64, -7, device)
    weights_out = torch.full((top_k, tokens), -7.0, device=device).T
    x_scales = torch.empty(tokens, device=device) if recipe in kernel_runs.PER_TOKEN else None

    arguments = hidden, weights, ids, x_fp4, x_sf, idx_out, weights_out, x_scales, None
    staging.prepare(*arguments, recipe=recipe)(*arguments)

    q = quantize(x, recipe)
    assert torch.equal(x_fp4.cpu(), q.codes)
    assert torch.equal(x_sf.cpu(), layouts.to_words(q.scales))
    assert torch.equal(idx_out, ids.long())
    assert torch.equal(weights_out, weights)
    for whole, view in ((whole_codes, x_fp4), (whole_words, x_sf), (whole_idx, idx_out)):
        untouched = whole[0, 0].item()
        view.fill_(untouched)
        assert (whole == untouched).all(), "written outside the view"


def test_the_seed_fills_views_with_longer_rows_and_odd_offsets(device):
    x = bit_patterns(3, 384, SEED, largest=BF16_INF)
    x = x.where(x.abs() >= 2.0**-126, 0.0)
    _, hidden = guarded((3, 384), torch.bfloat16, 0, device)
    hidden.copy_(x)
    codes, scales, _ = run("seed", hidden)
    q = quantize(x, "seed")
    assert torch.equal(codes.cpu(), q.element_codes())
    assert torch.equal(scales.cpu(), q.scales)


# ---- The kernels against the oracles ----


def test_every_bf16_amax_gives_the_scale_byte_of_the_oracle(device):
    """One program a run of 128 blocks; the seed's, of 8, is long in the interpreter."""
    count = proofs.prove_scales(run, "nvfp4", device, width=2048)
    assert count == 32768 * (proofs.BLOCK + 1)


def test_every_bf16_amax_gives_the_scale_byte_of_the_oracle_in_the_seed(gpu):
    assert proofs.prove_scales(run, "seed", gpu) == 32768 * (proofs.BLOCK + 1)


@pytest.mark.parametrize("recipe", ["nvfp4", "seed"])
def test_every_reachable_pair_of_value_and_scale_byte_gives_the_code_of_the_oracle(recipe, gpu):
    count = proofs.prove_codes(run, recipe, gpu, with_nan=recipe == "seed")
    print(f"{recipe}: {count} codes and scales")


def test_every_row_amax_gives_the_outer_scale_of_the_oracle(gpu):
    assert proofs.prove_token_outer(run, gpu) == 32768 * (128 + 8 + 1)


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token", "seed"])
def test_seeded_bit_patterns_give_the_bytes_of_the_oracle(recipe, gpu):
    proofs.prove_random(run, recipe, torch.bfloat16, gpu, width=7168, elements=1 << 22, seed=SEED)


@pytest.mark.parametrize("recipe", OURS)
def test_offsets_past_2_to_the_31_are_right(recipe, gpu):
    """Rows 2^30 elements apart: the last starts at 2^32 in hidden_states, 8 GiB."""
    needed = 10 << 30
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory")
    x = bit_patterns(5, 128, SEED)
    hidden = torch.empty(4 << 30 | 128, dtype=torch.bfloat16, device=gpu).as_strided(
        (5, 128), (1 << 30, 1)
    )
    hidden.copy_(x)
    codes, scales, _ = run(recipe, hidden)
    q = quantize(x, recipe)
    assert torch.equal(codes.cpu(), q.element_codes())
    assert torch.equal(scales.cpu(), q.scales)
