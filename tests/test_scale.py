"""From no token to more elements than 32 bits count, and nothing that grows with use.

On the CPU what fits 2 GB; on a GPU tensors of several GB, compared where offsets pass 2**31 and
2**32 with the same rows alone. May be changed: a new operation gets a row of its own.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import inspect
import os
import pkgutil
from pathlib import Path
from typing import Any

import pytest
import torch
from public_calls import values
from sweep_runs import EXACT

import nvfp4lab as nv
from nvfp4lab import staging

has_triton = importlib.util.find_spec("triton") is not None
WIDTH = 4096
ROWS = 2**31 // WIDTH + 3  # one row beyond the boundary, and two more


def same_rows(a: nv.Quantized, b: nv.Quantized, rows: slice) -> bool:
    """Whether b is what a holds in these rows, to the bit."""
    equal = torch.equal(a.codes[rows], b.codes) and torch.equal(a.scales[rows], b.scales)
    if a.outer is None or b.outer is None:
        return equal and a.outer is b.outer
    return equal and torch.equal(a.outer[rows], b.outer)


def around(rows: int, *boundaries: int) -> list[slice]:
    """The first rows, those around each boundary, and the last."""
    return [slice(0, 4), *(slice(b - 2, b + 2) for b in boundaries), slice(rows - 3, rows)]


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def in_torch(monkeypatch) -> None:
    """No kernel stages, and none that was prepared before does."""
    monkeypatch.setattr(staging, "_runs_kernel", lambda _: False)
    monkeypatch.setattr(staging, "_PREPARED", {})


# ---- Few and many ----

with_recipes = pytest.mark.parametrize("recipe", nv.recipes())


@with_recipes
def test_no_token_is_quantized_decoded_and_measured(recipe):
    q = nv.quantize(values(4, 128)[:0], recipe)
    assert q.dequantize().shape == (0, 128)
    assert nv.measure(values(4, 128)[:0], recipe).elements == 0


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token", "torchao", "fouroversix", "seed"])
def test_one_token_alone_is_what_it_is_among_others(recipe):
    """Where the tensor has an outer scale, it is given."""
    x = values(5, 256)
    outer = nv.quantize(x, recipe).outer if nv.recipe(recipe).outer else None
    given: dict[str, Any] = {"outer": outer} if outer is not None and outer.ndim == 0 else {}
    q, one = nv.quantize(x, recipe, **given), nv.quantize(x[3:4], recipe, **given)
    assert torch.equal(q.codes[3:4], one.codes) and torch.equal(q.scales[3:4], one.scales)


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token"])
def test_a_million_tokens_take_no_memory_beyond_the_result(recipe):
    """128 million elements, which are a few thousand rows seen again and again."""
    few = values(4000, 128)
    x, expected = few.expand(250, -1, -1), nv.quantize(few, recipe)
    before = resident()
    q = nv.quantize(x, recipe)
    result = q.codes.nbytes + q.scales.nbytes + (0 if q.outer is None else q.outer.nbytes)
    assert resident() - before < result + (64 + 8 * 7 << 20)  # up to eight threads have 7 MB each
    assert (q.codes == expected.codes).all() and (q.scales == expected.scales).all()


def test_measuring_many_tokens_takes_no_memory():
    few = values(1000, 128)
    x, alone = few.expand(100, -1, -1), nv.measure(few, "nvfp4")
    before = resident()
    many = nv.measure(x, "nvfp4")
    assert resident() - before < 64 << 20
    assert many.elements == 100 * alone.elements
    assert many.flushed == 100 * alone.flushed
    assert (many.element_codes == 100 * alone.element_codes).all()


@pytest.mark.parametrize("width", [128, 1024, 8192, 8320, 65536])
def test_a_wide_row_is_its_blocks_one_by_one(width):
    x = values(5, width)
    q, by_block = nv.quantize(x), nv.quantize(x.view(-1, 16))
    assert torch.equal(q.codes.view(-1, 8), by_block.codes)
    assert torch.equal(q.scales.view(-1, 1), by_block.scales)
    of_tokens = nv.quantize(x, "nvfp4-token")
    assert of_tokens.outer is not None
    divided = nv.quantize((x.float() / of_tokens.outer).view(-1, 16))
    assert torch.equal(of_tokens.codes.view(-1, 8), divided.codes)
    assert torch.equal(of_tokens.scales.view(-1, 1), divided.scales)


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token"])
def test_a_kernel_stages_every_width_at_which_its_plan_changes(recipe, interpreter):
    from nvfp4lab.kernels.staging import plan

    def shape(width: int) -> tuple:  # what of the plan is not the number of programs
        return plan(recipe, width)[:2] + plan(recipe, width)[3:]

    widths = range(128, 65536 + 1, 128)
    changes = {w for w in widths[1:] if shape(w) != shape(w - 128)}
    for width in sorted({128, 1024, 1152, 65536, *changes, *(w - 128 for w in changes)}):
        x = values(1, width)
        staged = nv.stage(x, torch.ones(1, 1), torch.zeros(1, 1).int(), recipe)
        assert same_rows(staged.quantized, nv.quantize(x, recipe), slice(0, 1)), width


def test_every_top_k_up_to_64_is_copied(in_torch):
    for top_k in range(65):
        ids = torch.arange(3 * top_k, dtype=torch.int32).view(3, top_k)
        staged = nv.stage(values(3, 128), ids.float(), ids)
        assert torch.equal(staged.topk_idx, ids.long()), top_k
        assert torch.equal(staged.topk_weights, ids.float()), top_k


def test_more_experts_than_a_launch_can_copy_are_refused(interpreter):
    """When the launch is planned, so before anything is written; 60 GB that are never there."""
    from nvfp4lab.kernels import staging

    tokens, top_k = 2**25, 64

    def room(width: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(tokens, width, dtype=dtype, device="meta")

    read = room(128, torch.bfloat16), room(top_k, torch.float32), room(top_k, torch.int32)
    written = room(64, torch.uint8), room(2, torch.int32)
    copied = room(top_k, torch.int64), room(top_k, torch.float32)
    with pytest.raises(ValueError, match="33554432 tokens of width 128, top_k 64: too many"):
        staging.prepare(*read, *written, *copied, None, None, recipe="nvfp4")


def test_rows_further_apart_than_2_to_the_31_elements_on_the_cpu(in_torch):
    """Of memory that is never touched but in its first and last rows."""
    apart = 2**31 + 64
    try:
        room = torch.empty(apart + 512, dtype=torch.bfloat16)
        x_fp4 = torch.empty(apart + 256, dtype=torch.uint8).as_strided((2, 256), (apart, 1))
    except RuntimeError as error:
        pytest.skip(f"needs 6.5 GB of addresses: {error}")
    x = room.as_strided((2, 512), (apart, 1)).copy_(values(2, 512))
    ids, x_sf = torch.ones(2, 1, dtype=torch.int64), torch.zeros(2, 8, dtype=torch.int32)
    written = x_fp4, x_sf, torch.zeros_like(ids), torch.zeros(2, 1)
    nv.stage_mega_moe_inputs(x, ids.float(), ids, *written)
    assert torch.equal(x_fp4, nv.quantize(values(2, 512)).codes)
    assert nv.measure(x, "nvfp4") == nv.measure(values(2, 512), "nvfp4")


# ---- Nothing that grows ----


def stage_once() -> None:
    ids = torch.zeros(1, 1, dtype=torch.int32)
    nv.stage(values(1, 128), ids.float(), ids, "nvfp4-token")


def read_once() -> None:
    q = nv.quantize(values(1, 128))
    nv.Quantized.from_buffers(q.codes, nv.layouts.to_words(q.scales), recipe="nvfp4")


CALLED = {  # function, calls of which memory may not grow
    "quantize": (lambda: nv.quantize(values(1, 128), "nvfp4-tensor"), 1000),
    "dequantize": (lambda: nv.quantize(values(1, 128)).dequantize(), 1000),
    "stage": (stage_once, 600),
    "from_buffers": (read_once, 600),
    "measure": (lambda: nv.measure(values(1, 128), "nvfp4"), 200),
    "block_errors": (lambda: nv.errors.block_errors(values(1, 128), "nvfp4"), 100),
    "explain_block": (lambda: nv.explain_block(values(1, 16)[0], "nvfp4"), 100),
    "compare": (
        lambda: nv.compare(nv.quantize(values(1, 64)), nv.quantize(values(1, 64)), values(1, 64)),
        100,
    ),
}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.parametrize("name", CALLED)
def test_calls_keep_no_memory(name, in_torch):
    call, count = CALLED[name]
    for _ in range(count // 2):
        call()
    gc.collect()
    before = resident()
    for _ in range(count // 2):
        call()
    gc.collect()
    assert resident() - before < 2 << 20


def test_shapes_without_end_are_not_all_remembered(in_torch, monkeypatch):
    monkeypatch.setattr(staging, "MOST_PREPARED", 50)
    room = torch.zeros(1000, dtype=torch.bfloat16)
    ids = torch.zeros(2, 1, dtype=torch.int32)
    for stride in range(128, 428):
        nv.stage(room.as_strided((2, 128), (stride, 1)), ids.float(), ids)
    assert len(staging._PREPARED) <= 50


def test_every_cache_is_bounded_or_by_device():
    """There are few devices, formats and parts of a recipe; recipes and shapes may be any."""
    few = {"device", "device_type", "fmt", "part"}
    for info in pkgutil.walk_packages(nv.__path__, "nvfp4lab."):
        if "_main_" in info.name or ("kernels" in info.name and not has_triton):
            continue
        try:
            module = importlib.import_module(info.name)
        except ImportError:  # an engine that is not installed
            continue
        for name, function in vars(module).items():
            parameters = getattr(function, "cache_parameters", None)
            if parameters is not None and parameters()["maxsize"] is None:
                by = inspect.signature(function.__wrapped__).parameters.keys()
                assert by <= few, f"{info.name}.{name}"


# ---- On a GPU ----


@pytest.fixture
def large(gpu):
    """BF16 of more than 2**31 elements, 4.3 GB."""
    generator = torch.Generator(gpu).manual_seed(3)
    x = torch.empty(ROWS, WIDTH, dtype=torch.bfloat16, device=gpu)
    x.normal_(generator=generator)
    yield x
    del x
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token", "vllm-megamoe", "vllm-muse"])
def test_staging_of_more_than_2_to_the_31_elements(recipe, large):
    ids = torch.zeros(1, 1, dtype=torch.int32, device=large.device).expand(ROWS, 2)
    q = nv.stage(large, ids.float(), ids, recipe).quantized
    for rows in around(ROWS, 2**30 // WIDTH, 2**31 // WIDTH):
        assert same_rows(q, nv.quantize(large[rows], recipe), rows), rows


def test_the_seed_refuses_more_than_2_to_the_31_elements(large):
    ids = torch.zeros(1, 1, dtype=torch.int32, device=large.device).expand(ROWS, 2)
    with pytest.raises(ValueError, match="fewer tokens"):
        nv.stage(large, ids.float(), ids, "seed")


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token"])
def test_quantize_of_more_than_2_to_the_31_elements(recipe, large):
    q = nv.quantize(large, recipe)
    for rows in around(ROWS, 2**30 // WIDTH, 2**31 // WIDTH):
        assert same_rows(q, nv.quantize(large[rows], recipe), rows), rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token"])
def test_dequantize_of_more_than_2_to_the_31_elements(recipe, dtype, large):
    """As float32 the last bytes lie beyond 2**33."""
    ids = torch.zeros(1, 1, dtype=torch.int32, device=large.device).expand(ROWS, 2)
    values = nv.stage(large, ids.float(), ids, recipe).quantized.dequantize(dtype)
    for rows in around(ROWS, 2**29 // WIDTH, 2**30 // WIDTH, 2**31 // WIDTH):
        assert torch.equal(values[rows], nv.quantize(large[rows], recipe).dequantize(dtype)), rows


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token"])
def test_measure_of_more_than_2_to_the_31_elements_is_the_sum_of_its_parts(recipe, large):
    whole, half = nv.measure(large, recipe), ROWS // 2
    parts = nv.measure(large[:half], recipe) + nv.measure(large[half:], recipe)
    assert whole.elements == large.numel()
    for name in EXACT:
        assert repr(getattr(whole, name)) == repr(getattr(parts, name)), name
    ids = torch.zeros(1, 1, dtype=torch.int32, device=large.device).expand(ROWS, 2)
    of_codes = nv.measure(large, nv.stage(large, ids.float(), ids, recipe).quantized)
    for name in EXACT:
        assert repr(getattr(whole, name)) == repr(getattr(of_codes, name)), name


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token", "vllm-megamoe", "vllm-muse"])
def test_rows_further_apart_than_2_to_the_31_elements(recipe, gpu):
    """Of what is read and of what is written; the rows of int32 words are 2**33 bytes apart."""
    apart = 2**31 + 64

    def rows(width: int, dtype: torch.dtype) -> torch.Tensor:
        room = torch.empty(apart + width, dtype=dtype, device=gpu)
        return room.as_strided((2, width), (apart, 1))

    x = rows(512, torch.bfloat16).copy_(values(2, 512))
    x_fp4, x_sf = rows(256, torch.uint8), rows(8, torch.int32)
    ids = torch.ones(2, 1, dtype=torch.int64, device=gpu)
    scales = torch.zeros(2, device=gpu) if recipe in ("nvfp4-token", "vllm-megamoe") else None
    written = x_fp4, x_sf, torch.zeros_like(ids), torch.zeros(2, 1, device=gpu)
    nv.stage_mega_moe_inputs(x, ids.float(), ids, *written, x_scales=scales, recipe=recipe)
    expected = nv.quantize(values(2, 512), recipe)
    assert torch.equal(x_fp4.cpu(), expected.codes)
    assert torch.equal(x_sf.cpu(), nv.layouts.to_words(expected.scales))
    counted, alone = nv.measure(x, recipe), nv.measure(values(2, 512), recipe)
    assert all(repr(getattr(counted, n)) == repr(getattr(alone, n)) for n in EXACT)
    torch.cuda.empty_cache()


def test_just_below_2_to_the_31_experts_are_copied(gpu):
    """26 GB are written. The ids and weights are one row, seen as many."""
    tokens, top_k = (2**31 - 1) // 127, 127
    row = torch.arange(top_k, dtype=torch.int32, device=gpu).expand(tokens, -1)
    x = values(1, 128).to(gpu).expand(tokens, -1)
    staged = nv.stage(x, row.float()[:1].expand(tokens, -1), row)
    for rows in around(tokens, 2**28 // top_k, 2**29 // top_k, 2**30 // top_k):
        assert torch.equal(staged.topk_idx[rows], row[rows].long())
        assert torch.equal(staged.topk_weights[rows], row[rows].float())
    assert torch.equal(staged.x_fp4[-1].cpu(), nv.quantize(values(1, 128)).codes[0])
    del staged
    torch.cuda.empty_cache()


def test_a_hundred_thousand_calls_keep_no_memory_on_a_gpu(gpu):
    x = values(2, 128).to(gpu)
    ids = torch.zeros(2, 1, dtype=torch.int32, device=gpu)
    weights = ids.float()

    def calls(count: int) -> None:
        for i in range(count):
            staged = nv.stage(x, weights, ids, "nvfp4-token")
            if i % 20 == 0:
                staged.quantized.dequantize()
            if i % 200 == 0:
                nv.measure(x, nv.quantize(x))
        torch.cuda.synchronize()

    calls(10_000)
    gc.collect()
    on_gpu, here = torch.cuda.memory_allocated(), resident()
    calls(90_000)
    gc.collect()
    assert torch.cuda.memory_allocated() == on_gpu
    assert resident() - here < 4 << 20
