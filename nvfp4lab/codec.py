"""quantize: any recipe, in torch, on the CPU or a CUDA device.

The path of a block is `quantize_blocks`, read from top to bottom. Everything else walks over the
input in chunks of blocks, so that memory beyond input and result stays small however large they
are. This is the reference that the kernels are held against; it imports none of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nvfp4lab import catalogue, layouts, rules
from nvfp4lab.quantized import DTYPES, Quantized, outer_of_blocks, spans
from nvfp4lab.rules import Elements, Outer, Precision, Recipe

LARGEST_BF16 = torch.finfo(torch.bfloat16).max


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
    recipe = catalogue.recipe(recipe)
    _check_input(x, recipe, outer, generator)
    block, bits = recipe.scale.block, recipe.elements.format.bits
    *lead, width = x.shape
    scale_dtype = torch.float32 if recipe.scale.format is None else torch.uint8
    codes = torch.empty(*lead, width * bits // 8, dtype=torch.uint8, device=x.device)
    scales = torch.empty(*lead, width // block, dtype=scale_dtype, device=x.device)
    outer_scale = find_outer(x, recipe, outer)

    flat_codes, flat_scales = codes.view(-1, block * bits // 8), scales.view(-1)
    for start, stop, blocks in iter_blocks(x, block):
        of_blocks = outer_scale.of_blocks(width // block, start, stop)
        element_codes, flat_scales[start:stop] = quantize_blocks(
            blocks, of_blocks, recipe, x.dtype, generator
        )
        flat_codes[start:stop] = element_codes if bits == 8 else layouts.pack_nibbles(element_codes)
    g = None if recipe.outer is None else outer_scale.decode.contiguous()
    return Quantized(codes, scales, g, recipe)


@dataclass(frozen=True)
class OuterScale:
    """g and G of a formula with the amax that they come from: float32 () or (..., 1), all alike."""

    decode: torch.Tensor  # g
    encode: torch.Tensor  # G
    amax: torch.Tensor

    def of_blocks(self, blocks_in_row: int, start: int, stop: int) -> OuterScale:
        """Those of the blocks start to stop, counted row-major: () or [stop - start, 1]."""
        return OuterScale(
            *(
                outer_of_blocks(part, blocks_in_row, start, stop)
                for part in (self.decode, self.encode, self.amax)
            )
        )


def quantize_blocks(
    x: torch.Tensor,
    outer: OuterScale,
    recipe: Recipe,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 blocks [n, block] of an input of `dtype` -> codes [n, block], scales [n]."""
    x, outer = split_outer(x, outer, recipe)
    amax = block_amax(x, recipe)
    raw = raw_scale(amax, outer, recipe, dtype)
    if recipe.search is None:
        stored_scale = encode_scale(raw, amax, outer, recipe)
        codes = encode_elements(x, stored_scale, raw, outer, recipe, dtype, generator)
    else:
        codes, stored_scale = _search(x, amax, raw, outer, recipe, dtype)
    return codes, stored_scale[:, 0]


def split_outer(
    x: torch.Tensor, outer: OuterScale, recipe: Recipe
) -> tuple[torch.Tensor, OuterScale]:
    """The input, divided by g where the recipe divides it, and the outer scale that is left."""
    if recipe.outer is None or recipe.outer.divides != "input":
        return x, outer
    one = torch.ones((), device=x.device)
    return x / outer.decode, OuterScale(one, one, outer.amax)


