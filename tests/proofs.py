"""Exhaustive proofs of an implementation against `oracles.py`: inputs, comparison, and the proofs
themselves.

An implementation is any callable `(recipe, x) -> (codes, scales, outer)`: x a torch tensor (rows,
width) on the device asked for; codes uint8 (rows, width), one 4-bit code to a byte, scales (rows,
width / 16) in the scale format's own bytes (float32 for `nvfp4-exact-scale`), outer None, () or
(rows, 1), all tensors. `quantize_with_torch` is one, `quantize_by_reference` another; a staging
kernel, in the interpreter or on a GPU, is a third (bf16, width 128). Every proof returns how many
values it compared and raises AssertionError with the first ten mismatches.

May be changed: add implementations and proofs; a proof may not be thinned out without its docstring
saying so.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import oracles
import torch

Implementation = Callable[[str, torch.Tensor], tuple[Any, Any, Any]]

BLOCK = oracles.BLOCK
BF16_INFINITY = 0x7F80
ALL_MAGNITUDES = np.arange(
    1 << 15, dtype=np.uint16
)  # every non-negative bf16, Inf and the NaNs included


# ---- Implementations ----


def quantize_with_torch(recipe: str, x: torch.Tensor, outer: float | None = None):
    """`nvfp4lab.quantize`, its nibbles unpacked (low nibble: even element)."""
    import nvfp4lab

    q = nvfp4lab.quantize(x, recipe, outer=None if outer is None else torch.tensor(outer))
    return unpack(q.codes), q.scales, q.outer


def quantize_by_reference(recipe: str, x: torch.Tensor):
    """The same without the tables that `quantize` takes on a CPU; recipes without outer scale."""
    import nvfp4lab
    from nvfp4lab.blocks import quantize_blocks
    from nvfp4lab.outer import OuterScale

    blocks, one = x.reshape(-1, BLOCK).float(), OuterScale.one(x.device)
    codes, scales = quantize_blocks(blocks, one, nvfp4lab.recipe(recipe), x.dtype)
    return codes.view(x.shape), scales.view(len(x), -1), None


def dequantize_with_torch(recipe: str, codes: torch.Tensor, scales: torch.Tensor, outer):
    """`Quantized.dequantize` of codes (rows, width), one to a byte, in float32."""
    import nvfp4lab

    packed = codes[..., ::2] | codes[..., 1::2] << 4
    return nvfp4lab.Quantized.from_buffers(packed, scales, outer, recipe=recipe).dequantize()


def unpack(packed: torch.Tensor) -> torch.Tensor:
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


# ---- Inputs: bit patterns as numpy arrays (rows, width) ----


def tensor_of(bits: np.ndarray, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """The torch tensor with these bits (uint16 for bf16 and fp16, uint32 for fp32)."""
    signed = {2: np.int16, 4: np.int32}[bits.dtype.itemsize]
    return torch.from_numpy(bits.view(signed).copy()).view(dtype).to(device)


def float32_of(bits: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The same numbers as float32, for the oracle; exact."""
    if dtype is torch.bfloat16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view({torch.float16: np.float16, torch.float32: np.float32}[dtype]).astype(
        np.float32
    )


