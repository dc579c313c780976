"""What a recipe gives on iid elements, worked out a second time; shares no code with nvfp4lab.

One idea throughout: the largest magnitude m of a block of B has the density B g(m) G(m)^(B-1), and
given m the other B - 1 are iid with density g / G(m) on [0, m]. Here every integral is a sum over
Gauss-Legendre panels, the inner one too, from the density alone; nvfp4lab has closed forms there.
Formats are lists of Fractions. A panel never crosses a step of the scale or of an element.

`plain` is without an outer scale, `under_one_scale` has one for n blocks, `smaller_of_two_uniform`
is 4/6 on blocks of up to four of the uniform law.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from scipy import stats

HALF = Fraction(1, 2)
E2M1 = [HALF * k for k in (0, 1, 2, 3, 4, 6, 8, 12)]
INT4 = [Fraction(k) for k in range(8)]


def minifloat(mantissa: int, smallest_normal: int, codes: int) -> list[Fraction]:
    """Values of the codes of an unsigned format; the smallest normal is a power of two."""
    size = 2**mantissa
    quantum = Fraction(2) ** (smallest_normal - mantissa)
    return [
        quantum * (c if c < size else (size + c % size) * 2 ** (c // size - 1))
        for c in range(codes)
    ]


E4M3 = minifloat(3, -6, 127)  # 0x7F is NaN
UE5M3 = minifloat(3, -14, 255)  # 0xFF is NaN
E8M0 = [Fraction(2) ** (c - 127) for c in range(255)]


def midpoints(values: list[Fraction]) -> list[Fraction]:
    return [(a + b) / 2 for a, b in itertools.pairwise(values)]


@dataclass(frozen=True)
class Law:
    """Of a magnitude: its density, its distribution function, E x^2, and where it ends."""

    density: Callable[[np.ndarray], np.ndarray]
    below: Callable[[np.ndarray], np.ndarray]
    square: float
    end: float = math.inf

    @classmethod
    def named(cls, name: str, sigma: float = 1.0) -> Law:
        """The uniform law by its elementary formulas, others from scipy."""
        if name == "uniform":
            end = sigma * math.sqrt(3)
            return cls(lambda x: np.full_like(x, 1 / end), lambda x: x / end, sigma**2, end)
        laws: dict[str, Any] = {
            "gauss": stats.norm(0, sigma),
            "laplace": stats.laplace(0, sigma / math.sqrt(2)),
            "t5": stats.t(5, 0, sigma * math.sqrt(3 / 5)),
            "logistic": stats.logistic(0, sigma * math.sqrt(3) / math.pi),
        }
        law = laws[name]
        return cls(lambda x: 2 * law.pdf(x), lambda x: 1 - 2 * law.sf(x), sigma**2)

    def up_to(self, end: float) -> Law:
        """The law of what lies below `end`; its E x^2 is not needed."""
        total = float(self.below(np.array(end)))
        return Law(lambda x: self.density(x) / total, lambda x: self.below(x) / total, 1.0, end)


@dataclass(frozen=True)
class Rule:
    """A scale rule: codes' values, and the amax at which each next code starts. No codes: exact."""

    values: list[Fraction] = field(default_factory=list)
    edges: list[Fraction] = field(default_factory=list)
    divisor: Fraction = Fraction(6)

    @classmethod
    def nearest(cls, values: list[Fraction], divisor: int | Fraction) -> Rule:
        return cls(values, [Fraction(divisor) * edge for edge in midpoints(values)])

    @classmethod
    def power_of_two(cls, up_at: Fraction, divisor: int) -> Rule:
        """2^k from amax / divisor = up_at * 2^(k-1) on: 2 is floor, 1 ceil, 7/4 even."""
        return cls(E8M0, [Fraction(divisor) * up_at * value for value in E8M0[:-1]])

    def scales(self, m: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not self.values:
            return np.zeros(m.shape, int), m / float(self.divisor)
        codes = np.searchsorted(np.array([float(e) for e in self.edges]), m)
        return codes, np.array([float(v) for v in self.values])[codes]


@dataclass(frozen=True)
class Oracle:
    nmse: float
    gain: float
    max_nmse: float
    other_nmse: float
    zero_nmse: float
    code_probabilities: np.ndarray
    scale_probabilities: np.ndarray


def panels(cuts: np.ndarray, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Points and weights over every gap between sorted cuts [..., n]: [..., (n - 1) * nodes]."""
    x, w = np.polynomial.legendre.leggauss(nodes)
    half = np.diff(cuts)[..., None] / 2
    middle = cuts[..., :-1, None] + half
    shape = (*cuts.shape[:-1], -1)
    return (middle + half * x).reshape(shape), (half * w).reshape(shape)


def outcome(
    x: np.ndarray, s: np.ndarray, values: list[Fraction], stochastic: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of magnitudes under scales: the expectations of e^2, of x q, and of each code [k, ...]."""
    grid = np.array([float(v) for v in values])
    y = x / np.where(s == 0, 1, s)
    shares = np.zeros((len(grid), *x.shape))
    if stochastic:
        low = np.clip(np.searchsorted(grid, y, side="right") - 1, 0, len(grid) - 2)
        up = np.clip((y - grid[low]) / (grid[low + 1] - grid[low]), 0, 1)
        np.put_along_axis(shares, low[None], (1 - up)[None], 0)
        np.put_along_axis(shares, low[None] + 1, up[None], 0)
    else:
        edges = np.array([float(v) for v in midpoints(values)])
        np.put_along_axis(shares, np.searchsorted(edges, y)[None], 1.0, 0)
    shares = np.where(s == 0, np.eye(len(grid))[0].reshape(-1, *[1] * x.ndim), shares)
    decoded = grid.reshape(-1, *[1] * x.ndim) * s
    return (shares * (decoded - x) ** 2).sum(0), (shares * decoded).sum(0) * x, shares


def steps(values: list[Fraction], stochastic: bool) -> np.ndarray:
    own = values[1:] if stochastic else midpoints(values)
    return np.array([float(v) for v in own])


def plain(
    law: Law,
    rule: Rule,
    values: list[Fraction],
    block: int,
    stochastic: bool = False,
    nodes: int = 20,
    lowest: int = -40,
    spacing: float = 0.5,
) -> Oracle:
    """A block under its own scale; `lowest` and `spacing`, in octaves of sqrt(E x^2), are cuts."""
    sigma = math.sqrt(law.square)
    top = law.end if math.isfinite(law.end) else sigma * 2.0**60
    octaves = sigma * np.exp2(np.arange(lowest, 60, spacing))
    edges = np.array([float(e) for e in rule.edges])
    of_elements = steps(values, stochastic)
    of_max = np.outer([float(v) for v in rule.values], of_elements).ravel()
    cuts = np.concatenate([[0.0, top], octaves, edges, of_max])
    cuts = np.unique(cuts[cuts <= top])
    keep = (cuts == 0) | (cuts >= sigma * 2.0**lowest)
    m, weight = panels(cuts[keep], nodes)
    density = law.density(m)
    weight = weight * block * density * law.below(m) ** (block - 2)
    alive = weight * m * m > 1e-40 * law.square
    m, weight, density = m[alive], weight[alive], density[alive]
    codes, s = rule.scales(m)

    inner = np.minimum(s[:, None] * np.concatenate([[0], of_elements]), m[:, None])
    inner = np.concatenate([inner, m[:, None]], 1)
    # Where no element steps (a scale of zero, or saturated) octaves of sigma cut the panel.
    extra = sigma * np.exp2(np.arange(-6, 60, 1.0))
    extra = extra[extra < m.max()]
    if len(extra):
        inner = np.concatenate(
            [inner, np.broadcast_to(np.minimum(extra, m[:, None]), (len(m), len(extra)))], 1
        )
    inner = np.sort(inner, 1)
    totals = {"e": 0.0, "xq": 0.0, "max": 0.0, "other": 0.0, "zero": 0.0}
    of_codes = np.zeros(len(values))
    for i in range(0, len(m), 4000):  # so that memory stays small
        part = slice(i, i + 4000)
        mass, x = weight[part], m[part]
        of_m = outcome(x, s[part], values, stochastic)
        y, v = panels(inner[part], nodes)
        v = v * law.density(y)
        of_rest = outcome(y, s[part][:, None] + 0 * y, values, stochastic)
        below = law.below(x)
        # The largest has B g G^(B-1), each other B g G^(B-2) and its own density.
        largest, rest = mass * below * of_m[0], (block - 1) * mass * (v * of_rest[0]).sum(1)
        zero = s[part] == 0
        totals["e"] += (largest + rest).sum()
        totals["max"] += largest[~zero].sum()
        totals["other"] += rest[~zero].sum()
        totals["zero"] += (largest + rest)[zero].sum()
        totals["xq"] += (mass * below * of_m[1]).sum()
        totals["xq"] += ((block - 1) * mass * (v * of_rest[1]).sum(1)).sum()
        of_codes += (mass * below * of_m[2]).sum(1)
        of_codes += ((block - 1) * mass * (v * of_rest[2]).sum(2)).sum(1)
    whole = block * law.square
    scales = np.zeros(max(len(rule.values), 1))
    np.add.at(scales, codes, weight * law.below(m))
    return Oracle(
        totals["e"] / whole,
        totals["xq"] / whole,
        totals["max"] / whole,
        totals["other"] / whole,
        totals["zero"] / whole,
        of_codes / block,
        scales,
    )


def under_one_scale(
    law: Law, values: list[Fraction], block: int, blocks: int, nodes: int = 5
) -> tuple[float, float]:
    """NMSE and gain with E4M3 scales of amax / max / g and g = the tensor's amax / (max * 448).

    Given the tensor's largest magnitude t, its own block has the scale 448 and the rest of it is
    iid below t; the other blocks are blocks of the law below t.
    """
    top = values[-1]
    sigma = math.sqrt(law.square)
    end = min(law.end, 32 * sigma)
    t, weight = panels(end * np.linspace(0, 1, 41), 8)
    weight = weight * blocks * block * law.density(t) * law.below(t) ** (blocks * block - 1)
    error = product = 0.0
    for end, mass in zip(t[weight > 1e-12], weight[weight > 1e-12], strict=True):
        own = law.up_to(end)
        unit = Fraction(float(end)) / (top * 448)  # g
        rule = Rule([unit * v for v in E4M3], [unit * top * e for e in midpoints(E4M3)])
        other = plain(own, rule, values, block, nodes=nodes, lowest=-10, spacing=2.0)
        s = float(unit * 448)
        cuts = np.append(np.append(0.0, steps(values, False)[steps(values, False) < top]) * s, end)
        y, v = panels(cuts, 20)
        of_rest = outcome(y, np.full_like(y, s), values, False)
        v = v * own.density(y)
        error += mass * ((block - 1) * (v * of_rest[0]).sum() + (blocks - 1) * block * other.nmse)
        product += mass * (
            end**2 + (block - 1) * (v * of_rest[1]).sum() + (blocks - 1) * block * other.gain
        )
    whole = blocks * block * law.square
    return error / whole, product / whole


def smaller_of_two_uniform(
    sigma: float, block: int, nodes: int = 6, fine: int = 2, split: int = 2
) -> float:
    """NMSE of 4/6 on blocks of 2 to 4 of the uniform law: given m the others are uniform on [0, m].

    `split` panels of m between steps of either scale, `fine` of each other element's: it converges
    slowly, for where the smaller error changes the integrand has corners.
    """
    end = sigma * math.sqrt(3)
    law = Law.named("uniform", sigma)
    cuts = np.array([float(d * e) for d in (6, 4) for e in midpoints(E4M3)])
    cuts = np.unique([0.0, end, *cuts[cuts < end]])
    cuts = np.unique(np.linspace(cuts[:-1], cuts[1:], split + 1))
    m, weight = panels(cuts, nodes)
    weight = weight * block * law.density(m) * law.below(m) ** (block - 1)
    rules = [Rule.nearest(E4M3, divisor) for divisor in (6, 4)]
    six, four = (rule.scales(m)[1] for rule in rules)
    seen = weight > 1e-12
    total = sum(
        mass * _smaller_sum(at, s6, s4, block, nodes, fine)
        for at, mass, s6, s4 in zip(m[seen], weight[seen], six[seen], four[seen], strict=True)
    )
    return total / (block * sigma**2)


def _smaller_sum(m: float, s6: float, s4: float, block: int, nodes: int, fine: int) -> float:
    """E min(S6, S4) of a block with the largest magnitude m, the others uniform on [0, m].

    It is E S6 + E min(0, D), D a sum of piecewise linear functions of the others. The integral over
    the last of them is elementary; those before get `fine` panels between steps.
    """

    def error(x: np.ndarray, s: float) -> np.ndarray:
        return outcome(x, np.full_like(x, s), E2M1, False)[0]

    cuts = np.concatenate([[0.0, m], s6 * steps(E2M1, False), s4 * steps(E2M1, False)])
    cuts = np.unique(cuts[cuts <= m])
    d = error(cuts, s4) - error(cuts, s6)
    largest = np.array([m])
    y, v = panels(np.unique(np.linspace(cuts[:-1], cuts[1:], fine + 1)), nodes)
    v = v / m
    of_y = error(y, s4) - error(y, s6)
    c, w = error(largest, s4) - error(largest, s6), np.ones(1)
    for _ in range(block - 2):
        c, w = (c[:, None] + of_y).ravel(), (w[:, None] * v).ravel()
    a, b = c[:, None] + d[:-1], c[:, None] + d[1:]  # D at both ends of each segment
    low, high = np.minimum(a, b), np.maximum(a, b)
    crossing = (low < 0) & (high > 0)
    between = -low * low / (2 * np.where(crossing, high - low, 1.0))
    mean = np.where(high <= 0, (a + b) / 2, np.where(crossing, between, 0.0))
    gained = (w * (mean * np.diff(cuts)).sum(1)).sum() / m
    return float(error(largest, s6)[0] + (block - 1) * (v * error(y, s6)).sum() + gained)