def block_amax(x: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """The largest magnitude of each block [n, block] -> [n, 1]; NaN as the recipe has it."""
    amax = x.abs().amax(-1, keepdim=True)  # NaN if one is in the block
    if recipe.specials.nan_in_amax == "ignored" and amax.isnan().any():
        amax = x.abs().nan_to_num(nan=0.0, posinf=math.inf).amax(-1, keepdim=True)
    return amax


def raw_scale(
    amax: torch.Tensor, outer: OuterScale, recipe: Recipe, dtype: torch.dtype
) -> torch.Tensor:
    """The scale before it is rounded; NaN where the formula makes one of numbers."""
    rule = recipe.scale
    amax = _at_least(amax, rule.amax_floor)
    # Tensors: torch takes a Python number apart into a multiplication by its reciprocal.
    d, one = torch.full_like(amax, rule.divisor), torch.ones_like(amax)
    g, encode = outer.decode, outer.encode
    match rule.formula:
        case "amax / d / g":
            raw = _rounded(amax / d, rule.precision, dtype) / g
        case "amax / (d * g)":
            raw = amax / (d * g)
        case "amax * (1 / d)":
            raw = amax * (one / d)
        case "amax / d * G":
            raw = _rounded(amax / d, rule.precision, dtype) * encode
        case "G * amax / d":
            raw = encode * amax / d
        case "G * (amax * (1 / d))":
            raw = encode * (amax * (one / d))
        case "amax * (G * (1 / d))":
            raw = amax * (encode * (one / d))
    raw = raw if rule.factor == 1 else raw * rule.factor
    if recipe.specials.invalid_scale_code is None:
        raw = raw.where(~raw.isnan() | amax.isnan(), 0.0)  # 0 / 0, where g has underflowed to 0
    if rule.of_raw_zero:
        raw = raw.where(raw != 0, rule.of_raw_zero)
    return _at_least(raw, rule.floor)


def encode_scale(
    raw: torch.Tensor, amax: torch.Tensor, outer: OuterScale, recipe: Recipe
) -> torch.Tensor:
    """What is stored of an unrounded scale [n, 1]: its code, or itself where it has no format."""
    rule, specials = recipe.scale, recipe.specials
    if rule.format is None:
        return raw
    code = rule.format.encode(
        raw, rule.rounding, subnormals=rule.subnormals, overflow=rule.overflow
    )
    if rule.of_zero:
        stand_in = rule.format.encode(torch.full_like(raw, rule.of_zero))
        code = code.where(code != 0, stand_in)
    if specials.nan_scale_code is not None:
        code = code.where(~amax.isnan(), specials.nan_scale_code)
    if specials.outer_nan_scale_code is not None:
        inherited = outer.amax.isnan() & ~amax.isnan()
        code = code.where(~inherited, specials.outer_nan_scale_code)
    if specials.invalid_scale_code is not None:
        made = raw.isnan() & ~amax.isnan() & ~outer.amax.isnan()
        code = code.where(~made, specials.invalid_scale_code)
    return code


def encode_elements(
    x: torch.Tensor,
    stored_scale: torch.Tensor,
    raw: torch.Tensor,
    outer: OuterScale,
    recipe: Recipe,
    dtype: torch.dtype,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Blocks x [n, block] under their stored scales [n, 1] -> codes [n, block]."""
    rule, specials = recipe.elements, recipe.specials
    s = divisor_scale(stored_scale, raw, recipe)
    quotient = quotient_of(x, s, outer, recipe, dtype)
    if specials.zero_scale == "codes +0":
        quotient = quotient.where(s != 0, 0.0)
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
    return codes.where(quotient == quotient, _nan_codes(x, s, outer, recipe))


def _nan_codes(
    x: torch.Tensor, s: torch.Tensor, outer: OuterScale, recipe: Recipe
) -> torch.Tensor | int:
    """The code of each element [n, block] if its quotient is NaN."""
    specials, sign_mask = recipe.specials, recipe.elements.format.sign_mask
    if specials.nan_sign == "none":
        return specials.nan_code
    of_scale = (
        specials.nan_code if specials.nan_scale_nan_code is None else specials.nan_scale_nan_code
    )
    nan_scale = s.isnan() & ~outer.amax.isnan()
    code = torch.full_like(s, specials.nan_code).where(~nan_scale, of_scale).to(torch.uint8)
    made = ~x.isnan() & ~block_amax(x, recipe).isnan() & ~outer.amax.isnan()
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
            as_normal = fmt.smallest_normal / 2 * (1 + stored / 2**fmt.mantissa_bits)
            return fmt.decode(stored).where(stored >> fmt.mantissa_bits != 0, as_normal)


def quotient_of(
    x: torch.Tensor, s: torch.Tensor, outer: OuterScale, recipe: Recipe, dtype: torch.dtype
) -> torch.Tensor:
    rule, specials = recipe.elements, recipe.specials
    one, g, encode = torch.ones_like(s), outer.decode, outer.encode
    product = s * g
    product = product.where(product != 0, specials.zero_divisor)
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
        case "x * G / s":
            quotient = x * encode / s
        case "x / s * G":
            quotient = _rounded(x / s, rule.precision, dtype) * encode
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


def _search(
    x: torch.Tensor,
    amax: torch.Tensor,
    raw: torch.Tensor,
    outer: OuterScale,
    recipe: Recipe,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [n, block] and scale codes [n, 1] of the candidate with the smallest error."""
    search, fmt = recipe.search, recipe.scale.format
    assert search is not None and fmt is not None
    if search.factors is None:
        stored = [torch.full_like(amax, c).to(torch.uint8) for c in range(fmt.code_of_max + 1)]
        unusable = ~amax.isfinite()
        plain = encode_scale(raw, amax, outer, recipe)
        candidates = [(plain.where(unusable, code), raw) for code in stored]
    else:
        raws = [raw if factor == 1 else raw * factor for factor in search.factors]
        candidates = [(encode_scale(r, amax, outer, recipe), r) for r in raws]
    kept: list[torch.Tensor] = []
    for scale_code, candidate in candidates:
        codes = encode_elements(x, scale_code, candidate, outer, recipe, dtype)
        error = _block_error(x, codes, scale_code, outer, recipe)
        if not kept:
            kept = [codes, scale_code, error]
            continue
        better = error < kept[2]
        kept = [
            new.where(better, old)
            for new, old in zip((codes, scale_code, error), kept, strict=True)
        ]
    return kept[0], kept[1]


def _block_error(
    x: torch.Tensor,
    codes: torch.Tensor,
    scale_code: torch.Tensor,
    outer: OuterScale,
    recipe: Recipe,
) -> torch.Tensor:
    """The search's error of each block: [n, 1]."""
    search, elements, fmt = recipe.search, recipe.elements, recipe.scale.format
    assert search is not None and fmt is not None
    precision = torch.float64 if search.precision == "float64" else torch.float32
    value = elements.format.decode(codes)
    if elements.overflow == "sign bit":  # it counts as the 8 that it was meant to be
        carried = (codes == elements.format.sign_mask) & (
            quotient_of(x, fmt.decode(scale_code), outer, recipe, x.dtype).abs() >= 7.0
        )
        value = value.where(~carried, 8.0 * x.sign())
    decoded = (value * fmt.decode(scale_code)).to(precision)
    if search.decoding == "v * s * g":
        decoded = decoded * outer.decode.to(precision)
    else:
        n = recipe.outer.range if recipe.outer is not None else 1.0
        decoded = decoded * outer.amax / torch.full_like(outer.amax, n)
    e = (decoded - x.to(precision)).abs()
    if search.criterion == "max":
        return e.amax(-1, keepdim=True)
    return (e if search.criterion == "mae" else e * e).sum(-1, keepdim=True)


def find_outer(
    x: torch.Tensor, recipe: Recipe, given: float | torch.Tensor | None = None
) -> OuterScale:
    """The recipe's outer scale of x, or the given decode scale; ones where it has none."""
    rule, one = recipe.outer, torch.ones((), device=x.device)
    if rule is None:
        return OuterScale(one, one, one)
    if given is not None:
        g = torch.as_tensor(given, dtype=torch.float32, device=x.device).reshape(())
        return OuterScale(g, one / g, g * torch.full_like(g, rule.range))
    shape = (*x.shape[:-1], 1) if rule.per == "token" else ()
    amax = torch.zeros(math.prod(shape), device=x.device)
    infinity = LARGEST_BF16 if rule.inf_in_amax == "the largest BF16" else math.inf
    blocks_of_one = x.numel() // recipe.scale.block // max(1, len(amax))
    for start, stop, blocks in iter_blocks(x, recipe.scale.block):
        of_block = blocks.abs_()
        if rule.nan_in_amax == "ignored":
            of_block = of_block.nan_to_num_(nan=0.0, posinf=infinity)
        index = torch.arange(start, stop, device=x.device) // blocks_of_one
        amax.scatter_reduce_(0, index, of_block.amax(-1), "amax")
    return outer_from_amax(amax.reshape(shape), rule, x.dtype)


def outer_from_amax(amax: torch.Tensor, rule: Outer, dtype: torch.dtype) -> OuterScale:
    """amax of tokens or of the tensor -> the outer scale, of the same shape."""
    floor = torch.finfo(dtype).tiny if rule.amax_floor == "smallest normal" else rule.amax_floor
    raised = _at_least(amax, floor)
    n, one = torch.full_like(amax, rule.range), torch.ones_like(amax)
    match rule.formula:
        case "g = amax / n":
            scale = raised / n
        case "g = amax * (1 / n)":
            scale = raised * (one / n)
        case "G = n / amax":
            scale = n / raised
        case "G = (1 / amax) * n":
            reciprocal = _rounded(one / raised, rule.precision, dtype)
            scale = _rounded(reciprocal * n, rule.precision, dtype)
    if rule.floor or rule.ceiling != math.inf:
        scale = scale.clamp(rule.floor, rule.ceiling)
    if rule.rounding == "up to a power of two":  # on the bits: g is a normal number
        scale = (scale.view(torch.int32) + 0x7FFFFF & ~0x7FFFFF).view(torch.float32)
    if rule.of_zero is not None:
        scale = scale.where(amax != 0, rule.of_zero)
    if rule.of_inf is not None:
        scale = scale.where(~amax.isinf(), rule.of_inf)
    if rule.of_nonfinite is not None:
        scale = scale.where(scale.isfinite(), rule.of_nonfinite)
    other = (one / scale).where(scale != 0, rule.reciprocal_of_zero)
    return OuterScale(other, scale, amax) if rule.encodes else OuterScale(scale, other, amax)


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


def _rounded(x: torch.Tensor, precision: Precision, dtype: torch.dtype) -> torch.Tensor:
    """float32 rounded once more where the arithmetic was the input's: float32."""
    return x if precision == "float32" else x.to(dtype).float()


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
