"""`nvfp4lab.quantize` against the oracle over every bf16 input, and over seeded bit patterns where
that is not finite.

The proofs themselves are in `proofs.py`, so that the kernels can be put through the same ones;
every test here runs on the CPU and, marked `gpu`, on a CUDA device. May be changed: recipes and
dtypes may be added to the tables.
"""

import functools
import math

import numpy as np
import oracles
import proofs
import pytest
import torch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SEED = 20250
INF, NAN = math.inf, math.nan

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])]
on_devices = pytest.mark.parametrize("device", DEVICES)
with_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))

both_ways = pytest.mark.parametrize(
    "way", [proofs.quantize_with_torch, proofs.quantize_by_reference], ids=["quantize", "reference"]
)


@on_devices
@both_ways
@pytest.mark.parametrize("recipe", ["nvfp4", "seed", "seed-as-meant"])
def test_every_bf16_amax_gives_the_scale_byte_of_the_oracle(recipe, way, device):
    count = proofs.prove_scales(way, recipe, device)
    print(f"{recipe}: {count} codes and scales from 32768 amax")
    assert count == 32768 * (proofs.BLOCK + 1)


@on_devices
@both_ways
@pytest.mark.parametrize("recipe", ["nvfp4", "seed", "seed-as-meant"])
def test_every_reachable_pair_of_bf16_value_and_scale_byte_gives_the_code_of_the_oracle(
    recipe, way, device
):
    bytes_ = proofs.largest_amax_by_scale(recipe).values()
    pairs = sum(2 * (amax + 1) for amax in bytes_)
    count = proofs.prove_codes(way, recipe, device, with_nan=recipe != "nvfp4")
    print(f"{recipe}: {pairs} pairs under {len(bytes_)} scale bytes in {count} codes and scales")
    assert count > pairs


@pytest.mark.parametrize(("recipe", "count"), [("nvfp4", 0x7F), ("seed", 0x80)])
def test_the_blocks_of_the_code_proof_meet_every_scale_byte(recipe, count):
    assert sorted(proofs.largest_amax_by_scale(recipe)) == list(range(count))


@on_devices
def test_every_bf16_row_amax_gives_the_outer_scale_of_the_oracle(device):
    count = proofs.prove_token_outer(proofs.quantize_with_torch, device)
    print(f"nvfp4-token: {count} codes, scales and outer scales from 32768 rows")
    assert count == 32768 * (128 + 8 + 1)


@on_devices
@with_dtypes
@pytest.mark.parametrize("recipe", oracles.NAMES)
def test_seeded_bit_patterns_give_the_bytes_of_the_oracle(recipe, dtype, device):
    count = proofs.prove_random(proofs.quantize_with_torch, recipe, dtype, device, seed=SEED)
    print(f"{recipe} {dtype}: {count} values")
    assert count > 1 << 18


@on_devices
@with_dtypes
@pytest.mark.parametrize("outer", [1.0, 2.0**-149, 3.7e-5, 0.0123, 1e-30, 1e34])
def test_a_given_outer_scale_gives_the_bytes_of_the_oracle(outer, dtype, device):
    print(f"seed {SEED}")
    for bits in proofs.random_tensors(dtype, 1 << 15, 128, SEED, unit=outer):
        proofs.compare(proofs.quantize_with_torch, "nvfp4-tensor", bits, dtype, device, outer=outer)


SPECIAL_BLOCKS = {
    "zeros of both signs": [[0, -0.0], []],
    "Inf": [[INF, -INF, 1, -1, 3e38], [1, -2]],
    "NaN": [[NAN, -INF, 1, -1], [1, -2, NAN], [1, -3]],
    "nothing but NaN": [[NAN] * 16, [NAN] * 16],
    "float32 subnormals": [[1e-40, -1e-41], [1e-45], []],
    "an amax that underflows when divided": [[1.8e-42], [3e-45, -1e-45], [1e-45], []],
    "the largest finite values": [[3.39e38, -3.4e38, 3e38], [1e36], [-3.4028235e38]],
}


@on_devices
@pytest.mark.parametrize("case", SPECIAL_BLOCKS)
@pytest.mark.parametrize("recipe", oracles.NAMES)
def test_special_values_give_the_bytes_of_the_oracle(recipe, case, device):
    x = np.zeros((1, 16 * len(SPECIAL_BLOCKS[case])), np.float32)
    for i, block in enumerate(SPECIAL_BLOCKS[case]):
        x[0, 16 * i : 16 * i + len(block)] = block
    proofs.compare(proofs.quantize_with_torch, recipe, x.view(np.uint32), torch.float32, device)


@on_devices
@pytest.mark.parametrize(
    ("recipe", "outer"),
    [
        ("nvfp4", None),
        ("seed", None),
        ("seed-as-meant", None),
        ("nvfp4-token", np.float32(2.0) ** np.arange(-100, 118, dtype=np.float32)[:, None]),
        *[("nvfp4-tensor", np.array(g, np.float32)) for g in (1, 2.0**-149, 1e-40, 3.7e-5, 1e34)],
    ],
)
def test_every_code_under_every_scale_byte_decodes_as_the_oracle_does(recipe, outer, device):
    count = proofs.prove_decode(proofs.dequantize_with_torch, recipe, outer, device)
    print(f"{recipe}: {count} decoded values")


# ---- The proofs can fail ----


def quantize_with_reciprocal(recipe, x, outer=None):
    """nvfp4 as cuBLAS documents it, x * float32(1 / s): wrong at 42 exact ties."""
    codes, scales, _ = oracles.quantize(recipe, x.float().numpy())
    values = np.array([float(oracles.scale_value(code)) for code in range(128)], np.float32)
    with np.errstate(all="ignore"):
        reciprocal = np.float32(1) / np.repeat(values[scales], proofs.BLOCK, axis=-1)
        y = np.abs(x.float().numpy()) * reciprocal
    sums = [y > 0.25, y >= 0.75, y > 1.25, y >= 1.75, y > 2.5, y >= 3.5, y > 5]
    changed = np.where(np.isfinite(y), codes & 8 | np.sum(sums, axis=0, dtype=np.uint8), codes)
    return changed.astype(np.uint8), scales, None


def test_the_code_proof_finds_a_reciprocal_in_place_of_a_division():
    with pytest.raises(AssertionError, match=r"nvfp4 code: \d+ of \d+ differ"):
        proofs.prove_codes(quantize_with_reciprocal, "nvfp4")


def test_the_scale_proof_finds_ties_rounded_away():
    def as_meant(recipe, x):
        return oracles.quantize("seed-as-meant", x.float().numpy())

    with pytest.raises(AssertionError, match="nvfp4 scale: "):
        proofs.prove_scales(as_meant, "nvfp4")


def test_a_mismatch_is_printed_as_value_bits_got_want():
    one_code_off = functools.partial(change_one_code, index=(1, 3))
    bits = np.full((2, 16), 0x3FC0, np.uint16)  # 1.5
    with pytest.raises(AssertionError) as caught:
        proofs.compare(one_code_off, "nvfp4", bits, torch.bfloat16)
    assert str(caught.value).splitlines() == [
        "nvfp4 code: 1 of 32 differ; the first:",
        "  at (1, 3): value np.float32(1.5) bits 0x3fc0 got 0x6 want 0x7",
    ]


def change_one_code(recipe, x, index):
    codes, scales, outer = oracles.quantize(recipe, x.float().numpy())
    codes[index] ^= 1
    return codes, scales, outer
