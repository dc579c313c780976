"""Blocks of a recipe that computes its scale from the amax: their sums under one outer scale.

For `expectation`, beside `four_over_six`. There is nothing to choose here: what a recipe decides is
read in `steps`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nvfp4lab.rules import Recipe
from nvfp4lab.theory.integrals import BlockLaw, Sums, at_amax, over_step
from nvfp4lab.theory.steps import Cells, element_cells, scale_steps


@dataclass(frozen=True)
class Plain:
    """One scale a block. `between` and `at` are what every kind of block offers."""

    recipe: Recipe
    of: BlockLaw
    cells: Cells

    @classmethod
    def under(cls, recipe: Recipe, of: BlockLaw) -> Plain:
        """The recipe's blocks of a law."""
        return cls(recipe, of, element_cells(recipe))

    def between(self, low: float, high: float, g: float) -> Sums:
        """Integrated over largest magnitudes from low to high."""
        total = Sums.zero(self.cells.codes)
        for step in scale_steps(self.recipe, g, low, high):
            total.add(over_step(step, self.cells, self.of))
        return total

    def at(self, amax: float, g: float) -> Sums:
        """Of blocks with this largest magnitude."""
        near = scale_steps(self.recipe, g, amax, np.nextafter(amax, np.inf))
        return at_amax(near[0].at(amax), self.cells, self.of)
