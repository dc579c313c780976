"""From blocks to codes: what a recipe does to a block, read from top to bottom.

`quantize_blocks` is the path: the block with its amax and unrounded scale (`prepare`), the scale
code (`encode_scale`), the element codes (`encode_elements`), and where a recipe searches, that for
each candidate. Formulas are those that `rules` names, each in its one place here. To add a choice
to a decision, add it to its Literal in `rules` and to its match below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from nvfp4lab import rules
from nvfp4lab.outer import OuterScale, rounded_to
from nvfp4lab.rules import Elements, Recipe


@dataclass(frozen=True)
class Blocks:
    """Blocks of an input as far as a recipe takes them before it rounds anything."""

    x: torch.Tensor  # float32 [n, block], divided by g where the recipe divides its input
    amax: torch.Tensor  # [n, 1], NaN as the recipe has it
    raw_scale: torch.Tensor  # [n, 1]; NaN also where the formula makes one of numbers
    outer: OuterScale  # what is left of it for the formulas: () or [n, 1]
    dtype: torch.dtype  # of the input


def quantize_blocks(
    x: torch.Tensor,
    outer: OuterScale,
    recipe: Recipe,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 blocks [n, block] of an input of `dtype` -> codes [n, block], stored scales [n]."""
    blocks = prepare(x, outer, recipe, dtype)
    if recipe.search is None:
        stored = encode_scale(blocks, recipe)
        codes = encode_elements(blocks, stored, recipe, generator)
    else:
        codes, stored = _search(blocks, recipe)
    return codes, stored[:, 0]


def prepare(x: torch.Tensor, outer: OuterScale, recipe: Recipe, dtype: torch.dtype) -> Blocks:
    """Everything that comes before rounding."""
    if recipe.outer is not None and recipe.outer.divides == "input":
        one = torch.ones((), dtype=torch.float32, device=x.device)
        x, outer = x / outer.decode, OuterScale(one, one, outer.amax)
    amax = _block_amax(x, recipe)
    return Blocks(x, amax, _raw_scale(amax, outer, recipe, dtype), outer, dtype)


