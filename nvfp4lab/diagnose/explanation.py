"""explain_block: every intermediate of one block, as frames; `plots.explained_block` draws them.

The numbers are those of `blocks`, stage by stage; nothing is computed here in another way. To show
one more intermediate, add its column.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import torch

from nvfp4lab import catalogue, codec
from nvfp4lab.blocks import (
    Blocks,
    candidates,
    divisor_scale,
    prepare,
    quantize_blocks,
    quotient_of,
)
from nvfp4lab.checks import require_tensor
from nvfp4lab.formats import CodeClass, Format
from nvfp4lab.quantized import DTYPES
from nvfp4lab.rules import Recipe


@dataclass(frozen=True)
class Explanation:
    """One block under one recipe.

    scale: a frame of one row: amax (of x, or of x / outer where the recipe divides its input),
    outer (the decode scale, 1 without one), raw_scale (before
    rounding), scale_code, scale, scale_class, below and above (the neighbouring scale values).
    elements: a row an element: x, quotient (what is rounded), below and above (the magnitudes that
    it lies between), tie (whether it is midway), code, value, decoded, error (decoded - x), ulps
    (error in steps of the element format at the decoded value, times scale and outer scale).
    candidates: for a recipe that searches, a row a scale that it tries: scale_code, scale, error
    (by the recipe's criterion), kept; empty otherwise.
    """

    recipe: Recipe
    scale: pd.DataFrame
    elements: pd.DataFrame
    candidates: pd.DataFrame

    def __str__(self) -> str:
        scale = self.scale.to_string(index=False)
        tried = "" if self.candidates.empty else f"\n{self.candidates.to_string()}"
        return f"{self.recipe.name}\n{scale}\n{self.elements.to_string()}{tried}"

    def _repr_html_(self) -> str:
        tried = "" if self.candidates.empty else self.candidates.to_html()
        return self.scale.to_html(index=False) + self.elements.to_html() + tried


@torch.no_grad()
def explain_block(
    block: torch.Tensor,
    recipe: str | Recipe = "nvfp4",
    outer: float | torch.Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Explanation:
    """Every intermediate of one block.

    block: (B,) of a dtype that `quantize` takes, B the recipe's block. outer: the decode scale that
    the block was under in its token or tensor; without one, the block is taken for the whole of it.
    generator: draws the random numbers of stochastic rounding.

    Raises: ValueError for another shape, or an outer scale where the recipe has none; otherwise as
    `quantize`.

    >>> bool(explain_block(torch.tensor([6.0, 0.25] + [0.0] * 14)).elements.loc[1, "tie"])
    True
    """
    recipe = catalogue.recipe(recipe)
    require_tensor("block", block, DTYPES)
    if block.shape != (recipe.scale.block,):
        raise ValueError(
            f"a block of {recipe.name} has shape ({recipe.scale.block},), got {tuple(block.shape)}"
        )
    if outer is not None and recipe.outer is None:
        raise ValueError(f"an outer scale was given, but {recipe.name} has none")
    if outer is not None and not isinstance(outer, (int, float)):
        require_tensor("outer", outer, (torch.float32,))
        if outer.numel() != 1:
            raise ValueError(f"outer is one decode scale, got shape {tuple(outer.shape)}")
    found = codec.find_outer(block[None], recipe, outer)
    found = found.of_blocks(1, 0, 1)
    x = block[None].float()
    codes, stored = quantize_blocks(x, found, recipe, block.dtype, generator)
    before = prepare(x, found, recipe, block.dtype)
    s = divisor_scale(stored[:, None], before.raw_scale, recipe)
    quotient = quotient_of(before, s, recipe)[0]
    if recipe.elements.formula == "x":
        quotient = quotient / s[0]
    fmt = recipe.scale.format
    scale = recipe.scale.decode(stored)
    g = found.decode.flatten()[0].item() if recipe.outer else 1.0
    row = {
        "amax": before.amax.item(),
        "outer": g,
        "raw_scale": before.raw_scale.item(),
        "scale_code": math.nan if fmt is None else int(stored.item()),
        "scale": scale.item(),
        "scale_class": "" if fmt is None else CodeClass(int(fmt.class_of(stored))).name.lower(),
        "below": math.nan if fmt is None else _neighbour(fmt, int(stored.item()), -1),
        "above": math.nan if fmt is None else _neighbour(fmt, int(stored.item()), 1),
    }
    elements = _elements(x[0], quotient, codes[0], row, recipe)
    return Explanation(recipe, pd.DataFrame([row]), elements, _candidates(before, stored, recipe))


def _candidates(before: Blocks, stored: torch.Tensor, recipe: Recipe) -> pd.DataFrame:
    fmt = recipe.scale.format
    if recipe.search is None or fmt is None:
        return pd.DataFrame()
    rows = [
        {
            "scale_code": int(code.item()),
            "scale": fmt.decode(code).item(),
            "error": error.item(),
            "kept": bool(code[0] == stored),
        }
        for _, code, error in candidates(before, recipe)
    ]
    return pd.DataFrame(rows)


def _elements(
    x: torch.Tensor, quotient: torch.Tensor, codes: torch.Tensor, row: dict, recipe: Recipe
) -> pd.DataFrame:
    fmt = recipe.elements.format
    steps = torch.tensor(
        fmt.magnitudes[: fmt.code_of_max + 1], dtype=torch.float32, device=x.device
    )
    size = quotient.abs()
    low = torch.searchsorted(steps, size.nan_to_num(0.0, posinf=math.inf), right=True) - 1
    low = low.clamp(0, len(steps) - 1)
    high = (low + 1).clamp(max=len(steps) - 1)
    value = fmt.decode(codes)
    decoded = value.double() * row["scale"] * row["outer"]
    error = decoded - x.double()
    index = torch.searchsorted(steps, value.abs()).clamp(max=len(steps) - 2)
    step = (steps[index + 1] - steps[index]).double() * row["scale"] * row["outer"]
    below, above = steps[low], steps[high].where(low < len(steps) - 1, math.inf)
    below, above = (side.where(~size.isnan(), math.nan) for side in (below, above))
    columns = {
        "x": x,
        "quotient": quotient,
        "below": below,
        "above": above,
        "tie": size == (below + above) / 2,
        "code": codes,
        "value": value,
        "decoded": decoded,
        "error": error,
        "ulps": error / step,
    }
    return pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})


def _neighbour(fmt: Format, code: int, step: int) -> float:
    """The magnitude next to that of a code, NaN where there is none."""
    if code > fmt.code_of_max or not 0 <= code + step <= fmt.code_of_max:
        return math.nan
    return fmt.magnitudes[code + step]
