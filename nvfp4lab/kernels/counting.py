"""Launches of the kernels in `errors`: the totals of a piece of a tensor, and single blocks.

`statistics.in_triton` hands in pieces and tables and names what comes out. The sizes below are for
a GPU's many processors; results do not depend on them, but for the order of sums. May be changed:
these sizes, by measurement.
"""

# pyright: reportCallIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from nvfp4lab.kernels import LAUNCHING, errors

COPIES = 512  # of the totals
PROGRAMS = 4096  # a launch has about as many, however many rows there are
BLOCKS = 64  # of a row that a program works on together, one for each thread
CHANNELS = 512  # the same of channels
NOT_FUSED = {"enable_fp_fusion": False}


@dataclass(frozen=True, eq=False)
class Totals:
    """What `count` adds up of a piece of R rows, cut into tiles [R, runs]."""

    row_xx: torch.Tensor  # float64 [R, runs]
    row_ee: torch.Tensor
    row_lost: torch.Tensor  # int32
    tile_ee: torch.Tensor  # float64 [R, runs] of the tile's worst block
    tile_lost: torch.Tensor  # int32
    channels: torch.Tensor  # float64 [3, K]: xx, ee, xq
    sums: torch.Tensor  # float64 [COPIES, .]: where what begins is in SUMS
    counts: torch.Tensor  # int32 [COPIES, .]: in COUNTS
    largest: torch.Tensor  # the bits of float64 [3]: LARGEST


@dataclass(frozen=True, eq=False)
class Piece:
    """x [R, K] of any strides, codes uint8 [n, block] or two to a byte [n, block / 2], stored
    scales uint8 or float32 [n] and g float32 [1] or [R], with the value of each element code and of
    each scale code (None for float32 scales); n blocks, row-major."""

    x: torch.Tensor
    codes: torch.Tensor
    stored: torch.Tensor
    g: torch.Tensor
    element_values: torch.Tensor
    scale_values: torch.Tensor | None

    @property
    def block(self) -> int:
        return self.x.numel() // len(self.codes)

    @property
    def blocks_in_row(self) -> int:
        return len(self.codes) // len(self.x)

    def cut(self) -> tuple[int, int, int]:
        """Blocks in a row, in a tile, and tiles in a row."""
        in_tile = min(BLOCKS, 1 << (self.blocks_in_row - 1).bit_length())
        return self.blocks_in_row, in_tile, -(-self.blocks_in_row // in_tile)

    def constants(self) -> dict:
        return {"BLOCK": self.block, "PACKED": self.codes.shape[1] < self.block}


def count(piece: Piece, qsnr_edges: torch.Tensor, constants: dict) -> Totals:
    """Two launches over the piece, on the current device.

    qsnr_edges: float64 [127], rising. constants: those of `_count_blocks` that say where bins are.
    """
    rows, width = piece.x.shape
    in_row, in_tile, runs = piece.cut()
    totals = _zeros(rows, runs, width, piece.x.device)
    strides = (*piece.x.stride(), int(len(piece.g) > 1))
    channel_runs = triton.cdiv(width, CHANNELS)
    at_once = triton.cdiv(rows * channel_runs, PROGRAMS)
    with LAUNCHING:
        errors._count_channels[(channel_runs * triton.cdiv(rows, at_once),)](
            *vars(piece).values(), totals.channels, totals.counts,
            channel_runs, rows, at_once, in_row, *strides,
            SIZE=CHANNELS, COPIES=COPIES, **piece.constants(),
            CODE_BINS=512 if len(piece.element_values) > 16 else 32,  # one more than codes
            num_warps=4, **NOT_FUSED,
        )  # fmt: skip
    at_once = triton.cdiv(rows * runs, PROGRAMS)
    of_blocks = [part for name, part in vars(totals).items() if name != "channels"]
    with LAUNCHING:
        errors._count_blocks[(runs * triton.cdiv(rows, at_once),)](
            *vars(piece).values(), qsnr_edges, *of_blocks, runs, rows, at_once, in_row, *strides,
            BLOCKS=in_tile, COPIES=COPIES, **piece.constants(), **constants,
            num_warps=triton.cdiv(in_tile, 32), **NOT_FUSED,
        )  # fmt: skip
    return totals


def _zeros(rows: int, runs: int, width: int, device: torch.device) -> Totals:
    """Totals to add to, in few allocations."""
    tiles = torch.empty(3, rows, runs, dtype=torch.float64, device=device)
    lost = torch.empty(2, rows, runs, dtype=torch.int32, device=device)
    sizes = (COPIES * errors.SUMS["size"], 3 * width, len(errors.LARGEST))
    sums, channels, largest = torch.zeros(sum(sizes), dtype=torch.float64, device=device).split(
        sizes
    )
    counts = torch.zeros(COPIES, errors.COUNTS["size"], dtype=torch.int32, device=device)
    return Totals(
        row_xx=tiles[0],
        row_ee=tiles[1],
        row_lost=lost[0],
        tile_ee=tiles[2],
        tile_lost=lost[1],
        channels=channels.view(3, width),
        sums=sums.view(COPIES, -1),
        counts=counts,
        largest=largest.view(torch.int64),
    )


def describe(piece: Piece, tiles: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Every block of the tiles int64 [m] (row * runs + run), [m, blocks of a tile]: which block of
    the piece it is (beyond the row: -1), its lost elements, ee and amax, and x [m, ., block]."""
    in_row, in_tile, runs = piece.cut()
    shape, device = (len(tiles), in_tile), piece.x.device
    lost = torch.empty(shape, dtype=torch.int32, device=device)
    ee = torch.empty(shape, dtype=torch.float64, device=device)
    amax = torch.empty(shape, dtype=torch.float32, device=device)
    x = torch.empty(*shape, piece.block, dtype=torch.float32, device=device)
    with LAUNCHING:
        errors._describe[(len(tiles),)](
            *vars(piece).values(), tiles, lost, ee, amax, x,
            runs, in_row, *piece.x.stride(), int(len(piece.g) > 1),
            BLOCKS=in_tile, **piece.constants(),
            num_warps=triton.cdiv(in_tile, 32), **NOT_FUSED,
        )  # fmt: skip
    block = (tiles % runs)[:, None] * in_tile + torch.arange(in_tile, device=device)
    index = (tiles // runs)[:, None] * in_row + block
    return index.where(block < in_row, -1), lost, ee, amax, x
