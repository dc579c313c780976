"""What must hold of every recipe's output on any input.

A property takes a recipe and BF16 rows [T, K] (`bytes_are_codes` any dtype and shape), on the CPU
or a GPU; it returns how many blocks it looked at and raises AssertionError with the first of those
that break it. test_fuzz.py gives them what hypothesis draws and a million blocks of any bits,
fuzz.py as many on a GPU as are asked for.

May be changed: add a property here and to both. Where a property holds with exceptions, they are in
a table that says why; the exhaustive tests of test_fuzz.py hold the tables of `REQUANTIZED` in both
directions: what is not named does not change, what is named does.
"""

from __future__ import annotations

import math

import torch
from kernel_runs import run

import nvfp4lab as nv

# The scale codes under which requantizing a decoded block may change its bytes. Under scale code k,
# subnormal, amax / s lies from 6 - 3 / k to 6 + 3 / k: the largest element may round to less than
# 6, and is then no longer 6 times the scale. 7 - 3.5 / k in `nvint4`; `vllm-muse` has 1 for all
# that is smaller. `llama.cpp` has 448 for all from 248 up, and takes the tie at 5 to 4.
REQUANTIZED = {
    "nvfp4": {1, 2},
    "nvfp4-ue5m3": {1, 2},
    "cublas": {1, 2},
    "nvint4": {2, 4, 5, 6},
    "mxfp4-floor": set(),
    "mxfp4-even": set(),
    "vllm-muse": {2},
    "llama.cpp": {2, 3, 0x7E},
}
# The same of the values alone: 3 * s may become 6 * s / 2, or the scales of a row be halved and its
# outer scale doubled.
REQUANTIZED_VALUES: dict[str, set[int]] = {
    "mxfp4-ceil": set(),
    "mxfp8-deepseek-v4": set(),
    "nvfp4-search": set(),
    "nvfp4-token": {1, 2},
}

# Finite inputs that decode to NaN: of any magnitude where scales do not saturate at 448; and
# tensors whose amax is below this, where n / amax overflows or amax / n, a divisor, is 0.
NEVER_SATURATES = ("seed", "seed-as-meant")
_OVERFLOWS, _UNDERFLOWS = 2.0**-128, 2.0**-149
LEAST_AMAX = {
    "vllm-reference": 2688 * _OVERFLOWS,
    "torchao": 2688 * _UNDERFLOWS,
    "modelopt": 2688 * _UNDERFLOWS,
    "fouroversix": 1536 * _OVERFLOWS,
    "fouroversix-mae": 1536 * _OVERFLOWS,
    "fouroversix-max": 1536 * _OVERFLOWS,
    "fouroversix-static6": 2688 * _OVERFLOWS,
    "mlx": 2688 * _OVERFLOWS,
    "fp-quant": 2688 * _OVERFLOWS,
}


DRAWS_NOTHING = [n for n in nv.recipes() if nv.recipe(n).elements.rounding != "stochastic"]

# ---- The properties ----


def bytes_are_codes(recipe: nv.Recipe, x: torch.Tensor) -> int:
    """Codes and scale codes are codes of their formats, scales are not negative, and what no NaN or
    Inf could reach decodes to finite numbers: to the code's value times the scale's, times g."""
    q = nv.quantize(x, recipe)
    elements, fmt = recipe.elements.format, recipe.scale.format
    codes, stored = _codes(q), q.scales.reshape(-1)
    finite = _finite_parts(recipe, x)
    if recipe.name in NEVER_SATURATES or _amax(x) < LEAST_AMAX.get(recipe.name, 0.0):
        finite = torch.zeros_like(finite)
    require((codes >> elements.bits - 1 < 2).all(-1), x, recipe, "a code has too many bits")
    if elements.negative == "two's complement":
        lowest = 1 << elements.bits - 1
        require((codes != lowest).all(-1), x, recipe, "a code beyond that of the largest value")
    scale = stored if fmt is None else fmt.decode(stored)
    require(~finite | (scale >= 0) & ~scale.isinf(), x, recipe, "a scale is negative, NaN or Inf")
    if fmt is not None:
        in_format = stored <= fmt.code_of_max
        require(~finite | in_format, x, recipe, f"a scale code above {fmt.code_of_max:#x}")
    decoded = q.dequantize().reshape(codes.shape)
    require(~finite | decoded.isfinite().all(-1), x, recipe, "a finite block is no longer finite")
    if q.outer is not None:
        usable = ((q.outer >= 0) & q.outer.isfinite()).expand(q.scales.shape).reshape(-1)
        require(~finite | usable, x, recipe, "the outer scale is negative, NaN or Inf")
    return len(codes)


