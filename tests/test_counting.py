"""The kernels that count errors against counting in torch: every field, any bytes, any input.

In Triton's interpreter a turn of the inner loop costs the same for 4 blocks as for 4000, so inputs
are few rows of many blocks, and tiles are made wide.
"""

import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from kernel_runs import bit_patterns
from sweep_runs import same

import nvfp4lab as nv
from nvfp4lab.kernels import counting, errors
from nvfp4lab.statistics import Statistics, Tally, bins, in_triton
from nvfp4lab.statistics.pieces import Piece

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # as GPUs do


@pytest.fixture(autouse=True)
def wide_tiles(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(counting, "BLOCKS", 512)
        monkeypatch.setattr(counting, "CHANNELS", 4096)


def by_kernel(x: torch.Tensor, q: nv.Quantized, cuts: tuple[int, ...] = ()) -> Statistics:
    """By the kernel, on the device of x: x [T, K], its rows cut into pieces at `cuts`."""
    tally, in_row = Tally(q.recipe, x.shape[1], count=in_triton.count), q.scales.shape[1]
    codes, stored = q.codes.view(len(x) * in_row, -1), q.scales.view(-1)
    for start, stop in zip((0, *cuts), (*cuts, len(x)), strict=True):
        blocks = slice(start * in_row, stop * in_row)
        g = q.outer if q.outer is None or q.outer.ndim == 0 else q.outer[start:stop]
        tally.add(Piece(start, stop - start), x[start:stop], codes[blocks], stored[blocks], g)
    return tally.statistics()


def by_torch(x: torch.Tensor, q: nv.Quantized) -> Statistics:
    return nv.measure(x.cpu(), moved(q, "cpu"))


def moved(q: nv.Quantized, device: str) -> nv.Quantized:
    outer = None if q.outer is None else q.outer.to(device)
    return nv.Quantized(q.codes.to(device), q.scales.to(device), outer, q.recipe)


def assert_alike(got: Statistics, want: Statistics) -> None:
    """As `same`, but that the ee of worst blocks is a sum too."""
    np.testing.assert_allclose(got.worst["ee"], want.worst["ee"], rtol=1e-12)
    got.worst["ee"][:] = want.worst["ee"]
    assert same(got, want)


def hard(rows: int, width: int, seed: int = 0) -> torch.Tensor:
    """float32 over many binades, with zeros, -0, a zero block, NaN, Inf and saturated blocks."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    x *= 2.0 ** torch.randint(-24, 14, (rows, width // 16, 1), generator=generator).repeat(
        1, 1, 16
    ).view(rows, width)
    flat = x.view(-1, 16)
    flat[0], flat[1, 3], flat[2, 5], flat[3, 1] = 0.0, math.nan, math.inf, -math.inf
    flat[4, ::2], flat[5, ::3], flat[6], flat[7] = 0.0, -0.0, math.nan, 1e-41
    return x


RECIPES = (  # no, a token's and the tensor's outer scale; float32 scales; other elements and blocks
    "nvfp4",
    "nvfp4-token",
    "torchao",
    "nvfp4-exact-scale",
    "nvint4",
    "mxfp4-floor",
    "mxfp8-deepseek-v4",
)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_field_is_as_in_torch(recipe, device):
    x = hard(2, 320)
    q = nv.quantize(x.bfloat16(), recipe)
    got = by_kernel(x.bfloat16().to(device), moved(q, device))
    assert_alike(got, by_torch(x.bfloat16(), q))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_inputs_are_counted_as_they_are(dtype, device):
    x = hard(2, 320).to(dtype)
    q = nv.quantize(x, "vllm-megamoe")
    assert_alike(by_kernel(x.to(device), moved(q, device)), by_torch(x, q))


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-tensor"])
def test_any_bytes_on_any_input_are_counted_as_in_torch(recipe, device):
    """Every scale byte, signs and NaN included, under codes that were not made for it."""
    x = bit_patterns(2, 512 * 16, seed=1)
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 256, (2, 512 * 8), generator=generator).to(torch.uint8)
    scales = torch.arange(1024).reshape(2, 512).to(torch.uint8)
    outer = None if recipe == "nvfp4" else torch.tensor(2.0**-8 / 3)
    q = nv.Quantized(codes, scales, outer, nv.recipe(recipe))
    assert_alike(by_kernel(x.to(device), moved(q, device)), by_torch(x, q))


@pytest.mark.parametrize("g", [0.0, 1e-45, 3e38, math.inf, math.nan])
def test_any_outer_scale_is_counted_as_in_torch(g, device):
    x = hard(1, 320).bfloat16()
    q = nv.quantize(x, "nvfp4-tensor", outer=1.0)
    q = nv.Quantized(q.codes, q.scales, torch.tensor(g), q.recipe)
    assert_alike(by_kernel(x.to(device), moved(q, device)), by_torch(x, q))


def test_tiles_and_runs_of_rows_may_end_anywhere(device, monkeypatch):
    """19 blocks in tiles of 16 and 304 channels in runs of 256; 3 rows, 2 to a program."""
    monkeypatch.setattr(counting, "BLOCKS", 16)
    monkeypatch.setattr(counting, "CHANNELS", 256)
    monkeypatch.setattr(counting, "PROGRAMS", 4)
    monkeypatch.setattr(counting, "COPIES", 2)
    x = hard(3, 19 * 16).bfloat16()
    q = nv.quantize(x, "nvfp4-token")
    assert_alike(by_kernel(x.to(device), moved(q, device)), by_torch(x, q))


def test_a_row_of_one_block(device):
    x = hard(3, 48).view(9, 16)[4:7].bfloat16()
    q = nv.quantize(x, "nvfp4")
    assert_alike(by_kernel(x.to(device), moved(q, device)), by_torch(x, q))


def test_rows_may_have_any_strides(device):
    x = hard(2, 64).bfloat16()
    q = nv.quantize(x, "nvfp4")
    wider = torch.zeros(3, 130, 2, dtype=torch.bfloat16, device=device)[1:, :128:2, 1]
    wider.copy_(x)
    assert wider.stride() == (260, 4)
    assert_alike(by_kernel(wider, moved(q, device)), by_torch(x, q))


def test_pieces_add_up(device):
    x = hard(3, 160).bfloat16()
    q = nv.quantize(x, "nvfp4-token")
    assert_alike(by_kernel(x.to(device), moved(q, device), cuts=(1,)), by_torch(x, q))


def test_parts_of_a_row_add_up(device):
    x = hard(1, 320).bfloat16()
    q = nv.quantize(x, "nvfp4")
    tally = Tally(q.recipe, 320, count=in_triton.count)
    for first, last in ((0, 7), (7, 20)):
        piece = Piece(0, 1, first, ends_row=last == 20)
        codes, scales = q.codes.view(20, 8)[first:last], q.scales.view(-1)[first:last]
        tally.add(piece, x[:, first * 16 : last * 16].to(device), codes.to(device),
                  scales.to(device), None)  # fmt: skip
    got, want = tally.statistics(), by_torch(x, q)
    assert got.tokens == 1
    assert_alike(got, want)


def test_the_worst_of_many_tiles_are_found_in_their_order(device, monkeypatch):
    """Blocks that are alike come by place; those that lost elements come before any error."""
    monkeypatch.setattr(counting, "BLOCKS", 4)
    x = torch.tensor([6.0, 0.2] + [0.0] * 14).repeat(2, 12)  # 24 blocks, all with the same error
    x[1, 5 * 16], x[0, 9 * 16], x[1, 16:18] = math.nan, math.nan, math.nan
    x[1, 7 * 16 + 2] = 0.3
    q = nv.quantize(x.bfloat16(), "nvfp4")
    got = by_kernel(x.bfloat16().to(device), moved(q, device))
    assert list(zip(got.worst["token"], got.worst["block"], strict=True)) == [
        (0, 9), (1, 5), (1, 1), (1, 7), (0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (0, 5)
    ]  # fmt: skip
    assert got.worst["lost"].tolist() == [15, 15, 14] + [0] * 7
    assert_alike(got, by_torch(x.bfloat16(), q))


def test_a_tensor_without_error_has_no_worst_block(device):
    x = torch.full((1, 32), 6.0, dtype=torch.bfloat16)
    got = by_kernel(x.to(device), moved(nv.quantize(x), device))
    assert len(got.worst["ee"]) == 0 and got.max_abs_e == 0


# ---- Bins ----


@triton.jit
def _amax_bins(amax, out, SIZE: tl.constexpr, FIRST_EXPONENT: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, errors._amax_bin(tl.load(amax + i), FIRST_EXPONENT))


@triton.jit
def _qsnr_bins(xx, ee, lost, edges, out, SIZE: tl.constexpr, COUNT: tl.constexpr):
    i = tl.arange(0, SIZE)
    where = errors._qsnr_bin(tl.load(xx + i), tl.load(ee + i), tl.load(lost + i), edges, COUNT)
    tl.store(out + i, where)


def test_amax_bins_are_those_of_bins_at_both_ends_of_every_binade(device):
    low = torch.tensor([2.0**e for e in range(-149, 128)], dtype=torch.float64).float()
    below = torch.nextafter(low, torch.zeros(()))
    amax = torch.cat([low, below, torch.tensor([0.0, torch.finfo(torch.float32).max])])
    padded = torch.nn.functional.pad(amax, (0, 1024 - len(amax))).to(device)
    out = torch.zeros(1024, dtype=torch.int32, device=device)
    _amax_bins[(1,)](padded, out, tl.constexpr(1024), tl.constexpr(bins.AMAX_EXPONENTS[0]))
    torch.testing.assert_close(out.cpu().long()[: len(amax)], bins.amax_bin(amax))


def test_qsnr_bins_are_those_of_bins_around_every_edge(device):
    edge = bins.nmse_edges(torch.device("cpu"))
    up = torch.nextafter(edge, torch.full((), math.inf, dtype=torch.float64))
    down = torch.nextafter(edge, torch.zeros((), dtype=torch.float64))
    ee = torch.cat([edge, up, down, torch.tensor([0.0, 1e-300, 1e300, 1.0], dtype=torch.float64)])
    ee = torch.nn.functional.pad(ee, (0, 512 - len(ee)), value=0.5)
    xx, lost = torch.ones_like(ee), torch.zeros(512, dtype=torch.int32)
    xx[-5], ee[-4], xx[-4], lost[-3] = 0.0, 0.0, 0.0, 2
    out = torch.zeros(512, dtype=torch.int32, device=device)
    edges = in_triton._qsnr_edges(torch.device(device))
    _qsnr_bins[(1,)](
        xx.to(device), ee.to(device), lost.to(device), edges, out,
        tl.constexpr(512), tl.constexpr(bins.QSNR_COUNT),
    )  # fmt: skip
    torch.testing.assert_close(out.cpu().long(), bins.qsnr_bin(xx, ee, lost))


def test_every_bin_has_its_place_in_the_totals(device):
    """No part of a copy of the totals reaches into the next one."""
    for starts in (errors.SUMS, errors.COUNTS):
        for (name, start), end in zip(starts.items(), list(starts.values())[1:], strict=False):
            assert start + in_triton._SIZES.get(name, 1) <= end, name


# ---- On a GPU ----


def test_a_gpu_is_not_waited_for_before_the_end(gpu):
    x = hard(64, 2048).bfloat16().to(gpu)
    q = nv.quantize(x, "nvfp4")
    nv.measure(x, q)  # compiled, and tables made
    tally = Tally(q.recipe, 2048, count=in_triton.count)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tally.add(Piece(0, 64), x, q.codes.view(-1, 8), q.scales.view(-1), None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_alike(tally.statistics(), by_torch(x, q))


def test_memory_on_a_gpu_does_not_grow_with_the_tensor(gpu):
    peaks = []
    for rows in (1 << 14, 1 << 16):
        x = torch.ones(rows, 1 << 13, dtype=torch.bfloat16, device=gpu)
        nv.measure(x[:16], "nvfp4")
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        nv.measure(x, "nvfp4")
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < peaks[0] + 1e6 and peaks[0] < 2.5 * nv.errors.COUNTED_BY_KERNEL


def test_a_gpu_stages_what_it_measures(gpu, monkeypatch):
    """And quantizes in torch what cannot be staged: rows that are no multiple of 128."""
    staged = []
    stage = nv.errors.stage
    monkeypatch.setattr(nv.errors, "stage", lambda *a: staged.append(stage(*a)) or staged[-1])
    for width, count in ((384, 1), (400, 0)):
        staged.clear()
        x = hard(20, width).bfloat16()
        assert_alike(nv.measure(x.to(gpu), "nvfp4"), nv.measure(x, "nvfp4"))
        assert len(staged) == count
