"""quantize: any recipe, in torch, on the CPU or a CUDA device.

The path of a block is `_quantize_blocks`, read from top to bottom. Everything else walks over the
input in chunks of blocks, so that memory beyond input and result stays small however large they
are. This is the reference that the kernels are held against; it imports none of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from nvfp4lab import layouts, rules
from nvfp4lab.quantized import DTYPES, Quantized, outer_of_blocks, spans
from nvfp4lab.rules import Outer, Recipe

LARGEST_BF16 = torch.finfo(torch.bfloat16).max

SCALE_FORMULAS = {
    "amax / d / g": lambda amax, d, g: amax / d / g,
}
ELEMENT_FORMULAS = {
    "x / (s * g)": lambda x, divisor: x / divisor,
    "x * (1 / (s * g))": lambda x, divisor: x * (torch.ones_like(divisor) / divisor),
}
OUTER_FORMULAS = {
    "amax / n": lambda amax, n: amax / n,
}


@torch.no_grad()
def quantize(
    x: torch.Tensor,
    recipe: str | Recipe = "nvfp4",
    *,
    outer: float | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Quantized:
    """Quantize x block by block along its last dimension.

    x: (..., K) bfloat16, float16 or float32, K a multiple of the recipe's block, any strides, CPU
    or CUDA; all arithmetic is float32. outer: a calibrated decode scale in place of the tensor's
    own, for recipes with an outer scale per tensor. generator: draws the random numbers of
    stochastic rounding. What becomes of NaN, Inf, -0, zero blocks and ties is in the recipe.

    Raises: TypeError for a dtype, ValueError for a shape, an unknown recipe, or an outer scale or a
    generator that the recipe has no use for.

    >>> q = quantize(torch.tensor([[6.0] + [1.0] * 15]))
    >>> q.codes[0, 0].item(), q.scales[0, 0].item()     # 6 -> 7, 1 -> 2; scale 1.0 -> 0x38
    (39, 56)
    """
    recipe = rules.recipe(recipe)
    _check_input(x, recipe, outer, generator)
    block, bits = recipe.scale.block, recipe.elements.format.bits
    *lead, width = x.shape
    scale_dtype = torch.float32 if recipe.scale.format is None else torch.uint8
    codes = torch.empty(*lead, width * bits // 8, dtype=torch.uint8, device=x.device)
    scales = torch.empty(*lead, width // block, dtype=scale_dtype, device=x.device)
    g = _outer_scale(x, recipe, outer)

    flat_codes, flat_scales = codes.view(-1, block * bits // 8), scales.view(-1)
    for start, stop, blocks in iter_blocks(x, block):
        of_blocks = None if g is None else outer_of_blocks(g, width // block, start, stop)
        element_codes, flat_scales[start:stop] = _quantize_blocks(
            blocks, of_blocks, recipe, generator
        )
        flat_codes[start:stop] = element_codes if bits == 8 else layouts.pack_nibbles(element_codes)
    return Quantized(codes, scales, g, recipe)


def _quantize_blocks(
    x: torch.Tensor, g: torch.Tensor | None, recipe: Recipe, generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 blocks [n, block], outer scales [n, 1] or () -> codes [n, block], scales [n]."""
    one = torch.ones((), device=x.device)
    if g is None:
        g = one
    elif recipe.outer is not None and recipe.outer.divides == "input":
        x, g = x / g, one

    amax = x.abs().amax(-1, keepdim=True)  # NaN if one is in the block
    if recipe.specials.nan_in_amax == "ignored" and amax.isnan().any():
        amax = x.abs().nan_to_num(nan=0.0, posinf=math.inf).amax(-1, keepdim=True)
    stored_scale, s = _encode_scale(amax, g, recipe)

    divisor = s * g
    divisor = divisor.where(divisor != 0, recipe.specials.zero_divisor)
    quotient = ELEMENT_FORMULAS[recipe.elements.formula](x, divisor)
    if divisor.isinf().any():  # an Inf that divides itself stays Inf
        quotient = quotient.where(~(x.isinf() & divisor.isinf()), x)
    return _encode_elements(quotient, recipe, generator), stored_scale[:, 0]


