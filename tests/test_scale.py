"""From no token to more elements than 32 bits count, and nothing that grows with use.

On the CPU what fits 2 GB; on a GPU tensors of several GB, compared where offsets pass 2**31 and
2**32 with the same rows alone. May be changed: a new operation gets a row of its own.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from public_calls import values
from sweep_runs import EXACT

import nvfp4lab as nv

WIDTH = 4096
ROWS = 2**31 // WIDTH + 3  # one row beyond the boundary, and two more


def same_rows(a: nv.Quantized, b: nv.Quantized, rows: slice) -> bool:
    """Whether b is what a holds in these rows, to the bit."""
    equal = torch.equal(a.codes[rows], b.codes) and torch.equal(a.scales[rows], b.scales)
    return equal and (a.outer is None or torch.equal(a.outer[rows], b.outer))


def around(rows: int, *boundaries: int) -> list[slice]:
    """The first rows, those around each boundary, and the last."""
    return [slice(0, 4), *(slice(b - 2, b + 2) for b in boundaries), slice(rows - 3, rows)]


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


def resident() -> int:
    """Bytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
