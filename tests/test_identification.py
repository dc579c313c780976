"""identify and probe: named recipes are named, each fault that users met comes first, others are
found decision by decision, and what cannot be told is said to be open.

May be changed: faults and combinations may be added. Each test draws its input from a fixed seed.
"""

import itertools

import foreign_kernels as foreign
import pytest
import torch
from foreign_kernels import kernel, of_tensor, of_token
from safetensors.torch import save_file

import nvfp4lab as nv
from nvfp4lab import catalogue, cli, layouts
from nvfp4lab.diagnose.decisions import DECISIONS, with_choice
from nvfp4lab.rules import Outer

NVFP4, TENSOR = catalogue.NVFP4, nv.recipe("nvfp4-tensor")


def plain(name):
    recipe = nv.recipe(name)
    formats = (recipe.scale.format, recipe.elements.format)
    return (
        formats == (nv.formats.E4M3, nv.formats.E2M1) and recipe.elements.rounding != "stochastic"
    )


IDENTIFIABLE = [n for n in nv.recipes() if plain(n) and n != "nvfp4-search"]
PROBE = nv.probe()


def activations(rows=200, width=512, seed=1):
    """Gaussian rows over 26 binades, one zero block."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    x = x * torch.exp2(torch.randint(-14, 12, (rows, 1), generator=generator).float())
    x[3, :16] = 0
    return x.bfloat16()


X = activations()


def identify(q, x=X, **buffers):
    return nv.identify(x, **({"codes": q.codes, "scales": q.scales, "outer": q.outer} | buffers))


@pytest.mark.parametrize("name", IDENTIFIABLE)
@pytest.mark.parametrize("x", [X, PROBE], ids=["activations", "probe"])
def test_a_named_recipe_is_named(name, x):
    got = identify(nv.quantize(x, name), x)
    assert got.explained and got.recipe.name == name, str(got)
    assert got.ranking.iloc[0][["scales", "codes"]].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", IDENTIFIABLE)
def test_the_probe_tells_every_two_recipes_apart(name):
    def result(other):
        q = nv.quantize(PROBE, other)
        return q.codes, q.scales, torch.zeros(()) if q.outer is None else q.outer

    mine = result(name)
    for other in IDENTIFIABLE:
        same = all(
            a.shape == b.shape and a.equal(b) for a, b in zip(mine, result(other), strict=True)
        )
        assert same == (name == other), other


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, "bfloat16"])
def test_a_probe_has_a_dtype_that_quantize_takes(dtype):
    with pytest.raises(TypeError, match="a probe is bfloat16, float16 or float32, got"):
        nv.probe(dtype)


@pytest.mark.parametrize("name", ["nvfp4", "cublas", "vllm-muse"])
def test_the_probe_leaves_no_named_decision_open(name):
    got = identify(nv.quantize(PROBE, name), PROBE)
    asked = {
        "scale layout", "nibble order", "outer scale", "ties of elements", "scale rounding",
        "scale floor", "subnormal scales", "scale saturation", "divide or reciprocal",
        "scale that divides", "sign of zero",
    }  # fmt: skip
    rows = got.decisions[got.decisions["decision"].isin(list(asked))]
    assert set(rows["decision"]) == asked and set(rows["verdict"]) == {"supported"}
    assert min(rows["blocks"].tolist()) > 0


FAULTS = {
    "subnormal scale byte decoded as a normal": (
        NVFP4.changed({"elements.scale_read": "subnormals as normals"}),
        "subnormal scale bytes are decoded as normal ones",
    ),
    "scale floor that rounds to 0": (
        NVFP4.changed({"scale.floor": 2.0**-12, "specials.zero_divisor": 0.0}),
        "blocks have scale 0 and codes that are not 0",
    ),
    "E4M3 cast without a clamp": (
        NVFP4.changed({"scale.overflow": "nan"}),
        "scales beyond 448 become NaN",
    ),
    "elements divided by the unrounded scale": (
        NVFP4.changed({"elements.scale_read": "unrounded"}),
        "divided by the unrounded scale",
    ),
    "half away taken for even": (
        NVFP4.changed({"elements.rounding": "ties-away"}),
        "ties of elements: ties-away",
    ),
    "half down": (
        NVFP4.changed({"elements.rounding": "ties-to-zero"}),
        "ties of elements: ties-to-zero",
    ),
    "scale ties away": (
        NVFP4.changed({"scale.rounding": "ties-away"}),
        "scales round ties-away",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_arithmetic_comes_first(fault):
    recipe, cause = FAULTS[fault]
    got = identify(nv.quantize(X, recipe))
    assert got.explained and cause in got.causes[0], str(got)


@pytest.mark.parametrize("convention", ["encode", "decode"])
def test_a_dead_expert(convention):
    dead = Outer("tensor", formula="G = n / amax", of_zero=None)
    recipe = TENSOR.changed({"outer": dead, "specials.invalid_scale_code": 0x7F})
    x = torch.zeros(8, 64).bfloat16()
    q = nv.quantize(x, recipe)
    assert (q.scales == 0x7F).all()
    got = identify(q, x, outer=torch.tensor(float("inf")) if convention == "encode" else q.outer)
    assert got.explained and got.causes[0].startswith("an all-zero input"), str(got)


@pytest.mark.parametrize("name", ["nvfp4-tensor", "vllm-megamoe", "torchao"])
def test_an_outer_scale_that_is_missing(name):
    got = identify(nv.quantize(X, name), outer=None)
    assert got.explained and got.causes[0].startswith("outer scale missing"), str(got)


@pytest.mark.parametrize("name", ["nvfp4-tensor", "vllm-megamoe", "sgl-megamoe"])
@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_an_outer_scale_that_is_inverted(name, shape):
    q = nv.quantize(X, name)
    assert q.outer is not None
    got = identify(q, outer=(1 / q.outer).reshape(shape))
    assert got.explained and "encode scale" in got.causes[0], str(got)


@pytest.mark.parametrize("factor", [25.0, 1 / 25, 100.0, 1 / 100])
def test_outputs_too_small_or_too_large(factor):
    q = nv.quantize(X, "nvfp4-tensor")
    assert q.outer is not None
    got = identify(q, outer=q.outer * factor)
    assert not got.explained and not got.unexplained  # the outer scale contradicts the bytes
    wrong = f"{factor:g} times too large" if factor > 1 else f"{1 / factor:g} times too small"
    assert wrong in got.causes[0], str(got)


def test_swapped_nibbles():
    q = nv.quantize(X)
    got = identify(q, codes=q.codes << 4 | q.codes >> 4)
    assert got.explained and got.causes == ["nibble order: high nibble first"]


def test_the_packing_of_llama_cpp():
    q = nv.quantize(X, "llama.cpp")
    codes = layouts.to_gguf(q.codes, q.scales).view(len(X), -1, 36)[:, :, 4:].reshape(q.codes.shape)
    got = identify(q, codes=codes)
    assert (
        got.explained and got.causes[0] == "nibble order: low nibbles, then high ones, of each 16"
    )


@pytest.mark.parametrize("rows", [128, 200], ids=["of the linear size", "padded"])
def test_swizzled_scales(rows):
    x = X[:rows]
    q = nv.quantize(x)
    got = identify(q, x, scales=layouts.to_tiles(q.scales))
    assert got.explained and got.causes == ["the scales lie in 128x4 tiles, not row by row"]


def test_padding_that_was_never_written():
    q = nv.quantize(X)
    padded = layouts.from_tiles(layouts.to_tiles(q.scales), 256, 32)
    padded[200:] = 0x55
    got = identify(q, scales=layouts.to_tiles(padded).flatten())
    assert (
        got.explained
        and got.causes[-1] == f"{56 * 32} padding bytes of the 128x4 tiles are not zero"
    )


@pytest.mark.parametrize(
    ("layout", "place"),
    [
        ("mega_moe int32 words", layouts.to_words),
        ("MN-major int32 words", layouts.to_mn_major),
        ("linear", lambda s: s.view(torch.float8_e4m3fn)),
    ],
)
def test_sound_layouts_are_no_fault(layout, place):
    q = nv.quantize(X)
    got = identify(q, scales=place(q.scales))
    assert got.explained and got.reading.layout == layout and not got.causes


def test_an_approximate_reciprocal():
    q = nv.quantize(X, "vllm-megamoe")
    assert q.outer is not None
    s = q.decoded_scales().repeat_interleave(16, -1) * q.outer
    codes = nv.formats.E2M1.encode(X.float() * ((1 / s) * (1 + 2.0**-23)))
    codes = codes.where(codes != 8, 0)
    got = identify(q, codes=layouts.pack_nibbles(codes))
    assert not got.explained and got.causes[0].startswith("approximate division"), str(got)


FOREIGN = {  # what a kernel that shares no code with us does -> the cause that comes first
    "sound": ({}, None),
    "ties to odd": ({"tie": "odd"}, "ties of elements: ties-to-odd"),
    "ties to +Inf": ({"tie": "plus"}, "ties of elements: ties-up"),
    "ties to -Inf": ({"tie": "minus"}, "ties of elements: ties-down"),
    "elements cut": ({"tie": "cut"}, "ties of elements: toward-zero"),
    "scales cut": ({"scale_tie": "cut"}, "scales round toward-zero"),
    "scales up": ({"scale_tie": "ceil"}, "scales round up"),
    "floor 2^-7": ({"floor": 2.0**-7}, "scales are never below 2^-7"),
    "floor 2^-8": ({"floor": 2.0**-8}, "scales are never below 2^-8"),
    "ceiling 240": ({"ceiling": 240.0}, "scales are never above 240"),
    "divisor 7": ({"divisor": 7.0}, "scales are amax / 7, not amax / 6"),
    "factor 1.02": ({"factor": 1.02}, "scales are 1.02 times amax / 6"),
    "zero block 2^-9": ({"of_zero_block": 2.0**-9}, "a block of zeros gets the scale 2^-9"),
    "unrounded, guarded": ({"unrounded": True}, "elements are divided by the unrounded scale"),
    "unrounded, half away": (
        {"unrounded": True, "tie": "away"},
        "elements are divided by the unrounded scale",
    ),
    "elements forget": (
        {"outer": of_tensor(), "order": "x / s"},
        "elements are not divided by the outer scale",
    ),
    "scales forget": (
        {"outer": of_tensor(), "scales_forget": True},
        "scales are not divided by the outer scale",
    ),
    "FlashInfer's order": (
        {"outer": of_tensor(), "order": "x * (G * (1 / s))"},
        "elements are multiplied by a reciprocal",
    ),
    "no sign of zero": ({"zero_sign": "dropped"}, "the sign of elements of code 0: dropped"),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_the_decision_of_a_foreign_kernel_comes_first(case):
    decisions, cause = FOREIGN[case]
    got = nv.identify(PROBE, **kernel(PROBE, **decisions))
    assert got.explained, str(got)
    assert got.causes[0].startswith(cause) if cause else not got.causes, str(got)


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("name", ["smollm2", "v4-mini"])
def test_nothing_false_is_said_on_real_activations(case, name):
    """There the decision may not show; then nothing is said of it, and never of another."""
    x = nv.activations(name)[1].hidden[:96]
    decisions, cause = FOREIGN[case]
    got = nv.identify(x, **kernel(x, **decisions))
    assert got.explained, str(got)
    alone = [cause] if cause else []
    if case == "unrounded, half away":
        alone.append("ties of elements: ties-away")
    assert all(any(c.startswith(a) for a in alone) for c in got.causes), str(got)


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (of_token(), "of the token, n = 2688 (one for each token)"),
        (foreign.power_of_two, "down to a power of two (one for each token)"),
        (of_tensor(1536.0), "of the tensor, n = 1536"),
        (lambda a: foreign.F32(0.05), "none that is known"),
    ],
)
def test_the_rule_of_an_outer_scale(rule, text):
    x = X[50:150] if text.startswith("none") else X
    got = nv.identify(x, **kernel(x, outer=rule))
    row = got.decisions.set_index("decision").loc["outer scale rule"]
    assert got.explained and text in row["choice"], str(got)


def test_a_recipe_with_another_outer_scale_is_not_named():
    got = nv.identify(X, **kernel(X, outer=foreign.power_of_two))
    assert got.explained and got.recipe.name.startswith("nvfp4 with an outer scale for each token")


def test_one_number_for_all_tokens_is_told_from_one_for_each():
    q = nv.quantize(X, "nvfp4-tensor")
    assert q.outer is not None
    got = identify(q, outer=q.outer.expand(len(X)).contiguous())
    row = got.decisions.set_index("decision").loc["outer scale rule"]
    assert got.explained and "of the tensor" in row["choice"]


def test_a_buffer_that_holds_amax():
    q = nv.quantize(X, "nvfp4-tensor")
    got = identify(q, outer=X.float().abs().amax())
    assert got.explained and got.causes == ["the outer scale is amax itself, not amax / 2688"]


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0, float("inf")])
def test_an_outer_scale_that_is_none(value):
    got = identify(nv.quantize(X), outer=torch.tensor(value))
    assert not got.explained and "zero, negative, NaN or Inf" in got.causes[0]


SPOILED = {
    "lost_signs": ("signs are lost", None),
    "inverted_signs": ("signs are inverted", None),
    "big_endian": ("nibble order: big-endian words, low nibble first", True),
    "transposed_scales": ("the scales lie as: linear, transposed", True),
    "transposed_words": ("the scales lie as: int32 words, transposed", True),
    "padded_rows": ("the scales lie as: linear, padded to whole tiles", True),
    "rolled_codes": ("codes follow their elements in no nibble order that is known", False),
    "powers_of_two": ("the scale bytes are powers of two (E8M0), not E4M3", False),
    "swapped_rows": ("no explanation for", False),
    "stale_tail": ("no explanation for", False),
    "flipped_bits": ("no explanation for 1 scale and 1 code", False),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_spoiled_buffers(fault):
    """`explained`: True, False, or None where the bytes are but a buffer contradicts them."""
    cause, explained = SPOILED[fault]
    x = nv.activations("v4-mini")[1].hidden[:96, :512]
    got = nv.identify(x, **getattr(foreign, fault)(kernel(x)))
    assert got.causes[0].startswith(cause) and got.explained == bool(explained), str(got)
    assert (got.unexplained == 0) == (explained is not False)


@pytest.mark.parametrize(
    ("fault", "place"),
    [("swapped_rows", "all in rows 7, 40 of 96"), ("stale_tail", "all in rows 93 to 95 of 96")],
)
def test_what_is_left_is_said_to_be_where_it_is(fault, place):
    x = nv.activations("v4-mini")[1].hidden[:96, :512]
    assert place in nv.identify(x, **getattr(foreign, fault)(kernel(x))).causes[-1]


def test_no_cause_rests_on_a_decision_that_is_open():
    for x in (torch.zeros(1, 16), torch.randn(4, 64, generator=torch.Generator().manual_seed(3))):
        got = nv.identify(x, **kernel(x, tie="away", order="x * (1 / (s * g))"))
        open_ = got.decisions.query("verdict != 'supported'")
        said = [decision.text(c) for decision in DECISIONS for c in open_["choice"]]
        assert got.explained and not set(got.causes) & set(said), str(got)


COMBINATIONS = list(
    itertools.product(
        ("ties-to-even", "ties-away", "up"),
        ("gradual", "flush"),
        ("saturate", "nan"),
        (0.0, 2.0**-9),
        ("ties-to-even", "ties-to-zero"),
        ("x / (s * g)", "x * (1 / (s * g))"),
        ("kept", "dropped", "from nonzero"),
    )
)


@pytest.mark.parametrize("number", range(0, len(COMBINATIONS), 7))
def test_a_combination_without_a_name_is_found(number):
    rounding, subnormals, overflow, floor, ties, formula, zero_sign = COMBINATIONS[number]
    decisions = {
        "scale.rounding": rounding,
        "scale.subnormals": subnormals,
        "scale.overflow": overflow,
        "scale.floor": floor,
        "elements.rounding": ties,
        "elements.formula": formula,
        "elements.zero_sign": zero_sign,
    }
    q = nv.quantize(PROBE, NVFP4.changed(decisions))
    got = identify(q, PROBE)
    assert got.explained, (COMBINATIONS[number], str(got))
    again = nv.quantize(PROBE, got.recipe.changed({"outer": None}))
    assert again.codes.equal(q.codes) and again.scales.equal(q.scales)


def test_a_refuted_choice_is_contradicted_by_as_many_blocks_as_are_said():
    q = nv.quantize(PROBE)
    row = identify(q, PROBE).decisions.set_index("decision").loc["ties of elements"]
    others = [with_choice(NVFP4, "elements.rounding", c) for c in ("ties-away", "ties-to-zero")]
    differing = [
        int((nv.quantize(PROBE, o).element_codes() != q.element_codes()).sum()) for o in others
    ]
    assert row["elements"] <= min(differing) and row["elements"] > 100
    assert "ties-away" in row["refuted"]


def test_random_bytes_are_not_explained():
    codes = torch.randint(0, 256, (200, 256), generator=torch.Generator().manual_seed(2))
    got = identify(nv.quantize(X), codes=codes.to(torch.uint8))
    assert not got.explained and "no explanation" in got.causes[-1]


def test_one_flipped_code_is_seen():
    q = nv.quantize(X)
    codes = q.codes.clone()
    codes[100, 100] ^= 1
    got = identify(q, codes=codes)
    assert (got.explained, got.unexplained_scales, got.unexplained_codes) == (False, 0, 1)


@pytest.mark.parametrize(
    ("buffers", "error", "message"),
    [
        ({"codes": torch.zeros(4, 8)}, TypeError, "codes are bytes .* got torch.float32"),
        (
            {"codes": torch.zeros(4, 8, dtype=torch.uint8)},
            ValueError,
            r"x \(200, 512\) has codes \(200, 256\), got \(4, 8\)",
        ),
        ({"scales": torch.zeros(4, 8)}, TypeError, "scales are bytes or int32 words"),
        ({"scales": torch.zeros(3, 8, dtype=torch.uint8)}, ValueError, r"got \(3, 8\) torch.uint8"),
        ({"outer": torch.ones(3)}, ValueError, r"one for each of 200 tokens, got \(3,\)"),
        ({"outer": torch.ones(()).double()}, TypeError, "outer is float32, got torch.float64"),
        ({"codes": None}, TypeError, "codes is a torch.Tensor, got NoneType"),
    ],
)
def test_refuses(buffers, error, message):
    with pytest.raises(error, match=message):
        identify(nv.quantize(X), **buffers)


@pytest.mark.parametrize(
    ("flag", "shown"), [([], "explained by vllm-muse"), (["--json"], '"explained": true')]
)
def test_from_the_shell(tmp_path, capsys, flag, shown):
    q = nv.quantize(X, "vllm-muse")
    save_file({"hidden": X}, tmp_path / "x.safetensors")
    save_file({"codes": q.codes, "scales": layouts.to_words(q.scales)}, tmp_path / "q.safetensors")
    paths = [str(tmp_path / name) for name in ("x.safetensors", "q.safetensors")]
    assert cli.main(["identify", *paths, *flag]) == 0
    assert shown in capsys.readouterr().out


def test_keys_that_are_not_read_are_named(tmp_path, capsys):
    q = nv.quantize(X)
    save_file({"hidden": X}, tmp_path / "x.safetensors")
    buffers = {"codes": q.codes, "scales": q.scales, "outer_scale": torch.ones(())}
    save_file(buffers, tmp_path / "q.safetensors")
    paths = [str(tmp_path / name) for name in ("x.safetensors", "q.safetensors")]
    assert cli.main(["identify", *paths]) == 0
    assert "not read: outer_scale" in capsys.readouterr().err


def test_one_flipped_bit_is_placed_and_not_called_rounding():
    q = kernel(X)
    q["codes"][5, 100] ^= 1
    got = nv.identify(X, **q)
    assert len(got.causes) == 1, str(got)
    assert got.causes[0].startswith("no explanation for 0 scales and 1 code, all in row 5 of 200")


def test_a_threshold_that_is_off_is_told():
    x = torch.linspace(0, 6, 4096).repeat_interleave(16).view(64, -1)
    x.view(-1, 16)[:, 0] = 6.0
    q = nv.quantize(x)
    off = x.ge(2.25) & x.lt(2.5)
    got = identify(q, x, codes=layouts.pack_nibbles(q.element_codes().where(~off, 5)))
    assert got.causes[0].startswith("another threshold") and "rounded to 3" in got.causes[0]


def test_big_endian_scale_words():
    q = nv.quantize(X)
    words = layouts.to_words(q.scales.unflatten(-1, (-1, 4)).flip(-1).flatten(-2))
    got = identify(q, scales=words)
    assert got.explained and got.causes == ["the scales lie as: int32 words, big-endian"]


def test_a_missing_power_of_two_of_the_token():
    got = identify(nv.quantize(X, "nvfp4-token"), outer=None)
    assert got.explained and got.causes[0].endswith("of the token / 2688, up to a power of two")


def test_exit_codes_of_the_shell(tmp_path, capsys):
    q = nv.quantize(X)
    save_file({"hidden": X}, tmp_path / "x.safetensors")
    x, out = str(tmp_path / "x.safetensors"), str(tmp_path / "q.safetensors")
    save_file({"codes": q.codes ^ 1, "scales": q.scales}, out)
    assert cli.main(["identify", x, out]) == 1
    assert cli.main(["identify", x, x]) == 2
    assert "has no codes and no scales; it has hidden" in capsys.readouterr().err
    assert cli.main(["identify", x, str(tmp_path / "none.safetensors")]) == 2


def test_a_recipe_without_a_name_claims_the_source_of_none():
    x = nv.probe()
    ties_away = nv.recipe("nvfp4").changed({"elements.rounding": "ties-away"})
    q = nv.quantize(x, ties_away)
    found = nv.identify(x, q.codes, q.scales).recipe
    named = [nv.recipe(name) for name in nv.recipes()]
    assert found.source not in {recipe.source for recipe in named}
    assert found.summary not in {recipe.summary for recipe in named}
