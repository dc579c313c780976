"""A piece of a tensor counted by kernels, on a GPU: what `in_torch.count` gives, without a wait.

The kernels are in `kernels.errors`; here they get their tables, and their totals the names of
`contents`. Counts, histograms and largest values are those of `in_torch` to the bit, and so are the
worst blocks but for the last bits of their ee; sums are added in another order. To fill a new
field, see `kernels.errors`; one of more than one number gets its size in _SIZES.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch

from nvfp4lab.formats import Format
from nvfp4lab.quantized import runs_kernels
from nvfp4lab.rules import Recipe
from nvfp4lab.statistics import bins
from nvfp4lab.statistics.merging import KEPT
from nvfp4lab.statistics.pieces import Counted, Piece

if TYPE_CHECKING:
    from nvfp4lab.kernels import counting


def takes(recipe: Recipe, device: torch.device) -> bool:
    """Whether the kernels count this recipe's errors there: its block is a power of two."""
    block = recipe.scale.block
    return runs_kernels(device.type) and block > 1 and block & (block - 1) == 0


def count(
    piece: Piece,
    x: torch.Tensor,
    codes: torch.Tensor,
    stored: torch.Tensor,
    g: torch.Tensor | None,
    recipe: Recipe,
    last: tuple[int, float] | None = None,
) -> Counted:
    """x: [rows, k] of any dtype and strides, or its blocks [n, block]; codes uint8 [n, block] or
    two to a byte [n, block / 2]; stored scales [n]; g: outer decode scale None, () or [rows, 1]."""
    from nvfp4lab.kernels import counting, errors

    elements, scale = recipe.elements.format, recipe.scale.format
    given = counting.Piece(
        x if len(x) == piece.rows else x.view(piece.rows, -1),
        codes,
        stored,
        torch.ones(1, dtype=torch.float32, device=x.device)
        if g is None
        else g.reshape(-1).contiguous(),
        _values(elements, x.device),
        None if scale is None else _values(scale, x.device),
    )
    with torch.cuda.device_of(x):
        totals = counting.count(given, _qsnr_edges(x.device), _constants(elements))
        counts, sums = _fields(totals.counts, errors.COUNTS), _fields(totals.sums, errors.SUMS)
        worst = _worst(piece, given, totals, recipe, g is not None)
    rows = [part.sum(1) for part in (totals.row_xx, totals.row_ee, totals.row_lost)]
    sums |= {"sum_xx": rows[0].sum(), "sum_ee": rows[1].sum(), "sum_xq": totals.channels[2].sum()}
    of_scales = counts.pop("scales")
    by_class = dict(zip(("scale_zero", "scale_nan", "scale_normal"), of_scales, strict=False))
    counts |= by_class if scale is None else {"scale_codes": of_scales}
    counts |= {
        "nonfinite_output": counts["amax_lost"].sum(),
        "crest_blocks": counts["crest_counts"].sum(),
        "element_codes": counts["element_codes"][: 2**elements.bits],
    }
    largest = {name: totals.largest.view(torch.float64)[i] for i, name in enumerate(errors.LARGEST)}
    return Counted(counts, sums, largest, rows, list(totals.channels), worst)


def _worst(
    piece: Piece, given: counting.Piece, totals: counting.Totals, recipe: Recipe, has_outer: bool
) -> dict[str, torch.Tensor]:
    """Every block of the ten tiles with the worst blocks, in which the ten worst blocks are.

    Of tiles that are alike the first ones are taken: each has such a block, and they come first.
    """
    from nvfp4lab.kernels import counting

    order = totals.tile_ee.flatten().argsort(descending=True, stable=True)
    by_lost = totals.tile_lost.flatten()[order].argsort(descending=True, stable=True)
    index, lost, ee, amax, x = counting.describe(given, order[by_lost[:KEPT]])
    row, stored, fmt = index // given.blocks_in_row, given.stored[index], recipe.scale.format
    outer = given.g.expand(piece.rows)[row]
    return {
        "token": piece.row + row,
        "block": piece.block + index % given.blocks_in_row,
        "lost": lost,
        "ee": ee,
        "amax": amax,
        "scale_code": torch.full_like(index, -1) if fmt is None else stored.long(),
        "scale": recipe.scale.decode(stored),
        "outer": outer if has_outer else torch.full_like(outer, math.nan),
        "x": x,
    }


_SIZES = {
    "quotient_elements": bins.QUOTIENT_COUNT,
    "quotient_e": bins.QUOTIENT_COUNT,
    "quotient_ee": bins.QUOTIENT_COUNT,
    "amax_blocks": bins.AMAX_COUNT,
    "amax_lost": bins.AMAX_COUNT,
    "amax_xx": bins.AMAX_COUNT,
    "amax_ee": bins.AMAX_COUNT,
    "block_qsnr": bins.QSNR_COUNT,
    "crest_counts": bins.CREST_COUNT,
    "element_codes": 256,
    "scales": 256,
}  # of the others each is a number


def _fields(copies: torch.Tensor, starts: dict[str, int]) -> dict[str, torch.Tensor]:
    """The totals [copies, .] added up, by name."""
    total = copies.sum(0)
    return {
        name: total[at : at + _SIZES[name]] if name in _SIZES else total[at]
        for name, at in starts.items()
        if name != "size"
    }


def _constants(elements: Format) -> dict:
    """What the kernels have to know of `bins` and of the largest element."""
    return {
        "LARGEST_ELEMENT": elements.max,
        "INVERSE_WIDTH": 1 / bins.quotient_width(elements.max),
        "QUOTIENT_BINS": bins.QUOTIENT_BINS,
        "FIRST_EXPONENT": bins.AMAX_EXPONENTS[0],
        "CREST_FROM": bins.CREST_FROM,
        "CREST_PER_UNIT": bins.CREST_PER_UNIT,
        "CREST_COUNT": bins.CREST_COUNT,
        "QSNR_COUNT": bins.QSNR_COUNT,
    }


# Made on the CPU: a copy from there is complete when it returns, for every stream of the device.


@functools.cache
def _values(fmt: Format, device: torch.device) -> torch.Tensor:
    codes = torch.arange(2**fmt.bits, device="cpu").to(torch.uint8)
    return fmt.decode(codes).to(device)


@functools.cache
def _qsnr_edges(device: torch.device) -> torch.Tensor:
    """`bins.nmse_edges`, filled up with Inf to the 127 that a search in seven steps tells apart."""
    edges = bins.nmse_edges(torch.device("cpu"))
    return torch.nn.functional.pad(edges, (0, 127 - len(edges)), value=math.inf).to(device)
