"""Averages over the outer scale, which is a function of the largest of all its elements.

Of n = N / B blocks under one outer scale, one has the largest magnitude A of all N elements and the
others have theirs below A. So a block's expectation is the mean over A of

    (1 - 1/n) E[block | its largest < A] + 1/n E[block | its largest = A].

With A's distribution written exp(-exp(-z)), the mean is over the standard Gumbel law of z, of a
function that is smooth in z for light and for heavy tails alike: a Gauss rule of that law needs a
dozen nodes. An outer scale that is a power of two is constant over an octave of A, and nothing has
to be averaged: blocks whose largest is below a, where all are, are counted at the octave's ends. A
new rule of `rules.Outer` gets its place in `outer_scale`, and its corners in `_panels`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Protocol

import numpy as np

from nvfp4lab.outer import POWERS_OF_TWO
from nvfp4lab.rules import Outer
from nvfp4lab.theory.integrals import BlockLaw, Sums, between, nodes_on, power_tail
from nvfp4lab.theory.laws import Law
from nvfp4lab.theory.steps import Cells

LOWEST_Z = -3.5  # exp(-exp(3.5)) is 4e-15
BULK = 26.0  # what lies beyond has a probability of 5e-12
ENDS = np.array([2.0, 8.0])  # of panels for the Gauss rule
ENERGY_LEFT = 1e-12  # octaves end where so little of the second moment is beyond
MOST_OCTAVES = 90
FARTHEST_Z = 650.0  # exp(-z) is a float64


class Blocks(Protocol):
    """Sums over blocks of one recipe, by their largest magnitude and the outer scale."""

    @property
    def of(self) -> BlockLaw:
        """The law of their elements."""
        ...

    @property
    def cells(self) -> Cells:
        """What an element decodes to, by its quotient."""
        ...

    def between(self, low: float, high: float, g: float) -> Sums:
        """Integrated over largest magnitudes from low to high, under the outer scale g."""
        ...

    def at(self, amax: float, g: float) -> Sums:
        """Of blocks with this largest magnitude, under the outer scale g."""
        ...


def outer_scale(rule: Outer, amax: float) -> float:
    """g of the largest magnitude: as `outer.outer_from_amax`, in real arithmetic."""
    floor = 0.0 if rule.amax_floor == "smallest normal" else rule.amax_floor
    g = max(amax, floor) / rule.range
    encode = 1 / g
    if rule.encodes:
        encode = min(max(encode, rule.floor), rule.ceiling)
        return 1 / _rounded(rule, encode)
    return _rounded(rule, min(max(g, rule.floor), rule.ceiling))


def _rounded(rule: Outer, scale: float) -> float:
    if rule.rounding == "none":
        return scale
    mantissa, exponent = math.frexp(scale)  # mantissa in [1/2, 1)
    carries = (2 * mantissa - 1) * 2**23 + POWERS_OF_TWO[rule.rounding] >= 2**23
    return 2.0 ** (exponent - 1 + carries)


def averaged(blocks: Blocks, rule: Outer, elements: int, nodes: int) -> tuple[Sums, float]:
    """A block's sums under the outer scale of `elements` elements, and how far off the part of its
    error may be that was extrapolated."""
    of, count = blocks.of, elements // blocks.of.block
    total = Sums.zero(blocks.cells.codes)
    octaves = []
    for low, high in _panels(of.law, rule, elements):
        a, b = _amax_of(of.law, np.array([low, high]), elements).tolist()
        g, also = (outer_scale(rule, float(m)) for m in np.geomspace(a, b, 4)[1:3])
        if g == also:
            part = _constant(blocks, g, a, b, count)
            if low > BULK and rule.rounding != "none":
                octaves.append(part)
        else:
            part = _varying(blocks, rule, *gumbel_rule(low, high, nodes), elements)
        total.add(part)
    off = 0.0
    if len(octaves) > 3:
        tail, off = power_tail(octaves)
        total.add(tail)
    by = 1 / total.probability
    return total.scaled(by), off * by


def _constant(blocks: Blocks, g: float, low: float, high: float, count: int) -> Sums:
    """Where A lies between low and high and the outer scale is g.

    Blocks all below a magnitude a are (int below a) times the probability that the others are.
    """
    of, part = blocks.of, Sums.zero(blocks.cells.codes)
    all_low, all_high = (
        float(of.law.largest_cdf(np.array(a), of.block * (count - 1))) for a in (low, high)
    )
    if low > of.lowest:
        part.add(blocks.between(of.lowest, low, g), all_high - all_low)
    if high > of.lowest:
        part.add(blocks.between(max(low, of.lowest), high, g), all_high)
    return part


def _varying(
    blocks: Blocks, rule: Outer, z: np.ndarray, weights: np.ndarray, elements: int
) -> Sums:
    """Where the outer scale follows A: the rule's nodes z and weights."""
    of, count = blocks.of, elements // blocks.of.block
    part = Sums.zero(blocks.cells.codes)
    for amax, weight in zip(_amax_of(of.law, z, elements), weights, strict=True):
        g = outer_scale(rule, amax)
        if count > 1 and amax > of.lowest:
            below = blocks.between(of.lowest, amax, g)
            part.add(below, weight * (1 - 1 / count) / below.probability)
        part.add(blocks.at(amax, g), weight / count)
    return part