def _block_amax(x: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    amax = x.abs().amax(-1, keepdim=True)  # NaN if one is in the block
    if recipe.specials.nan_in_amax == "ignored" and amax.isnan().any():
        amax = x.abs().nan_to_num(nan=0.0, posinf=math.inf).amax(-1, keepdim=True)
    return amax


def _raw_scale(
    amax: torch.Tensor, outer: OuterScale, recipe: Recipe, dtype: torch.dtype
) -> torch.Tensor:
    rule = recipe.scale
    amax = amax.clamp_min(rule.amax_floor)
    # Tensors: torch takes a Python number apart into a multiplication by its reciprocal.
    d, one = torch.full_like(amax, rule.divisor), torch.ones_like(amax)
    g, encode = outer.decode, outer.encode
    match rule.formula:
        case "amax / d / g":
            raw = rounded_to(rule.precision, amax / d, dtype) / g
        case "amax / (d * g)":
            raw = amax / (d * g)
        case "amax * (1 / d)":
            raw = amax * (one / d)
        case "amax / d * G":
            raw = rounded_to(rule.precision, amax / d, dtype) * encode
        case "G * amax / d":
            raw = encode * amax / d
        case "G * (amax * (1 / d))":
            raw = encode * (amax * (one / d))
        case "amax * (G * (1 / d))":
            raw = amax * (encode * (one / d))
        case "amax / d":
            raw = amax / d
    raw = raw if rule.factor == 1 else raw * rule.factor
    if recipe.specials.invalid_scale_code is None:
        raw = raw.where(~raw.isnan() | amax.isnan(), 0.0)  # 0 / 0, where g has underflowed to 0
    if rule.of_raw_zero:
        raw = raw.where(raw != 0, rule.of_raw_zero)
    return raw.clamp(rule.floor, rule.ceiling)


def encode_scale(blocks: Blocks, recipe: Recipe) -> torch.Tensor:
    """What is stored of the unrounded scales: codes [n, 1], or themselves without a format."""
    rule, specials, raw = recipe.scale, recipe.specials, blocks.raw_scale
    if rule.format is None:
        return raw
    code = rule.format.encode(
        raw, rule.rounding, subnormals=rule.subnormals, overflow=rule.overflow
    )
    if rule.of_zero:
        stand_in = rule.format.encode(torch.full_like(raw, rule.of_zero))
        code = code.where(code != 0, stand_in)
    own_nan, outer_nan = blocks.amax.isnan(), blocks.outer.amax.isnan()
    if specials.nan_scale_code is not None:
        code = code.where(~own_nan, specials.nan_scale_code)
    if specials.outer_nan_scale_code is not None:
        code = code.where(own_nan | ~outer_nan, specials.outer_nan_scale_code)
    if specials.invalid_scale_code is not None:
        made = raw.isnan() & ~own_nan & ~outer_nan
        code = code.where(~made, specials.invalid_scale_code)
    return code


def encode_elements(
    blocks: Blocks,
    stored: torch.Tensor,
    recipe: Recipe,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """The codes [n, block] of blocks under their stored scales [n, 1]."""
    rule, specials = recipe.elements, recipe.specials
    s = divisor_scale(stored, blocks.raw_scale, recipe)
    quotient = quotient_of(blocks, s, recipe)
    if specials.zero_scale != "divides":
        zero = torch.zeros((), dtype=torch.float32, device=quotient.device)
        kept = zero if specials.zero_scale == "codes +0" else zero.copysign(blocks.x)
        quotient = quotient.where(recipe.scale.decode(stored) != 0, kept)
    if rule.overflow == "sign bit":
        quotient = quotient.where(~quotient.isinf(), math.nan)
    if rule.rounding == "least distance":
        codes = _least_distance(quotient, s if rule.formula == "x" else torch.ones_like(s), rule)
    else:
        codes = rule.format.encode(
            quotient, rule.rounding, generator=generator if rule.rounding == "stochastic" else None
        )
    if rule.overflow == "sign bit":  # 2 * round(y / 2) is 8 and more: its code is that of -0
        codes = codes.where(~(quotient.abs() >= 7.0), rule.format.sign_mask)
    match rule.zero_sign:
        case "from nonzero":
            codes = codes.where(quotient != 0, 0)
        case "dropped":
            codes = codes.where(codes != rule.format.sign_mask, 0)
        case "unless positive":
            is_zero = codes & ~rule.format.sign_mask == 0
            codes = codes.where(~is_zero | (quotient > 0), rule.format.sign_mask)
    return codes.where(quotient == quotient, _nan_codes(blocks, s, recipe))


def _nan_codes(blocks: Blocks, s: torch.Tensor, recipe: Recipe) -> torch.Tensor | int:
    """The code of each element [n, block] if its quotient is NaN."""
    specials, sign_mask = recipe.specials, recipe.elements.format.sign_mask
    if specials.nan_sign == "none":
        return specials.nan_code
    of_scale = (
        specials.nan_code if specials.nan_scale_nan_code is None else specials.nan_scale_nan_code
    )
    x, outer_nan = blocks.x, blocks.outer.amax.isnan()
    nan_scale = s.isnan() & ~outer_nan
    code = torch.full_like(s, specials.nan_code).where(~nan_scale, of_scale).to(torch.uint8)
    made = ~x.isnan() & ~blocks.amax.isnan() & ~outer_nan
    return code | (made | (x.isnan() & x.signbit())) * sign_mask


def divisor_scale(stored: torch.Tensor, raw: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """The s that the elements are divided by."""
    fmt = recipe.scale.format
    if fmt is None:
        return stored
    match recipe.elements.scale_read:
        case "decoded":
            return fmt.decode(stored)
        case "encoder's":
            return fmt.decode_as_number(stored)
        case "unrounded":
            return raw
        case "subnormals as normals":
            as_normal = fmt.smallest_normal / 2 * (1 + stored.float() / 2**fmt.mantissa_bits)
            return fmt.decode(stored).where(stored >> fmt.mantissa_bits != 0, as_normal)


def quotient_of(blocks: Blocks, s: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """What is rounded to an element code: float32 [n, block]."""
    rule, specials, x = recipe.elements, recipe.specials, blocks.x
    one, g, encode = torch.ones_like(s), blocks.outer.decode, blocks.outer.encode
    product = s * g
    product = product.where(product != 0, specials.zero_divisor)
    s = s.where(s != 0, specials.zero_divisor)
    match rule.formula:
        case "x / (s * g)":
            quotient = x / product
        case "x * (1 / (s * g))":
            quotient = x * (one / product)
        case "x * min(1 / (s * g), FLOAT32_MAX)":
            quotient = x * (one / product).clamp(max=rules.FLOAT32_MAX)
        case "x * (G / s)":
            quotient = x * (encode / s)
        case "x / (s / G)":
            quotient = x / (s / encode)
        case "x * (G * (1 / s))":
            quotient = x * (encode * (one / s))
        case "x * G / s":
            quotient = x * encode / s
        case "x / s * G":
            quotient = rounded_to(rule.precision, x / s, blocks.dtype) * encode
        case "x / s":
            quotient = x / s
        case "x":
            return x
    if specials.inf_over_inf == "Inf" and product.isinf().any():
        quotient = quotient.where(~(x.isinf() & product.isinf()), x)
    return quotient


def _least_distance(x: torch.Tensor, s: torch.Tensor, rule: Elements) -> torch.Tensor:
    """The first code whose value times s is the least float32 distance from x; 0 for NaN."""
    least, best = (x - 0 * s).abs(), torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    for code, value in enumerate(rule.format.values):
        distance = (value * s - x).abs()
        nearer = distance < least
        least, best = distance.where(nearer, least), best.where(~nearer, code)
    return best


def _search(blocks: Blocks, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [n, block] and scale codes [n, 1] of the candidate with the smallest error."""
    tried = candidates(blocks, recipe)
    kept = next(tried)
    for candidate in tried:
        better = candidate[2] < kept[2]
        kept = tuple(new.where(better, old) for new, old in zip(candidate, kept, strict=True))
    return kept[0], kept[1]


def candidates(blocks: Blocks, recipe: Recipe) -> Iterator[tuple[torch.Tensor, ...]]:
    """Codes [n, block], scale codes [n, 1] and error [n, 1] of each scale that a search tries."""
    search, fmt, amax = recipe.search, recipe.scale.format, blocks.amax
    assert search is not None and fmt is not None
    if search.factors is None:
        plain, usable = encode_scale(blocks, recipe), amax.isfinite()
        every = (torch.full_like(amax, c).to(torch.uint8) for c in range(fmt.code_of_max + 1))
        scaled = ((blocks, code.where(usable, plain)) for code in every)
    else:
        by_factor = (replace(blocks, raw_scale=blocks.raw_scale * f) for f in search.factors)
        scaled = ((b, encode_scale(b, recipe)) for b in by_factor)
    for candidate, stored in scaled:
        codes = encode_elements(candidate, stored, recipe)
        yield codes, stored, _block_error(candidate, codes, stored, recipe)


def _block_error(
    blocks: Blocks, codes: torch.Tensor, stored: torch.Tensor, recipe: Recipe
) -> torch.Tensor:
    """The search's error of each block: [n, 1]."""
    search, elements, fmt = recipe.search, recipe.elements, recipe.scale.format
    assert search is not None and fmt is not None
    x, outer, s = blocks.x, blocks.outer, fmt.decode(stored)
    precision = torch.float64 if search.precision == "float64" else torch.float32
    value = elements.format.decode(codes)
    if elements.overflow == "sign bit":  # it counts as the 8 that it was meant to be
        carried = codes == elements.format.sign_mask
        carried &= quotient_of(blocks, s, recipe).abs() >= 7.0
        value = value.where(~carried, 8.0 * x.sign())
    decoded = (value * s).to(precision)
    if search.decoding == "v * s * g":
        decoded = decoded * outer.decode.to(precision)
    else:
        n = recipe.outer.range if recipe.outer is not None else 1.0
        decoded = decoded * outer.amax / torch.full_like(outer.amax, n)
    e = (decoded - x.to(precision)).abs()
    if search.criterion == "max":
        return e.amax(-1, keepdim=True)
    return (e if search.criterion == "mae" else e * e).sum(-1, keepdim=True)
