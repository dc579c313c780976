"""predict: what it says of tensors that are drawn as its model has it, and what it leaves out."""

from __future__ import annotations

import math
from dataclasses import replace

import monte_carlo
import pytest
import torch

import nvfp4lab as nv
from nvfp4lab.theory import NoTheory, expected_error, predict

SMALL = 2.0**-7  # sigma at which E4M3 scales are subnormal


def gaussian(rows: int, sigma: float = 1.0, seed: int = 0) -> torch.Tensor:
    return sigma * torch.randn(rows, 512, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sigma", [1.0, SMALL])
@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token", "nvfp4-tensor", "mxfp4-floor"])
def test_iid_elements_need_one_sigma_only(recipe, sigma):
    got = predict(gaussian(256, sigma), recipe)
    assert got.block_sigmas.nmse == pytest.approx(got.one_sigma.nmse, rel=5e-3)
    assert got.measured.nmse == pytest.approx(got.one_sigma.nmse, rel=2e-2)


@pytest.mark.parametrize("sigma", [1.0, 0.9, SMALL])
def test_one_sigma_is_the_expected_error(sigma):
    x = gaussian(64, sigma)
    rms = x.double().square().mean().sqrt().item()
    got = predict(x, "nvfp4").one_sigma
    want = expected_error("gauss", "nvfp4", rms)
    assert got.nmse == pytest.approx(want.nmse, rel=1e-4)
    assert got.gain == pytest.approx(want.gain, abs=1e-5)
    assert got.code_probabilities == pytest.approx(want.code_probabilities, abs=1e-4)
    assert got.relative_error < 1e-2


@pytest.mark.parametrize("recipe", ["nvfp4-token", "vllm-megamoe", "nvfp4-tensor"])
def test_no_block_goes_beyond_what_its_outer_scale_comes_from(recipe):
    """Rows of four blocks: in each the largest of 64 elements is one of few."""
    x = gaussian(512).view(-1, 64)
    elements = 64 if nv.recipe(recipe).outer.per == "token" else x.numel()  # type: ignore[union-attr]
    got, want = predict(x, recipe), expected_error("gauss", recipe, elements=elements)
    for row in (got.one_sigma, got.block_sigmas):
        assert row.nmse == pytest.approx(want.nmse, rel=5e-3)
        assert row.scale_shares["saturated"] == pytest.approx(
            want.scale_shares["saturated"], abs=3e-3
        )


def test_one_sigma_is_of_that_sigma_whatever_the_tokens_are():
    x = gaussian(64)
    x[1:] *= 1e-3
    rms = x.double().square().mean().sqrt().item()
    got = predict(x, "nvfp4-token").one_sigma
    want = expected_error("gauss", "nvfp4-token", rms, elements=512)
    assert (got.nmse, got.gain) == (want.nmse, want.gain)


def test_where_every_code_is_zero_all_is_lost():
    got = predict(gaussian(64) * 1e-40, "nvfp4-token")
    for row in (got.one_sigma, got.block_sigmas, got.measured):
        assert (row.nmse, row.gain) == pytest.approx((1, 0), abs=1e-10)


def test_blocks_of_two_sigmas_are_the_mixture_of_both():
    x = gaussian(512)
    x[::2] *= SMALL / 4
    x[1::2] *= 4.0
    got = predict(x, "nvfp4")
    low, high = (expected_error("gauss", "nvfp4", s) for s in (SMALL / 4, 4.0))
    energy = (SMALL / 4) ** 2 + 4.0**2
    want = (low.nmse * (SMALL / 4) ** 2 + high.nmse * 4.0**2) / energy
    assert got.block_sigmas.nmse == pytest.approx(want, rel=5e-3)
    zero = (low.scale_shares["zero"] + high.scale_shares["zero"]) / 2
    assert got.block_sigmas.scale_shares["zero"] == pytest.approx(zero, abs=0.02)
    assert got.one_sigma.scale_shares["zero"] == 0


def test_the_shape_of_blocks_is_what_is_left():
    """Blocks of one spike each: no sigma tells that nothing but the largest is there."""
    x = torch.zeros(256, 512)
    x[:, ::16] = gaussian(256)[:, ::16]
    got = predict(x, "nvfp4")
    assert got.measured.nmse < 0.2 * got.block_sigmas.nmse


def test_a_heavy_law_can_be_the_shape():
    df = 3.0
    x = monte_carlo.drawn(("t", df), 1 << 20, torch.Generator().manual_seed(1)).view(2048, 512)
    of_gauss, of_t = (predict(x, "nvfp4-exact-scale", law=law) for law in ("gauss", ("t", df)))
    measured = of_t.measured.nmse
    assert abs(of_t.one_sigma.nmse / measured - 1) < abs(of_gauss.one_sigma.nmse / measured - 1)


def test_blocks_with_nan_or_inf_are_left_out_and_counted():
    x = gaussian(64)
    clean = predict(x, "nvfp4")
    x[0, 0], x[1, 100] = math.nan, math.inf
    got = predict(x, "nvfp4")
    assert (clean.blocks_left_out, got.blocks_left_out) == (0, 2)
    assert got.block_sigmas.nmse == pytest.approx(clean.block_sigmas.nmse, rel=1e-3)


def test_zero_blocks_have_their_scale_and_no_error():
    x = gaussian(64)
    x[:32] = 0
    got = predict(x, "nvfp4")
    assert got.block_sigmas.scale_shares["zero"] == pytest.approx(0.5)
    assert got.block_sigmas.nmse == pytest.approx(expected_error("gauss").nmse, rel=5e-3)


def test_a_calibrated_outer_scale_is_used():
    x = gaussian(64)
    got = predict(x, "nvfp4-tensor", outer=100.0)
    want = expected_error("gauss", "nvfp4-tensor", outer=100.0)
    assert got.one_sigma.nmse == pytest.approx(want.nmse, rel=2e-2)
    assert got.one_sigma.scale_shares["subnormal"] > 0.9


@pytest.mark.parametrize("site", ["layer00.mlp_input", "layer00.down_proj_input"])
def test_real_activations_have_three_rows(site):
    (record,) = (r for r in nv.activations("smollm2") if r.label == site)
    frame = predict(record.hidden, "nvfp4").to_frame()
    assert list(frame["source"]) == ["one sigma", "block sigmas", "measured"]
    assert not frame.isna().any(axis=None)
    parts = frame["max_nmse"] + frame["other_nmse"] + frame["zero_nmse"]
    assert list(parts) == pytest.approx(list(frame["nmse"]), rel=1e-9)
    classes = frame[[c for c in frame.columns if c.startswith("scale_")]].sum(axis=1)
    assert list(classes) == pytest.approx([1, 1, 1])


@pytest.mark.parametrize(
    ("x", "recipe", "error", "said"),
    [
        (torch.zeros(2, 16), "nvfp4", ValueError, "no block with a magnitude: 2 are zero, 0 have"),
        (torch.ones(2, 17), "nvfp4", ValueError, "a multiple of the block of 16"),
        (torch.ones(2, 16), "nvfp4-search", NoTheory, "more than two scales"),
        (torch.ones(2, 16).double(), "nvfp4", TypeError, "float64"),
    ],
)
def test_bad_input_says_what_was_expected(x, recipe, error, said):
    with pytest.raises(error, match=said):
        predict(x, recipe)


def test_a_stochastic_recipe_measures_with_the_generator():
    x, recipe = gaussian(64), nv.recipe("nvfp4-stochastic")
    first, again = (
        predict(x, recipe, generator=torch.Generator().manual_seed(5)).measured.nmse
        for _ in range(2)
    )
    assert first == again
    assert first == pytest.approx(expected_error("gauss", recipe).nmse, rel=3e-2)


def test_four_over_six_under_measured_outer_scales():
    r = nv.recipe("fouroversix")
    got = predict(gaussian(64), r)
    want = expected_error("gauss", replace(r, outer=None))
    assert got.one_sigma.nmse == pytest.approx(want.nmse, rel=2e-2)
    assert got.measured.nmse == pytest.approx(got.one_sigma.nmse, rel=3e-2)
