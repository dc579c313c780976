"""quantize: any recipe, in torch, on the CPU or a CUDA device.

Two passes over the input, in chunks of blocks, so that memory beyond input and result stays small
however large they are: one for the outer scale (`outer`), where there is one, and one that takes
each block to its codes (`blocks`). This is the reference that the kernels are held against; it
imports none of them. Much BF16 on a CPU takes a third way, by a table of what `blocks` does
(`lookup`), to the same bytes. What a recipe means is changed in `blocks` and `outer`; here, how a
tensor is walked over and which way is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

from nvfp4lab import catalogue, layouts, quantized
from nvfp4lab.blocks import quantize_blocks
from nvfp4lab.checks import require_tensor
from nvfp4lab.lookup import Table, table_of
from nvfp4lab.outer import OuterScale, outer_from_amax
from nvfp4lab.quantized import DTYPES, Quantized, chunk_on, refuse_capture, spans
from nvfp4lab.rules import Recipe

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
    stochastic rounding. What becomes of NaN, Inf, -0, zero blocks and ties is in the recipe. On a
    CPU thread with torch.set_flush_denormal(True) what is subnormal in float32 becomes zero.

    Raises: TypeError for a dtype, ValueError for a shape, an unknown recipe, or an outer scale or a
    generator that the recipe has no use for, RuntimeError while a CUDA graph is captured.

    >>> q = quantize(torch.tensor([[6.0] + [1.0] * 15]))
    >>> q.codes[0, 0].item(), q.scales[0, 0].item()     # 6 -> 7, 1 -> 2; scale 1.0 -> 0x38
    (39, 56)
    """
    recipe = catalogue.recipe(recipe)
    check_input(x, recipe, outer, generator)
    block, bits = recipe.scale.block, recipe.elements.format.bits
    *lead, width = x.shape
    scale_dtype = torch.float32 if recipe.scale.format is None else torch.uint8
    codes = torch.empty(*lead, width * bits // 8, dtype=torch.uint8, device=x.device)
    scales = torch.empty(*lead, width // block, dtype=scale_dtype, device=x.device)
    flat_codes, flat_scales = codes.view(-1, block * bits // 8), scales.view(-1)
    table = find_table(x, recipe)
    if table is not None:
        table.quantize(partial(blocks_of, x.detach(), block), flat_codes, flat_scales)
        return Quantized(codes, scales, None, recipe)

    outer_scale = find_outer(x, recipe, outer)
    for start, stop, blocks in iter_blocks(x, block):
        of_blocks = outer_scale.of_blocks(width // block, start, stop)
        element_codes, flat_scales[start:stop] = quantize_blocks(
            blocks, of_blocks, recipe, x.dtype, generator
        )
        flat_codes[start:stop] = element_codes if bits == 8 else layouts.pack_nibbles(element_codes)
    g = None if recipe.outer is None else outer_scale.decode.contiguous()
    return Quantized(codes, scales, g, recipe)


def find_table(x: torch.Tensor, recipe: Recipe) -> Table | None:
    """The table by which x is quantized sooner, to the same bytes; None: there is none for it.

    A table is derived once, in the time that `blocks` takes for some chunks of elements. Inputs
    below one chunk do not ask for it.
    """
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or x.numel() < quantized.CHUNK:
        return None
    return table_of(recipe)


def find_outer(
    x: torch.Tensor, recipe: Recipe, given: float | torch.Tensor | None = None
) -> OuterScale:
    """The recipe's outer scale of x (..., K), or the given one: () or (..., 1); 1 if none."""
    rule = recipe.outer
    if rule is None:
        return OuterScale.one(x.device)
    if given is not None:
        g = torch.as_tensor(given, dtype=torch.float32, device=x.device).reshape(())
        return OuterScale.given(g, rule)
    shape = (*x.shape[:-1], 1) if rule.per == "token" else ()
    amax = torch.zeros(math.prod(shape), dtype=torch.float32, device=x.device)
    infinity = LARGEST_BF16 if rule.inf_in_amax == "the largest BF16" else math.inf
    blocks_of_one = x.numel() // recipe.scale.block // max(1, len(amax))
    for start, stop, blocks in iter_blocks(x, recipe.scale.block):
        of_block = blocks.abs_()
        if rule.nan_in_amax == "ignored":
            of_block = of_block.nan_to_num_(nan=0.0, posinf=infinity)
        index = torch.arange(start, stop, device=x.device) // blocks_of_one
        amax.scatter_reduce_(0, index, of_block.amax(-1), "amax")
    return outer_from_amax(amax.reshape(shape), rule, x.dtype)


def iter_blocks(x: torch.Tensor, block: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(start, stop, float32 copy [stop - start, block]) over all blocks of x, row-major."""
    for start, stop in spans(x.numel() // block, block, chunk_on(x.device)):
        yield start, stop, blocks_of(x, block, start, stop).to(torch.float32, copy=True)


def blocks_of(x: torch.Tensor, block: int, start: int, stop: int) -> torch.Tensor:
    """Blocks start to stop of x, counted row-major: [stop - start, block], contiguous."""
    lead = (*x.shape[:-1], x.shape[-1] // block)
    blocks = x.unflatten(-1, (lead[-1], block))  # always a view
    if x.is_contiguous():
        return blocks.view(-1, block)[start:stop]
    return blocks[torch.unravel_index(torch.arange(start, stop, device=x.device), lead)]


def check_input(x: torch.Tensor, recipe: Recipe, outer, generator) -> None:
    """Raises what `quantize` raises for x, an outer scale or a generator."""
    require_tensor("x", x, DTYPES)
    refuse_capture(x.device)
    if x.ndim == 0 or x.shape[-1] % recipe.scale.block:
        raise ValueError(
            f"x is (..., K) with K a multiple of the block of {recipe.scale.block}, "
            f"got {tuple(x.shape)}"
        )
    if generator is not None and recipe.elements.rounding != "stochastic":
        raise ValueError(f"a generator was given, but {recipe.name} draws no random numbers")
    if outer is None:
        return
    if recipe.outer_per != "tensor":
        has = "an outer scale for each token" if recipe.outer else "no outer scale"
        raise ValueError(f"an outer scale was given, but {recipe.name} has {has}")
    if isinstance(outer, torch.Tensor):
        require_tensor("outer", outer)
    scale = torch.as_tensor(outer, dtype=torch.float32, device="cpu")
    if scale.numel() != 1 or not 0 < scale.item() < math.inf:
        raise ValueError(f"outer is one positive finite float32 decode scale, got {outer}")
