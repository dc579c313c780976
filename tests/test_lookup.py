"""The table path of `quantize` against the reference it is read off, over all that it can meet.

The reference itself is held against the oracles in test_proofs.py. May be changed: cases may be
added. The proofs over named recipes may not be thinned out; those over variations look at every
magnitude under some of the scale codes, as their names say.
"""

import itertools
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch

import nvfp4lab as nv
from nvfp4lab import codec, layouts, lookup, quantized
from nvfp4lab.blocks import quantize_blocks
from nvfp4lab.formats import UE5M3
from nvfp4lab.outer import OuterScale
from nvfp4lab.rules import Elements, Recipe, Scale, Specials

NVFP4 = nv.recipe("nvfp4")
INFINITY = lookup.INFINITY


def says_all_in_codes(recipe: Recipe) -> bool:
    """Four bits with a sign, under scale codes of the block alone; no search, no chance."""
    scale, elements = recipe.scale, recipe.elements
    if recipe.outer is not None or recipe.search is not None or scale.format is None:
        return False
    signed = elements.format.bits == 4 and elements.format.negative == "sign bit"
    return signed and elements.rounding != "stochastic"


WITH_TABLE = [name for name in nv.recipes() if says_all_in_codes(nv.recipe(name))]


def bf16(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int16).view(torch.bfloat16)


