"""The expected sums of one block, integrated over its largest magnitude.

For iid magnitudes of density g and distribution function G the largest of B has the density
B g G^(B-1), and under it the others are iid of density g / G(m) up to m. So a block's sum of
f(x), f being a square error, a product or the indicator of a code, has the expectation

    int B g(m) G(m)^(B-1) f(m) dm  +  int B (B-1) g(m) G(m)^(B-2) [int_0^m f(x) g(x) dx] dm

with f known where the scale is. Both integrals are cut where anything has a corner (a scale code
steps, a quotient crosses a rounding boundary) and where the law needs resolving; on each piece
Gauss-Legendre quadrature sees a smooth function; nothing large is subtracted, so nothing cancels.
To let the theory return one more sum, add it to `Sums` and to `collect`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache

import numpy as np

from nvfp4lab.theory.laws import Law
from nvfp4lab.theory.steps import UNROUNDED, Cells, Step

UNENCODED = 0  # where the blocks without a scale code are counted


@dataclass
class Sums:
    """Expectations over a block, or the same times a density; they add and scale."""

    probability: float  # of the blocks summed over
    lost_energy: float  # sum x^2 of the blocks that decode to NaN, which are in no other sum
    energy: float  # sum x^2 of the others
    max_error: float  # (q - x)^2 of the largest element, where the scale is not 0
    other_error: float  # of the other elements
    zero_error: float  # of all elements, where the scale is 0
    product: float  # sum x (q - x): what is off, so that the tail of x^2 need not be reached
    codes: np.ndarray  # [magnitudes]: how many elements have each
    scales: np.ndarray  # [256]: probability of each scale code; all in UNENCODED without codes

    @classmethod
    def zero(cls, codes: int) -> Sums:
        """Nothing summed yet, for so many codes."""
        arrays = {"codes": np.zeros(codes), "scales": np.zeros(256)}
        return cls(**{f.name: arrays.get(f.name, 0.0) for f in fields(cls)})  # type: ignore[arg-type]

    def add(self, other: Sums, times: float = 1.0) -> None:
        """Add another, times a number, in place."""
        for name in (f.name for f in fields(self)):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))

    def scaled(self, times: float) -> Sums:
        """All of them times a number."""
        result = Sums.zero(len(self.codes))
        result.add(self, times)
        return result

    def reweighted(self, squares: float, counts: float) -> Sums:
        """The sums of squares times one number, probabilities and counts times another."""
        result = self.scaled(squares)
        result.probability = self.probability * counts
        result.codes, result.scales = self.codes * counts, self.scales * counts
        return result

    @property
    def error(self) -> float:
        """sum (q - x)^2."""
        return self.max_error + self.other_error + self.zero_error


def power_tail(octaves: list[Sums]) -> tuple[Sums, float]:
    """What follows the last three octaves if they go on as a power law does, that is in a geometric
    series; and how far off that is for the error, judged by the third from the two before."""
    tail, off = Sums.zero(len(octaves[-1].codes)), 0.0
    for name in (f.name for f in fields(Sums) if f.type == "float"):
        first, second, third = (getattr(o, name) for o in octaves[-3:])
        if abs(first) > abs(second) > abs(third) > 0:
            setattr(tail, name, third * third / (second - third))
            if name.endswith("error"):
                off += abs(third + getattr(tail, name) - second * second / (first - second))
    return tail, off


@lru_cache
def gauss(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    return (nodes + 1) / 2, weights / 2


def nodes_on(low: np.ndarray, high: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights on each interval: [..., n] each."""
    nodes, weights = gauss(n)
    width = np.asarray(high - low)[..., None]
    return np.asarray(low)[..., None] + width * nodes, width * weights


def between(points: np.ndarray, low: float, high: float) -> np.ndarray:
    """Sorted ends of the panels that the points cut [low, high] into."""
    inside = points[(points > low) & (points < high)]
    return np.unique(np.concatenate([[low], inside, [high]]))


