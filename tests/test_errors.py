"""Error sums against the same sums written out in numpy float64, and what they leave out."""

import math

import numpy as np
import pytest
import torch

import nvfp4lab as nv
from nvfp4lab import errors


def gaussian(*shape: int, seed: int = 0, sigma: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * sigma).bfloat16()


@pytest.mark.parametrize(
    "recipe", [n for n in nv.recipes() if nv.recipe(n).elements.rounding != "stochastic"]
)
def test_measures_equal_their_definitions(recipe):
    x = gaussian(40, 96, seed=1)
    q = nv.quantize(x, recipe)
    a, b = x.double().numpy(), q.dequantize().double().numpy()
    got = nv.measure(x, q)
    want = {
        "mse": np.mean((b - a) ** 2),
        "nmse": np.sum((b - a) ** 2) / np.sum(a**2),
        "qsnr_db": -10 * np.log10(np.sum((b - a) ** 2) / np.sum(a**2)),
        "gain": np.sum(a * b) / np.sum(a**2),
        "cosine": np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b),
        "flushed_share": np.mean(b[a != 0] == 0),
        "max_abs_e": np.max(np.abs(b - a)),
    }
    assert {name: getattr(got, name) for name in want} == pytest.approx(want, rel=1e-12)


def test_a_recipe_measures_as_its_quantized_form():
    x = gaussian(8, 64)
    assert nv.measure(x, "nvfp4") == nv.measure(x, nv.quantize(x, "nvfp4"))


def test_errors_of_parts_add_up_to_the_whole():
    x = gaussian(64, 64, seed=2)
    whole = nv.measure(x, "nvfp4")
    parts = nv.measure(x[:10], "nvfp4") + nv.measure(x[10:], "nvfp4")
    assert parts.to_frame().iloc[0].to_dict() == pytest.approx(
        whole.to_frame().iloc[0].to_dict(), rel=1e-12
    )


def test_a_gain_of_a_tenth_is_seen_where_cosine_sees_nothing():
    x = gaussian(8, 64)
    q = nv.quantize(x, "nvfp4-tensor")
    tenth = nv.Quantized(q.codes, q.scales, q.outer / 10, q.recipe)  # type: ignore[operator]
    assert nv.measure(x, tenth).cosine == pytest.approx(nv.measure(x, q).cosine, rel=1e-6)
    assert nv.measure(x, tenth).gain == pytest.approx(nv.measure(x, q).gain / 10, rel=1e-6)


def test_nan_and_inf_are_counted_and_enter_no_sum():
    x = gaussian(4, 16)
    poisoned = x.clone()
    poisoned[0, 3], poisoned[1, 5] = math.nan, math.inf
    got = nv.measure(poisoned, "nvfp4")
    assert (got.nonfinite_input, got.nonfinite_output) == (2, 15)
    assert got.counted == 64 - 17 and math.isfinite(got.sum_ee)


def test_zero_tensor_has_no_error():
    got = nv.measure(torch.zeros(2, 16), "nvfp4")
    assert (got.nmse, got.qsnr_db, got.gain, got.scale_zero) == (0.0, math.inf, 1.0, 2)


@pytest.mark.parametrize(
    ("amax", "counted_as"),
    [
        (0.0, "zero"),
        (2.0**-9, "zero"),  # 2**-9 / 6 rounds to no scale
        (6 * 2.0**-9, "subnormal"),
        (6.0, "normal"),
        (6 * 448.0, "saturated"),
        (1e6, "saturated"),
        (math.nan, "nan"),
    ],
)
def test_scale_classes(amax, counted_as):
    q = nv.quantize(torch.tensor([amax] + [0.0] * 15), "nvfp4")
    assert [name for name, count in errors.scale_classes(q).items() if count] == [counted_as]


def test_scale_histogram_sums_to_one_and_finds_the_byte():
    frame = errors.scale_histogram(nv.quantize(torch.full((3, 16), 6.0), "nvfp4"))
    columns = frame["scale_code"], frame["share"]
    assert sum(columns[1]) == 1
    assert [c for c, share in zip(*columns, strict=True) if share == 1] == [0x38]


@pytest.mark.parametrize(
    ("x", "message"),
    [(torch.ones(2, 16), r"x is \(2, 16\), its quantized form \(4, 16\)")],
)
def test_measure_refuses_what_does_not_match(x, message):
    with pytest.raises(ValueError, match=message):
        nv.measure(x, nv.quantize(torch.ones(4, 16)))


def test_float32_scales_have_no_histogram():
    with pytest.raises(ValueError, match="nvfp4-exact-scale keeps its scales in float32"):
        errors.scale_histogram(nv.quantize(torch.ones(16), "nvfp4-exact-scale"))
