"""The theory against an oracle that shares no code with it, and against elementary results.

May be changed: cases may be added; the tolerances are what issue 5 promises, or better.
"""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import theory_oracles as oracles
from scipy import stats
from theory_oracles import E2M1, E4M3, INT4, UE5M3, Law, Rule

import nvfp4lab as nv
from nvfp4lab.rules import Search

LAWS = {"gauss": "gauss", "laplace": "laplace", "uniform": "uniform", "t5": ("t", 5)}
LAWS["logistic"] = stats.logistic(0, math.sqrt(3) / math.pi)
RULES = {  # recipe: scales, elements, whether these are drawn
    "nvfp4": (Rule.nearest(E4M3, 6), E2M1, False),
    "nvint4": (Rule.nearest(E4M3, 7), INT4, False),
    "nvfp4-ue5m3": (Rule.nearest(UE5M3, 6), E2M1, False),
    "nvfp4-exact-scale": (Rule(), E2M1, False),
    "nvfp4-stochastic": (Rule.nearest(E4M3, Fraction(6 * 16, 17)), E2M1, True),
    "mxfp4-floor": (Rule.power_of_two(Fraction(2), 4), E2M1, False),
    "mxfp4-ceil": (Rule.power_of_two(Fraction(1), 6), E2M1, False),
    "mxfp4-even": (Rule.power_of_two(Fraction(7, 4), 4), E2M1, False),
}
CASES = [
    *((recipe, law, 1.0, None) for recipe in RULES for law in ("gauss", "laplace", "uniform")),
    *((recipe, "t5", 1.0, None) for recipe in ("nvfp4-exact-scale", "mxfp4-even")),
    *((recipe, "logistic", 0.3, None) for recipe in ("nvfp4", "mxfp4-ceil")),
    *((recipe, "gauss", 2.0**-9, None) for recipe in ("nvfp4", "nvint4", "nvfp4-stochastic")),
    *((recipe, "gauss", 700.0, None) for recipe in ("nvfp4", "nvfp4-stochastic", "mxfp4-ceil")),
    *(("nvfp4", "gauss", 1.0, block) for block in (8, 32, 128, 256)),
    *(("nvfp4", "laplace", 2.0**-8, block) for block in (8, 64)),
]


def of_block(recipe, block, **changes):
    recipe = nv.recipe(recipe)
    return replace(
        recipe, scale=replace(recipe.scale, block=block or recipe.scale.block), **changes
    )


@pytest.mark.parametrize(("recipe", "law", "sigma", "block"), CASES)
def test_every_number_is_the_oracles(recipe, law, sigma, block):
    rule, values, drawn = RULES[recipe]
    recipe = of_block(recipe, block)
    want = oracles.plain(Law.named(law, sigma), rule, values, recipe.scale.block, drawn, nodes=12)
    got = nv.expected_error(LAWS[law], recipe, sigma)
    assert got.nmse == pytest.approx(want.nmse, rel=1e-10)
    for name in ("gain", "max_nmse", "other_nmse", "zero_nmse"):
        assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-10, abs=1e-12), name
    np.testing.assert_allclose(got.code_probabilities, want.code_probabilities, atol=1e-12)
    if len(got.scale_probabilities):
        scales = got.scale_probabilities[: len(want.scale_probabilities)]
        np.testing.assert_allclose(scales, want.scale_probabilities, atol=1e-12)


@pytest.mark.parametrize("law", ["gauss", "laplace", "uniform"])
@pytest.mark.parametrize(("block", "blocks"), [(8, 2), (16, 3)])
def test_an_outer_scale_over_a_few_blocks_is_the_oracles(law, block, blocks):
    nmse, gain = oracles.under_one_scale(Law.named(law), E2M1, block, blocks)
    got = nv.expected_error(law, of_block("nvfp4-tensor", block), 1.0, block * blocks)
    assert got.nmse == pytest.approx(nmse, rel=1e-7)
    assert got.gain == pytest.approx(gain, abs=1e-7)


def test_four_over_six_on_small_blocks_is_the_oracles():
    recipe = of_block("nvfp4", 4, search=Search(factors=(1.0, 1.5)))
    got = nv.expected_error("uniform", recipe, 1.0)
    assert got.nmse == pytest.approx(oracles.smaller_of_two_uniform(1.0, 4), rel=1e-6)


@pytest.mark.parametrize("block", [8, 16, 256])
def test_uniform_elements_under_exact_scales_have_an_elementary_error(block):
    # Given m, x / s is uniform on [0, 6], s = m / 6. On it E (y - Q(y))^2 is, with steps of width h
    # that reach h / 2 to either side, the sum of (h / 2)^3 / 3 over both sides of every step:
    # four of h = 1/2 (0 to 2), two of 1 (2 to 4), one of 2 (4 to 6), and h^3 / 12 for each.
    of_y = (4 * 0.5**3 + 2 * 1**3 + 1 * 2**3) / 12 / 6
    # E m^2 of the largest of B uniform on [0, e] is e^2 B / (B + 2); e^2 = 3 E x^2.
    want = (block - 1) / block * of_y / 36 * 3 * block / (block + 2)
    got = nv.expected_error("uniform", of_block("nvfp4-exact-scale", block))
    assert got.nmse == pytest.approx(want, rel=1e-12)
    assert got.max_nmse == pytest.approx(0, abs=1e-15)


def test_where_every_scale_is_zero_all_is_lost_and_nothing_gained():
    got = nv.expected_error("uniform", "nvfp4", 1e-4)  # sqrt(3) 1e-4 < 6 * 2^-10
    assert (got.nmse, got.gain) == pytest.approx((1, 0), rel=1e-14, abs=1e-14)
    assert got.code_probabilities[0] == pytest.approx(1)


def test_where_every_block_saturates_the_error_is_of_one_fixed_scale():
    # sigma = 2^30, 448 * 6 is nothing beside it: q = 2688 sign(x), e^2 = (|x| - 2688)^2 but for the
    # few |x| below it; E |x| = sigma sqrt(2 / pi).
    sigma, top = 2.0**30, 448 * 6.0
    got = nv.expected_error("gauss", "nvfp4", sigma)
    want = 1 - 2 * top * math.sqrt(2 / math.pi) / sigma + (top / sigma) ** 2
    assert got.nmse == pytest.approx(want, abs=1e-12)
    assert got.scale_shares["saturated"] == pytest.approx(1)


def test_unbiased_rounding_that_never_saturates_has_gain_one():
    got = nv.expected_error("gauss", "nvfp4-stochastic", 1.0)
    assert got.gain == pytest.approx(1, abs=1e-13)