def requantizing_changes_nothing(recipe: nv.Recipe, x: torch.Tensor) -> int:
    """Quantizing what was decoded gives the bytes, or at least the values, that it was decoded
    from: of the blocks that are finite, whose BF16 decoding is exact, and whose scale code is not
    among those of the tables above."""
    q = nv.quantize(x, recipe)
    decoded = q.dequantize()
    y = decoded.to(torch.bfloat16)
    again = nv.quantize(y, recipe)
    may_change = REQUANTIZED.get(recipe.name, REQUANTIZED_VALUES.get(recipe.name, set()))
    held = _part(recipe, x, _blocks(y == decoded, recipe).all(-1))
    held = held & _finite_parts(recipe, x)
    for code in may_change:
        held = held & (q.scales.reshape(-1) != code)
    if recipe.name in REQUANTIZED:
        same = (_codes(q) == _codes(again)).all(-1) & (q.scales == again.scales).reshape(-1)
        require(~held | same, x, recipe, "requantized, the bytes change")
    same = _blocks(again.dequantize() == decoded, recipe).all(-1)
    require(~held | same, x, recipe, "requantized, the values change")
    return int(held.sum())


def permuting_blocks_permutes_outputs(recipe: nv.Recipe, x: torch.Tensor, seed: int) -> int:
    """The blocks of each row in another order have their bytes in that order; and so, where no
    scale is that of a token, have rows."""
    block = recipe.scale.block
    generator = torch.Generator(x.device).manual_seed(seed)
    order = torch.rand(len(x), x.shape[1] // block, device=x.device, generator=generator).argsort()
    rows = torch.randperm(len(x), device=x.device, generator=generator)
    bits = x.view(torch.int16).view(*order.shape, block)  # as BF16 a NaN may come out as another
    permuted = torch.take_along_dim(bits, order[..., None], 1)[rows].flatten(1).view(x.dtype)
    q, other = nv.quantize(x, recipe), nv.quantize(permuted, recipe)
    codes = _codes(q).view(*order.shape, block)
    moved_codes = _blocks(torch.take_along_dim(codes, order[..., None], 1)[rows], recipe)
    moved_scales = torch.take_along_dim(q.scales, order, 1)[rows].view(-1)
    same = (moved_codes == _codes(other)).all(-1) & _equal(moved_scales, other.scales.view(-1))
    require(same, permuted, recipe, "in another order, a block has other bytes")
    if q.outer is not None and other.outer is not None:
        outer = q.outer if q.outer.ndim == 0 else q.outer[rows]
        assert bool(_equal(outer, other.outer).all()), f"{recipe.name}: other outer scales"
    return len(same)


def a_power_of_two_changes_only_scales(recipe: nv.Recipe, x: torch.Tensor, exponent: int) -> int:
    """2**exponent * x has the codes of x; of its scales, or outer scales, the exponents are moved.

    x: magnitudes that are 0 or moderate, so that no scale is subnormal, floored or saturated.
    """
    q, scaled = nv.quantize(x, recipe), nv.quantize(x * 2.0**exponent, recipe)
    same = (_codes(q) == _codes(scaled)).all(-1)
    require(same, x, recipe, f"times 2^{exponent}, the codes change")
    stored, moved, fmt = q.scales.view(-1), scaled.scales.view(-1), recipe.scale.format
    if q.outer is not None and scaled.outer is not None:
        require(_equal(stored, moved), x, recipe, f"times 2^{exponent}, scale codes change")
        outer_moved = _equal(q.outer * 2.0**exponent, scaled.outer)
        assert bool(outer_moved.all()), f"{recipe.name}: times 2^{exponent}: other outer scales"
    elif fmt is None:
        require(_equal(stored * 2.0**exponent, moved), x, recipe, f"scales times 2^{exponent}")
    else:
        expected = stored.int() + (exponent << fmt.mantissa_bits)
        has_scale = (x != 0).view(-1, recipe.scale.block).any(-1)
        require(
            ~has_scale | (expected == moved), x, recipe, f"scale codes moved by {exponent} binades"
        )
    return len(same)


def the_kernel_gives_the_bytes_of_quantize(recipe: nv.Recipe, x: torch.Tensor) -> int:
    """The staging kernel, in the interpreter or compiled, against torch on x's own device."""
    codes, scales, outer = run(recipe.name, x)
    q = nv.quantize(x, recipe)
    same = (_codes(q) == codes.view(-1, 16)).all(-1) & (q.scales == scales).view(-1)
    if q.outer is not None:
        same &= _equal(q.outer, outer).expand(q.scales.shape).reshape(-1)
    require(same, x, recipe, "the kernel's bytes are not those of quantize")
    return len(same)


# ---- Inputs ----


def moderate(tokens: int, width: int, seed: int, device: str = "cpu") -> torch.Tensor:
    """BF16 rows of any signs and mantissas, magnitudes from 2^-12 to 2^4 or 0, every block's
    largest from 2^2 up: for `a_power_of_two_changes_only_scales` with exponents from -3 to 3."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator, device=device, dtype=torch.int32)

    mantissa_and_sign = draw(128, tokens, width) | draw(2, tokens, width) << 15
    exponent = 127 - 12 + draw(16, tokens, width)
    exponent[:, ::16] = 129 + draw(2, tokens, width // 16)
    bits = (mantissa_and_sign | exponent << 7) * (draw(16, tokens, width) > 0)
    bits[:, ::16] = (mantissa_and_sign | exponent << 7)[:, ::16]
    return bits.to(torch.int16).view(torch.bfloat16)


# ---- Blocks ----


def require(holds: torch.Tensor, x: torch.Tensor, recipe: nv.Recipe, message: str) -> None:
    """Raises with the first three blocks [n] of x of which it does not hold."""
    if bool(holds.all()):
        return
    broken = (~holds).nonzero()[:3, 0].tolist()
    blocks = _blocks(x, recipe)
    shown = "\n".join(f"  block {i}: {blocks[i].tolist()}" for i in broken)
    count = int((~holds).sum())
    raise AssertionError(f"{recipe.name}: {message}, in {count} of {len(holds)} blocks\n{shown}")


def _blocks(x: torch.Tensor, recipe: nv.Recipe) -> torch.Tensor:
    return x.reshape(x.numel() // recipe.scale.block, recipe.scale.block)


def _codes(q: nv.Quantized) -> torch.Tensor:
    """uint8 [n, block], one code to a byte."""
    return _blocks(q.element_codes(), q.recipe)


def _part(recipe: nv.Recipe, x: torch.Tensor, of_block: torch.Tensor) -> torch.Tensor:
    """Whether it holds of every block with which a block shares a scale: [n] -> [n]."""
    if recipe.outer is None or not len(of_block):
        return of_block
    if recipe.outer.per == "tensor":
        return of_block.all().expand_as(of_block)
    rows = of_block.view(math.prod(x.shape[:-1]), -1)
    return rows.all(-1, keepdim=True).expand_as(rows).reshape(-1)


def _amax(x: torch.Tensor) -> float:
    return float(x.abs().amax()) if x.numel() else math.inf


def _finite_parts(recipe: nv.Recipe, x: torch.Tensor) -> torch.Tensor:
    """The blocks [n] that no NaN or Inf of the input can reach."""
    return _part(recipe, x, _blocks(x, recipe).isfinite().all(-1))


def _equal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a == b) | (a.isnan() & b.isnan())
