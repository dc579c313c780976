"""Recipes as data: looked up, varied, compared, and refused where a decision is no decision."""

import pickle
from dataclasses import FrozenInstanceError, fields

import pytest
import torch

from nvfp4lab import catalogue, codec
from nvfp4lab.formats import UE5M3
from nvfp4lab.rules import Elements, Outer, Recipe, Scale, Search, Specials

NAMES = [
    "nvfp4",
    "nvfp4-token",
    "nvfp4-tensor",
    "nvfp4-exact-scale",
    "nvfp4-stochastic",
    "nvfp4-search",
    "nvfp4-ue5m3",
    "cublas",
    "nvint4",
    "mxfp4-floor",
    "mxfp4-ceil",
    "mxfp4-even",
    "mxfp8-deepseek-v4",
    "seed",
    "seed-as-meant",
    "vllm-megamoe",
    "vllm-muse",
    "vllm-reference",
    "sgl-megamoe",
    "transformer-engine",
    "torchao",
    "modelopt",
    "compressed-tensors",
    "fouroversix",
    "fouroversix-mae",
    "fouroversix-max",
    "fouroversix-static6",
    "llama.cpp",
    "mlx",
    "fp-quant",
]


def test_the_names_are_a_promise():
    assert list(catalogue.recipes()) == NAMES
    assert all(catalogue.recipe(name).name == name for name in NAMES)


@pytest.mark.parametrize("name", catalogue.recipes())
def test_recipe_says_what_sets_it_apart_and_where_it_is_from(name):
    found = catalogue.recipe(name)
    assert found.summary.endswith(".") and found.source


def test_no_two_named_recipes_decide_alike():
    named = [catalogue.recipe(name) for name in catalogue.recipes()]
    for i, one in enumerate(named):
        for other in named[:i]:
            assert one.differences(other), (one.name, other.name)


def test_differences_name_the_decision_and_both_choices():
    assert catalogue.recipe("seed").differences(catalogue.recipe("seed-as-meant")) == {
        "scale.subnormals": ("exponent-wraps", "implicit-bit-lost")
    }


@pytest.mark.parametrize("name", catalogue.recipes())
def test_the_differences_from_a_recipe_change_it_into_the_other(name):
    recipe = catalogue.recipe(name)
    for other in map(catalogue.recipe, catalogue.recipes()):
        differing = {path: theirs for path, (_, theirs) in recipe.differences(other).items()}
        changed = recipe.changed(differing, other.name)
        assert not changed.differences(other) and changed.name == other.name


@pytest.mark.parametrize(
    ("decisions", "name"),
    [
        ({"elements.rounding": "ties-away"}, "nvfp4 with elements.rounding ties-away"),
        ({"scale.format": UE5M3, "search": Search(None)}, "nvfp4 with scale.format UE5M3, search of"
         " its own"),
        ({"scale.format": None}, "nvfp4 with scale.format none"),
        ({"outer": Outer("token"), "outer.per": "tensor"}, "nvfp4 with outer of its own"),
        ({"elements.rounding": "ties-to-even"}, "nvfp4"),
        ({}, "nvfp4"),
    ],
)  # fmt: skip
def test_a_changed_recipe_is_named_by_what_differs(decisions, name):
    assert catalogue.NVFP4.changed(decisions).name == name


@pytest.mark.parametrize(
    ("decisions", "error", "said"),
    [
        ({"elements.roundin": "up"}, ValueError, "'elements.roundin'; did you mean elements.round"),
        ({"name": "a"}, ValueError, "unknown decision 'name'"),
        ({7: "a"}, ValueError, "unknown decision 7"),
        ({"elements.rounding": "near"}, ValueError, "Elements.rounding='near'; expected one of"),
        ({"scale.format": "E4M3"}, ValueError, "Scale.format='E4M3'; expected one of nvfp4lab.for"),
        ({"scale.block": 0}, ValueError, "Scale.block=0; expected a whole number from 1 up"),
        (
            {"outer.per": "token"},
            ValueError,
            "nvfp4 has no outer and so no outer.per; give 'outer'",
        ),
        ({"outer": "token"}, TypeError, "outer is a rules.Outer, got str"),
        ({"scale": None}, TypeError, "scale is a rules.Scale, got NoneType"),
    ],
)
def test_a_change_that_is_none_is_refused(decisions, error, said):
    with pytest.raises(error, match=said):
        catalogue.NVFP4.changed(decisions)


def test_unknown_name_gets_the_nearest_ones():
    with pytest.raises(ValueError, match=r"unknown recipe 'nvpf4-tokn'.*nvfp4-token"):
        catalogue.recipe("nvpf4-tokn")


def test_a_number_is_no_recipe():
    with pytest.raises(TypeError, match="a recipe is a name or a Recipe, got int"):
        catalogue.recipe(4)  # type: ignore[arg-type]


def test_a_choice_that_a_decision_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"Scale.rounding='nearest'; expected one of .*ties-away"):
        Scale(rounding="nearest")  # type: ignore[arg-type]


@pytest.mark.parametrize("part", [Scale, Elements, Outer, Specials, Recipe])
def test_parts_are_frozen(part):
    one = {Outer: Outer("token"), Recipe: catalogue.NVFP4}.get(part) or part()
    with pytest.raises(FrozenInstanceError):
        setattr(one, fields(one)[0].name, None)


def test_recipe_survives_a_process_boundary():
    seed = catalogue.recipe("seed")
    assert pickle.loads(pickle.dumps(seed)) == seed


TENSOR = catalogue.recipe("nvfp4-tensor")
PARTS = {
    "scale": Scale(),
    "elements": Elements(),
    "outer": Outer("tensor"),
    "specials": Specials(nan_sign="x86"),
    "search": Search((1.0, 1.5)),
}


@pytest.mark.parametrize(
    ("part", "decision", "choice"),
    [
        (part, decision, choice)
        for part, default in PARTS.items()
        for decision, choices in default.choices().items()
        for choice in choices
    ],
)
def test_every_choice_that_a_recipe_may_make_is_carried_out(part, decision, choice):
    """None is met by a branch that is not there: each quantizes numbers, NaN, Inf and zeros."""
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[0], x[1, 0], x[2, 0] = 0, float("nan"), float("inf")
    recipe = TENSOR.changed({part: PARTS[part], f"{part}.{decision}": choice})
    q = codec.quantize(x, recipe)
    assert q.element_codes().max() < 16 and q.dequantize().shape == x.shape


def test_a_recipe_of_ones_own_quantizes():
    away = catalogue.NVFP4.changed({"elements.rounding": "ties-away"})
    x = torch.tensor([6.0, 0.25] + [0.0] * 14)
    assert codec.quantize(x, away).codes[0].item() == 0x17  # 0.25 goes up to code 1
    assert codec.quantize(x, "nvfp4").codes[0].item() == 0x07  # and to the even code 0


@pytest.mark.parametrize("value", [-1.0, float("nan"), "16"])
def test_a_number_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match=r"Scale\.floor="):
        Scale(floor=value)
