"""Blocks whose scale is the better of two (4/6): which one, and what comes of it, in expectation.

Of a block with largest magnitude m the second scale is taken if D, its gain in squared error summed
over the elements, is positive. D is a sum of iid terms d(x), piecewise linear in x, and one of m.
With the transform of d, the sums of the blocks that take the second scale are a Fourier series of
the step 1{D > 0}: a square wave of a half period that |D| does not reach,

    1{D > 0} = 1/2 + 2/pi sum over odd k of sin(pi k D / half) / k.

Where both scales decode to the same value, d is 0. Blocks with no or one element elsewhere make the
series converge slowly; they are summed exactly and taken out of it. May be changed: HIGHEST and
CONVERGED, against tests/theory_oracles.py.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from nvfp4lab.rules import Recipe
from nvfp4lab.theory.integrals import (
    BlockLaw,
    Sums,
    at_amax,
    between,
    cell_of,
    collect,
    nodes_on,
    of_element,
    over_step,
)
from nvfp4lab.theory.steps import Cells, Step, element_cells, scale_steps

HIGHEST = 20.0  # frequency of the last term of the series times scale^2, for each node of a panel
CONVERGED = 1e-11  # the series ends where what multiplies the wave has fallen to this
CHUNK = 128  # terms worked on at a time


@dataclass(frozen=True)
class Pair:
    """The two candidates' steps, alike over the same block maxima; the first wins a tie."""

    first: Step
    second: Step

    def at(self, amax: float) -> Pair:
        """The two under this largest magnitude."""
        return Pair(self.first.at(amax), self.second.at(amax))