def rows_of_blocks(blocks: np.ndarray, width: int) -> np.ndarray:
    """Blocks (n, 16) -> rows (ceil(16 n / width), width), zero blocks added at the end."""
    missing = -len(blocks) % (width // BLOCK)
    return np.pad(blocks, ((0, missing), (0, 0))).reshape(-1, width)


def amax_blocks(magnitudes: np.ndarray) -> np.ndarray:
    """One block for each magnitude, at a position and with a sign that vary, the rest zero."""
    blocks = np.zeros((len(magnitudes), BLOCK), np.uint16)
    position = np.arange(len(magnitudes))
    blocks[position, position % BLOCK] = magnitudes | (position // BLOCK % 2 << 15).astype(
        np.uint16
    )
    return blocks


def largest_amax_by_scale(recipe: str) -> dict[int, int]:
    """For each scale byte the bits of the largest bf16 amax (Inf included) that yields it."""
    magnitudes = ALL_MAGNITUDES[: BF16_INFINITY + 1]
    codes = oracles.scale_code(recipe, float32_of(magnitudes, torch.bfloat16))
    return {int(code): int(bits) for bits, code in zip(magnitudes, codes, strict=True)}


def pair_blocks(recipe: str, with_nan: bool) -> Iterator[tuple[int, np.ndarray]]:
    """(scale byte, blocks) that hold every bf16 value which can meet that byte, the block's amax
    first.

    Padding repeats the amax, so no block has another maximum. Without an outer scale the byte is a
    function of the block's amax and the code of x and the byte. If x can meet the byte at all, it
    does so in a block whose amax, A, has abs(x) <= A and yields the byte; the largest such A bounds
    them all, so the values up to it, of both signs, are all that are reachable, and one amax a byte
    covers the pairs. NaN, where the maximum skips it, meets every byte.
    """
    for code, amax in largest_amax_by_scale(recipe).items():
        magnitudes = np.arange(amax + 1, dtype=np.uint16)
        if with_nan:
            magnitudes = np.concatenate((magnitudes, ALL_MAGNITUDES[BF16_INFINITY + 1 :]))
        values = np.concatenate((magnitudes, magnitudes | np.uint16(0x8000)))
        values = np.pad(values, (0, -len(values) % (BLOCK - 1)), constant_values=amax)
        values = values.reshape(-1, BLOCK - 1)
        yield code, np.insert(values, 0, amax, axis=1)


def random_tensors(
    dtype: torch.dtype, elements: int, width: int, seed: int, unit: float = 1.0
) -> Iterator[np.ndarray]:
    """Tensors (32, width) of bit patterns, of four kinds in turn, until `elements` are reached.

    Kind 0: any bits. 1 and 2: magnitudes that fall off by up to 2^12 from tensor to row, again from
    row to block, and by 2^6 in a block. 3: midpoint * E4M3 value * power of two * unit and its two
    neighbours, which give a quotient rounded once too often away.
    """
    rng = np.random.default_rng(seed)
    bits, mantissa = {torch.bfloat16: (16, 7), torch.float16: (16, 10), torch.float32: (32, 23)}[
        dtype
    ]
    exponents = (1 << (bits - 1 - mantissa)) - 1
    shape = (32, width // BLOCK, BLOCK)
    for tensor in range(-(-elements // (32 * width))):
        falls = rng.integers(0, 13, (32, 1, 1)) + rng.integers(0, 13, (*shape[:2], 1))
        if tensor % 4 == 0:
            pattern = rng.integers(0, 1 << bits, shape)
        elif tensor % 4 < 3:
            field = rng.integers(0, exponents) - falls - rng.integers(0, 7, shape)
            pattern = np.maximum(field, 0) << mantissa | rng.integers(0, 1 << mantissa, shape)
        else:
            midpoints = rng.choice([0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6], shape)
            midpoints[..., 0] = 6
            scale = (
                (1 + rng.integers(0, 8, falls.shape) / 8) * 2.0 ** (8 - falls) * np.float32(unit)
            )
            near = torch.from_numpy(midpoints * scale.astype(np.float32)).to(dtype)
            near = near.view(torch.int16 if bits == 16 else torch.int32).numpy().astype(np.int64)
            pattern = np.maximum(near + rng.integers(-1, 2, shape), 0)
        if tensor % 4:
            pattern |= rng.integers(0, 2, shape) << (bits - 1)
        yield pattern.reshape(32, width).astype(np.uint16 if bits == 16 else np.uint32)


# ---- Comparison ----


def require_equal(
    what: str, got: Any, want: np.ndarray, values: np.ndarray, bits: np.ndarray
) -> int:
    """Count the entries of `want`; raise AssertionError listing the first ten that differ.

    Floats are compared by their bits, except that any NaN equals any NaN. `values` and `bits` (same
    shape as `want`) are the inputs to name in a mismatch.
    """
    got = got.detach().cpu().numpy() if isinstance(got, torch.Tensor) else np.asarray(got)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, want {want.shape}"
    assert got.dtype == want.dtype, f"{what}: dtype {got.dtype}, want {want.dtype}"
    if want.dtype == np.float32:
        differs = got.view(np.uint32) != want.view(np.uint32)
        differs &= ~(np.isnan(got) & np.isnan(want))
    else:
        differs = got != want
    if differs.any():
        lines = [f"{what}: {np.count_nonzero(differs)} of {want.size} differ; the first:"]
        form = hex if want.dtype.kind == "u" else repr
        for index in map(tuple, np.argwhere(differs)[:10]):
            lines.append(
                f"  at {tuple(map(int, index))}: value {values[index]!r} bits {int(bits[index]):#x}"
                f" got {form(got[index].item())} want {form(want[index].item())}"
            )
        raise AssertionError("\n".join(lines))
    return want.size


def compare(
    implementation: Callable[..., tuple[Any, Any, Any]],
    recipe: str,
    bits: np.ndarray,
    dtype: torch.dtype,
    device: str = "cpu",
    **outer: Any,
) -> int:
    """Run both on bits (rows, width); how many codes, scales and outer scales were compared.

    `outer=...` is handed on to both: a given outer scale.
    """
    x = float32_of(bits, dtype)
    codes, scales, got_outer = implementation(recipe, tensor_of(bits, dtype, device), **outer)
    want_codes, want_scales, want_outer = oracles.quantize(recipe, x, **outer)
    first = x[..., ::BLOCK], bits[..., ::BLOCK]  # a scale is named by its block's first element
    count = require_equal(f"{recipe} scale", scales, want_scales, *first)
    count += require_equal(f"{recipe} code", codes, want_codes, x, bits)
    if want_outer is None:
        assert got_outer is None, f"{recipe}: an outer scale {got_outer!r}, want None"
        return count
    want_outer = np.asarray(want_outer)
    named = (x[..., :1], bits[..., :1]) if want_outer.ndim else (x[0, 0], bits[0, 0])
    values, patterns = map(np.asarray, named)
    return count + require_equal(f"{recipe} outer scale", got_outer, want_outer, values, patterns)


# ---- Proofs: each returns the number of values compared ----


def prove_scales(
    implementation: Implementation,
    recipe: str,
    device: str = "cpu",
    width: int = 128,
    with_nan: bool = True,
) -> int:
    """All 2^15 non-negative bf16 amax -> scale byte. Without NaN: all 32,641 up to Inf."""
    magnitudes = ALL_MAGNITUDES if with_nan else ALL_MAGNITUDES[: BF16_INFINITY + 1]
    return compare(
        implementation,
        recipe,
        rows_of_blocks(amax_blocks(magnitudes), width),
        torch.bfloat16,
        device,
    )


def prove_codes(
    implementation: Implementation,
    recipe: str,
    device: str = "cpu",
    width: int = 128,
    with_nan: bool = False,
) -> int:
    """Every reachable pair of bf16 value and scale byte -> code; why all: `pair_blocks`."""
    batches = list(pair_blocks(recipe, with_nan))
    for code, blocks in batches:
        scales = oracles.quantize(recipe, float32_of(blocks, torch.bfloat16))[1]
        assert (scales == code).all(), f"{recipe}: a block built for {code:#04x} has another scale"
    rows = rows_of_blocks(np.concatenate([blocks for _, blocks in batches]), width)
    step = (1 << 20) // width  # as the peak memory of a GPU test and of the oracle
    return sum(
        compare(implementation, recipe, rows[k : k + step], torch.bfloat16, device)
        for k in range(0, len(rows), step)
    )


def prove_token_outer(
    implementation: Implementation, device: str = "cpu", width: int = 128, with_nan: bool = True
) -> int:
    """`nvfp4-token`: all 2^15 row amax -> outer scale, two values of amax / 64 beside each."""
    magnitudes = ALL_MAGNITUDES if with_nan else ALL_MAGNITUDES[: BF16_INFINITY + 1]
    rows = np.zeros((len(magnitudes), width), np.uint16)
    rows[:, 0] = magnitudes
    smaller = np.maximum(magnitudes.astype(np.int64) - (6 << 7), 0)
    rows[:, 3] = np.where(magnitudes < BF16_INFINITY, smaller, 0x3F80)
    rows[:, width - 2] = rows[:, 3] | 0x8000
    return compare(implementation, "nvfp4-token", rows, torch.bfloat16, device)


def prove_random(
    implementation: Implementation,
    recipe: str,
    dtype: torch.dtype,
    device: str = "cpu",
    width: int = 128,
    elements: int = 1 << 18,
    seed: int = 0,
) -> int:
    """Seeded bit patterns (`random_tensors`), not exhaustive."""
    print(f"{recipe} {dtype}: seed {seed}")
    return sum(
        compare(implementation, recipe, bits, dtype, device)
        for bits in random_tensors(dtype, elements, width, seed)
    )


def prove_decode(
    decoder: Callable[..., Any], recipe: str, outer: np.ndarray | None = None, device: str = "cpu"
) -> int:
    """All 16 codes under all 128 scale bytes -> float32, for each outer scale: (n, 1) or ()."""
    rows = 1 if outer is None or outer.ndim == 0 else len(outer)
    scales = np.tile(np.arange(128, dtype=np.uint8), (rows, 1))
    codes = np.tile(np.arange(16, dtype=np.uint8), (rows, 128))
    parts = [
        None if part is None else torch.from_numpy(part).to(device)
        for part in (codes, scales, outer)
    ]
    got = decoder(recipe, *parts)
    want = oracles.decode(recipe, codes, scales, outer)
    return require_equal(f"{recipe} decoded", got, want, np.repeat(scales, BLOCK, axis=1), codes)
