"""The staging kernel: BF16 rows in; codes, scale bytes, outer scales and the top-k copy out.

Read from the bottom: `prepare` plans the launch. A program of `_stage` does a part of a row, or,
where the recipe has an outer scale for each token, the whole row, its amax first; the first
programs copy the top-k instead. `_quantize` and `_quantize_twice_divided` are the path of a tile of
blocks to its bytes, a step a line; the steps are in `steps`. Checks are in `nvfp4lab.staging`.

A thread has whole blocks: the words of a tile of blocks are two tensors [BLOCKS, 4], one of first
halves and one of second, so that Triton gives both to the same thread, as loads of 16 bytes, and
nothing is passed between threads; `packed` relies on it, and tests/test_compiled.py sees to it.

No bit depends on whether float32 subnormals are flushed. Multiplying by a power of two is exact
above 2^-126, where the outer scale 2^117 leaves 1 / 448; a product that falls below it, or a BF16
subnormal under any outer scale from 2^-100 up, is smaller than half the least scale or a quarter of
it, and stands for zero either way. To stage another recipe, add it to DECISIONS; what it decides
otherwise becomes a constant of `_stage`.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton import knobs

from nvfp4lab.kernels import LAUNCHING, steps
from nvfp4lab.kernels.numerics import BF16_INF, power_of_two, token_outer_exponent

BLOCK = 16
BF16_MAX = tl.constexpr(0x7F7F)
LARGEST_INT32 = 2**31 - 1

# What varies between calls makes no variant of a kernel.
POINTERS = (
    "hidden", "x_fp4", "x_sf", "x_scales", "ids", "weights", "idx_out", "weights_out", "is_padding"
)  # fmt: skip
SIZES = (
    "hidden_row", "x_fp4_row", "x_sf_row", "ids_row", "ids_column", "weights_row", "weights_column",
    "idx_out_row", "idx_out_column", "weights_out_row", "weights_out_column",
    "has_padding", "tokens", "copiers",
)  # fmt: skip


# ---- Loads and stores ----


@triton.jit
def _load_halves(hidden, block, mask, ALIGNED: tl.constexpr):
    """The words of blocks of a row, first and second halves, int32 [BLOCKS, 4], 0 where masked."""
    return (
        _load_words(hidden, block[:, None] * 8, mask, ALIGNED),
        _load_words(hidden, block[:, None] * 8 + 4, mask, ALIGNED),
    )


@triton.jit
def _load_words(hidden, at, mask, ALIGNED: tl.constexpr):
    at += tl.arange(0, 4)[None, :]
    if ALIGNED:
        pointer = hidden.to(tl.pointer_type(tl.int32), bitcast=True) + at
        pointer = tl.max_contiguous(tl.multiple_of(pointer, [1, 16]), [1, 4])
        return tl.load(pointer, mask=mask[:, None], other=0)
    pointer = hidden.to(tl.pointer_type(tl.uint16), bitcast=True) + 2 * at
    even = tl.load(pointer, mask=mask[:, None], other=0).to(tl.int32)
    odd = tl.load(pointer + 1, mask=mask[:, None], other=0).to(tl.int32)
    return even | (odd << 16)


@triton.jit
def _store_codes(x_fp4, block, first, second, mask, BLOCKS: tl.constexpr, ALIGNED: tl.constexpr):
    """The codes of both halves, uint8 [BLOCKS, 4], to the 8 bytes of each block of a row."""
    codes = tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), [BLOCKS, 8])
    pointer = x_fp4 + block[:, None] * 8 + tl.arange(0, 8)[None, :]
    if ALIGNED:
        pointer = tl.max_contiguous(tl.multiple_of(pointer, [1, 8]), [1, 8])
    tl.store(pointer, codes, mask=mask[:, None])


@triton.jit
def _store_scales(x_sf, block, codes, mask):
    """A byte for each block of a row; four in a row are the word of `layouts.to_words`."""
    pointer = x_sf.to(tl.pointer_type(tl.uint8), bitcast=True) + block
    pointer = tl.max_contiguous(pointer, [1])  # one a thread, as the blocks are
    tl.store(pointer, codes.to(tl.uint8), mask=mask)


@triton.jit
def _copy_top_k(
    ids, weights, idx_out, weights_out, ids_row, ids_column, weights_row, weights_column,
    idx_out_row, idx_out_column, weights_out_row, weights_out_column,
    is_padding, has_padding, first, tokens, TOP_K: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """ENTRIES ids to int64 and weights to float32; a padding token gets -1 and 0."""
    entry = first + tl.arange(0, ENTRIES)
    token, k = (entry // TOP_K).to(tl.int64), (entry % TOP_K).to(tl.int64)
    mask = entry < tokens * TOP_K
    one_id = tl.load(ids + token * ids_row + k * ids_column, mask=mask).to(tl.int64)
    weight = tl.load(weights + token * weights_row + k * weights_column, mask=mask).to(tl.float32)
    # Compared in every lane: Triton's interpreter makes no bool of a scalar condition in a mask.
    given = tl.full((ENTRIES,), has_padding, tl.int32) != 0
    padding = tl.load(is_padding + token, mask=mask & given, other=0) != 0
    at = token * idx_out_row + k * idx_out_column
    tl.store(idx_out + at, tl.where(padding, -1, one_id), mask=mask)
    at = token * weights_out_row + k * weights_out_column
    tl.store(weights_out + at, tl.where(padding, 0.0, weight), mask=mask)


# ---- Blocks ----


@triton.jit
def _quantize(
    first, second, outer_exponent, has_special, NAN_SPOILS: tl.constexpr,
    SCALE_FLOOR: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Codes uint8 [BLOCKS, 4] of both halves and scale codes [BLOCKS], the outer scale being a
    power of two."""
    amax = steps.block_amax(first, second, NAN_SPOILS, PACKED)
    spoiled = amax > BF16_INF
    # amax / 6 and amax * fp32(1/6) round to the same E4M3 byte for every BF16 amax.
    raw = (amax << 16).to(tl.float32, bitcast=True) * power_of_two(254 - outer_exponent)
    raw *= 1.0 / 6.0
    if SCALE_FLOOR > 0:
        raw = tl.maximum(raw, SCALE_FLOOR)
    scale_code, scale = steps.encode_scale(raw, PACKED)
    first = steps.encode_divided(
        first, scale, outer_exponent, has_special, spoiled, NAN_SPOILS, PACKED
    )
    second = steps.encode_divided(
        second, scale, outer_exponent, has_special, spoiled, NAN_SPOILS, PACKED
    )
    return first, second, tl.where(spoiled, 0x7F, scale_code)


