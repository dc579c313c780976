"""The outer scale: one float32 for a token or the tensor, from the largest magnitude in it.

A recipe's formula gives either the scale that decodes, g, or the one that encodes, G; the other is
its float32 reciprocal, so both travel together. To add a formula, add it to `rules.OuterFormula`
and to its one place in `outer_from_amax`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from nvfp4lab.quantized import outer_of_blocks
from nvfp4lab.rules import Outer, Precision

# What is added to a float32's bits before its mantissa is cut.
POWERS_OF_TWO = {
    "up to a power of two": 0x7FFFFF,
    "down to a power of two": 0,
    "to the nearest power of two": 0x400000,  # from 1.5 up
}


@dataclass(frozen=True)
class OuterScale:
    """g and G of a formula with the amax that they come from: float32 () or (..., 1), all alike."""

    decode: torch.Tensor  # g
    encode: torch.Tensor  # G
    amax: torch.Tensor

    @classmethod
    def one(cls, device: torch.device | str = "cpu") -> OuterScale:
        """What stands in the formulas where a recipe has no outer scale."""
        one = torch.ones((), dtype=torch.float32, device=device)
        return cls(one, one, one)

    @classmethod
    def given(cls, g: torch.Tensor, rule: Outer) -> OuterScale:
        """A calibrated decode scale, which stands for the amax that expresses it."""
        return cls(g, torch.ones_like(g) / g, g * torch.full_like(g, rule.range))

    def of_blocks(self, blocks_in_row: int, start: int, stop: int) -> OuterScale:
        """Those of the blocks start to stop, counted row-major: () or [stop - start, 1]."""
        parts = (self.decode, self.encode, self.amax)
        return OuterScale(*(outer_of_blocks(p, blocks_in_row, start, stop) for p in parts))


def outer_from_amax(amax: torch.Tensor, rule: Outer, dtype: torch.dtype) -> OuterScale:
    """amax of tokens or of the tensor -> the outer scale, of the same shape."""
    floor = torch.finfo(dtype).tiny if rule.amax_floor == "smallest normal" else rule.amax_floor
    raised = amax.clamp_min(floor)
    # Tensors: torch takes a Python number apart into a multiplication by its reciprocal.
    n, one = torch.full_like(amax, rule.range), torch.ones_like(amax)
    match rule.formula:
        case "g = amax / n":
            scale = raised / n
        case "g = amax * (1 / n)":
            scale = raised * (one / n)
        case "G = n / amax":
            scale = n / raised
        case "G = (1 / amax) * n":
            reciprocal = rounded_to(rule.precision, one / raised, dtype)
            scale = rounded_to(rule.precision, reciprocal * n, dtype)
    if rule.floor or rule.ceiling != math.inf:
        scale = scale.clamp(rule.floor, rule.ceiling)
    if rule.rounding != "none":  # on the bits: the scale is a normal number
        carries = POWERS_OF_TWO[rule.rounding]
        scale = (scale.view(torch.int32) + carries & ~0x7FFFFF).view(torch.float32)
    if rule.of_zero is not None:
        scale = scale.where(amax != 0, rule.of_zero)
    if rule.of_inf is not None:
        scale = scale.where(~amax.isinf(), rule.of_inf)
    if rule.of_nonfinite is not None:
        scale = scale.where(scale.isfinite(), rule.of_nonfinite)
    other = (one / scale).where(scale != 0, rule.reciprocal_of_zero)
    return OuterScale(other, scale, amax) if rule.encodes else OuterScale(scale, other, amax)


def rounded_to(precision: Precision, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 rounded once more where the arithmetic was the input's: float32."""
    return x if precision == "float32" else x.to(dtype).float()
