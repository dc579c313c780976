"""Recipes as data: looked up, varied, compared, and refused where a decision is no decision."""

import pickle
from dataclasses import FrozenInstanceError, fields, replace
from typing import get_args

import pytest

from nvfp4lab import codec, rules
from nvfp4lab.rules import Elements, Outer, Recipe, Scale, Specials

LANDED = (
    "nvfp4",
    "seed",
    "seed-as-meant",
    "nvfp4-token",
    "nvfp4-tensor",
    "nvfp4-exact-scale",
)


@pytest.mark.parametrize("name", LANDED)
def test_recipe_is_found_by_its_name(name):
    assert rules.recipe(name).name == name


@pytest.mark.parametrize("name", rules.recipes())
def test_recipe_says_what_sets_it_apart_and_where_it_is_from(name):
    found = rules.recipe(name)
    assert found.summary.endswith(".") and found.source


def test_no_two_named_recipes_decide_alike():
    named = [rules.recipe(name) for name in rules.recipes()]
    for i, one in enumerate(named):
        for other in named[:i]:
            assert one.differences(other), (one.name, other.name)


def test_differences_name_the_decision_and_both_choices():
    assert rules.recipe("seed").differences(rules.recipe("seed-as-meant")) == {
        "scale.subnormals": ("exponent-wraps", "implicit-bit-lost")
    }


def test_unknown_name_gets_the_nearest_ones():
    with pytest.raises(ValueError, match=r"unknown recipe 'nvpf4-tokn'.*nvfp4-token"):
        rules.recipe("nvpf4-tokn")


def test_a_number_is_no_recipe():
    with pytest.raises(TypeError, match="a recipe is a name or a Recipe, got int"):
        rules.recipe(4)  # type: ignore[arg-type]


def test_a_choice_that_a_decision_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r"Scale.rounding='nearest'; expected one of .*ties-away"):
        Scale(rounding="nearest")  # type: ignore[arg-type]


@pytest.mark.parametrize("part", [Scale, Elements, Outer, Specials, Recipe])
def test_parts_are_frozen(part):
    one = {Outer: Outer("token"), Recipe: rules.NVFP4}.get(part) or part()
    with pytest.raises(FrozenInstanceError):
        setattr(one, fields(one)[0].name, None)


def test_recipe_survives_a_process_boundary():
    seed = rules.recipe("seed")
    assert pickle.loads(pickle.dumps(seed)) == seed


@pytest.mark.parametrize(
    ("formula", "table"),
    [
        (rules.ScaleFormula, codec.SCALE_FORMULAS),
        (rules.ElementFormula, codec.ELEMENT_FORMULAS),
        (rules.OuterFormula, codec.OUTER_FORMULAS),
    ],
)
def test_every_formula_that_a_recipe_may_name_is_carried_out(formula, table):
    assert set(get_args(formula)) == set(table)


def test_a_recipe_of_ones_own_quantizes():
    import torch

    away = replace(rules.NVFP4, elements=replace(rules.NVFP4.elements, rounding="ties-away"))
    x = torch.tensor([6.0, 0.25] + [0.0] * 14)
    assert codec.quantize(x, away).codes[0].item() == 0x17  # 0.25 goes up to code 1
    assert codec.quantize(x, "nvfp4").codes[0].item() == 0x07  # and to the even code 0