def _encode_scale(
    amax: torch.Tensor, g: torch.Tensor, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """amax [n, 1] -> the stored scale and the value s that divides the elements, both [n, 1]."""
    rule = recipe.scale
    d = torch.full_like(amax, rule.divisor)  # a tensor: torch multiplies by 1 / a Python number
    raw = SCALE_FORMULAS[rule.formula](_at_least(amax, rule.amax_floor), d, g)
    raw = raw.where(~raw.isnan() | amax.isnan(), 0.0)  # 0 / 0, where g has underflowed to 0
    raw = _at_least(raw, rule.floor)
    if rule.format is None:
        return raw, raw
    scale_code = rule.format.encode(
        raw, rule.rounding, subnormals=rule.subnormals, overflow=rule.overflow
    )
    read = (
        rule.format.decode_as_number
        if recipe.elements.scale_read == "encoder's"
        else rule.format.decode
    )
    return scale_code, read(scale_code)


def _encode_elements(
    quotient: torch.Tensor, recipe: Recipe, generator: torch.Generator | None
) -> torch.Tensor:
    """x / s [n, block] -> codes [n, block], with the recipe's signs of zero and NaN."""
    rule = recipe.elements
    codes = rule.format.encode(
        quotient, rule.rounding, generator=generator if rule.rounding == "stochastic" else None
    )
    match rule.zero_sign:
        case "from nonzero":
            codes = codes.where(quotient != 0, 0)
        case "dropped":
            codes = codes.where(codes != rule.format.sign_mask, 0)
    return codes.where(quotient == quotient, recipe.specials.nan_code)


def _outer_scale(
    x: torch.Tensor, recipe: Recipe, given: float | torch.Tensor | None
) -> torch.Tensor | None:
    """The recipe's outer scale of x: None, float32 () or (..., 1)."""
    rule = recipe.outer
    if rule is None:
        return None
    if given is not None:
        return torch.as_tensor(given, dtype=torch.float32, device=x.device).reshape(())
    shape = (*x.shape[:-1], 1) if rule.per == "token" else ()
    amax = torch.zeros(math.prod(shape), device=x.device)
    blocks_of_one = x.numel() // recipe.scale.block // max(1, len(amax))
    for start, stop, blocks in iter_blocks(x, recipe.scale.block):
        of_block = blocks.abs_().nan_to_num_(nan=0.0, posinf=LARGEST_BF16).amax(-1)
        index = torch.arange(start, stop, device=x.device) // blocks_of_one
        amax.scatter_reduce_(0, index, of_block, "amax")
    return _outer_from_amax(amax, rule).reshape(shape)


def _outer_from_amax(amax: torch.Tensor, rule: Outer) -> torch.Tensor:
    g = OUTER_FORMULAS[rule.formula](amax, torch.full_like(amax, rule.range))
    g = g.clamp(rule.floor, rule.ceiling)
    if rule.rounding == "up to a power of two":  # on the bits: g is a normal number
        g = (g.view(torch.int32) + 0x7FFFFF & ~0x7FFFFF).view(torch.float32)
    return g.where(amax != 0, rule.of_zero)


def iter_blocks(x: torch.Tensor, block: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(start, stop, float32 copy [stop - start, block]) over all blocks of x, row-major."""
    lead = (*x.shape[:-1], x.shape[-1] // block)
    blocks = x.unflatten(-1, (lead[-1], block))  # always a view
    for start, stop in spans(math.prod(lead), block):
        if x.is_contiguous():
            piece = blocks.view(-1, block)[start:stop]
        else:
            index = torch.unravel_index(torch.arange(start, stop, device=x.device), lead)
            piece = blocks[index]
        yield start, stop, piece.to(torch.float32, copy=True)


def _at_least(x: torch.Tensor, floor: float) -> torch.Tensor:
    return x.clamp_min(floor) if floor else x


def _check_input(x: torch.Tensor, recipe: Recipe, outer, generator) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x is a torch.Tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x is bfloat16, float16 or float32, got {x.dtype}")
    if x.ndim == 0 or x.shape[-1] % recipe.scale.block:
        raise ValueError(
            f"x is (..., K) with K a multiple of the block of {recipe.scale.block}, "
            f"got {tuple(x.shape)}"
        )
    if generator is not None and recipe.elements.rounding != "stochastic":
        raise ValueError(f"a generator was given, but {recipe.name} draws no random numbers")
    if outer is None:
        return
    if recipe.outer is None or recipe.outer.per != "tensor":
        has = "an outer scale for each token" if recipe.outer else "no outer scale"
        raise ValueError(f"an outer scale was given, but {recipe.name} has {has}")
    scale = torch.as_tensor(outer, dtype=torch.float32)
    if scale.numel() != 1 or not 0 < scale.item() < math.inf:
        raise ValueError(f"outer is one positive finite float32 decode scale, got {outer}")
