"""Recipes that no CPU can hold against their peer: worked by hand from the peers' sources.

Each example is a tensor of a few blocks whose outer scale, scales and codes were worked out on
paper; where a number is not plain, the line says how it comes about. The peers that do install are
compared by `make conformance`; the last tests hold its table to be complete. May be changed: more
examples. May not: expectations taken from what `quantize` gives.
"""

import json
from pathlib import Path

import pytest
import torch

import nvfp4lab as nv

NAN, INF = float("nan"), float("inf")
DATA = Path(__file__).parents[1] / "data"
CONFORMANCE = json.loads((DATA / "conformance.json").read_text(encoding="utf-8"))
BY_SOURCE = json.loads((DATA / "by_source.json").read_text(encoding="utf-8"))
# The largest is 6, so the scale is 1: midpoints, both zeros, a negative that rounds to zero.
PLAIN = [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.1, -0.0, 0.1, -5.0]
HALF_EVEN = [7, 0, 2, 2, 4, 4, 6, 6]
HALF_TO_ZERO = [7, 0, 1, 2, 3, 4, 5, 6]
LARGEST = [2688.0]  # makes an outer scale 2688 / 2688 = 1; its own scale is 448, byte 0x7E


def blocks(*rows, block=16):
    """Rows of blocks, each block filled up with zeros."""
    return torch.tensor(
        [[v for values in row for v in [*values, *[0.0] * (block - len(values))]] for row in rows]
    )


def check(recipe, x, scales, codes):
    """scales: a byte a block; codes: the first codes of each block, row-major."""
    q = nv.quantize(x, recipe)
    size = q.recipe.scale.block
    got = q.element_codes().view(-1, size).tolist()
    assert [hex(s) for s in q.scales.flatten().tolist()] == [hex(s) for s in scales]
    assert [row[: len(want)] for row, want in zip(got, codes, strict=True)] == codes
    return q


def test_vllm_muse():
    check(
        "vllm-muse",
        blocks([PLAIN, [], [INF, -INF, 448.0], [6.0, NAN]]),
        [0x38, 0x01, 0x7E, 0x38],  # a zero block has the floor of 2**-9
        [[*HALF_EVEN, 0, 0, 0, 0, 14], [0, 0], [7, 15, 2], [7, 0]],
    )


def test_vllm_megamoe():
    q = check(
        "vllm-megamoe",
        blocks([LARGEST, PLAIN], [[], []], [[INF], [1.0]], [LARGEST, [6.0, NAN]]),
        [0x7E, 0x38, 0x01, 0x01, 0x01, 0x01, 0x7E, 0x38],
        [[7], [*HALF_EVEN, 0, 0, 0, 0, 14], [0], [0], [0], [0], [7], [7, 0]],
    )
    # float32(1/2688) is 0x1.861862p-12, below 1/2688; times 2688 it rounds back to 1.
    one_third_of_1e12 = (torch.tensor(1e-12) * torch.tensor(1 / 2688)).item()
    assert q.outer is not None
    assert q.outer.flatten().tolist() == [1.0, one_third_of_1e12, INF, 1.0]


def test_sgl_megamoe():
    q = check(
        "sgl-megamoe",
        blocks([LARGEST, PLAIN], [[], []], [LARGEST, [2.9 * 2.0**-9]]),
        [0x7E, 0x38, 0x00, 0x00, 0x7E, 0x00],  # 2.9 * 2**-9 / 6 is below half of 2**-9: no floor
        [[7], [*HALF_EVEN, 0, 0, 0, 0, 14], [0], [0], [7], [0]],
    )
    assert q.outer is not None
    assert q.outer[1].item() == (torch.tensor(1e-4) / torch.tensor(2688.0)).item()


