"""expected_error: published numbers, what must hold of any recipe, small samples, refusals.

An oracle that shares no code is in test_theory_oracle.py; the large sample is
data/benchmarks/theory.json, made by monte_carlo.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import monte_carlo
import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

import nvfp4lab as nv
from nvfp4lab.theory import NoTheory, expectation, expected_error, steps
from nvfp4lab.theory.laws import law

NVFP4 = nv.recipe("nvfp4")


def in_blocks_of(block: int, recipe: str | nv.Recipe = NVFP4) -> nv.Recipe:
    r = nv.recipe(recipe)
    return r.changed({"scale.block": block})


def nmse(distribution, recipe, sigma=None, elements=None) -> float:
    return expected_error(distribution, recipe, sigma, elements).nmse


# Published numbers: notebooks/README.md has them with their sources.


@pytest.mark.parametrize(
    ("recipe", "published"),
    [
        ("nvfp4", 9.0),
        ("nvfp4-stochastic", 23.5),
        (in_blocks_of(256), 12.4),  # 16 x 16
        (nv.recipe("fouroversix").changed({"outer": None}), 7.6),
    ],
)
def test_quartet_ii_table_of_nmse_in_thousandths(recipe, published):
    assert round(1e3 * nmse("gauss", recipe), 1) == published


@pytest.mark.parametrize(
    ("recipe", "published"),
    [("nvfp4", 3.394), (nv.recipe("fouroversix").changed({"outer": None}), 3.524)],
)
def test_quartet_ii_bits(recipe, published):
    assert round(-0.5 * math.log2(nmse("gauss", recipe)), 3) == published


def test_quartet_optimal_fixed_scale():
    def of_scale(s: float) -> float:
        fixed = {"scale.format": None, "scale.floor": s, "scale.ceiling": s}
        return nmse("gauss", NVFP4.changed(fixed))

    best = optimize.minimize_scalar(of_scale, bracket=(0.3, 0.5, 0.7), tol=1e-10)
    assert best.x == pytest.approx(0.487079, abs=5e-7)
    assert best.fun == pytest.approx(0.012684904, abs=5e-10)


def crossing(recipe: str, from_octave: float) -> float:
    def excess(log_sigma: float) -> float:
        eight, sixteen = (nmse("gauss", in_blocks_of(b, recipe), 2.0**log_sigma) for b in (8, 16))
        return eight - sixteen

    return 2.0 ** float(optimize.brentq(excess, from_octave, from_octave + 3))  # type: ignore[arg-type]


def test_block_8_becomes_worse_than_16_below_a_sigma_of_two_hundredths():
    assert crossing("nvfp4", -7.0) == pytest.approx(0.01939, abs=1e-5)


def test_ue5m3_scales_move_that_by_eight_octaves():
    assert crossing("nvfp4", -7.0) / crossing("nvfp4-ue5m3", -15.0) == pytest.approx(256, rel=1e-6)


def test_a_power_of_two_scale_makes_qsnr_periodic_in_octaves_of_sigma():
    of_phase = [nmse("gauss", "mxfp4-floor", 2.0**p) for p in (0.0, 0.5, 1.0)]
    assert of_phase[0] == pytest.approx(of_phase[2], rel=1e-13)
    assert abs(of_phase[1] / of_phase[0] - 1) > 0.01


def w_norm(t: float) -> float:
    return float(2 * (t * stats.norm.pdf(t) + stats.norm.sf(t)))


def int_formula(bits: int, crest: float, rho: float) -> float:
    return 4.78 + 6.02 * bits - 20 * math.log10(rho * crest)


def fp_formula(mantissa: int, bias: int, largest: float, crest: float, of_max: float = 0.0):
    """10 log10 of the formula of "INT v.s. FP"; crest: times rho; of_max: crest^2 / block."""
    t = crest / largest * 2.0 ** (1 - bias)
    normal = (w_norm(t) - of_max) / (24 * 4**mantissa)
    below = 2.0 ** (2 * (1 - bias - mantissa)) / (12 * largest**2)
    return -10 * math.log10(normal + below * crest**2 * (2 * stats.norm.cdf(t) - 1))


@pytest.mark.parametrize(
    ("bits", "mantissa", "bias", "largest", "published"),
    [(8, 3, 7, 448.0, 7.55), (4, 1, 1, 6.0, 2.04)],
)
def test_crest_factor_crossovers_of_mx_formats_by_their_formula(
    bits, mantissa, bias, largest, published
):
    def gap(crest: float) -> float:
        return int_formula(bits, crest, 1.5) - fp_formula(mantissa, bias, largest, 1.5 * crest)

    assert optimize.brentq(gap, 1.5, 20) == pytest.approx(published, abs=0.006)


def test_the_nvint4_crossover_of_their_formula_is_not_the_published_one():
    def gap(crest: float) -> float:
        own = int_formula(4, crest, 1.0) + 10 * math.log10(16 / 15)
        return own - fp_formula(1, 1, 6.0, crest, crest**2 / 16)

    assert optimize.brentq(gap, 1.5, 3.9) == pytest.approx(2.464, abs=1e-3)  # published: 2.39


def mean_crest(distribution, block: int) -> float:
    of = law(distribution)
    tail = integrate.quad(lambda a: 1 - of.largest_cdf(np.array(a), block), 0, 60, limit=400)[0]
    return tail / math.sqrt(of.second_moment)


def test_no_single_crest_factor_parts_nvint4_from_nvfp4():
    """By the tail of the law it is 2.225, by the length of the block 2.53."""

    def by_tail(shape: float) -> float:
        of = stats.gennorm(shape)
        return nmse(of, "nvint4", 1.0) - nmse(of, "nvfp4", 1.0)

    shape = optimize.brentq(by_tail, 1.2, 1.6, xtol=1e-6)
    assert mean_crest(stats.gennorm(shape), 16) == pytest.approx(2.225, abs=1e-3)
    better = [
        nmse("gauss", in_blocks_of(b, "nvint4")) < nmse("gauss", in_blocks_of(b)) for b in (48, 56)
    ]
    assert better == [True, False]
    assert mean_crest("gauss", 48) == pytest.approx(2.495, abs=1e-3)
    assert mean_crest("gauss", 56) == pytest.approx(2.550, abs=1e-3)


# What must hold of any recipe.


@pytest.mark.parametrize("distribution", ["gauss", "laplace", "uniform", ("t", 5)])
@pytest.mark.parametrize("sigma", [1.0, 2.0**-9])
@pytest.mark.parametrize("recipe", [r for r in nv.recipes() if nv.recipe(r).search is None])
def test_parts_add_up(distribution, sigma, recipe):
    got = expected_error(distribution, recipe, sigma, 2048)
    assert got.max_nmse + got.other_nmse + got.zero_nmse == pytest.approx(got.nmse, rel=1e-13)
    assert sum(got.scale_shares.values()) == pytest.approx(1, rel=1e-12)
    if got.scale_shares["nan"] < 1:
        assert got.code_probabilities.sum() == pytest.approx(1, rel=1e-12)
    if len(got.scale_probabilities):
        assert got.scale_probabilities.sum() == pytest.approx(1, rel=1e-12)
    assert got.relative_error < (1e-9 if nv.recipe(recipe).outer is None else 1e-6)


def test_recipes_without_a_theory_are_these():
    refused = set()
    for name in nv.recipes():
        try:
            expectation.require_theory(nv.recipe(name))
        except NoTheory:
            refused.add(name)
    assert refused == {"nvfp4-search", "fouroversix-mae", "fouroversix-max"}


def test_four_over_six_is_better_than_either_of_its_scales():
    r = nv.recipe("fouroversix").changed({"outer": None})
    both = expected_error("gauss", r)
    plain = r.changed({"search": None})
    six, four = (nmse("gauss", plain.changed({"scale.factor": f})) for f in (1.0, 1.5))
    assert both.nmse < min(six, four)
    assert both.code_probabilities.sum() == pytest.approx(1, rel=1e-10)
    assert both.relative_error < 1e-6


def test_two_equal_candidates_are_one():
    r = NVFP4.changed({"search": nv.rules.Search(factors=(1.0, 1.0))})
    assert nmse("gauss", r) == pytest.approx(nmse("gauss", "nvfp4"), rel=1e-9)


@pytest.mark.parametrize("recipe", ["nvfp4-tensor", "nvfp4-exact-scale", "vllm-reference"])
def test_scales_that_follow_the_data_do_not_see_sigma(recipe):
    want = expected_error("gauss", recipe, 1.0, 4096).nmse
    assert nmse("gauss", recipe, 0.37, 4096) == pytest.approx(want, rel=1e-12)


def test_one_block_under_its_own_outer_scale_is_an_exact_scale():
    """s is 448 and s g is amax / 6, so E4M3 rounds nothing."""
    assert nmse("gauss", "nvfp4-tensor", elements=16) == pytest.approx(
        nmse("gauss", "nvfp4-exact-scale"), rel=1e-10
    )


def test_a_calibrated_outer_scale_is_a_change_of_sigma():
    got = expected_error("gauss", "nvfp4-tensor", outer=2.0**-9 * 1.1).nmse
    assert got == pytest.approx(nmse("gauss", "nvfp4", 2.0**9 / 1.1), rel=1e-11)


def test_stochastic_rounding_has_gain_one():
    assert expected_error("laplace", "nvfp4-stochastic").gain == pytest.approx(1, abs=1e-14)


def test_seed_writes_nan_scales_where_all_are_small():
    got = expected_error("gauss", "seed", 2.0**-9)
    assert got.scale_shares["nan"] > 0.05 and got.nmse == pytest.approx(1)


def test_where_every_scale_is_nan_there_is_no_error_to_expect():
    r = NVFP4.changed({"scale.overflow": "nan"})
    got = expected_error("gauss", r, 1e9)
    assert got.scale_shares["nan"] == pytest.approx(1)
    assert math.isnan(got.nmse) and math.isnan(got.qsnr_db) and math.isnan(got.gain)


def test_zero_scales_lose_everything():
    got = expected_error("gauss", "nvfp4", 2.0**-20)
    assert (got.nmse, got.gain) == (pytest.approx(1), pytest.approx(0, abs=1e-12))
    assert got.scale_shares["zero"] == pytest.approx(1)


@pytest.mark.parametrize(
    "distribution", ["gauss", ("t", 2.05), stats.logistic(), stats.gennorm(0.5), stats.cosine()]
)
def test_the_error_estimate_is_one(distribution, monkeypatch):
    """The same at twice the resolution."""
    got = expected_error(distribution, "nvfp4")
    monkeypatch.setattr(expectation, "RESOLUTIONS", ((24, 8), (32, 10)))
    fine = expected_error(distribution, "nvfp4")
    assert abs(got.nmse / fine.nmse - 1) <= 3 * max(got.relative_error, fine.relative_error)


def test_the_tail_beyond_the_last_panel_counts_for_the_gain_too():
    """0.336121 is that of theory_oracles.plain; without the tail it was 0.337466."""
    assert expected_error(stats.t(2.05), "nvfp4").gain == pytest.approx(0.336121, abs=1e-6)


def test_a_density_that_is_infinite_at_its_end_says_how_far_it_is_off():
    got = expected_error(stats.arcsine(loc=-0.5), "nvfp4")
    assert got.nmse == pytest.approx(0.010102, abs=3e-6)  # a sample of 2**22
    assert 1e-9 < got.relative_error < 1e-6


def test_frozen_distributions_keep_their_own_sigma():
    own = expected_error(stats.norm(scale=2.0**-8), "nvfp4")
    assert own.nmse == pytest.approx(nmse("gauss", "nvfp4", 2.0**-8), rel=1e-11)
    assert own.sigma == 2.0**-8
    given = expected_error(stats.norm(scale=2.0**-8), "nvfp4", 1.0)
    assert given.nmse == pytest.approx(nmse("gauss", "nvfp4"), rel=1e-11)


# Steps of the scale and cells of the elements, against the package's own codec.


@pytest.mark.parametrize("recipe", [r for r in nv.recipes() if r != "nvfp4-exact-scale"])
def test_steps_are_the_codecs(recipe):
    """Of blocks with one magnitude, at random between 2**-24 and 2**14."""
    r = nv.recipe(recipe)
    if r.search is not None or r.outer is not None:
        r = r.changed({"search": None, "outer": None})
    amax = 2.0 ** (38 * torch.rand(4000, generator=torch.Generator().manual_seed(1)) - 24)
    x = torch.zeros(4000, r.scale.block)
    x[:, 0] = amax
    q = nv.quantize(x, r)
    found = steps.scale_steps(r, 1.0, 2.0**-25, 2.0**15)
    lows = np.array([s.low for s in found])
    own = [found[i] for i in np.searchsorted(lows, amax.double().numpy(), side="right") - 1]
    assert [s.code for s in own] == q.scales[:, 0].tolist()
    want = q.decoded_scales()[:, 0].double()
    assert np.array_equal(np.array([s.scale for s in own]), want.numpy(), equal_nan=True)


# Small samples.

SAMPLED = (
    ("gauss", 1.0, 16, "E4M3", "none", "E2M1", "ties-to-even"),
    ("laplace", 2.0**-8, 8, "E4M3", "none", "E2M1", "ties-to-even"),
    ("gauss", 600.0, 16, "E4M3", "none", "INT4", "stochastic"),
    ("uniform", 1.0, 32, "E8M0 floor", "none", "E4M3", "ties-to-even"),
    (("t", 5.0), 1.0, 64, "UE5M3", "power of two", "INT8", "stochastic"),
    ("laplace", 1.0, 16, "exact", "tensor", "E2M1", "stochastic"),
    ("gauss", 1.0, 16, "E4M3", "tensor", "E2M1", "ties-to-even"),
    ("gauss", 1.0, 8, "E8M0 even", "power of two", "INT4", "ties-to-even"),
)


@pytest.mark.parametrize("arguments", SAMPLED, ids=str)
def test_a_sample_of_2_to_the_20_agrees(arguments):
    of = monte_carlo.case(*arguments)
    generator = torch.Generator().manual_seed(20)
    unit = monte_carlo.drawn(of.law, 1 << 20, generator)
    z = monte_carlo.deviations(of, of.expected(), unit, generator)
    assert len(z) >= 3
    assert {name: value for name, value in z.items() if abs(value) > 4} == {}


@pytest.mark.parametrize("outer", ["none", "power of two"])
def test_a_sample_of_four_over_six_agrees(outer):
    of = monte_carlo.case("laplace", 1.0, 16, "E4M3", outer, "E2M1", "ties-to-even")
    of = replace(of, recipe=replace(of.recipe, search=nv.rules.Search(factors=(1.0, 1.5))))
    generator = torch.Generator().manual_seed(46)
    unit = monte_carlo.drawn(of.law, 1 << 20, generator)
    z = monte_carlo.deviations(of, of.expected(), unit, generator)
    assert {name: value for name, value in z.items() if abs(value) > 4} == {}


def test_a_sample_would_show_an_nmse_that_is_two_percent_off():
    of = monte_carlo.case("gauss", 1.0, 16, "E4M3", "none", "E2M1", "ties-to-even")
    generator = torch.Generator().manual_seed(20)
    unit = monte_carlo.drawn(of.law, 1 << 20, generator)
    off = replace(of.expected(), nmse=1.02 * of.expected().nmse)
    assert abs(monte_carlo.deviations(of, off, unit, generator)["nmse"]) > 10


@pytest.fixture(scope="module")
def large_sample() -> dict[str, dict]:
    """The rows of data/benchmarks/theory.json by case."""
    path = Path(__file__).parent.parent / "data" / "benchmarks" / "theory.json"
    return {row["case"]: row for row in json.loads(path.read_text(encoding="utf-8"))["cases"]}


def test_the_large_sample_has_every_supported_combination(large_sample):
    assert large_sample.keys() == {of.name for of in monte_carlo.cases()}
    assert {row["elements"] for row in large_sample.values()} == {1 << 26}


def test_every_nmse_of_the_large_sample_is_within_four_standard_errors(large_sample):
    assert {
        n: row["z_of_nmse"] for n, row in large_sample.items() if abs(row["z_of_nmse"]) > 4
    } == {}


def test_the_large_sample_scatters_as_chance_does(large_sample):
    """Were the theory off, or the standard errors too wide, so would be the spread. Cases share
    their samples, so it is not quite one."""
    z = np.array([row["z_of_nmse"] for row in large_sample.values()])
    assert abs(z.std() - 1) < 0.1 and abs(z.mean()) < 0.2


def test_the_large_sample_is_of_this_theory(large_sample):
    plain = [of for of in monte_carlo.cases() if not (of.recipe.search or of.recipe.outer)]
    for of in plain[::16]:
        assert of.expected().nmse == pytest.approx(large_sample[of.name]["nmse"], rel=1e-9)


# Refusals.


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ("nvfp4-search", "no theory for nvfp4-search: it searches over more than two scales"),
        ("fouroversix-mae", "chooses between scales by mae"),
        ("fouroversix-max", "chooses between scales by max"),
        (NVFP4.changed({"elements.rounding": "up"}), "depends on their sign"),
        (
            NVFP4.changed({"elements.scale_read": "unrounded"}),
            "before it was rounded",
        ),
        (NVFP4.changed({"scale.rounding": "stochastic"}), "stochastically"),
    ],
)
def test_a_recipe_without_a_theory_says_why(recipe, said):
    with pytest.raises(NoTheory, match=said):
        expected_error("gauss", recipe, elements=4096)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (("normal",), ValueError, "unknown law 'normal'; expected one of gauss, laplace, uniform"),
        ((("t", 2),), ValueError, "more than 2 degrees of freedom, got 2"),
        ((("t", "5"),), ValueError, "more than 2 degrees of freedom"),
        ((stats.t(1.5),), ValueError, "finite variance"),
        ((stats.norm(loc=1),), ValueError, "symmetric about 0; norm has median 1"),
        ((stats.expon(),), ValueError, "symmetric about 0"),
        ((stats.poisson(3),), ValueError, "continuous distribution, poisson"),
        ((3,), TypeError, "a law is one of"),
        ((stats.norm(0, [1, 2]),), ValueError, "expected one distribution, got norm of shape"),
        ((stats.tukeylambda(-0.3),), ValueError, "tukeylambda cannot be integrated"),
        ((stats.beta(0.3, 0.3, loc=-0.5),), ValueError, "beta cannot be integrated"),
        (("gauss", "nvfp4", 0.0), ValueError, "sigma is a standard deviation from"),
        (("gauss", "nvfp4", math.inf), ValueError, "sigma is a standard deviation from"),
        (("gauss", "nvfp4", True), ValueError, "as float32 has them, got True"),
        (("gauss", "nvfp4", 1e-200), ValueError, "as float32 has them, got 1e-200"),
        (("gauss", "nvfp4-token"), ValueError, "an outer scale for each token: say how many"),
        (("gauss", "nvfp4-tensor", 1.0, 100), ValueError, "multiple of the block of 16, got 100"),
        (("gauss", "nvfp4-tensor", 1.0, 8), ValueError, "at least 16, got 8"),
        (("gauss", "nvfp44"), ValueError, "unknown recipe 'nvfp44'"),
    ],
)
def test_bad_arguments_say_what_was_expected(arguments, error, said):
    with pytest.raises(error, match=said.replace("(", r"\(")):
        expected_error(*arguments)


@pytest.mark.parametrize(
    ("recipe", "outer", "said"),
    [
        ("nvfp4", 1.0, "nvfp4 has none"),
        ("nvfp4-tensor", -1.0, "positive finite decode scale"),
        ("nvfp4-tensor", "1", "positive finite decode scale, got '1'"),
    ],
)
def test_a_calibrated_outer_scale_is_checked(recipe, outer, said):
    with pytest.raises(ValueError, match=said):
        expected_error("gauss", recipe, outer=outer)
