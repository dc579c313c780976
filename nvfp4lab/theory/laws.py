"""The laws that elements are drawn from, as the magnitude |x| sees them.

The theory needs of a law its density, its tail and the places between which quadrature sees it as
smooth. Four have closed forms here; any other is taken from a frozen scipy distribution. To add a
closed form, add it to LAWS.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

Curve = Callable[[np.ndarray], np.ndarray]

HALVINGS = 64  # quantiles where the tail has halved up to so many times are ends of panels
NEGLIGIBLE = 1e-17  # share of the second moment that lies beyond the last panel
SMALLEST_SIGMA, LARGEST_SIGMA = 2.0**-149, 2.0**127
FARTHEST_OCTAVES = 160  # panels reach no further than this many octaves beyond the quantiles


@dataclass(frozen=True)
class Law:
    """A symmetric continuous law: what |x| does. Vectorised over float64 arrays."""

    name: str
    pdf: Curve  # density of |x| on [0, end)
    sf: Curve  # P(|x| > a)
    isf: Curve  # the a with that probability
    second_moment: float  # E x^2
    end: float = math.inf  # of the support

    def scaled(self, by: float) -> Law:
        """The law of `by` times the magnitude."""
        return Law(
            self.name,
            lambda a: self.pdf(a / by) / by,
            lambda a: self.sf(a / by),
            lambda p: self.isf(p) * by,
            self.second_moment * by**2,
            self.end * by,
        )

    def largest_cdf(self, a: np.ndarray, count: int) -> np.ndarray:
        """P(the largest of `count` magnitudes is at most a)."""
        return np.exp(count * np.log1p(-np.minimum(self.sf(a), 1.0)))

    def largest_isf(self, p: np.ndarray, count: int) -> np.ndarray:
        """The a that the largest of `count` magnitudes exceeds with probability p."""
        return self.isf(-np.expm1(np.log1p(-p) / count))

    def knots(self, count: int = 1) -> np.ndarray:
        """Sorted ends of panels that resolve the law of the largest of `count` magnitudes.

        Its quantiles, a factor of two apart in the tail and of four near zero, and from there
        octaves until what is beyond is negligible or FARTHEST_OCTAVES are reached.
        """
        upper = 0.5 ** np.arange(1.0, HALVINGS)
        lower = -np.expm1(np.log(0.25) * np.arange(1.0, 26))  # 1 - 4^-k
        knots = np.concatenate([self.largest_isf(upper, count), self.largest_isf(lower, count)])
        knots = np.unique(knots[(knots > 0) & (knots < self.end)])
        if self.end == math.inf:
            octaves = knots[-1] * 2.0 ** np.arange(1.0, FARTHEST_OCTAVES)
            beyond = np.flatnonzero(self.energy_beyond(octaves) < NEGLIGIBLE * self.second_moment)
            octaves = octaves[: beyond[0] + 1] if len(beyond) else octaves
            return np.concatenate([knots, octaves])
        return np.append(knots, self.end)

    def energy_beyond(self, a: np.ndarray) -> np.ndarray:
        """About E[x^2; |x| > a], as if the tail were the power of x that it is at a."""
        with np.errstate(divide="ignore", invalid="ignore"):
            tail = self.sf(a)
            power = a * self.pdf(a) / tail
            energy = a * a * tail * power / np.maximum(power - 2, 1e-3)
        return np.where(tail > 0, energy, 0.0)


def law(distribution: object, sigma: float | None = None) -> Law:
    """A named law, ("t", degrees of freedom), or a frozen scipy distribution as a `Law`.

    sigma: its standard deviation; None: 1 for a named law, a frozen distribution's own.

    Raises: ValueError for a law that is unknown, not symmetric about 0, not continuous or without a
    finite variance, or a sigma that is not a positive number; TypeError for anything else.
    """
    sigma = _checked_sigma(sigma)
    if isinstance(distribution, str):
        if distribution not in LAWS:
            raise ValueError(
                f"unknown law {distribution!r}; expected one of {', '.join(LAWS)}, "
                '("t", degrees of freedom) or a frozen scipy distribution'
            )
        return LAWS[distribution].scaled(sigma or 1.0)
    if isinstance(distribution, tuple) and len(distribution) == 2 and distribution[0] == "t":
        return _student_t(distribution[1]).scaled(sigma or 1.0)
    if hasattr(distribution, "dist") and hasattr(distribution, "isf"):
        own = _frozen(distribution)
        return own if sigma is None else own.scaled(sigma / math.sqrt(own.second_moment))
    raise TypeError(
        f'a law is one of {", ".join(LAWS)}, ("t", degrees of freedom) or a frozen scipy '
        f"distribution, got {distribution!r}"
    )


def _checked_sigma(sigma: object) -> float | None:
    if sigma is None:
        return None
    number = isinstance(sigma, (int, float, np.integer, np.floating))
    if not number or isinstance(sigma, bool) or not SMALLEST_SIGMA <= sigma <= LARGEST_SIGMA:
        raise ValueError(
            f"sigma is a standard deviation from {SMALLEST_SIGMA:g} to {LARGEST_SIGMA:g}, as "
            f"float32 has them, got {sigma!r}"
        )
    return float(sigma)


def _student_t(df: float) -> Law:
    """Of variance 1."""
    if isinstance(df, bool) or not isinstance(df, (int, float)) or not df > 2:
        raise ValueError(f"a Student-t has a variance for more than 2 degrees of freedom, got {df}")
    if df == math.inf:
        return LAWS["gauss"]
    scale = math.sqrt((df - 2) / df)
    log_norm = special.gammaln((df + 1) / 2) - special.gammaln(df / 2)
    norm = 2 * math.exp(log_norm) / math.sqrt(df * math.pi) / scale
    return Law(
        f"t({df:g})",
        lambda a: norm * np.exp(-(df + 1) / 2 * np.log1p(np.square(a / scale) / df)),
        lambda a: 2 * special.stdtr(df, -a / scale),
        lambda p: scale * stats.t.isf(p / 2, df),
        1.0,
    )


def _frozen(frozen) -> Law:
    name = getattr(frozen.dist, "name", type(frozen.dist).__name__)
    if not isinstance(frozen.dist, stats.rv_continuous):
        raise ValueError(f"expected a continuous distribution, {name} is none")
    variance = np.asarray(frozen.var())
    if variance.ndim:
        raise ValueError(f"expected one distribution, got {name} of shape {variance.shape}")
    variance = float(variance)
    if not 0 < variance < math.inf:
        raise ValueError(f"expected a distribution with a finite variance, {name} has {variance}")
    _check_symmetric(frozen, name)
    return Law(
        name,
        lambda a: np.nan_to_num(2 * frozen.pdf(a), nan=0.0, posinf=0.0),  # at an end of the support
        lambda a: 2 * frozen.sf(a),
        lambda p: frozen.isf(p / 2),
        variance,
        float(frozen.support()[1]),
    )


def _check_symmetric(frozen, name: str) -> None:
    above = frozen.isf(np.array([0.45, 0.3, 0.1, 1e-3, 1e-6]))
    unlike = ~np.isclose(frozen.pdf(-above), frozen.pdf(above), rtol=1e-9, atol=0)
    if abs(frozen.median()) > 1e-9 * frozen.std() or unlike.any():
        raise ValueError(
            f"expected a distribution that is symmetric about 0; {name} has median "
            f"{frozen.median():g} and mean {frozen.mean():g}"
        )


_ROOT_2, _ROOT_3 = math.sqrt(2), math.sqrt(3)

LAWS = {  # of variance 1
    "gauss": Law(
        "gauss",
        lambda a: math.sqrt(2 / math.pi) * np.exp(-np.square(a) / 2),
        lambda a: special.erfc(a / _ROOT_2),
        lambda p: _ROOT_2 * special.erfcinv(p),
        1.0,
    ),
    "laplace": Law(
        "laplace",
        lambda a: _ROOT_2 * np.exp(-_ROOT_2 * a),
        lambda a: np.exp(-_ROOT_2 * a),
        lambda p: -np.log(p) / _ROOT_2,
        1.0,
    ),
    "uniform": Law(
        "uniform",
        lambda a: np.full_like(a, 1 / _ROOT_3),
        lambda a: 1 - a / _ROOT_3,
        lambda p: _ROOT_3 * (1 - p),
        1.0,
        _ROOT_3,
    ),
}
