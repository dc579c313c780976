"""The staging contract of `stage` and `stage_mega_moe_inputs`: what is written, what is refused.

What is written is tested on every path: torch on the CPU, the kernels in the interpreter and,
marked `gpu`, compiled. Bits are in test_kernels.py. May be changed: a rule of the contract gets a
row in BAD_INPUTS or a test.
"""

import contextlib
import dataclasses
import importlib.util
import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import COMPILED, HAS_GPU, INTERPRETED
from kernel_runs import bit_patterns

import nvfp4lab
from nvfp4lab import catalogue, contract, layouts, rules, staging
from nvfp4lab.codec import quantize

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter

SEED = 9
RECIPES = ("nvfp4", "nvfp4-token", "seed")
T, K, TOP_K = 3, 256, 6
has_triton = importlib.util.find_spec("triton") is not None
PATHS = [
    pytest.param("torch", id="torch"),
    pytest.param(
        "interpreter",
        marks=pytest.mark.skipif(
            not (has_triton and INTERPRETED), reason="kernels are compiled in this process"
        ),
    ),
    pytest.param("cuda", marks=COMPILED.marks),
]
with_recipes = pytest.mark.parametrize("recipe", RECIPES)


@pytest.fixture(params=PATHS)
def device(request, monkeypatch) -> str:
    """The tensors' device; "cpu" either by torch or by the kernels in the interpreter."""
    if request.param == "cuda":
        return "cuda"
    monkeypatch.setattr(staging, "_runs_kernel", lambda _: request.param == "interpreter")
    return "cpu"


def hidden_states(tokens: int = T, width: int = K) -> torch.Tensor:
    """Seeded bit patterns without NaN and BF16 subnormals, which the interpreter reads wrongly."""
    print(f"seed {SEED}")
    x = bit_patterns(tokens, width, SEED, largest=0x7F7F)
    return x.where(x.abs() >= 2.0**-126, 0.0)


