"""The properties of properties.py: on inputs that hypothesis draws, and on a million blocks each.

Draws are the same at every run; `FUZZ_EXAMPLES=10000 pytest tests/test_fuzz.py` makes others, and
more. A billion blocks on a GPU: fuzz.py. May be changed: add a kind of bits to `KINDS`, a view to
`VIEWS`, a property to properties.py.
"""

from __future__ import annotations

import os

import numpy as np
import properties
import pytest
import torch
from conftest import INTERPRETED
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from kernel_runs import bit_patterns
from test_lookup import assert_quantized_by_reference

import nvfp4lab as nv
from nvfp4lab import formats, quantized
from nvfp4lab.contract import STAGEABLE
from nvfp4lab.rules import Elements, Outer, Scale, Specials

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))
fuzz = settings(
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
)
SEED = 20261126
MILLION = 10**6

RECIPES = [nv.recipe(name) for name in nv.recipes()]
DRAWS_NOTHING = [nv.recipe(name) for name in properties.DRAWS_NOTHING]
REQUANTIZED = [nv.recipe(n) for n in (*properties.REQUANTIZED, *properties.REQUANTIZED_VALUES)]
STAGED = [nv.recipe(n) for n in STAGEABLE if n != "seed"]  # interpreted, it reads NaN otherwise


# ---- Drawn bits ----

MIDPOINTS = np.array([0, 0.25, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4, 5, 6, 7])


def any_bits(draw, count: int) -> np.ndarray:
    return np.frombuffer(draw(st.binary(min_size=2 * count, max_size=2 * count)), np.uint16)