def test_transformer_engine():
    check(
        "transformer-engine",
        blocks([LARGEST, PLAIN, [1e-5, -1e-5], []]),
        [0x7E, 0x38, 0x00, 0x00],
        # A scale that underflows to 0 has the reciprocal FLOAT32_MAX, which saturates every code.
        [[7], [*HALF_EVEN, 8, 8, 0, 0, 14], [7, 15, 0], [0]],
    )


def test_transformer_engine_nan_is_code_0_and_takes_the_tensor():
    check("transformer-engine", blocks([[6.0], [NAN]]), [0x7F, 0x7F], [[0], [0]])


def test_vllm_reference():
    check(
        "vllm-reference",
        blocks([LARGEST, PLAIN, [1e-5], []]),
        [0x7E, 0x38, 0x00, 0x00],
        [[7], [*HALF_EVEN, 8, 8, 0, 0, 14], [0], [0]],
    )


def test_vllm_reference_keeps_codes_under_a_zero_scale():
    # G = 2688 / 1e30; 1e20 * G / 6 is 4.5e-8, so its scale is 0; 1e20 * 1e-8 saturates.
    check("vllm-reference", blocks([[1e30], [1e20, -1e20, 1e3]]), [0x7E, 0x00], [[7], [7, 15, 0]])


def test_cublas_multiplies_by_the_rounded_reciprocal():
    # s = 15/8: float32(1/s) is above 8/15, so the ties 1.25 * s and 2.5 * s land above the tie.
    x = blocks([[6 * 1.875, 1.25 * 1.875, 2.5 * 1.875, 0.25 * 1.875]])
    check("cublas", x, [0x3F], [[7, 3, 5, 0]])
    check("nvfp4", x, [0x3F], [[7, 2, 4, 0]])


def test_mxfp8_of_deepseek_v4():
    check(
        "mxfp8-deepseek-v4",
        blocks([[448.0, 1.0, -1.0], [450.0], []], block=32),
        [127, 128, 105],  # 1e-4 / 448 is 2.23e-7, rounded up to 2**-22
        [[0x7E, 0x38, 0xB8], [0x76], [0]],  # 450 / 2 = 225, to 224
    )


def test_fp_quant():
    check(
        "fp-quant",
        blocks([LARGEST, PLAIN]),
        [0x7E, 0x38],
        [[7], [*HALF_TO_ZERO, 8, 8, 8, 0, 14]],
    )


def test_mxfp4_scales():
    x = blocks(*[[[amax]] for amax in (6.0, 6.5, 7.0, 8.0, 0.0)], block=32)
    check("mxfp4-floor", x, [127, 127, 127, 128, 0], [[7], [7], [7], [6], [0]])
    check("mxfp4-ceil", x, [127, 128, 128, 128, 0], [[7], [5], [6], [6], [0]])
    check("mxfp4-even", x, [127, 127, 128, 128, 0], [[7], [7], [6], [6], [0]])


def test_nvint4():
    x = blocks([[7.0, 0.5, 1.5, -2.5, -7.0, -0.0, -0.4]])
    check("nvint4", x, [0x38], [[7, 0, 2, 14, 9, 0, 0]])


def test_ue5m3_reaches_eight_binades_lower():
    x = blocks([[6 * 2.0**-17], [6 * 2.0**-14], [6.0], [6e5]])
    check("nvfp4-ue5m3", x, [0x01, 0x08, 0x78, 0xFC], [[7], [7], [7], [7]])


