"""A recipe as the theory reads it: real arithmetic, a scale that steps with the block's amax.

Rounding makes the scale a step function of amax (or, where it is not rounded, proportional to it),
and an element's value a step function of its quotient. Both are read off the formats and off
`blocks.encode_scale`, so that a recipe is described once, in `rules`. float32 rounding inside the
formulas, the input's dtype and what becomes of NaN and Inf are left out: they move nothing that is
not within float32's precision of a step. A new choice of a decision is read here where it moves a
step or a cell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch

from nvfp4lab.blocks import Blocks, divisor_scale, encode_scale
from nvfp4lab.formats import Format
from nvfp4lab.outer import OuterScale
from nvfp4lab.rules import Recipe, Scale

UNROUNDED = -1  # the scale code where scales are not encoded
TINY = 1e-200  # stands for a divisor of 0: every quotient saturates


class NoTheory(ValueError):
    """The recipe does what the theory has no expectation of."""


@dataclass(frozen=True)
class Step:
    """Block maxima from `low` to `high`, and the scale that they share.

    scale: what codes are multiplied by, outer scale included; NaN decodes to NaN. divisor: what
    elements are divided by. Both are multiples of amax where `proportional`.
    """

    low: float
    high: float
    code: int
    scale: float
    divisor: float
    proportional: bool = False

    def at(self, amax: float) -> Step:
        """The step of this one amax, its scale a number."""
        by = amax if self.proportional else 1.0
        return Step(amax, amax, self.code, self.scale * by, self.divisor * by)


@dataclass(frozen=True)
class Cells:
    """What becomes of a quotient y >= 0: the cell between two edges that it falls into.

    edges: [C - 1], the inner ones. Cell c gives the magnitude `low[c]`, or with probability
    (y - low) / (high - low) `high[c]`; the codes are theirs.
    """

    edges: np.ndarray
    low: np.ndarray
    high: np.ndarray
    low_code: np.ndarray
    high_code: np.ndarray
    meant: np.ndarray  # what a search takes the cell to decode to
    codes: int  # how many magnitudes the format has
    drawn: bool  # whether any cell gives more than one


def element_cells(recipe: Recipe) -> Cells:
    """The cells of a recipe's elements."""
    rule, fmt = recipe.elements, recipe.elements.format
    top, magnitudes = fmt.code_of_max, np.array(fmt.magnitudes)
    index = np.arange(top + 1)
    if rule.rounding == "stochastic":
        edges, low, high = magnitudes[1 : top + 1], index, np.minimum(index + 1, top)
    else:
        rounding = "ties-to-even" if rule.rounding == "least distance" else rule.rounding
        edges, low, high = fmt.boundaries(rounding)[:top], index, index
    meant = magnitudes[low]
    if rule.overflow == "sign bit":  # from 7 up: the code of -0
        edges = np.append(edges, 7.0)
        low, high = np.append(low, 0), np.append(high, 0)
        meant = np.append(meant, 8.0)
    drawn = rule.rounding == "stochastic"
    return Cells(edges, magnitudes[low], magnitudes[high], low, high, meant, top + 1, drawn)


def scale_steps(
    recipe: Recipe, g: float, low: float, high: float, factor: float = 1.0
) -> list[Step]:
    """The steps of block maxima between low and high under the outer scale g, in their order.

    factor: of a search's candidate.
    """
    rule = recipe.scale
    applied = g if _outer_in(recipe, rule.formula) else 1.0
    per_amax = rule.factor * factor / (rule.divisor * applied)
    flat_below = max(rule.floor / per_amax, rule.amax_floor)
    corners = np.array([flat_below, rule.ceiling / per_amax])
    if rule.format is not None:
        corners = np.append(corners, _code_edges(rule, low * per_amax, high * per_amax) / per_amax)
    inner = np.unique(corners[(corners > low) & (corners < high)])
    edges = np.concatenate([[low], inner, [high]])
    middle = np.sqrt(np.maximum(edges[:-1], edges[1:] * 2.0**-20) * edges[1:])
    raw = np.clip(np.maximum(middle, rule.amax_floor) * per_amax, rule.floor, rule.ceiling)
    codes, scales, divisors = _encoded(recipe, raw)
    free = (rule.format is None) & (middle > flat_below) & (middle * per_amax < rule.ceiling)
    per = np.where(free, middle, 1.0)  # scales proportional to amax: of an amax of 1
    decodes = (g if recipe.outer is not None else 1.0) / per
    divides = (g if _outer_in(recipe, recipe.elements.formula) else 1.0) / per
    columns = edges[:-1], edges[1:], codes, scales * decodes, divisors * divides, free
    return _merged([Step(*row) for row in zip(*(c.tolist() for c in columns), strict=True)])


def _outer_in(recipe: Recipe, formula: str) -> bool:
    """Whether the outer scale divides what a formula gives."""
    if recipe.outer is None:
        return False
    return recipe.outer.divides == "input" or "g" in formula.lower()  # g, or G its reciprocal


def _encoded(recipe: Recipe, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, decoded scales and divisors of unrounded scales, by the package's own encoder."""
    fmt, specials = recipe.scale.format, recipe.specials
    if fmt is None:
        return np.full(len(raw), UNROUNDED), raw, raw
    unrounded = torch.from_numpy(raw).float()[:, None]
    blocks = Blocks(unrounded, torch.ones_like(unrounded), unrounded, OuterScale.one(), torch.float)
    stored = encode_scale(blocks, recipe)
    scale, divisor = fmt.decode(stored), divisor_scale(stored, unrounded, recipe)
    zero_divisor = math.inf if specials.zero_scale != "divides" else specials.zero_divisor
    divisor = divisor.where(divisor != 0, zero_divisor).double().clamp_min(TINY)
    return stored[:, 0].numpy(), scale[:, 0].double().numpy(), divisor[:, 0].numpy()


def _code_edges(rule: Scale, low: float, high: float) -> np.ndarray:
    """Unrounded scales between low and high where the scale code may change."""
    fmt = rule.format
    assert fmt is not None
    edges = fmt.boundaries(rule.rounding)
    if rule.subnormals in ("gradual", "flush") and rule.overflow in ("saturate", "nan"):
        return edges if rule.subnormals == "gradual" else np.append(edges, fmt.smallest_normal)
    first = math.floor(math.log2(max(low, 2.0**-140)))
    last = math.ceil(math.log2(min(high, 2.0**127)))
    mantissa = _of_one_binade(fmt, rule.rounding)
    octaves = 2.0 ** np.arange(first, last + 1)
    return np.concatenate([edges, (octaves[:, None] * mantissa).ravel()])


def _of_one_binade(fmt: Format, rounding) -> np.ndarray:
    """The boundaries of significands from 1 to 2, and 1."""
    edges = fmt.boundaries(rounding)
    return np.append(edges[(edges >= 1) & (edges < 2)], 1.0)


def _merged(steps: list[Step]) -> list[Step]:
    """Neighbours that are alike made one."""
    merged = steps[:1]
    for step in steps[1:]:
        alike = replace(step, low=merged[-1].low, high=merged[-1].high)
        if repr(alike) == repr(merged[-1]):  # NaN is not equal to itself, its text is
            merged[-1] = replace(merged[-1], high=step.high)
        else:
            merged.append(step)
    return merged