def by_reference(x: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """BF16 blocks [n, block] -> packed codes and scale codes, without a table."""
    one = OuterScale.one(torch.device("cpu"))
    codes, scales = quantize_blocks(x.float(), one, recipe, torch.bfloat16)
    return layouts.pack_nibbles(codes), scales


def by_table(x: torch.Tensor, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    table = lookup.table_of(recipe)
    assert table is not None
    codes = torch.empty(len(x), x.shape[1] // 2, dtype=torch.uint8)
    scales = torch.empty(len(x), dtype=torch.uint8)
    table.quantize(partial(codec.blocks_of, x, x.shape[1]), codes, scales)
    return codes, scales


def assert_same_bytes(x: torch.Tensor, recipe: Recipe) -> None:
    want, got = by_reference(x, recipe), by_table(x, recipe)
    for what, a, b in zip(("codes", "scales"), got, want, strict=True):
        differs = (a != b).reshape(len(x), -1).any(1)
        assert not differs.any(), (
            f"{recipe.name} {what} of {int(differs.sum())} of {len(x)} blocks differ; the first: "
            f"{x[differs][0].tolist()} gives {a[differs][0].tolist()}, not {b[differs][0].tolist()}"
        )


def amax_blocks(recipe: Recipe) -> torch.Tensor:
    """A block for each of the 2**15 magnitudes, NaNs included, at a place and of a sign that
    vary."""
    amax = torch.arange(lookup.MAGNITUDES)
    blocks = torch.zeros(len(amax), recipe.scale.block, dtype=torch.int64)
    blocks[amax, amax % blocks.shape[1]] = amax | amax // blocks.shape[1] % 2 << 15
    return bf16(blocks)


def largest_amax(recipe: Recipe) -> dict[int, int]:
    """For each scale code the largest finite amax that has it, by the reference."""
    scales = by_reference(amax_blocks(recipe)[:INFINITY], recipe)[1]
    return {code: amax for amax, code in enumerate(scales.tolist())}


def pair_blocks(recipe: Recipe, every: int = 1) -> torch.Tensor:
    """Blocks that hold every BF16 value, of both signs, which can meet a scale code, for `every`
    so many of the codes. Their first element is the largest amax that has the code: what meets the
    code in any block, meets it there."""
    found = []
    for code, amax in sorted(largest_amax(recipe).items())[::every]:
        magnitudes = torch.arange(amax + 1)
        values = torch.cat([magnitudes, magnitudes | 1 << 15])
        rest = recipe.scale.block - 1
        values = torch.nn.functional.pad(values, (0, -len(values) % rest), value=amax)
        values = values.view(-1, rest)
        found.append(torch.cat([torch.full((len(values), 1), amax), values], dim=1))
        assert code == by_reference(bf16(found[-1][:1]), recipe)[1].item()
    return bf16(torch.cat(found))


@pytest.mark.parametrize("name", WITH_TABLE)
def test_every_pair_of_bf16_value_and_scale_code_has_the_code_of_the_reference(name):
    recipe = nv.recipe(name)
    blocks = pair_blocks(recipe)
    pairs = sum(2 * (amax + 1) for amax in largest_amax(recipe).values())
    print(f"{name}: {pairs} pairs in {len(blocks)} blocks")
    assert blocks.numel() > pairs
    assert_same_bytes(blocks, recipe)


@pytest.mark.parametrize("name", WITH_TABLE)
def test_every_amax_has_the_scale_code_of_the_reference(name):
    assert_same_bytes(amax_blocks(nv.recipe(name)), nv.recipe(name))


def test_those_recipes_and_no_other_have_a_table():
    assert [name for name in nv.recipes() if lookup.table_of(nv.recipe(name))] == WITH_TABLE


# ---- Recipes without a name: one decision of nvfp4 changed ----


def variations() -> dict[str, Recipe]:
    numbers = {
        Scale: {"amax_floor": 1e-4, "factor": 17 / 16, "of_raw_zero": 1.0, "floor": 2.0**-6}
        | {"ceiling": 448.0, "of_zero": 0.125, "divisor": 4.0},
        Elements: {},
        Specials: {"zero_divisor": 0.0, "nan_code": 0x3, "invalid_scale_code": 0x7F},
    }
    found = {}
    for part, name in ((Scale, "scale"), (Elements, "elements"), (Specials, "specials")):
        choices = {k: v for k, v in part.choices().items() if k != "format"}
        changes = [(k, c) for k, cs in choices.items() for c in cs if c != getattr(part(), k)]
        for decision, choice in [*changes, *numbers[part].items()]:
            if (decision, choice) != ("rounding", "stochastic"):
                label = f"{name}.{decision}={choice}"
                found[label] = NVFP4.changed({f"{name}.{decision}": choice}, label)
    return found


VARIATIONS = variations()
WITHOUT_TABLE = {
    "elements.rounding=ties-up": "of the two signs, one goes up at a tie",
    "elements.rounding=ties-down": "of the two signs, one goes up at a tie",
    "elements.rounding=up": "of the two signs, one goes up",
    "elements.rounding=down": "of the two signs, one goes up",
    "elements.overflow=sign bit": "beyond 7 a code falls",
    "elements.zero_sign=unless positive": "zero has the sign that others have not",
    "elements.scale_read=unrounded": "codes depend on more than the scale code",
}


def test_variations_cover_every_choice():
    choices = Counter(label.split("=")[0] for label in VARIATIONS)
    for part, name in ((Scale, "scale"), (Elements, "elements"), (Specials, "specials")):
        for decision, named in part.choices().items():
            stochastic = "stochastic" in named
            assert choices[f"{name}.{decision}"] == len(named) - 1 - stochastic, decision
    assert WITHOUT_TABLE.keys() <= VARIATIONS.keys()


@pytest.mark.parametrize("label", [v for v in VARIATIONS if v not in WITHOUT_TABLE])
def test_a_variation_has_the_codes_of_the_reference_under_every_16th_scale_code(label):
    recipe = VARIATIONS[label]
    assert_same_bytes(pair_blocks(recipe, every=16), recipe)
    assert_same_bytes(amax_blocks(recipe), recipe)


@pytest.mark.parametrize("block", [4, 8, 12, 20, 64])
def test_blocks_of_any_number_of_words_an_odd_number_of_them(block):
    recipe = NVFP4.changed({"scale.block": block})
    assert_same_bytes(bit_patterns(1031, block, seed=block), recipe)
    assert_same_bytes(bf16(bit_patterns(1031, block).view(torch.int16) & ~0x4000), recipe)


@pytest.mark.parametrize("label", WITHOUT_TABLE)
def test_what_steps_cannot_say_has_no_table(label):
    assert lookup.table_of(VARIATIONS[label]) is None


def test_a_code_that_falls_with_the_magnitude_ends_the_table_there():
    """Where float32 no longer tells the distances apart, llama.cpp takes the first code."""
    recipe = nv.recipe("llama.cpp")
    table = lookup.table_of(recipe)
    assert table is not None and 2.0**32 < bf16(torch.tensor([table.limit])) < 2.0**36
    codes = by_reference(bf16(torch.arange(0x5000, 0x5800)).view(-1, 16), recipe)[0]
    assert (layouts.unpack_nibbles(codes).int().diff() < 0).any()


FALLING = {
    "at the largest magnitude of a scale code": {
        "scale.format": UE5M3,
        "scale.divisor": 7.0,
        "scale.factor": 17 / 16,
        "scale.rounding": "up",
        "elements.overflow": "sign bit",
        "elements.zero_sign": "dropped",
    },
    "and rises within half a binade": {
        "scale.format": UE5M3,
        "scale.factor": 17 / 16,
        "scale.rounding": "up",
        "scale.overflow": "nan",
        "elements.formula": "x / s * G",
        "elements.scale_read": "encoder's",
        "elements.rounding": "least distance",
    },
}


@pytest.mark.parametrize("where", FALLING)
def test_a_code_that_falls(where):
    recipe = NVFP4.changed(FALLING[where], where)
    assert lookup.table_of(recipe) is not None
    assert_same_bytes(amax_blocks(recipe), recipe)
    assert_same_bytes(pair_blocks(recipe, every=3), recipe)


# ---- How quantize gets there ----


@pytest.fixture
def small_chunks(monkeypatch):
    """Tables for inputs from 112 elements up, in pieces of that size."""
    monkeypatch.setattr(quantized, "CHUNK", 16 * 7)


@pytest.fixture(params=[1, 3])
def thread_count(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def bit_patterns(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return bf16(torch.randint(0, 1 << 16, (rows, width), generator=drawn))


def assert_quantized_by_reference(x: torch.Tensor, recipe: Recipe) -> None:
    q = nv.quantize(x, recipe)
    want = by_reference(x.detach().reshape(-1, recipe.scale.block), recipe)
    assert q.codes.view(want[0].shape).equal(want[0])
    assert q.scales.view(-1).equal(want[1])


@pytest.mark.parametrize("name", WITH_TABLE)
def test_any_bits_on_any_number_of_threads(name, thread_count):
    x = bit_patterns(1031, 512)  # three chunks; one block in 16 is without NaN and Inf
    x[::2] = bf16(x[::2].view(torch.int16) & 0x3FFF)  # and half of them all
    assert x.numel() > 2 * quantized.CHUNK
    assert_quantized_by_reference(x, nv.recipe(name))
    assert torch.get_num_threads() == thread_count


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.t(),
        lambda x: x[::2, 16:48],
        lambda x: x.view(-1)[1:-15].view(-1, 16),
        lambda x: x.view(-1)[2:-14].view(-1, 16),
        lambda x: x[:1].expand(9, 64),
        lambda x: x.clone().requires_grad_(),
        lambda x: torch.nn.Parameter(x),
    ],
    ids=["transposed", "sliced", "odd", "half a word", "expanded", "with a gradient", "parameter"],
)
def test_strides_offsets_and_kinds_of_tensors(view, small_chunks, thread_count):
    x = view(bit_patterns(64, 64, seed=1))
    assert codec.find_table(x, NVFP4) is not None
    assert_quantized_by_reference(x, NVFP4)


def test_any_recipe_after_any_other(small_chunks, thread_count):
    """What is kept between calls is not taken for another table's."""
    x = bit_patterns(16, 64, seed=2)
    for first, second in itertools.permutations(WITH_TABLE, 2):
        nv.quantize(x, first)
        assert_quantized_by_reference(x, nv.recipe(second))


def test_within_inference_mode(small_chunks, thread_count):
    with torch.inference_mode():
        assert_quantized_by_reference(bit_patterns(64, 64, seed=2), NVFP4)


def test_another_default_device_is_not_asked(small_chunks, thread_count):
    x = bit_patterns(64, 64, seed=3)
    want = nv.quantize(x)
    lookup.table_of.cache_clear()
    with torch.device("meta"):
        got = nv.quantize(x)
    assert got.codes.equal(want.codes) and got.scales.equal(want.scales)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked on POSIX")
def test_in_a_forked_process():
    """Where torch's own threads, once they have run in the parent, never come back."""
    script = """
import os, torch, nvfp4lab as nv
torch.set_num_threads(2)
x = torch.randn(128, 7168).bfloat16()
want = nv.quantize(x).codes.numpy().tobytes()
child = os.fork()
if child == 0:
    os._exit(0 if nv.quantize(x).codes.numpy().tobytes() == want else 1)
raise SystemExit(os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=120, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (torch.zeros(quantized.CHUNK // 16 - 1, 16).bfloat16(), "below a chunk"),
        (torch.zeros(quantized.CHUNK // 16, 16), "float32"),
        (torch.zeros(quantized.CHUNK // 16, 16).half(), "float16"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_no_table_for(x, reason):
    assert codec.find_table(x, NVFP4) is None
    assert codec.find_table(torch.zeros(quantized.CHUNK // 16, 16).bfloat16(), NVFP4) is not None


def test_the_comparison_finds_one_step_that_is_off(monkeypatch):
    """By one magnitude, under one scale code; in a block for either sign."""
    table = lookup.table_of(NVFP4)
    assert table is not None
    steps = table.steps.clone()
    steps[3, 60] += lookup.ALL_LANES
    monkeypatch.setattr(lookup, "table_of", lambda _: replace(table, steps=steps))
    with pytest.raises(AssertionError, match=r"nvfp4 codes of 2 of .* blocks differ"):
        assert_same_bytes(pair_blocks(NVFP4, every=12), NVFP4)
