"""expected_error: what a recipe does to iid elements of a law, by quadrature.

A recipe becomes blocks (`plain`, `four_over_six`) and perhaps an outer scale over them
(`outer_scales`). The same integral is taken at growing resolutions until two agree; their
difference is the error estimate. A recipe that the theory cannot follow is refused in
`require_theory`; take it out there when it can.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from nvfp4lab import catalogue
from nvfp4lab.rules import Recipe
from nvfp4lab.theory.four_over_six import FourOverSix
from nvfp4lab.theory.integrals import UNENCODED, BlockLaw, Sums, power_tail
from nvfp4lab.theory.laws import NEGLIGIBLE, Law
from nvfp4lab.theory.laws import law as law_of
from nvfp4lab.theory.outer_scales import Blocks, averaged
from nvfp4lab.theory.plain import Plain
from nvfp4lab.theory.steps import NoTheory

# (nodes on a panel, nodes of the mean over outer scales on a panel), and when two agree.
RESOLUTIONS = ((6, 4), (8, 6), (12, 9), (16, 13))
AGREE, AGREE_WITH_OUTER = 1e-11, 5e-7
ROUNDOFF = 1e-14
PROBABILITY_MISSING = 1e-6  # more than is left out on purpose


@dataclass(frozen=True)
class Expectation:
    """What to expect of a recipe on a law. Sums are of expectations: NMSE is E e^2 / E x^2.

    Blocks with a NaN scale are left out of all but the scales, as `measure` leaves them out.
    """

    law: str
    sigma: float  # standard deviation of the law
    recipe: str
    nmse: float
    relative_error: float  # estimate for nmse, as a share of it
    gain: float  # E x q / E x^2
    cosine: float
    max_nmse: float  # the part of nmse from each block's largest element,
    other_nmse: float  # from the others,
    zero_nmse: float  # and from blocks whose scale is zero; the three add up to nmse
    # Of each of the element format's magnitudes, signs folded, and of each scale code [256]; the
    # second is empty for float32 scales.
    code_probabilities: np.ndarray = field(repr=False)
    scale_probabilities: np.ndarray = field(repr=False)
    scale_shares: dict[str, float]  # zero, subnormal, normal, saturated, nan: share of blocks

    @property
    def qsnr_db(self) -> float:
        """-10 log10 of the NMSE, in dB."""
        return -10 * math.log10(self.nmse) + 0.0 if self.nmse else math.inf  # no -0

    def to_frame(self) -> pd.DataFrame:
        """One row: the numbers, and the scale classes as scale_zero_share and so on."""
        names = ("law", "sigma", "recipe", "nmse", "qsnr_db", "relative_error", "gain", "cosine")
        names += ("max_nmse", "other_nmse", "zero_nmse")
        row = {name: getattr(self, name) for name in names}
        shares = {f"scale_{name}_share": share for name, share in self.scale_shares.items()}
        return pd.DataFrame([row | shares])


def expected_error(
    distribution: object,
    recipe: str | Recipe = "nvfp4",
    sigma: float | None = None,
    elements: int | None = None,
    *,
    outer: float | None = None,
) -> Expectation:
    """The expected error of a recipe on iid elements of a symmetric law, in real arithmetic.

    distribution: "gauss", "laplace", "uniform", ("t", degrees of freedom above 2), or a frozen
    continuous scipy distribution that is symmetric about 0. sigma: its standard deviation; left
    out, 1 for a named law and a frozen distribution's own. elements: how many share one outer
    scale, the tensor's or, where the recipe has one for each token, the token's; needed there, and
    without effect on recipes without one. outer: a calibrated decode scale instead.

    Left out are float32 rounding inside the recipe's formulas, the input's dtype, NaN and Inf.
    `relative_error` is about 1e-13, with an outer scale below 1e-6; it says where it is not. A
    point takes well under a second, 4/6 under an outer scale tens of seconds.

    Raises: NoTheory, a ValueError, for a recipe without a theory (a search other than 4/6 by
    squared error, directed rounding of elements); ValueError and TypeError for a law or number that
    is none, and for a law that cannot be integrated (an infinite density, or one that does not
    agree with its distribution function).

    >>> round(1e3 * expected_error("gauss", "nvfp4").nmse, 2)
    9.05
    """
    recipe = catalogue.recipe(recipe)
    require_theory(recipe)
    with np.errstate(all="ignore"):  # a density may overflow far out; results are checked
        of_law = law_of(distribution, sigma)
        return integrated(of_law, recipe, elements, check_outer(recipe, elements, outer))


def integrated(of_law: Law, recipe: Recipe, elements: int | None, g: float | None) -> Expectation:
    """The integral at growing resolutions, until two agree.

    Raises: ValueError for a law that cannot be integrated.
    """
    averages = recipe.outer is not None and g is None
    agree = AGREE_WITH_OUTER if averages or recipe.search else AGREE
    found, off, left = None, math.inf, 0.0
    for nodes, nodes_of_outer in RESOLUTIONS:
        blocks = blocks_of(recipe, BlockLaw(of_law, recipe.scale.block, nodes, agree / 1e5))
        if averages:
            assert recipe.outer is not None and elements is not None
            sums, left = averaged(blocks, recipe.outer, elements, nodes_of_outer)
        else:
            sums, left = over_all(blocks, 1.0 if g is None else g)
        if found is not None:
            off = abs(sums.error - found.error)
        found = sums
        if off <= agree * sums.error:
            break
    assert found is not None
    missing = abs(found.probability - 1)
    if not missing < PROBABILITY_MISSING or not math.isfinite(found.error + found.lost_energy):
        raise ValueError(
            f"{of_law.name} cannot be integrated: the probabilities of its blocks add up to "
            f"{found.probability:.6g}, their error is {found.error:.6g}. Its density has to be "
            "finite and to agree with its distribution function"
        )
    relative = (off + left) / found.error if found.error else 0.0
    found.energy = recipe.scale.block * of_law.second_moment - found.lost_energy  # tails and all
    sigma = math.sqrt(of_law.second_moment)
    return expectation(found, recipe, of_law.name, sigma, relative + missing + ROUNDOFF)


def require_theory(recipe: Recipe) -> None:
    """Raises NoTheory for a recipe that the theory cannot follow."""
    search, elements = recipe.search, recipe.elements
    why = None
    if search is not None and (search.factors is None or len(search.factors) != 2):
        why = "it searches over more than two scales"
    elif search is not None and search.criterion != "mse":
        why = f"it chooses between scales by {search.criterion}, not by squared error"
    elif search is not None and (elements.rounding == "stochastic" or recipe.scale.format is None):
        why = "it searches, with stochastic rounding or with scales that are not encoded"
    elif search is not None and not _decodes_as_it_searches(recipe):
        why = "it searches with amax / n in place of the outer scale that decodes"
    elif elements.rounding in ("up", "down"):
        why = f"elements are rounded {elements.rounding}, which depends on their sign"
    elif elements.scale_read == "unrounded":
        why = "elements are divided by the scale before it was rounded"
    elif recipe.scale.rounding == "stochastic":
        why = "scales are rounded stochastically"
    if why:
        raise NoTheory(f"there is no theory for {recipe.name}: {why}")


def _decodes_as_it_searches(recipe: Recipe) -> bool:
    search, outer = recipe.search, recipe.outer
    if search is None or outer is None or search.decoding == "v * s * g":
        return True
    return outer.rounding == "none" and outer.divides == "scale"


def check_outer(recipe: Recipe, elements: int | None, outer: float | None) -> float | None:
    """The calibrated outer scale, or None.

    Raises: ValueError for one that is no scale or that the recipe has no use for, and for a number
    of elements that is missing or no multiple of the block.
    """
    if outer is not None:
        if recipe.outer is None:
            raise ValueError(f"an outer scale was given, but {recipe.name} has none")
        if isinstance(outer, str) or not 0 < float(outer) < math.inf:
            raise ValueError(f"outer is a positive finite decode scale, got {outer!r}")
        return float(outer)
    if recipe.outer is None:
        return None
    block, per = recipe.scale.block, recipe.outer.per
    if elements is None:
        raise ValueError(
            f"{recipe.name} has an outer scale for each {per}: say how many elements a {per} has"
        )
    integer = isinstance(elements, (int, np.integer)) and not isinstance(elements, bool)
    if not integer or elements < block:
        raise ValueError(f"elements is an integer of at least {block}, got {elements!r}")
    if elements % block:
        raise ValueError(f"elements is a multiple of the block of {block}, got {elements}")
    return None


def blocks_of(recipe: Recipe, of: BlockLaw) -> Blocks:
    """The kind of blocks that a recipe makes."""
    return Plain.under(recipe, of) if recipe.search is None else FourOverSix.under(recipe, of)


def over_all(blocks: Blocks, g: float) -> tuple[Sums, float]:
    """A block's sums under one outer scale, over all largest magnitudes, and how far off the part
    of its error may be that was extrapolated beyond the last panel."""
    of = blocks.of
    top = float(of.knots_of_max[-1])
    total = blocks.between(of.lowest, top, g)
    if of.law.energy_beyond(np.array([top]))[0] <= NEGLIGIBLE * of.law.second_moment:
        return total, 0.0
    octaves = [blocks.between(top / 2**k, top / 2 ** (k - 1), g) for k in (3, 2, 1)]
    tail, off = power_tail(octaves)
    total.add(tail)
    return total, off


def scale_shares(of_code: np.ndarray, recipe: Recipe) -> dict[str, float]:
    """The share of blocks whose scale is zero, subnormal, normal, saturated, NaN."""
    fmt = recipe.scale.format
    if fmt is None:
        normal = float(of_code[UNENCODED])
        return {"zero": 0.0, "subnormal": 0.0, "normal": normal, "saturated": 0.0, "nan": 0.0}
    return {name: float(share) for name, share in fmt.by_class(of_code).items()}


def expectation(
    sums: Sums, recipe: Recipe, law: str, sigma: float, relative_error: float
) -> Expectation:
    """Sums over a block as what to expect of its elements."""
    counted = sums.codes.sum()
    energy = sums.energy if counted > ROUNDOFF else math.nan  # all blocks have a NaN scale
    off = sums.product / energy
    decoded = 1 + 2 * off + sums.error / energy  # E q^2 / E x^2
    numbers = {
        "sigma": sigma,
        "nmse": sums.error / energy,
        "relative_error": relative_error,
        "gain": 1 + off,
        "cosine": (1 + off) / math.sqrt(decoded) if decoded > 0 else 0.0,
        "max_nmse": sums.max_error / energy,
        "other_nmse": sums.other_error / energy,
        "zero_nmse": sums.zero_error / energy,
    }
    return Expectation(
        law=law,
        recipe=recipe.name,
        **{name: float(number) for name, number in numbers.items()},
        code_probabilities=sums.codes / counted if counted else sums.codes,
        scale_probabilities=sums.scales if recipe.scale.format else np.zeros(0),
        scale_shares=scale_shares(sums.scales, recipe),
    )