def make_buffers(device: str = "cpu", recipe: str = "nvfp4") -> dict[str, Any]:
    """The arguments of a good call, outputs filled with something to recognise."""
    generator = torch.Generator().manual_seed(SEED)
    buffers = {
        "hidden_states": hidden_states(),
        "topk_weights": torch.rand(T, TOP_K, generator=generator),
        "topk_ids": torch.randint(0, 384, (T, TOP_K), generator=generator, dtype=torch.int32),
        "x_fp4": torch.full((T, K // 2), 0xAA, dtype=torch.uint8),
        "x_sf": torch.full((T, K // 64), -1, dtype=torch.int32),
        "topk_idx_out": torch.full((T, TOP_K), -7, dtype=torch.int64),
        "topk_weights_out": torch.full((T, TOP_K), -7.0),
    }
    if recipe == "nvfp4-token":
        buffers["x_scales"] = torch.full((T,), -7.0)
    return {name: tensor.to(device) for name, tensor in buffers.items()}


# ---- What is written ----


@with_recipes
def test_staging_writes_the_bytes_of_quantize(recipe, device):
    buffers = make_buffers(device, recipe)
    nvfp4lab.stage_mega_moe_inputs(**buffers, recipe=recipe)
    q = quantize(hidden_states(), recipe)
    assert torch.equal(buffers["x_fp4"].cpu(), q.codes)
    assert torch.equal(buffers["x_sf"].cpu(), layouts.to_words(q.scales))
    if q.outer is not None:
        assert torch.equal(buffers["x_scales"].cpu(), q.outer[:, 0])


@with_recipes
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=str)
def test_top_k_is_copied_as_int64_and_float32(id_dtype, weight_dtype, recipe, device):
    buffers = make_buffers(device, recipe)
    buffers["topk_ids"] = buffers["topk_ids"].to(id_dtype)
    buffers["topk_weights"] = buffers["topk_weights"].to(weight_dtype)
    nvfp4lab.stage_mega_moe_inputs(**buffers, recipe=recipe)
    assert torch.equal(buffers["topk_idx_out"], buffers["topk_ids"].long())
    assert torch.equal(buffers["topk_weights_out"], buffers["topk_weights"].float())


@with_recipes
def test_a_padding_token_gets_id_minus_1_and_weight_0_and_is_quantized(recipe, device):
    buffers = make_buffers(device, recipe)
    is_padding = torch.tensor([False, True, False], device=device)
    nvfp4lab.stage_mega_moe_inputs(**buffers, is_padding=is_padding, recipe=recipe)
    q = quantize(hidden_states(), recipe)
    assert torch.equal(buffers["x_fp4"].cpu(), q.codes)
    assert (buffers["topk_idx_out"][1] == -1).all()
    assert (buffers["topk_weights_out"][1] == 0).all()
    assert torch.equal(buffers["topk_idx_out"][::2], buffers["topk_ids"][::2].long())
    assert torch.equal(buffers["topk_weights_out"][::2], buffers["topk_weights"][::2])


@with_recipes
def test_top_k_may_be_0(recipe, device):
    x = hidden_states().to(device)
    is_padding = torch.tensor([True, False, True], device=device)
    none = torch.empty(T, 0, device=device)
    staged = nvfp4lab.stage(x, none, none.int(), recipe, is_padding)
    assert staged.topk_idx.shape == staged.topk_weights.shape == (T, 0)
    assert torch.equal(staged.x_fp4.cpu(), quantize(hidden_states(), recipe).codes)


@with_recipes
def test_top_k_tensors_may_have_any_strides(recipe, device):
    buffers = make_buffers(device, recipe)
    for name in ("topk_ids", "topk_weights", "topk_idx_out", "topk_weights_out"):
        spread = buffers[name].new_zeros(2 * TOP_K, 3 * T)[::2, ::3].T
        buffers[name] = spread.copy_(buffers[name])
    nvfp4lab.stage_mega_moe_inputs(**buffers, recipe=recipe)
    assert torch.equal(buffers["topk_idx_out"], buffers["topk_ids"].long())
    assert torch.equal(buffers["topk_weights_out"], buffers["topk_weights"])


@with_recipes
def test_stage_gives_the_quantized_tensor(recipe, device):
    x = hidden_states().to(device)
    ids = torch.zeros(T, 1, dtype=torch.int64, device=device)
    staged = nvfp4lab.stage(x, torch.ones(T, 1, device=device), ids, recipe)
    q = quantize(hidden_states(), recipe)
    assert torch.equal(staged.quantized.codes.cpu(), q.codes)
    assert torch.equal(staged.quantized.scales.cpu(), q.scales)
    decoded, expected = staged.quantized.dequantize().cpu(), q.dequantize()
    torch.testing.assert_close(decoded, expected, rtol=0, atol=0, equal_nan=True)
    assert staged.recipe is catalogue.recipe(recipe)


def test_a_top_k_of_outputs_that_require_grad_is_filled(device):
    buffers = make_buffers(device)
    buffers["topk_weights_out"].requires_grad_()
    is_padding = torch.tensor([False, True, False], device=device)
    nvfp4lab.stage_mega_moe_inputs(**buffers, is_padding=is_padding)
    assert (buffers["topk_weights_out"][1] == 0).all()


def test_no_tokens_return_before_any_check():
    empty = torch.empty(0, 100)
    nvfp4lab.stage_mega_moe_inputs(
        empty, *[torch.empty(5)] * 6, x_scales=torch.empty(9), recipe="no such recipe"
    )


@with_recipes
def test_stage_of_no_tokens_gives_empty_buffers(recipe, device):
    x = torch.empty(0, K, dtype=torch.bfloat16, device=device)
    none = torch.empty(0, TOP_K, device=device)
    staged = nvfp4lab.stage(x, none, none.int(), recipe)
    assert staged.x_fp4.shape == (0, K // 2)
    assert staged.x_sf.shape == (0, K // 64)
    assert staged.quantized.dequantize().shape == (0, K)


def test_without_triton_staging_goes_through_torch():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, nvfp4lab\n"
        "x = torch.full((1, 128), 6.0, dtype=torch.bfloat16)\n"
        "staged = nvfp4lab.stage(x, torch.ones(1, 1), torch.zeros(1, 1).int(), 'seed')\n"
        "print(staged.x_sf.tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str([[0x38383838] * 2]), done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU or INTERPRETED, reason="needs a CUDA device, no interpreter")
@with_recipes
def test_staging_neither_allocates_nor_waits(recipe):
    """Once compiled. A captured CUDA graph allows neither; this asks for both directly."""
    buffers = make_buffers("cuda", recipe)
    is_padding = torch.tensor([False, True, False], device="cuda")
    nvfp4lab.stage_mega_moe_inputs(**buffers, is_padding=is_padding, recipe=recipe)
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        nvfp4lab.stage_mega_moe_inputs(**buffers, is_padding=is_padding, recipe=recipe)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
@pytest.mark.skipif(
    INTERPRETED or torch.cuda.device_count() < 2, reason="needs two CUDA devices, no interpreter"
)
@with_recipes
def test_a_tensors_own_device_is_used_whichever_is_current(recipe):
    buffers = make_buffers("cuda:1", recipe)
    with torch.cuda.device(0):
        nvfp4lab.stage_mega_moe_inputs(**buffers, recipe=recipe)
    torch.cuda.synchronize(1)
    assert torch.equal(buffers["x_fp4"].cpu(), quantize(hidden_states(), recipe).codes)


# ---- What is refused ----

BAD_INPUTS = {  # case: what replaces a good argument, the error, what its message says
    "hidden_states of one dimension": (
        {"hidden_states": torch.zeros(K, dtype=torch.bfloat16)},
        ValueError, ["hidden_states", "two dimensions", "(256,)"],
    ),
    "a list for hidden_states": (
        {"hidden_states": [[1.0]]}, TypeError, ["hidden_states", "torch.Tensor", "list"],
    ),
    "float32 hidden_states": (
        {"hidden_states": torch.zeros(T, K)}, TypeError, ["bfloat16", "got torch.float32"],
    ),
    "K that is not a multiple of 128": (
        {"hidden_states": torch.zeros(T, 192, dtype=torch.bfloat16)},
        ValueError,
        ["DeepSeek V4 MegaMoE input staging requires hidden_size to be a multiple of 128.",
         "(3, 192)"],
    ),
    "K of 0": (
        {"hidden_states": torch.zeros(T, 0, dtype=torch.bfloat16)},
        ValueError, ["multiple of 128.", "(3, 0)"],
    ),
    "hidden_states with a last stride": (
        {"hidden_states": torch.zeros(K, T, dtype=torch.bfloat16).T},
        ValueError, ["hidden_states", "last stride of 1", "(1, 3)"],
    ),
    "hidden_states on another kind of device": (
        {"hidden_states": torch.zeros(T, K, dtype=torch.bfloat16, device="meta")},
        ValueError, ["hidden_states is on a device that holds its values, got meta"],
    ),
    "top-k shapes that differ": (
        {"topk_weights": torch.zeros(T, TOP_K + 1)},
        ValueError,
        ["DeepSeek V4 MegaMoE input staging requires topk_weights and topk_ids to have the same "
         "shape.", "(3, 7) and (3, 6)"],
    ),
    "top-k of other tokens": (
        {"topk_weights": torch.zeros(2, TOP_K), "topk_ids": torch.zeros(2, TOP_K).int()},
        ValueError, ["topk_weights is (T, top_k), here (3, 6); got (2, 6)"],
    ),
    "ids of one dimension": (
        {"topk_ids": torch.zeros(T).int()}, ValueError, ["topk_ids", "two dimensions", "(3,)"],
    ),
    "int16 ids": (
        {"topk_ids": torch.zeros(T, TOP_K).short()},
        TypeError, ["topk_ids is int32 or int64, got torch.int16"],
    ),
    "float64 weights": (
        {"topk_weights": torch.zeros(T, TOP_K).double()},
        TypeError, ["topk_weights is float32, bfloat16 or float16, got torch.float64"],
    ),
    "x_fp4 of another dtype": (
        {"x_fp4": torch.zeros(T, K // 2).to(torch.int8)}, TypeError, ["x_fp4", "uint8", "int8"],
    ),
    "x_fp4 one byte short": (
        {"x_fp4": torch.zeros(T, K // 2 - 1, dtype=torch.uint8)},
        ValueError, ["x_fp4 is (T, K // 2), here (3, 128); got (3, 127)"],
    ),
    "x_fp4 with more rows": (
        {"x_fp4": torch.zeros(T + 1, K // 2, dtype=torch.uint8)},
        ValueError, ["x_fp4", "(3, 128)", "(4, 128)"],
    ),
    "x_fp4 with a last stride": (
        {"x_fp4": torch.zeros(T, K, dtype=torch.uint8)[:, ::2]},
        ValueError, ["x_fp4 has a last stride of 1", "(256, 2)"],
    ),
    "x_fp4 whose rows are one": (
        {"x_fp4": torch.zeros(1, K // 2, dtype=torch.uint8).expand(T, -1)},
        ValueError, ["x_fp4 is written", "(0, 1)"],
    ),
    "x_fp4 whose rows overlap": (
        {"x_fp4": torch.zeros(T * K, dtype=torch.uint8).as_strided((T, K // 2), (K // 2 - 1, 1))},
        ValueError, ["x_fp4 is written", "shape (3, 128) and strides (127, 1)"],
    ),
    "topk_idx_out whose rows interleave onto one another": (
        {"topk_idx_out": torch.zeros(99, dtype=torch.int64).as_strided((T, TOP_K), (4, 2))},
        ValueError, ["topk_idx_out is written", "strides (4, 2)"],
    ),
    "x_fp4 on another device": (
        {"x_fp4": torch.zeros(T, K // 2, dtype=torch.uint8, device="meta")},
        ValueError, ["x_fp4 is on a device that holds its values, got meta"],
    ),
    "x_sf as bytes": (
        {"x_sf": torch.zeros(T, K // 16, dtype=torch.uint8)}, TypeError, ["x_sf", "int32", "uint8"],
    ),
    "x_sf of another width": (
        {"x_sf": torch.zeros(T, K // 16).int()}, ValueError, ["x_sf is (T, K // 64)", "(3, 16)"],
    ),
    "int32 topk_idx_out": (
        {"topk_idx_out": torch.zeros(T, TOP_K).int()}, TypeError, ["topk_idx_out", "int64"],
    ),
    "bfloat16 topk_weights_out": (
        {"topk_weights_out": torch.zeros(T, TOP_K).bfloat16()},
        TypeError, ["topk_weights_out", "float32", "bfloat16"],
    ),
    "topk_weights_out transposed": (
        {"topk_weights_out": torch.zeros(TOP_K, T)},
        ValueError, ["topk_weights_out is (T, top_k), here (3, 6); got (6, 3)"],
    ),
    "x_scales for a recipe without": (
        {"x_scales": torch.zeros(T)}, ValueError, ["'nvfp4' takes no x_scales; one was given"],
    ),
    "no x_scales for a recipe with": (
        {"recipe": "nvfp4-token"}, ValueError, ["'nvfp4-token' needs x_scales", "none was given"],
    ),
    "x_scales of two dimensions": (
        {"recipe": "nvfp4-token", "x_scales": torch.zeros(T, 1)},
        ValueError, ["x_scales is (T), here (3,); got (3, 1)"],
    ),
    "float64 x_scales": (
        {"recipe": "nvfp4-token", "x_scales": torch.zeros(T).double()}, TypeError, ["x_scales"],
    ),
    "x_scales with a stride": (
        {"recipe": "nvfp4-token", "x_scales": torch.zeros(2 * T)[::2]},
        ValueError, ["x_scales has a last stride of 1", "(2,)"],
    ),
    "int32 is_padding": (
        {"is_padding": torch.zeros(T).int()}, TypeError, ["is_padding is bool", "int32"],
    ),
    "is_padding of other tokens": (
        {"is_padding": torch.zeros(T + 1).bool()}, ValueError, ["is_padding", "(3,)", "(4,)"],
    ),
    "an unknown recipe": (
        {"recipe": "nvfp4-tokens"}, ValueError, ["'nvfp4-tokens'", "did you mean nvfp4-token"],
    ),
    "a recipe without a kernel": (
        {"recipe": "nvfp4-tensor"},
        ValueError,
        ["'nvfp4-tensor'", "stageable: nvfp4, nvfp4-token, vllm-megamoe, vllm-muse, seed"],
    ),
    "a recipe altered under its name": (
        {"recipe": dataclasses.replace(catalogue.recipe("nvfp4"), scale=rules.Scale(floor=1.0))},
        ValueError, ["'nvfp4'", "stageable", "quantize"],
    ),
    "a recipe that is no name": ({"recipe": 4}, TypeError, ["recipe", "int"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_input_is_refused_with_what_was_given_and_nothing_is_written(case):
    changes, error, messages = BAD_INPUTS[case]
    good = make_buffers()
    with pytest.raises(error) as caught:
        nvfp4lab.stage_mega_moe_inputs(**good | changes)
    for message in messages:
        assert message in str(caught.value)
    for name, untouched in make_buffers().items():
        assert torch.equal(good[name], untouched), f"{name} was written"


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_stage_refuses_what_stage_mega_moe_inputs_refuses_of_its_arguments(case):
    changes, error, _ = BAD_INPUTS[case]
    inputs = ("hidden_states", "topk_weights", "topk_ids", "is_padding", "recipe")
    arguments = {name: value for name, value in make_buffers().items() if name in inputs}
    refused = set(changes) <= set(inputs) and case != "no x_scales for a recipe with"
    with pytest.raises(error) if refused else contextlib.nullcontext():
        nvfp4lab.stage(**arguments | {k: v for k, v in changes.items() if k in inputs})


def test_entries_that_share_memory_are_found_for_all_small_shapes_and_strides():
    """Also that no others are: rows that interleave without meeting, gaps, no rows at all."""
    wrong = []
    for rows, columns, a, b in itertools.product(range(6), range(6), range(9), range(9)):
        places = [i * a + j * b for i in range(rows) for j in range(columns)]
        shared = len(set(places)) < len(places)
        if contract._overlaps((rows, columns), (a, b)) != shared:
            wrong.append(((rows, columns), (a, b)))
        if columns == 1 and contract._overlaps((rows,), (a,)) != shared:
            wrong.append(((rows,), (a,)))
    assert not wrong


def test_the_seed_refuses_tensors_past_its_32_bit_offsets():
    """The check alone: such tensors have 4 GiB. 299,593 rows of 7168 and 1,024 more still fit."""
    fits = torch.empty(2**31, dtype=torch.bfloat16, device="meta")
    staging._refuse_offsets_past_32_bits(fits.view(-1, 1 << 12))
    too_long = torch.empty(299_595, 7168, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match=r"2\*\*31 - 1.*\(299595, 7168\).*fewer tokens"):
        staging._refuse_offsets_past_32_bits(fits, too_long)
