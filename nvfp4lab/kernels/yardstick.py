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

GROUP = 64  # elements that share one 32-bit word of scales: 32 words of BF16, 8 of codes, 1
WORDS, CODE_WORDS = tl.constexpr(32), tl.constexpr(8)
ALIGNED_TO = tl.constexpr(16)  # groups: so that every run of words starts on 64 bytes


@dataclass(frozen=True)
class Shape:
    """How a yardstick works: what its sweep goes over.

    vector: 32-bit words that a thread reads at a time, 1, 2 or 4 (4, 8 or 16 bytes).
    warps: of a program. at_once: code words, each of 4 words of BF16, that a thread has in flight.
    """

    vector: int
    warps: int
    at_once: int

    @property
    def elements(self) -> int:
        """Elements of a program."""
        return GROUP * 32 * self.warps * self.vector


@triton.jit
def _tile(groups, LANES: tl.constexpr):
    """(first group, groups here, lanes): a program's tile lies in one piece, word by word.

    Word i of the tile's groups is the run [i * here, (i + 1) * here) of the tile's words.
    """
    first = tl.program_id(0).to(tl.int64) * LANES
    here = tl.minimum(groups - first, LANES).to(tl.int32)
    return first, tl.multiple_of(here, ALIGNED_TO), tl.arange(0, LANES)


@triton.jit
def _down(x, codes, scales, groups, LANES: tl.constexpr, AT_ONCE: tl.constexpr):
    first, here, lane = _tile(groups, LANES)  # pyright: ignore[reportGeneralTypeIssues]
    there = lane < here
    scale = tl.zeros([LANES], tl.int32)
    for start in range(0, CODE_WORDS, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            code = tl.zeros([LANES], tl.int32)
            for j in tl.static_range(WORDS // CODE_WORDS):
                word = (start + i) * (WORDS // CODE_WORDS) + j
                code ^= tl.load(x + first * WORDS + word * here + lane, mask=there, other=0)
            tl.store(codes + first * CODE_WORDS + (start + i) * here + lane, code, mask=there)
            scale ^= code
    tl.store(scales + first + lane, scale, mask=there)


@triton.jit
def _up(codes, scales, y, groups, LANES: tl.constexpr, AT_ONCE: tl.constexpr):
    first, here, lane = _tile(groups, LANES)  # pyright: ignore[reportGeneralTypeIssues]
    there = lane < here
    scale = tl.load(scales + first + lane, mask=there, other=0)
    for start in range(0, CODE_WORDS, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            code = tl.load(codes + first * CODE_WORDS + (start + i) * here + lane, mask=there)
            for j in tl.static_range(WORDS // CODE_WORDS):
                word = (start + i) * (WORDS // CODE_WORDS) + j
                tl.store(y + first * WORDS + word * here + lane, code ^ (scale + j), mask=there)


@triton.jit
def empty(
    hidden, x_fp4, x_sf, x_scales, is_padding, ids, weights, idx_out, weights_out,
    hidden_row, x_fp4_row, x_sf_row, ids_row, ids_column, weights_row, weights_column,
    idx_out_row, idx_out_column, weights_out_row, weights_out_column,
    WIDTH: tl.constexpr, TOP_K: tl.constexpr, BLOCKS: tl.constexpr, BLOCK_TOPK: tl.constexpr,
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
    empty[(1, 1)](
        hidden_states, x_fp4, x_sf, x_scales, is_padding,
        topk_ids, topk_weights, topk_idx_out, topk_weights_out,
        hidden_states.stride(0), x_fp4.stride(0), x_sf.stride(0),
        *topk_ids.stride(), *topk_weights.stride(),
        *topk_idx_out.stride(), *topk_weights_out.stride(),
        WIDTH=hidden_states.shape[1], TOP_K=topk_ids.shape[1], BLOCKS=128, BLOCK_TOPK=8,
        num_warps=4,  # pyright: ignore[reportCallIssue]  (Triton's own argument)
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
    if n % ALIGNED_TO.value:
        raise ValueError(f"the yardstick moves multiples of 16 groups of 64 elements, got {n}")
    lanes = 32 * shape.warps * shape.vector
    kernel[(triton.cdiv(n, lanes),)](
        *args, n, LANES=lanes, AT_ONCE=shape.at_once, num_warps=shape.warps
    )