def test_stochastic_rounding_saturates_nothing_and_is_unbiased():
    x = torch.randn(64, 4096, generator=torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(6)
    draws = [nv.quantize(x, "nvfp4-stochastic", generator=generator) for _ in range(64)]
    decoded = torch.stack([q.dequantize() for q in draws])
    amax = x.unflatten(-1, (-1, 16)).abs().amax(-1)
    assert (amax <= 6 * draws[0].decoded_scales()).all()
    bias, variance = (decoded.mean(0) - x).sum(), decoded.double().var(0).sum() / len(draws)
    assert abs(bias) < 5 * variance.sqrt() and variance > 0


def with_e4m3_scales_alone(name):
    r = nv.recipe(name)
    formats = (r.scale.format, r.elements.format)
    return formats == (nv.formats.E4M3, nv.formats.E2M1) and r.outer is None and r.search is None


@pytest.mark.parametrize("recipe", [*filter(with_e4m3_scales_alone, nv.recipes())])
def test_no_recipe_with_e4m3_scales_beats_the_search(recipe):
    """Where scales are E4M3 bytes alone, the search over all of them is a lower bound."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(7)).bfloat16()

    def error(name):
        return (nv.quantize(x, name).dequantize().double() - x).square().view(-1, 16).sum(-1)

    assert (error("nvfp4-search") <= error(recipe)).all()


def test_four_over_six_takes_the_larger_scale_just_where_that_is_better():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(8))
    for name, size in (
        ("fouroversix", lambda e: e.square().sum(-1)),
        ("fouroversix-mae", lambda e: e.abs().sum(-1)),
        ("fouroversix-max", lambda e: e.abs().amax(-1)),
    ):
        recipe = nv.recipe(name)
        tried = [
            nv.quantize(x, recipe.changed({"search": nv.rules.Search((factor,))}))
            for factor in (1.0, 1.5)
        ]
        six, four = (size((q.dequantize() - x).view(-1, 16)) for q in tried)
        kept = size((nv.quantize(x, name).dequantize() - x).view(-1, 16))
        assert torch.allclose(kept, torch.minimum(six, four), rtol=1e-5)
        assert 0.2 < (four < six).float().mean() < 0.8


def test_every_rule_that_is_not_ours_is_in_the_table_of_conformance():
    ours = ("This package", "arXiv", "nvfp4lab/kernels")  # a paper has no bytes to compare with
    of_others = {n for n in nv.recipes() if not any(own in nv.recipe(n).source for own in ours)}
    assert of_others == set(CONFORMANCE["recipes"])


def test_what_differs_from_an_installed_peer_has_a_reason():
    for recipe, entry in CONFORMANCE["recipes"].items():
        for case, dtypes in entry.get("cases", {}).items():
            for dtype, counts in dtypes.items():
                differs = counts["codes"] + counts["scales"] + counts["outer"]
                assert not differs or counts["why"], (recipe, case, dtype)


def test_the_peers_own_tests_pass_with_our_recipe_in_their_place():
    outcomes = {n: e["own tests"] for n, e in CONFORMANCE["recipes"].items() if "own tests" in e}
    assert set(outcomes) == {"compressed-tensors", "fouroversix", "llama.cpp"}
    bound = outcomes.pop("llama.cpp")
    assert bound["total_error"] < bound["below"]
    for outcome in outcomes.values():
        assert outcome["passed"] and "failed" not in outcome


def test_the_files_of_peers_that_do_not_install_agree():
    rows = [
        (recipe, case, row)
        for device in BY_SOURCE.values()
        for recipe, cases in device["recipes"].items()
        for case, row in cases.items()
    ]
    by_source = {n for n in nv.recipes() if "by source only" in nv.recipe(n).source}
    assert {recipe for recipe, _, _ in rows} == by_source - {"cublas", "sgl-megamoe"}
    for recipe, case, row in rows:
        differs = sum(row[part] for part in ("codes", "scales", "outer") if part in row)
        if recipe == "fp-quant":  # its compiled divisions are approximate and move ties
            assert row["scales"] == 0 and row["codes"] <= 1e-3 * 16 * row["blocks"], case
        else:
            assert not differs, (recipe, case, row)


def test_recipes_by_source_only_are_worked_by_hand():
    by_source = {n for n in nv.recipes() if "by source only" in nv.recipe(n).source}
    named = {n for n, entry in CONFORMANCE["recipes"].items() if "tests" in entry}
    assert by_source == named
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{name}"' in text for name in by_source)