def close_in_magnitude(draw, count: int) -> np.ndarray:
    """Each 16 within a factor of 2^8: sign, three bits below their exponent, four of mantissa."""
    exponents = np.repeat(_bytes(draw, count // 16), 16).astype(int)
    parts = _bytes(draw, count).astype(int)
    exponent = np.maximum(exponents - (parts >> 4 & 7), 0)
    return ((parts & 0x80) << 8 | exponent << 7 | (parts & 15) << 3).astype(np.uint16)


def at_ties(draw, count: int) -> np.ndarray:
    """Codes and midpoints of E2M1 under an E4M3 scale for each 16, some one unit off."""
    e4m3 = np.array(formats.E4M3.values[:0x7F])
    scale = np.repeat(e4m3[_bytes(draw, count // 16) % len(e4m3)], 16)
    parts = _bytes(draw, count)
    values = torch.tensor(MIDPOINTS[parts & 15] * scale).to(torch.bfloat16)
    bits = values.view(torch.int16).numpy().astype(int) & 0x7FFF
    off = np.array([0, 0, 1, -1])[parts >> 5 & 3]
    return (np.maximum(bits + off, 0) | (parts & 0x80).astype(int) << 8).astype(np.uint16)


def _bytes(draw, count: int) -> np.ndarray:
    return np.frombuffer(draw(st.binary(min_size=count, max_size=count)), np.uint8)


KINDS = (any_bits, close_in_magnitude, at_ties)


@st.composite
def rows(draw, multiple: int = 32, largest: int = 4) -> torch.Tensor:
    """BF16 [T, K]: no row to 4, K from `multiple` to `largest` times it."""
    tokens, width = draw(st.integers(0, 4)), multiple * draw(st.integers(1, largest))
    bits = draw(st.sampled_from(KINDS))(draw, tokens * width)
    x = torch.from_numpy(bits.astype(np.int16).reshape(tokens, width))
    return x.view(torch.bfloat16)


@st.composite
def in_any_dtype(draw, x: torch.Tensor) -> torch.Tensor:
    """x, or as many float16 or float32 of its bits; a float32's lower half is drawn from 0 to 3."""
    dtype = draw(st.sampled_from((torch.bfloat16, torch.float16, torch.float32)))
    if dtype != torch.float32:
        return x.view(dtype)
    lower = draw(st.integers(0, 3))
    return ((x.view(torch.int16).int() << 16) + lower).view(torch.float32)


VIEWS = {
    "every other column": lambda x: x.repeat_interleave(2, -1)[:, ::2],
    "columns before rows": lambda x: x.t().contiguous().t(),
    "inside a wider one": lambda x: torch.cat((x, x, x), -1)[:, x.shape[1] + 1 :][:, : x.shape[1]],
    "one row, as often": lambda x: x[:1].expand_as(x),
    "backwards in memory by rows": lambda x: torch.as_strided(
        torch.cat((x, x)), x.shape, (x.shape[1], 1), x.shape[1]
    ),
    "more dimensions": lambda x: x[None, :, None].expand(2, -1, 3, -1),
}


# ---- Drawn recipes ----


def parts_of(part, **given):
    """A recipe's part, any choice for each of its decisions; `given` strategies for the others."""
    choices = {name: st.sampled_from(c) for name, c in part.choices().items()}
    return st.builds(part, **choices | given)


def roundings(part):
    return st.sampled_from([c for c in part.choices()["rounding"] if c != "stochastic"])


SCALES = parts_of(
    Scale,
    format=st.sampled_from((formats.E4M3, formats.UE5M3)),
    rounding=roundings(Scale),
    divisor=st.sampled_from((6.0, 4.0, 7.0)),
    factor=st.sampled_from((1.0, 17 / 16)),
    floor=st.sampled_from((0.0, 2.0**-9, 2.0**-6)),
    of_zero=st.sampled_from((0.0, 0.125)),
)
ELEMENTS = parts_of(
    Elements,
    format=st.sampled_from((formats.E2M1, formats.INT4)),
    rounding=roundings(Elements),
)


def drawn_recipes(outer):
    """Recipes of any decisions, most of which nobody has made together."""
    name = st.just("drawn")
    return st.builds(nv.Recipe, name, name, name, SCALES, ELEMENTS, outer, parts_of(Specials))


# ---- Drawn inputs ----


@fuzz
@given(st.data(), rows())
def test_bytes_are_codes(data, x):
    x = data.draw(in_any_dtype(x))
    for recipe in RECIPES:
        properties.bytes_are_codes(recipe, x)


@fuzz
@given(st.sampled_from(list(VIEWS)), rows())
def test_a_view_has_the_bytes_of_its_copy(view, x):
    x = VIEWS[view](x)
    copy = x.clone(memory_format=torch.contiguous_format)
    for recipe in DRAWS_NOTHING:
        q, of_copy = nv.quantize(x, recipe), nv.quantize(copy, recipe)
        assert q.codes.equal(of_copy.codes), recipe.name
        assert q.scales.view(torch.uint8).equal(of_copy.scales.view(torch.uint8)), recipe.name


@fuzz
@given(rows())
def test_requantizing_changes_nothing(x):
    for recipe in REQUANTIZED:
        properties.requantizing_changes_nothing(recipe, x)


@fuzz
@given(rows(), st.integers(0, 2**31))
def test_permuting_blocks_permutes_outputs(x, seed):
    for recipe in DRAWS_NOTHING:
        properties.permuting_blocks_permutes_outputs(recipe, x, seed)


@fuzz
@given(st.integers(-3, 3), st.integers(0, 2**31))
def test_a_power_of_two_changes_only_scales(exponent, seed):
    x = properties.moderate(2, 64, seed)
    for recipe in DRAWS_NOTHING:
        properties.a_power_of_two_changes_only_scales(recipe, x, exponent)


@settings(fuzz, max_examples=EXAMPLES or 10)
@given(rows(128, 2))
@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled: fuzz.py has a billion blocks")
def test_the_kernels_give_the_bytes_of_quantize(x):
    assume(len(x))
    for recipe in STAGED:
        properties.the_kernel_gives_the_bytes_of_quantize(recipe, x)


@settings(fuzz, max_examples=EXAMPLES or 200)
@given(drawn_recipes(st.one_of(st.none(), parts_of(Outer))), rows())
def test_a_recipe_of_any_decisions_is_measured_as_it_is_quantized(recipe, x):
    q = nv.quantize(x, recipe)
    codes = q.element_codes()
    assert int(codes.max() if codes.numel() else 0) < 1 << recipe.elements.format.bits
    assert nv.measure(x, recipe) == nv.measure(x, q)


@settings(fuzz, max_examples=EXAMPLES or 200)
@given(drawn_recipes(st.none()), st.integers(0, 2**31))
def test_a_recipe_of_any_decisions_is_as_tabled(recipe, seed):
    """The table that `quantize` takes for much BF16 on a CPU, where the recipe has one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized, "CHUNK", 1024)
        assert_quantized_by_reference(bit_patterns(8, 512, seed), recipe)


# ---- The theorem, over all inputs ----


@pytest.mark.parametrize("recipe", REQUANTIZED, ids=lambda r: r.name)
def test_requantizing_changes_blocks_just_under_the_scale_codes_named(recipe):
    """Over every BF16 amax: the scale comes of it alone, and if it stays, then so do all codes,
    each the quotient v * s / s."""
    x = torch.zeros(1 << 15, recipe.scale.block, dtype=torch.bfloat16)
    x[:, 0] = torch.arange(1 << 15).to(torch.int16).view(torch.bfloat16)
    x = x[x[:, 0].isfinite()]
    q = nv.quantize(x, recipe)
    decoded = q.dequantize()
    y = decoded.to(torch.bfloat16)
    again = nv.quantize(y, recipe)
    changed = (again.dequantize() != decoded).any(-1)
    if recipe.name in properties.REQUANTIZED:
        changed |= (q.scales != again.scales).any(-1) | (q.codes != again.codes).any(-1)
    changed &= (y == decoded).all(-1)
    named = properties.REQUANTIZED | properties.REQUANTIZED_VALUES
    assert set(q.scales[changed].flatten().tolist()) == named[recipe.name]


def scale_code_and_value(x: torch.Tensor) -> tuple[int, float]:
    """What `nvfp4` makes of a block's first element, in units of the least scale."""
    q = nv.quantize(x)
    return int(q.scales[0, 0]), float(q.dequantize()[0, 0]) * 2**9


@pytest.mark.parametrize(
    ("amax", "once", "twice"),
    [
        (3.0625, (1, 3.0), (0, 0.0)),  # 3.0625 / 1 is nearest 3, and 3 / 6 a tie, to 0
        (9.0, (2, 8.0), (1, 6.0)),  # 1.5 is a tie, to 2; 4.5 is nearest 4, and 8 / 6 nearest 1
        (15.0625, (3, 18.0), (3, 18.0)),  # from here on amax / s is above 5, and nearest 6
    ],
)
def test_requantizing_under_the_three_least_scales_by_hand(amax, once, twice):
    x = torch.zeros(1, 16, dtype=torch.bfloat16)
    x[0, 0] = amax * 2.0**-9
    assert scale_code_and_value(x) == once
    assert scale_code_and_value(nv.quantize(x).dequantize()) == twice


def test_below_the_normal_scales_a_power_of_two_changes_more_than_the_exponent():
    x = torch.zeros(1, 16, dtype=torch.bfloat16)
    x[0, 0] = 45.5 * 2.0**-9  # over 6: 7.58 units, to 8, the least normal
    assert scale_code_and_value(x) == (8, 48.0)
    assert scale_code_and_value(2 * x) == (15, 90.0)  # 15.17 units, to 15 and not to 16


# ---- A million blocks ----


def shares(recipes: list[nv.Recipe], total: int) -> list[tuple[nv.Recipe, int]]:
    """Rows of 1024 for each recipe, `total` blocks together; nvfp4-search, which is a hundred times
    slower, has 16 rows."""
    quick = [r for r in recipes if r.search is None or r.search.factors is not None]
    blocks = sum(1024 // r.scale.block for r in quick)
    tokens = -(-total // blocks)
    return [(r, tokens if r in quick else 16) for r in recipes]


BLOCKWISE = {
    "bytes are codes": (RECIPES, properties.bytes_are_codes),
    "requantizing changes nothing": (REQUANTIZED, properties.requantizing_changes_nothing),
    "permuting blocks permutes outputs": (
        DRAWS_NOTHING,
        lambda recipe, x: properties.permuting_blocks_permutes_outputs(recipe, x, SEED),
    ),
}


@pytest.mark.parametrize("name", BLOCKWISE)
def test_a_million_blocks_of_any_bits(name):
    recipes, holds = BLOCKWISE[name]
    print(f"seed {SEED}")
    looked_at = 0
    for i, (recipe, tokens) in enumerate(shares(recipes, MILLION * 5 // 4)):
        for part in range(0, tokens, 512):
            x = bit_patterns(min(512, tokens - part), 1024, SEED + 1000 * i + part, 0x7F7F)
            looked_at += holds(recipe, x)
    assert looked_at >= MILLION


def test_a_million_blocks_times_a_power_of_two():
    print(f"seed {SEED}")
    looked_at = 0
    for i, (recipe, tokens) in enumerate(shares(DRAWS_NOTHING, MILLION)):
        x = properties.moderate(tokens, 1024, SEED + i)
        exponent = (-3, -2, -1, 1, 2, 3)[i % 6]
        looked_at += properties.a_power_of_two_changes_only_scales(recipe, x, exponent)
    assert looked_at >= MILLION


@pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled: fuzz.py has a billion blocks")
def test_a_million_blocks_in_the_kernels(monkeypatch):
    """In tiles of 2^15 blocks: the interpreter takes as long for a tile of 64."""
    from nvfp4lab.kernels import staging

    monkeypatch.setattr(staging, "plan", lambda *_: staging.Plan(1024, 1, programs_a_row=1))
    print(f"seed {SEED}")
    looked_at = 0
    for recipe in STAGED:
        for part in range(8):
            x = bit_patterns(1, 16 << 15, SEED + part)
            looked_at += properties.the_kernel_gives_the_bytes_of_quantize(recipe, x)
    assert looked_at >= MILLION
