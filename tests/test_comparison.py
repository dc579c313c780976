"""compare: each cause injected alone, counted, and named."""

from dataclasses import replace

import pytest
import torch

import nvfp4lab as nv
from nvfp4lab.quantized import Quantized
from nvfp4lab.rules import Elements, Scale

NVFP4 = nv.recipe("nvfp4")
AWAY = NVFP4.changed({"elements.rounding": "ties-away"})


def varied(**parts):
    return replace(NVFP4, **parts)


def block(*values: float) -> torch.Tensor:
    return torch.tensor([[*values, *[0.0] * (16 - len(values))]])


def counts(comparison) -> dict:
    rows = comparison.counts
    return {r.cause: (r.scales, r.codes) for r in rows.itertuples()}


def test_equal_results_have_no_cause():
    x = torch.randn(8, 64)
    got = nv.compare(nv.quantize(x), nv.quantize(x), x)
    assert got.equal and got.first.empty and "nothing differs" in str(got)


@pytest.mark.parametrize(
    ("x", "recipe", "want"),
    [
        (block(6.0, 0.25, 2.5, 0.3), AWAY, {"tie": (0, 2)}),
        (
            block(6.0, -0.1, -0.0),
            varied(elements=Elements(zero_sign="dropped")),
            {"sign of zero": (0, 2)},
        ),
        (block(), varied(scale=Scale(floor=2.0**-9)), {"zero scale": (1, 0)}),
        (
            block(6 * 470.0, 1000.0),
            varied(scale=Scale(overflow="nan")),
            {"NaN": (1, 0), "other scale": (0, 15)},
        ),
        (
            block(6.0, 3.0),
            varied(scale=Scale(factor=1.5)),
            {"scale code": (1, 0), "other scale": (0, 2)},
        ),
        (
            block(6 * 448.0),
            varied(scale=Scale(factor=0.5)),
            {"saturation": (1, 0)},
        ),
        (
            block(6 * 1.875, 1.25 * 1.875),
            varied(elements=Elements(formula="x * (1 / (s * g))")),
            {"tie": (0, 1)},
        ),
    ],
    ids=["tie", "sign", "zero scale", "NaN", "scale code", "saturation", "reciprocal"],
)
def test_each_cause_is_named(x, recipe, want):
    got = counts(nv.compare(nv.quantize(x, recipe), nv.quantize(x), x))
    assert got == want


def test_an_outer_scale_that_differs():
    x = torch.randn(4, 32)
    want = nv.quantize(x, "nvfp4-tensor")
    assert want.outer is not None
    got = Quantized(want.codes, want.scales, want.outer * 2, want.recipe)
    assert counts(nv.compare(got, want, x)) == {"outer scale": (8, 0)}


def test_a_near_tie_is_told_from_a_tie():
    x = block(6.0, 0.75 + 2.0**-24)
    want = nv.quantize(x)
    codes = want.codes.clone()
    codes[0, 0] = codes[0, 0] & 0x0F | 1 << 4
    got = Quantized(codes, want.scales, None, want.recipe)
    assert counts(nv.compare(got, want, x)) == {"near-tie": (0, 1)}


def test_the_first_ten_say_where_and_what():
    x = torch.zeros(32, 16)
    x[:, 0], x[3:, 5] = 6.0, 2.5
    first = nv.compare(nv.quantize(x, AWAY), nv.quantize(x), x).first
    assert len(first) == 10 and first["block"].tolist() == list(range(3, 13))
    row = first.iloc[0].to_dict()
    assert (row["value"], row["bits"], row["got"], row["want"]) == (2.5, "40200000", 5, 4)
    assert row["cause"] == "tie"


def test_chunks_do_not_show(monkeypatch):
    x = torch.randn(37, 160, generator=torch.Generator().manual_seed(1)).bfloat16()
    a, b = nv.quantize(x, "seed"), nv.quantize(x)
    whole = nv.compare(a, b, x)
    monkeypatch.setattr("nvfp4lab.quantized.CHUNK", 16 * 7)
    parts = nv.compare(a, b, x)
    assert whole.counts.equals(parts.counts) and whole.first.equals(parts.first)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda x: (nv.quantize(x[:1]), x), r"x is \(2, 32\), the quantized forms \(1, 32\)"),
        (lambda x: (nv.quantize(x, "nvfp4-ue5m3"), x), "scale formats differ"),
        (lambda x: (nv.quantize(x, "nvint4"), x), "elements formats differ"),
    ],
)
def test_refuses(other, message):
    x = torch.ones(2, 32)
    q, given = other(x)
    with pytest.raises(ValueError, match=message):
        nv.compare(q, nv.quantize(x), given)


def test_arguments_in_another_order_are_named():
    x = torch.randn(4, 32)
    q = nv.quantize(x)
    with pytest.raises(TypeError, match=r"got \(Tensor, Quantized, Quantized\)"):
        nv.compare(x, q, q)  # type: ignore[arg-type]