@dataclass(frozen=True)
class FourOverSix:
    """Two candidates a block."""

    recipe: Recipe
    of: BlockLaw
    cells: Cells

    @classmethod
    def under(cls, recipe: Recipe, of: BlockLaw) -> FourOverSix:
        """The recipe's blocks of a law."""
        return cls(recipe, of, element_cells(recipe))

    def between(self, low: float, high: float, g: float) -> Sums:
        """Integrated over largest magnitudes from low to high."""
        total = Sums.zero(self.cells.codes)
        for pair in self._pairs(low, high, g):
            if pair.first.code == pair.second.code:
                total.add(over_step(pair.first, self.cells, self.of))
                continue
            ends = between(
                np.concatenate([self._corners(pair), self.of.knots_of_max]),
                pair.first.low,
                pair.first.high,
            )
            m, w = nodes_on(ends[:-1], ends[1:], self.of.nodes // 2)  # two grids of codes: narrow
            w = w * self.of.weights(m)[0]
            others = self._others(pair, ends)
            for panel in range(len(m)):
                for one, weight in zip(m[panel], w[panel], strict=True):
                    total.add(self._given(float(one), pair, others), float(weight))
                others = others.up_to(ends[panel + 1])
        return total

    def at(self, amax: float, g: float) -> Sums:
        """Of blocks with this largest magnitude."""
        pair = self._pairs(amax, np.nextafter(amax, np.inf), g)[0].at(amax)
        if pair.first.code == pair.second.code:
            return at_amax(pair.first, self.cells, self.of)
        return self._given(amax, pair, self._others(pair, np.array([amax])))

    def _others(self, pair: Pair, ends: np.ndarray) -> Others:
        """The others below the first of `ends`, with a wave that serves all largest magnitudes in
        the panels between them."""
        corners = np.concatenate([self._corners(pair), self.of.knots_of_x])
        widest = Others(between(corners, 0.0, ends[-1]), pair, self, math.nan)
        half = max(widest.half_period(self._d_of(m, pair)) for m in ends)
        return Others(between(corners, 0.0, ends[0]), pair, self, half)

    def _d_of(self, m: float, pair: Pair) -> float:
        amax = np.array([m])
        cell = [np.searchsorted(self.cells.edges * s.divisor, amax, "right") for s in both(pair)]
        return float(gain(amax, cell, pair, self.cells)[0])

    def _pairs(self, low: float, high: float, g: float) -> list[Pair]:
        search = self.recipe.search
        assert search is not None and search.factors is not None
        first, second = (scale_steps(self.recipe, g, low, high, f) for f in search.factors)
        ends = np.unique([s.low for s in (*first, *second)] + [high])
        pairs, i, j = [], 0, 0
        for a, b in itertools.pairwise(ends):
            i += first[i].high <= a
            j += second[j].high <= a
            pairs.append(Pair(*(replace(s, low=a, high=b) for s in (first[i], second[j]))))
        return pairs

    def _corners(self, pair: Pair) -> np.ndarray:
        edges = self.cells.edges
        return np.concatenate([edges * pair.first.divisor, edges * pair.second.divisor])

    def _given(self, m: float, pair: Pair, known: Others) -> Sums:
        """The sums of blocks whose largest magnitude is m."""
        others, amax, count = known.up_to(m), np.array([m]), self.of.block - 1
        whole, rest = (others.mass.sum() ** n for n in (count, count - 1))
        taken, of_others = others.with_second(self._d_of(m, pair), count)
        taken, of_others = taken / whole, of_others / whole
        parts = (1 - taken, others.moments * rest / whole - of_others), (taken, of_others)
        total = Sums.zero(self.cells.codes)
        for i, (step, (probability, moments)) in enumerate(zip(both(pair), parts, strict=True)):
            cell = np.searchsorted(self.cells.edges * step.divisor, amax, "right")
            largest = of_element(amax, cell, step, self.cells) * probability
            rows = others.rows(moments, i, step) * count
            total.add(
                collect(step, self.cells, probability, [(largest, cell)], [(rows, others.cells[i])])
            )
        return total


@dataclass(frozen=True)
class Others:
    """The other elements, cut into intervals on which d is linear and the law smooth."""

    ends: np.ndarray  # [I + 1]
    pair: Pair
    blocks: FourOverSix
    half: float  # period of the wave
    known: Others | None = None  # all but the last interval

    def up_to(self, m: float) -> Others:
        """With one more interval, up to m."""
        if m <= self.ends[-1]:
            return self
        return Others(np.append(self.ends, m), self.pair, self.blocks, self.half, self)

    @cached_property
    def cells(self) -> list[np.ndarray]:
        """The cell of each interval under the first and under the second scale."""
        return [cell_of(self.ends, step, self.blocks.cells) for step in both(self.pair)]

    @cached_property
    def middle(self) -> np.ndarray:
        """[I]: the middle of each interval."""
        return (self.ends[:-1] + self.ends[1:]) / 2

    @cached_property
    def d(self) -> np.ndarray:
        """[2, I]: d in the middle of each interval, and its slope."""
        first, second = meant(self.cells, self.pair, self.blocks.cells)
        slope = np.where(np.isclose(first, second, rtol=1e-12, atol=0), 0.0, 2 * (second - first))
        return np.stack([slope * (self.middle - (first + second) / 2), slope])

    @cached_property
    def alike(self) -> np.ndarray:
        """[I]: whether both scales decode to the same value."""
        return self.d[1] == 0

    @cached_property
    def moments(self) -> np.ndarray:
        """[3, I]: the integrals of g(x) (x - middle)^j."""
        new = [self._weighted(i, self.blocks.of.nodes)[1].sum(-1) for i in self._new]
        moments = np.stack(new, axis=1)
        return moments if self.known is None else np.append(self.known.moments, moments, axis=1)

    @property
    def mass(self) -> np.ndarray:
        """[I]: the probability of an element in each interval."""
        return self.moments[0]

    def rows(self, moments: np.ndarray, which: int, step: Step) -> np.ndarray:
        """Moments [3, I] about the middles as the rows that `Sums` are collected from: [5, I]."""
        q = step.scale * self.blocks.cells.low[self.cells[which]]
        m0, m1, m2 = moments
        off = self.middle - q
        error = m2 + 2 * off * m1 + off * off * m0
        product = -(m2 + (off + self.middle) * m1 + off * self.middle * m0)
        energy = m2 + 2 * self.middle * m1 + self.middle**2 * m0
        return np.stack([m0, 0 * m0, error, product, energy])

    def transform(self, chunk: int) -> np.ndarray:
        """[3, I, CHUNK]: the integrals of g(x) (x - middle)^j exp(i t d(x)) at t of `frequencies`.

        With as many nodes more as it takes to follow exp(i t d(x)).
        """
        if chunk not in self._transforms:
            _, t = self.frequencies(chunk)
            new = []
            for i in self._new:
                at_middle, slope = self.d[:, i]
                turns = abs(slope) * (self.ends[i + 1] - self.ends[i]) / 2 * t[-1]
                away, weighted = self._weighted(i, self.blocks.of.nodes + math.ceil(0.75 * turns))
                new.append(weighted @ np.exp(1j * np.outer(at_middle + slope * away, t)))
            transform = np.stack(new, axis=1)
            if self.known is not None:
                transform = np.append(self.known.transform(chunk), transform, axis=1)
            self._transforms[chunk] = transform
        return self._transforms[chunk]

    @cached_property
    def _transforms(self) -> dict[int, np.ndarray]:
        return {}

    @property
    def _new(self) -> range:
        """The intervals that `known` has not."""
        return range(0 if self.known is None else len(self.ends) - 2, len(self.ends) - 1)

    def _weighted(self, i: int, nodes: int) -> tuple[np.ndarray, np.ndarray]:
        """x - middle at the nodes of interval i, and [3, nodes] its powers with density, weight."""
        x, w = nodes_on(self.ends[i], self.ends[i + 1], nodes)
        away = x - self.middle[i]
        return away, w * self.blocks.of.law.pdf(x) * away ** np.arange(3)[:, None]

    def frequencies(self, chunk: int) -> tuple[np.ndarray, np.ndarray]:
        """The odd k of a chunk of the wave's terms, and their frequencies."""
        k = 2.0 * np.arange(chunk * CHUNK, (chunk + 1) * CHUNK) + 1
        return k, math.pi / self.half * k

    def where_gained(self, d_of_m: float) -> np.ndarray:
        """[3, I]: the integrals of g(x) (x - middle)^j over d(x) + d_of_m > 0, where not alike."""
        at_middle, slope = self.d
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = self.middle - (at_middle + d_of_m) / slope
        crossing = np.clip(crossing, self.ends[:-1], self.ends[1:])
        low = np.where(slope > 0, crossing, self.ends[:-1])
        high = np.where(slope > 0, self.ends[1:], crossing)
        x, w = nodes_on(low, high, self.blocks.of.nodes)
        w = w * self.blocks.of.law.pdf(x)
        away = x - self.middle[:, None]
        integrals = np.stack([w.sum(-1), (w * away).sum(-1), (w * away * away).sum(-1)])
        return np.where(self.alike, 0.0, integrals)

    def with_second(self, d_of_m: float, count: int) -> tuple[float, np.ndarray]:
        """What blocks of `count` others put where the second scale is taken.

        Returns the integral over all others, each with density g below m, and [3, I] the moments
        of one of them times the integral over the rest.
        """
        moved = np.where(self.alike, 0.0, self.moments)
        still = self.moments - moved
        a, b = still[0].sum(), moved[0].sum()
        n, rest = count, count - 1
        one, one_of_rest = n * a ** (n - 1), rest * a ** (rest - 1)
        # No or one other with d not 0, exactly; and half of all the blocks beyond these.
        first, gained = float(d_of_m > 0), self.where_gained(d_of_m)
        all_others = first * a**n + one * gained[0].sum()
        all_others += 0.5 * ((a + b) ** n - a**n - one * b)
        of_one = still * (first * a**rest + one_of_rest * gained[0].sum()) + gained * a**rest
        of_one += 0.5 * still * ((a + b) ** rest - a**rest - one_of_rest * b)
        of_one += 0.5 * moved * ((a + b) ** rest - a**rest)
        # The wave, of what is beyond these.
        highest = HIGHEST * self.blocks.of.nodes / max(step.scale for step in both(self.pair)) ** 2
        for chunk in itertools.count():
            k, t = self.frequencies(chunk)
            wave = 2 / (math.pi * k) * np.exp(1j * t * d_of_m)
            transform = self.transform(chunk)
            phi = transform[0][~self.alike].sum(0)
            beyond = (a + phi) ** rest - a**rest
            all_others += (wave * ((a + phi) ** n - a**n - one * phi)).sum().imag
            of_one += np.where(
                self.alike,
                still * (wave * (beyond - one_of_rest * phi)).sum().imag,
                (transform @ (wave * beyond)).imag,
            )
            if t[-1] > highest or np.abs(beyond).max() < CONVERGED * (a + b) ** rest:
                return all_others, of_one
        raise AssertionError

    def half_period(self, d_of_m: float) -> float:
        """What |D| does not exceed, or with a probability of 1e-12 at the most (Bernstein)."""
        at_middle, slope = self.d
        reach = np.abs(slope) * np.diff(self.ends) / 2
        count, share = self.blocks.of.block - 1, self.mass / self.mass.sum()
        mean = count * (share * at_middle).sum()
        spread = math.sqrt(count * (share * (at_middle**2 + reach**2)).sum())
        largest = (np.abs(at_middle) + reach).max()
        likely = abs(d_of_m + mean) + 7.5 * spread + 19 * largest
        return 1.01 * min(abs(d_of_m) + count * largest, likely)


def both(pair: Pair) -> tuple[Step, Step]:
    """The two steps."""
    return pair.first, pair.second


def meant(cell: list[np.ndarray], pair: Pair, cells: Cells) -> list[np.ndarray]:
    """What the search takes elements in these cells to decode to, under either scale."""
    return [s.scale * cells.meant[c] for c, s in zip(cell, both(pair), strict=True)]


def gain(x: np.ndarray, cell: list[np.ndarray], pair: Pair, cells: Cells) -> np.ndarray:
    """d: the square error under the first scale less that under the second."""
    first, second = meant(cell, pair, cells)
    return (second - first) * (2 * x - first - second)