@dataclass(frozen=True)
class BlockLaw:
    """Blocks of iid elements, and what integrals over their largest magnitude need."""

    law: Law
    block: int
    nodes: int  # of the quadrature on each panel
    never: float = 1e-16  # block maxima as small as happen with this probability are left out

    @cached_property
    def lowest(self) -> float:
        """The smallest block maximum that is not left out."""
        return float(self.law.isf(np.array(-math.expm1(math.log(self.never) / self.block))))

    @cached_property
    def knots_of_x(self) -> np.ndarray:
        """Where the law of an element is not smooth, or far out."""
        return self.law.knots()

    @cached_property
    def knots_of_max(self) -> np.ndarray:
        """The same of the largest magnitude of a block."""
        return np.union1d(self.knots_of_x, self.law.knots(self.block))

    def weights(self, m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """B g G^(B-1) and B (B-1) g G^(B-2), the weights of the largest and of the others."""
        b = self.block
        one_at_m = b * self.law.pdf(m) * self.law.largest_cdf(m, b - 2)
        return one_at_m * self.law.largest_cdf(m, 1), one_at_m * (b - 1)


# Rows of what is integrated of an element x: the probability of its cell's lower code and of its
# upper code, its square error, x (q - x), x^2.
LOW, HIGH, ERROR, PRODUCT, INPUT = range(5)


def of_element(x: np.ndarray, cell: np.ndarray, step: Step, cells: Cells) -> np.ndarray:
    """[5, *x.shape]: the rows for elements x, all in the given cells (broadcast to x)."""
    low, high = step.scale * cells.low[cell], step.scale * cells.high[cell]
    if cells.drawn:
        width = cells.high[cell] - cells.low[cell]
        p = (x / step.divisor - cells.low[cell]) / np.where(width > 0, width, np.inf)
    else:
        p = np.zeros_like(x)
    off = (1 - p) * (low - x) + p * (high - x)
    error = (1 - p) * np.square(x - low) + p * np.square(x - high)
    return np.stack([1 - p, p, error, x * off, np.square(x)])


def moments(ends: np.ndarray, step: Step, cells: Cells, of: BlockLaw) -> tuple[np.ndarray, ...]:
    """[5, P]: the rows, integrated with the law's density over each panel; and the cells [P]."""
    x, w = nodes_on(ends[:-1], ends[1:], of.nodes)
    cell = cell_of(ends, step, cells)
    return (of_element(x, cell[:, None], step, cells) * (w * of.law.pdf(x))).sum(-1), cell


def cell_of(ends: np.ndarray, step: Step, cells: Cells) -> np.ndarray:
    """The cell of each panel; no panel has a cell's edge inside."""
    middle = (ends[:-1] + ends[1:]) / 2
    return np.searchsorted(cells.edges * step.divisor, middle, side="right")


def over_step(step: Step, cells: Cells, of: BlockLaw) -> Sums:
    """The sums of the blocks whose largest magnitude lies in the step."""
    if step.proportional:
        ends = between(of.knots_of_max, step.low, step.high)
        m, w = nodes_on(ends[:-1], ends[1:], of.nodes)
        total = Sums.zero(cells.codes)
        weights = w * of.weights(m)[0]
        for one, weight in zip(m.ravel(), weights.ravel(), strict=True):
            total.add(at_amax(step.at(float(one)), cells, of), float(weight))
        return total
    corners = cells.edges * step.divisor
    ends = between(np.concatenate([corners, of.knots_of_max]), step.low, step.high)
    m, w = nodes_on(ends[:-1], ends[1:], of.nodes)
    weight_max, weight_others = (w * each for each in of.weights(m))
    cell = cell_of(ends, step, cells)
    largest = (of_element(m, cell[:, None], step, cells) * weight_max).sum(-1)

    # The others: whole panels below the one that m is in, then up to m.
    base, base_cell = moments(panels_below(step.low, corners, of), step, cells, of)
    whole, _ = moments(ends, step, cells, of)
    x, inner = nodes_on(np.broadcast_to(ends[:-1, None], m.shape), m, of.nodes)
    partial = of_element(x, cell[:, None, None], step, cells) * (inner * of.law.pdf(x))
    to_m = (partial.sum(-1) * weight_others).sum(-1)
    passed = weight_others.sum(-1)
    above = np.cumsum(passed[::-1])[::-1]  # the weight of all m in a panel or beyond it
    others = to_m + whole * np.append(above[1:], 0.0)
    return collect(
        step, cells, weight_max.sum(),
        [(largest, cell)], [(others, cell), (base * above[0], base_cell)],
    )  # fmt: skip


def at_amax(step: Step, cells: Cells, of: BlockLaw) -> Sums:
    """The sums of blocks whose largest magnitude is step.low."""
    amax = np.array([step.low])
    corners = cells.edges * step.divisor
    cell = np.searchsorted(corners, amax, side="right")
    largest = of_element(amax, cell, step, cells)
    others, of_cell = moments(panels_below(step.low, corners, of), step, cells, of)
    others *= (of.block - 1) / of.law.largest_cdf(amax, 1)
    return collect(step, cells, 1.0, [(largest, cell)], [(others, of_cell)])


def panels_below(m: float, corners: np.ndarray, of: BlockLaw) -> np.ndarray:
    """Ends of panels from 0 to m, for the others."""
    return between(np.concatenate([corners, of.knots_of_x]), 0.0, m)


def collect(step: Step, cells: Cells, probability, largest, others) -> Sums:
    """Rows of the largest and of the other elements, [5, P] with cells [P] each, as `Sums`."""
    sums = Sums.zero(cells.codes)
    sums.probability = float(probability)
    sums.scales[UNENCODED if step.code == UNROUNDED else step.code] = probability
    of_max, of_others = (
        np.sum([rows.sum(-1) for rows, _ in part], axis=0) for part in (largest, others)
    )
    if math.isnan(step.scale):
        sums.lost_energy = float(of_max[INPUT] + of_others[INPUT])
        return sums
    if step.scale == 0:
        sums.zero_error = float(of_max[ERROR] + of_others[ERROR])
    else:
        sums.max_error, sums.other_error = float(of_max[ERROR]), float(of_others[ERROR])
    sums.product = float(of_max[PRODUCT] + of_others[PRODUCT])
    sums.energy = float(of_max[INPUT] + of_others[INPUT])
    for rows, cell in (*largest, *others):
        np.add.at(sums.codes, cells.low_code[cell], rows[LOW])
        np.add.at(sums.codes, cells.high_code[cell], rows[HIGH])
    return sums
