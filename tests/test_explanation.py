"""explain_block against hand-worked blocks and against quantize itself."""

import math

import matplotlib.pyplot as plt
import pytest
import torch

import nvfp4lab as nv
from nvfp4lab import plots


def block(*values: float, size: int = 16) -> torch.Tensor:
    return torch.tensor([*values, *[0.0] * (size - len(values))])


def test_a_block_worked_by_hand():
    got = nv.explain_block(block(3.0, 0.125, 0.4, -1.6, 0.0))
    scale = got.scale.iloc[0].to_dict()
    assert scale == {
        "amax": 3.0,
        "outer": 1.0,
        "raw_scale": 0.5,
        "scale_code": 0x30,
        "scale": 0.5,
        "scale_class": "normal",
        "below": 0.46875,
        "above": 0.5625,
    }
    elements = got.elements
    assert elements["quotient"].tolist()[:5] == pytest.approx([6.0, 0.25, 0.8, -3.2, 0.0])
    assert elements["code"].tolist()[:5] == [7, 0, 2, 13, 0]
    assert elements["tie"].tolist()[:5] == [False, True, False, False, False]
    assert elements["below"].tolist()[:5] == [6.0, 0.0, 0.5, 3.0, 0.0]
    assert elements["above"].tolist()[:5] == [math.inf, 0.5, 1.0, 4.0, 0.5]
    assert elements["decoded"].tolist()[:5] == [3.0, 0.0, 0.5, -1.5, 0.0]
    assert elements["ulps"].tolist()[:4] == pytest.approx([0.0, -0.5, 0.4, 0.2], rel=1e-6)


@pytest.mark.parametrize(
    "name", [n for n in nv.recipes() if nv.recipe(n).elements.rounding != "stochastic"]
)
def test_codes_and_scale_are_those_of_quantize(name):
    size = nv.recipe(name).scale.block
    x = torch.randn(size, generator=torch.Generator().manual_seed(1)).bfloat16()
    q, got = nv.quantize(x[None], name), nv.explain_block(x, name)
    assert got.elements["code"].tolist() == q.element_codes()[0].tolist()
    assert got.scale["scale"].item() == q.decoded_scales().item()
    assert got.elements["decoded"].tolist() == pytest.approx(
        q.dequantize()[0].tolist(), rel=1e-6, abs=1e-12
    )
    unrounded = nv.recipe(name).elements.format.encode(
        torch.tensor(got.elements["quotient"].to_numpy(), dtype=torch.float32), "ties-to-even"
    )
    codes = torch.tensor(got.elements["code"].to_numpy())
    assert (unrounded & 7).ne(codes & 7).sum() <= (name in ("seed", "fp-quant"))


@pytest.mark.parametrize(
    ("amax", "scale_class"),
    [(0.0, "zero"), (6 * 2.0**-8, "subnormal"), (6.0, "normal"), (math.nan, "nan")],
)
def test_the_class_of_the_scale(amax, scale_class):
    assert nv.explain_block(block(amax)).scale["scale_class"].item() == scale_class


def test_an_outer_scale_is_taken():
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(2))
    q = nv.quantize(x, "nvfp4-tensor")
    got = nv.explain_block(x[1, 16:], "nvfp4-tensor", outer=q.outer)
    assert got.elements["code"].tolist() == q.element_codes()[1, 16:].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": torch.ones(32)}, r"a block of nvfp4 has shape \(16,\), got \(32,\)"),
        ({"outer": 1.0}, "an outer scale was given, but nvfp4 has none"),
        ({"recipe": "nvfp5"}, "unknown recipe 'nvfp5'"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        nv.explain_block(**({"block": torch.ones(16)} | arguments))


def test_it_prints_and_draws():
    got = nv.explain_block(block(3.0, 0.125, -0.4))
    assert "0.46875" in str(got) and "<table" in got._repr_html_()
    figure, ax = plt.subplots()
    plots.explained_block(got, ax)
    drawn = ax.collections[1].get_offsets().tolist()  # type: ignore[union-attr]
    assert drawn == [[i, q] for i, q in enumerate(got.elements["quotient"])]
    assert len(ax.collections[3].get_offsets()) == 1  # type: ignore[arg-type]
    plt.close(figure)


@pytest.mark.parametrize(("name", "tried"), [("fouroversix", 2), ("nvfp4-search", 127)])
def test_a_search_shows_what_it_tried(name, tried):
    block = torch.randn(16, generator=torch.Generator().manual_seed(4))
    got = nv.explain_block(block, name)
    kept = got.candidates.query("kept").iloc[0]
    assert len(got.candidates) == tried and kept["scale_code"] == got.scale.loc[0, "scale_code"]
    assert kept["error"] == got.candidates["error"].min()
    assert nv.explain_block(block, "nvfp4").candidates.empty


def test_the_neighbours_of_a_nan_are_none():
    got = nv.explain_block(torch.tensor([float("nan")] + [1.0] * 15)).elements
    assert got[["below", "above"]].isna().to_numpy().all() and not got["tie"].to_numpy().any()


def test_a_generator_repeats_a_stochastic_block():
    block = torch.randn(16, generator=torch.Generator().manual_seed(4))
    draws = [
        nv.explain_block(block, "nvfp4-stochastic", generator=torch.Generator().manual_seed(9))
        for _ in range(2)
    ]
    assert draws[0].elements.equals(draws[1].elements)
