"""The staging kernel for `nvfp4` and `nvfp4-token`: BF16 rows in; codes, scale words, top-k out.

Read from the bottom: `launch` picks the grid, `_stage` finds a token's outer scale and copies its
top-k, `_stage_blocks` does the work on a run of blocks. Checks are in `nvfp4lab.staging`, formats
in `numerics`. A row's base is a 64-bit offset; inside a row int32 is enough.

No bit depends on whether float32 subnormals are flushed. Multiplying by a power of two is exact
above 2^-126, where the outer scale 2^117 leaves 1 / 448; a product that falls below it, or a BF16
subnormal under any outer scale from 2^-100 up, is smaller than half the least scale or a quarter
of it, and stands for zero either way.
"""

import torch
import triton
import triton.language as tl

from nvfp4lab.kernels.numerics import (
    decode_e4m3,
    encode_e2m1,
    encode_e4m3,
    power_of_two,
    token_outer_exponent,
)

BLOCK = tl.constexpr(16)
BF16_INF = tl.constexpr(0x7F80)
BF16_MAX = tl.constexpr(0x7F7F)
BLOCKS_AT_ONCE = 128  # blocks that a program works on together: one for each thread of 4 warps


@triton.jit
def _load_bits(row, first_block, WIDTH: tl.constexpr, BLOCKS: tl.constexpr):
    """The BF16 bits of BLOCKS blocks as int32 [BLOCKS, 8, 2], zero past the end of the row."""
    block = first_block + tl.arange(0, BLOCKS)[:, None, None]
    within = tl.arange(0, 8)[None, :, None] * 2 + tl.arange(0, 2)[None, None, :]
    x = tl.load(row + block * BLOCK + within, mask=block < WIDTH // BLOCK, other=0.0)
    return x.to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _stage_blocks(
    row, codes_row, words_row, first_block, inverse_outer, WIDTH: tl.constexpr, BLOCKS: tl.constexpr
):
    """Quantize BLOCKS blocks of a row: codes to bytes, scales to words."""
    bits = _load_bits(row, first_block, WIDTH, BLOCKS)
    magnitude = bits & 0x7FFF  # ordered as the numbers are, NaN above Inf
    amax = tl.max(tl.max(magnitude, axis=2), axis=1)
    has_nan = amax > BF16_INF

    # amax / 6 and amax * fp32(1/6) round to the same E4M3 byte for every BF16 amax.
    raw_scale = (amax << 16).to(tl.float32, bitcast=True) * inverse_outer * (1.0 / 6.0)
    scale_code = tl.where(has_nan, 0x7F, encode_e4m3(raw_scale))
    is_zero = scale_code == 0
    scale = decode_e4m3(tl.where(is_zero | has_nan, 8, scale_code))
    reciprocal = tl.where(is_zero, 0.0, tl.div_rn(1.0, scale) * inverse_outer)

    x = (magnitude << 16).to(tl.float32, bitcast=True)
    signed = encode_e2m1(x, reciprocal[:, None, None]) | ((bits >> 12) & 8)
    even, odd = tl.split(tl.where(has_nan[:, None, None], 7, signed))

    block = first_block + tl.arange(0, BLOCKS)[:, None]
    byte = block * (BLOCK // 2) + tl.arange(0, 8)[None, :]
    tl.store(codes_row + byte, (even | (odd << 4)).to(tl.uint8), mask=block < WIDTH // BLOCK)

    word = first_block // 4 + tl.arange(0, BLOCKS // 4)
    shift = tl.arange(0, 4)[None, :] * 8
    words = tl.sum(tl.reshape(scale_code, [BLOCKS // 4, 4]) << shift, axis=1)
    tl.store(words_row + word, words, mask=word < WIDTH // (4 * BLOCK))


@triton.jit
def _copy_top_k(
    ids, weights, idx_out, weights_out, ids_column, weights_column, idx_out_column,
    weights_out_column, is_padding, token, TOP_K: tl.constexpr, BLOCK_TOPK: tl.constexpr,
):  # fmt: skip
    """One token's ids to int64 and weights to float32; a padding token gets -1 and 0."""
    k = tl.arange(0, BLOCK_TOPK).to(tl.int64)  # a column may lie anywhere
    one_id = tl.load(ids + k * ids_column, mask=k < TOP_K, other=0).to(tl.int64)
    weight = tl.load(weights + k * weights_column, mask=k < TOP_K, other=0.0).to(tl.float32)
    if is_padding is not None:
        padding = tl.load(is_padding + token) != 0
        one_id = tl.where(padding, -1, one_id)
        weight = tl.where(padding, 0.0, weight)
    tl.store(idx_out + k * idx_out_column, one_id, mask=k < TOP_K)
    tl.store(weights_out + k * weights_out_column, weight, mask=k < TOP_K)


@triton.jit
def _stage(
    hidden, x_fp4, x_sf, x_scales, is_padding, ids, weights, idx_out, weights_out,
    hidden_row, x_fp4_row, x_sf_row, ids_row, ids_column, weights_row, weights_column,
    idx_out_row, idx_out_column, weights_out_row, weights_out_column,
    WIDTH: tl.constexpr, TOP_K: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_TOPK: tl.constexpr,
):  # fmt: skip
    """Without x_scales, program (token, c) does the c-th run of BLOCKS blocks of the row; with
    it, program (token, 0) does the row: its amax first, then its blocks.
    """
    token = tl.program_id(0).to(tl.int64)
    row = hidden + token * hidden_row
    codes_row = x_fp4 + token * x_fp4_row
    words_row = x_sf + token * x_sf_row

    if x_scales is None:
        _stage_blocks(row, codes_row, words_row, tl.program_id(1) * BLOCKS, 1.0, WIDTH, BLOCKS)
    else:
        largest = tl.zeros([BLOCKS, 8, 2], tl.int32)
        for first_block in range(0, WIDTH // BLOCK, BLOCKS):
            magnitude = _load_bits(row, first_block, WIDTH, BLOCKS) & 0x7FFF
            largest = tl.maximum(largest, tl.where(magnitude > BF16_INF, 0, magnitude))
        amax = tl.minimum(tl.max(tl.reshape(largest, [BLOCKS * 16])), BF16_MAX)  # Inf as the max
        exponent = token_outer_exponent(amax)
        tl.store(x_scales + token, power_of_two(exponent))
        for first_block in range(0, WIDTH // BLOCK, BLOCKS):
            _stage_blocks(
                row, codes_row, words_row, first_block, power_of_two(254 - exponent), WIDTH, BLOCKS
            )

    if tl.program_id(1) == 0:
        _copy_top_k(
            ids + token * ids_row, weights + token * weights_row,
            idx_out + token * idx_out_row, weights_out + token * weights_out_row,
            ids_column, weights_column, idx_out_column, weights_out_column,
            is_padding, token, TOP_K, BLOCK_TOPK,
        )  # fmt: skip


def launch(
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    x_fp4: torch.Tensor,
    x_sf: torch.Tensor,
    topk_idx_out: torch.Tensor,
    topk_weights_out: torch.Tensor,
    x_scales: torch.Tensor | None,
    is_padding: torch.Tensor | None,
) -> None:
    """One launch over checked tensors on the current device; x_scales makes it `nvfp4-token`."""
    tokens, width = hidden_states.shape
    top_k = topk_ids.shape[1]
    blocks = min(BLOCKS_AT_ONCE, triton.next_power_of_2(width // BLOCK.value))
    runs = 1 if x_scales is not None else triton.cdiv(width // BLOCK.value, blocks)
    _stage[(tokens, runs)](
        hidden_states, x_fp4, x_sf, x_scales, is_padding,
        topk_ids, topk_weights, topk_idx_out, topk_weights_out,
        hidden_states.stride(0), x_fp4.stride(0), x_sf.stride(0),
        *topk_ids.stride(), *topk_weights.stride(),
        *topk_idx_out.stride(), *topk_weights_out.stride(),
        WIDTH=width, TOP_K=top_k, BLOCKS=blocks,
        BLOCK_TOPK=triton.next_power_of_2(max(1, top_k)),
        num_warps=4,  # pyright: ignore[reportCallIssue]  (Triton's own argument)
    )  # fmt: skip