@triton.jit
def _quantize_twice_divided(
    first, second, outer, reciprocal, has_special, SCALE_FLOOR: tl.constexpr, PACKED: tl.constexpr
):
    """The same where x is divided by an outer scale that is any float32, and rounded, first."""
    if has_special:
        first, second = steps.without_nan(first), steps.without_nan(second)
    amax = (steps.block_amax(first, second, True, PACKED) << 16).to(tl.float32, bitcast=True)
    amax = steps.divide(amax, outer, reciprocal, PACKED)
    amax = tl.where(outer == float("inf"), 0.0, amax)
    scale_code, scale = steps.encode_scale(tl.maximum(amax * (1.0 / 6.0), SCALE_FLOOR), PACKED)
    t1, t2, t3, t4 = steps.thresholds(outer, scale, PACKED)
    first = steps.encode_counted(first, t1, t2, t3, t4, PACKED)
    second = steps.encode_counted(second, t1, t2, t3, t4, PACKED)
    return first, second, scale_code


# ---- The kernel ----


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def _stage(
    hidden, x_fp4, x_sf, x_scales, ids, weights, idx_out, weights_out, is_padding,
    hidden_row, x_fp4_row, x_sf_row, ids_row, ids_column, weights_row, weights_column,
    idx_out_row, idx_out_column, weights_out_row, weights_out_column,
    has_padding, tokens, copiers,
    WIDTH: tl.constexpr, TOP_K: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr,
    OUTER: tl.constexpr, NAN_SPOILS: tl.constexpr,
    SCALE_FLOOR: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """TILES tiles of a row, all of it if it has an outer scale, or BLOCKS entries of the top-k."""
    program = tl.program_id(0)
    if program < copiers:
        _copy_top_k(
            ids, weights, idx_out, weights_out, ids_row, ids_column, weights_row, weights_column,
            idx_out_row, idx_out_column, weights_out_row, weights_out_column,
            is_padding, has_padding, program * BLOCKS, tokens, TOP_K, BLOCKS,
        )  # fmt: skip
    else:
        IN_ROW: tl.constexpr = WIDTH // 16
        PARTS: tl.constexpr = (IN_ROW + BLOCKS * TILES - 1) // (BLOCKS * TILES)
        part = program - copiers
        row = (part // PARTS).to(tl.int64)
        blocks = (part % PARTS) * (BLOCKS * TILES) + tl.arange(0, BLOCKS)
        hidden += row * hidden_row
        x_fp4 += row * x_fp4_row
        x_sf += row * x_sf_row

        tiles = ()
        for tile in tl.static_range(TILES):
            block = blocks + tile * BLOCKS
            tiles += (_load_halves(hidden, block, block < IN_ROW, ALIGNED),)

        exponent = tl.full((), 127, tl.int32)  # of 1.0, where there is no outer scale
        has_special = None
        if OUTER is not None:
            amax = _row_amax(tiles, True, TILES, PACKED)
            has_special = amax >= BF16_INF
            if has_special:
                amax = _row_amax(tiles, False, TILES, PACKED)
            if OUTER == "power of two":
                exponent = token_outer_exponent(tl.minimum(amax, BF16_MAX))  # Inf as the largest
                outer = power_of_two(exponent)
            else:
                amax = (amax << 16).to(tl.float32, bitcast=True)
                outer = tl.maximum(amax, 1e-12) * (1.0 / 2688.0)
                reciprocal = tl.div_rn(1.0, outer)
            tl.store(x_scales + row, outer)

        for tile in tl.static_range(TILES):
            first, second = tiles[tile]
            if OUTER == "amax / 2688":
                first, second, scale_codes = _quantize_twice_divided(
                    first, second, outer, reciprocal, has_special, SCALE_FLOOR, PACKED
                )
            else:
                first, second, scale_codes = _quantize(
                    first, second, exponent, has_special, NAN_SPOILS, SCALE_FLOOR, PACKED
                )
            block = blocks + tile * BLOCKS
            _store_scales(x_sf, block, scale_codes, block < IN_ROW)
            _store_codes(x_fp4, block, first, second, block < IN_ROW, BLOCKS, ALIGNED)


@triton.jit
def _row_amax(tiles, NAN_SPOILS: tl.constexpr, TILES: tl.constexpr, PACKED: tl.constexpr):
    largest = steps.block_amax(tiles[0][0], tiles[0][1], NAN_SPOILS, PACKED)
    for tile in tl.static_range(1, TILES):
        amax = steps.block_amax(tiles[tile][0], tiles[tile][1], NAN_SPOILS, PACKED)
        largest = tl.maximum(largest, amax)
    return tl.max(largest, axis=0)


# ---- Launching ----


class Plan(NamedTuple):
    """How a recipe's kernel is launched for rows of one width."""

    warps: int  # a tile has 32 blocks for each
    tiles: int
    programs_a_row: int
    registers: int | None = None  # a thread's, at most


DECISIONS: dict[str, dict[str, object]] = {
    "nvfp4": {"OUTER": None, "NAN_SPOILS": True, "SCALE_FLOOR": 0.0},
    "nvfp4-token": {"OUTER": "power of two", "NAN_SPOILS": True, "SCALE_FLOOR": 0.0},
    "vllm-megamoe": {"OUTER": "amax / 2688", "NAN_SPOILS": False, "SCALE_FLOOR": 2.0**-9},
    "vllm-muse": {"OUTER": None, "NAN_SPOILS": False, "SCALE_FLOOR": 2.0**-9},
}


def plan(recipe: str, width: int) -> Plan:
    """One for all numbers of tokens, by the measurements in data/benchmarks/notes.md.

    Short programs where rows can be divided. A row that has to be one program's has four warps or
    more, and up to width 65536 four tiles at most: the loads of several rows are in flight, and a
    single row is quick. Two tiles fit 64 registers, with which more threads fit; four would spill.
    """
    in_row = width // BLOCK
    if DECISIONS[recipe]["OUTER"] is None:
        return Plan(warps=2, tiles=1, programs_a_row=triton.cdiv(in_row, 64))
    warps = min(32, max(4, triton.next_power_of_2(triton.cdiv(in_row, 128))))
    tiles = triton.cdiv(in_row, 32 * warps)
    return Plan(warps, tiles, programs_a_row=1, registers=64 if tiles <= 2 else None)


@functools.cache
def is_packed(device: torch.device) -> bool:
    """Whether the target has the instructions of `packed`; Triton's interpreter has not."""
    if knobs.runtime.interpret or torch.version.cuda is None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)


def prepare(
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    x_fp4: torch.Tensor,
    x_sf: torch.Tensor,
    topk_idx_out: torch.Tensor,
    topk_weights_out: torch.Tensor,
    x_scales: torch.Tensor | None,
    is_padding: torch.Tensor | None,
    recipe: str,
) -> Callable[..., None]:
    """A function of the first nine arguments that stages them, on the current device.

    They may be others than these, of the same dtypes, shapes, strides and device. Its first call
    for either alignment may compile; later ones go straight to the compiled kernel.

    Raises: ValueError for more programs than a launch can have.
    """
    tokens, width = hidden_states.shape
    top_k = topk_ids.shape[1]
    planned = plan(recipe, width)
    blocks = 32 * planned.warps
    copiers = triton.cdiv(tokens * top_k, blocks)
    grid = (copiers + tokens * planned.programs_a_row, 1, 1)
    if max(grid[0], tokens * top_k) > LARGEST_INT32:
        raise ValueError(f"{tokens} tokens of width {width}, top_k {top_k}: too many for a launch")
    sizes = (
        hidden_states.stride(0), x_fp4.stride(0), x_sf.stride(0),
        *topk_ids.stride(), *topk_weights.stride(),
        *topk_idx_out.stride(), *topk_weights_out.stride(),
        int(is_padding is not None), tokens, copiers,
    )  # fmt: skip
    constants = (width, top_k, blocks, planned.tiles, *DECISIONS[recipe].values())
    packed = is_packed(hidden_states.device)
    options = {"num_warps": planned.warps, "maxnreg": planned.registers if packed else None}
    rows_at = 2 * hidden_states.stride(0) | 2 * x_fp4.stride(0)
    compiled = {}

    def stage(
        hidden_states, topk_weights, topk_ids, x_fp4, x_sf, topk_idx_out, topk_weights_out,
        x_scales, is_padding,
    ) -> None:  # fmt: skip
        # 16 bytes are loaded and 8 stored at a time.
        aligned = (rows_at | hidden_states.data_ptr() | 2 * x_fp4.data_ptr()) % 16 == 0
        arguments = (
            hidden_states, x_fp4, x_sf, x_scales,
            topk_ids, topk_weights, topk_idx_out, topk_weights_out,
            x_fp4 if is_padding is None else is_padding.view(torch.uint8),
            *sizes, *constants, aligned, aligned and packed,
        )  # fmt: skip
        kernel = compiled.get(aligned)
        if kernel is None:
            with LAUNCHING:
                compiled[aligned] = _stage[grid](*arguments, **options)  # None in the interpreter
        else:
            kernel[grid](*arguments)

    return stage