def _panels(law: Law, rule: Outer, elements: int) -> Iterator[tuple[float, float]]:
    """Intervals of z, cut where the outer scale, as a function of A, has a corner or a step.

    Under powers of two these go on until little of the second moment is beyond.
    """
    floor = 0.0 if rule.amax_floor == "smallest normal" else rule.amax_floor
    limits = [x for x in (rule.floor, rule.ceiling) if 0 < x < math.inf]
    corners = [floor, *(rule.range / x if rule.encodes else rule.range * x for x in limits)]
    last = BULK
    if rule.rounding != "none":
        low, high = _amax_of(law, np.array([LOWEST_Z, BULK]), elements)
        step = 1.5 if rule.rounding == "to the nearest power of two" else 1.0
        first = math.floor(math.log2(low / rule.range)) - 1
        octaves = (
            rule.range
            * (1 / step if rule.encodes else step)
            * 2.0 ** np.arange(first, first + MOST_OCTAVES)
        )
        far = (octaves > high) & (law.energy_beyond(octaves) < ENERGY_LEFT * law.second_moment)
        octaves = octaves[: np.flatnonzero(far)[0] + 1] if far.any() else octaves
        last = max(BULK, float(_z_of(law, octaves[-1:], elements)[0]))
        corners += list(octaves)
        ends = np.array([BULK])
    else:
        ends = ENDS
    cuts = np.append(ends, _z_of(law, np.array([c for c in corners if c > 0]), elements))
    ends = between(cuts, LOWEST_Z, min(last, FARTHEST_Z))
    return itertools.pairwise(ends.tolist())


def _amax_of(law: Law, z: np.ndarray, elements: int) -> np.ndarray:
    return law.isf(-np.expm1(-np.exp(-z) / elements))


def _z_of(law: Law, amax: np.ndarray, elements: int) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return -np.log(-elements * np.log1p(-np.clip(law.sf(amax), 0.0, 1.0)))


@lru_cache(maxsize=1024)
def gumbel_rule(low: float, high: float, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """The Gauss rule of the density exp(-z - exp(-z)) on [low, high]: nodes and weights.

    From its recurrence (Lanczos on a fine discretisation) by Golub and Welsch. Where the density is
    small, fewer nodes do.
    """
    fine = np.linspace(low, high, 1 + math.ceil(2 * (high - low)))
    z, weight = (part.ravel() for part in nodes_on(fine[:-1], fine[1:], 10))
    weight = weight * np.exp(-z - np.exp(-z))
    mass = weight.sum()
    nodes = max(2, nodes + math.ceil(math.log10(mass) / 2))
    diagonal, beside = np.zeros(nodes), np.zeros(nodes)
    before, now = np.zeros_like(z), np.full_like(z, 1 / math.sqrt(mass))
    for k in range(nodes):
        diagonal[k] = (weight * z * now * now).sum()
        after = (z - diagonal[k]) * now - (beside[k - 1] * before if k else 0.0)
        beside[k] = math.sqrt((weight * after * after).sum())
        before, now = now, after / beside[k]
    jacobi = np.diag(diagonal) + np.diag(beside[:-1], 1) + np.diag(beside[:-1], -1)
    at, vectors = np.linalg.eigh(jacobi)
    return at, mass * vectors[0] ** 2
