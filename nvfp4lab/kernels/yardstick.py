"""What any staging or dequantizing kernel has to beat: the same bytes moved, and nothing else.

`launch_down` reads 2 bytes an element and writes 9/16, as staging does; `launch_up` reads 9/16 and
writes 2, as dequantizing to BF16 does. Both are elementwise: a lane reads whole 32-bit words,
combines them by xor, which keeps every byte read alive, and writes whole words; no lane needs
another's. `empty` does nothing with as many arguments as the staging kernel takes, which is what a
launch costs the host. May be changed: the ways of moving the bytes, and with them `Shape`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from nvfp4lab.kernels.staging import POINTERS, SIZES

GROUP = 64  # elements of 32 words of BF16, which become 8 words of codes and one of scales
WORDS, CODE_WORDS = tl.constexpr(4), tl.constexpr(8)  # of BF16 for a code word; for a scale word
GROUPS = 16  # that a tensor is a multiple of, so that every run of words starts on 16 bytes
TILE_ALIGNED_TO = tl.constexpr(GROUPS * 8)  # code words


@dataclass(frozen=True)
class Shape:
    """How a yardstick works: what its sweep goes over.

    vector: 32-bit words that a thread reads at a time, 1, 2 or 4 (4, 8 or 16 bytes).
    warps: of a program. times: vectors of codes of a thread, each of four vectors of BF16; 1, 2, 4
    or 8. streaming: whether the caches are told that nothing is used twice.
    """

    vector: int
    warps: int
    times: int
    streaming: bool = False

    @property
    def elements(self) -> int:
        """Elements of a program."""
        return 8 * 32 * self.warps * self.vector * self.times


@triton.jit
def _tile(code_words, LANES: tl.constexpr, TIMES: tl.constexpr):
    """(first code word, code words of each of TIMES runs, lanes): a program's tile is one piece.

    Word w of the tile's lanes is the run [w * here, (w + 1) * here) of the tile's words.
    """
    first = tl.program_id(0).to(tl.int64) * (LANES * TIMES)
    here = tl.minimum(code_words - first, LANES * TIMES).to(tl.int32) // TIMES
    whole: tl.constexpr = LANES * TIMES
    aligned: tl.constexpr = min(whole, TILE_ALIGNED_TO) // TIMES
    return first, tl.multiple_of(here, aligned), tl.arange(0, LANES)


@triton.jit
def _load(pointer, there, STREAMING: tl.constexpr):
    if STREAMING:
        return tl.load(pointer, mask=there, other=0, eviction_policy="evict_first")
    return tl.load(pointer, mask=there, other=0)


@triton.jit
def _store(pointer, value, there, STREAMING: tl.constexpr):
    if STREAMING:
        tl.store(pointer, value, mask=there, cache_modifier=".cs")
    else:
        tl.store(pointer, value, mask=there)


@triton.jit
def _down(
    x, codes, scales, code_words,
    LANES: tl.constexpr, TIMES: tl.constexpr, STREAMING: tl.constexpr,
):  # fmt: skip
    """The first lanes write the tile's scale words too: their last code word."""
    first, here, lane = _tile(code_words, LANES, TIMES)  # pyright: ignore[reportGeneralTypeIssues]
    code = tl.zeros([LANES], tl.int32)
    for i in tl.static_range(TIMES):
        code = tl.zeros([LANES], tl.int32)
        for j in tl.static_range(WORDS):
            word = x + first * WORDS + (i * WORDS + j) * here + lane
            code ^= _load(word, lane < here, STREAMING)
        _store(codes + first + i * here + lane, code, lane < here, STREAMING)
    has_scale = lane < here * TIMES // CODE_WORDS
    _store(scales + first // CODE_WORDS + lane, code, has_scale, STREAMING)


@triton.jit
def _up(
    codes, scales, y, code_words,
    LANES: tl.constexpr, TIMES: tl.constexpr, STREAMING: tl.constexpr,
):  # fmt: skip
    """The first lanes read the tile's scale words too, and write them into all their words."""
    first, here, lane = _tile(code_words, LANES, TIMES)  # pyright: ignore[reportGeneralTypeIssues]
    has_scale = lane < here * TIMES // CODE_WORDS
    scale = _load(scales + first // CODE_WORDS + lane, has_scale, STREAMING)
    for i in tl.static_range(TIMES):
        code = _load(codes + first + i * here + lane, lane < here, STREAMING) ^ scale
        for j in tl.static_range(WORDS):
            word = y + first * WORDS + (i * WORDS + j) * here + lane
            _store(word, code + j, lane < here, STREAMING)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=POINTERS)
def empty(
    hidden, x_fp4, x_sf, x_scales, ids, weights, idx_out, weights_out, is_padding,
    hidden_row, x_fp4_row, x_sf_row, ids_row, ids_column, weights_row, weights_column,
    idx_out_row, idx_out_column, weights_out_row, weights_out_column,
    has_padding, tokens, copiers,
    WIDTH: tl.constexpr, TOP_K: tl.constexpr, BLOCKS: tl.constexpr, TILES: tl.constexpr,
    OUTER: tl.constexpr, NAN_SPOILS: tl.constexpr,
    SCALE_FLOOR: tl.constexpr, ALIGNED: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Nothing, with the staging kernel's arguments."""


def launch_down(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, shape: Shape) -> None:
    """Read x, int32 (n, 32); write codes, int32 (n, 8), and scales, int32 (n,); all contiguous.

    n is a multiple of 16. Raises: ValueError otherwise, before anything is written.
    """
    _launch(_down, (x, codes, scales), x, codes, scales, shape)


def launch_up(codes: torch.Tensor, scales: torch.Tensor, y: torch.Tensor, shape: Shape) -> None:
    """Read codes, int32 (n, 8), and scales, int32 (n,); write y, int32 (n, 32)."""
    _launch(_up, (codes, scales, y), y, codes, scales, shape)


def launch_empty(
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    x_fp4: torch.Tensor,
    x_sf: torch.Tensor,
    topk_idx_out: torch.Tensor,
    topk_weights_out: torch.Tensor,
    x_scales: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
) -> None:
    """`empty` on one program, given what the staging kernel is given for these tensors."""
    tokens, width = hidden_states.shape
    arguments = (
        hidden_states, x_fp4, x_sf, x_scales,
        topk_ids, topk_weights, topk_idx_out, topk_weights_out,
        x_fp4 if is_padding is None else is_padding.view(torch.uint8),
        hidden_states.stride(0), x_fp4.stride(0), x_sf.stride(0),
        *topk_ids.stride(), *topk_weights.stride(),
        *topk_idx_out.stride(), *topk_weights_out.stride(),
        int(is_padding is not None), tokens, 1,
    )  # fmt: skip
    empty[(1,)](
        *arguments, WIDTH=width, TOP_K=topk_ids.shape[1], BLOCKS=64, TILES=1, OUTER=None,
        NAN_SPOILS=True, SCALE_FLOOR=0.0, ALIGNED=True, PACKED=True,
        num_warps=2,  # pyright: ignore[reportCallIssue]  (Triton's own argument)
    )  # fmt: skip


def _launch(kernel, args, wide, codes, scales, shape: Shape) -> None:
    n = scales.numel()
    wanted = ((wide, (n, 32)), (codes, (n, 8)), (scales, (n,)))
    for tensor, expected in wanted:
        if tensor.shape != expected or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            raise ValueError(
                f"the yardstick moves contiguous int32 {expected}, "
                f"got {tensor.dtype} {tuple(tensor.shape)}"
            )
    if n % GROUPS:
        raise ValueError(
            f"the yardstick moves multiples of {GROUPS} groups of {GROUP} elements, got {n}"
        )
    grid = (triton.cdiv(n * GROUP, shape.elements),)
    kernel[grid](
        *args,
        n * CODE_WORDS.value,
        LANES=32 * shape.warps * shape.vector,
        TIMES=shape.times,
        STREAMING=shape.streaming,
        num_warps=shape.warps,
    )
