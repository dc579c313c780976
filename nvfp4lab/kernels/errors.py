"""The errors of a piece of a tensor: one pass over x and its codes, every sum in float64.

Read from the bottom: `count` launches `_count`, in which a program takes a run of blocks through a
run of rows, a tile of one row at a time; `describe` writes out the blocks of single tiles. What is
counted is said in `statistics.contents`, the bins are those of `statistics.bins`;
`statistics.in_triton` hands in tables and takes the totals apart by SUMS and COUNTS.

Totals go by atomics to one of COPIES private copies: Triton adds nothing in shared memory, and in a
single copy all programs would wait for the same few bins. No product is fused with a sum, so that
what torch rounds is rounded here too, and sums of x^2 and e^2 that are equal stay equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

COPIES = 512
TILE = 512  # elements of one row that a program works on together
PROGRAMS = 4096  # a launch has about as many, however many rows there are
MOST_ROWS = 255  # that a program may take: counts of elements are kept in bytes
WARPS = 4

FLOAT32_MAX, INFINITY = tl.constexpr(3.4028234663852886e38), tl.constexpr(float("inf"))
FLOAT64_EXPONENT = tl.constexpr(1022)  # of frexp: what an exponent field is larger by

# Where each part of a copy of the totals begins: float64 sums, then int32 counts.
QUOTIENT_E, QUOTIENT_EE, AMAX_XX, AMAX_EE, SUM_OF_ELEMENTS, SUM_OF_BLOCKS, SUMS_SIZE = (
    tl.constexpr(start) for start in (0, 128, 256, 768, 1280, 1283, 1287)
)
(
    QUOTIENTS, CODES, SCALES, AMAX_BLOCKS, AMAX_LOST, BLOCK_QSNR, CREST_COUNTS, COUNT_OF_ELEMENTS,
    COUNTS_SIZE,
) = (
    tl.constexpr(start) for start in (0, 128, 640, 896, 1408, 1920, 2048, 2176, 2180)
)  # fmt: skip
SUMS = {
    "quotient_e": QUOTIENT_E.value,
    "quotient_ee": QUOTIENT_EE.value,
    "amax_xx": AMAX_XX.value,
    "amax_ee": AMAX_EE.value,
    "sum_qq": SUM_OF_ELEMENTS.value,
    "sum_abs_e": SUM_OF_ELEMENTS.value + 1,
    "sum_e": SUM_OF_ELEMENTS.value + 2,
    "sum_ee_max": SUM_OF_BLOCKS.value,
    "sum_ee_other": SUM_OF_BLOCKS.value + 1,
    "sum_ee_zero_scale": SUM_OF_BLOCKS.value + 2,
    "sum_crest": SUM_OF_BLOCKS.value + 3,
}
COUNTS = {
    "quotient_elements": QUOTIENTS.value,
    "element_codes": CODES.value,
    "scales": SCALES.value,  # by code; float32 ones: zero, NaN, neither
    "amax_blocks": AMAX_BLOCKS.value,
    "amax_lost": AMAX_LOST.value,
    "block_qsnr": BLOCK_QSNR.value,
    "crest_counts": CREST_COUNTS.value,
    "nonfinite_input": COUNT_OF_ELEMENTS.value,
    "nonzero": COUNT_OF_ELEMENTS.value + 1,
    "flushed": COUNT_OF_ELEMENTS.value + 2,
    "saturated": COUNT_OF_ELEMENTS.value + 3,
}
LARGEST = ("max_abs_e", "max_rel_e", "amax")


@triton.jit
def _decode(value, s, g):
    """value * s, then * g, each product rounded once, as `quantized.decode`: NaN stays NaN, and
    what is beyond the largest float32 becomes it unless the scale is Inf."""
    decoded = value * s * g
    beyond = (tl.abs(decoded) > FLOAT32_MAX) & (tl.abs(s) != INFINITY)
    return tl.where(beyond, tl.where(decoded > 0, FLOAT32_MAX, -FLOAT32_MAX), decoded)


@triton.jit
def _load_tile(
    x, codes, stored, g, scale_values, row, block, blocks_in_row,
    row_stride, column_stride, g_stride, BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Blocks of one row: x as float32 and codes as int32 [BLOCKS, BLOCK]; stored scales, as int32
    where they are codes, and what they decode to, float32 [BLOCKS]; the row's g."""
    inside = block < blocks_in_row
    lane = tl.arange(0, BLOCK)[None, :]
    element = block[:, None].to(tl.int64) * BLOCK + lane
    at = x + row * row_stride + element * column_stride
    values = tl.load(at, mask=inside[:, None], other=0.0).to(tl.float32)

    place = row * blocks_in_row + block
    if PACKED:
        byte = tl.load(
            codes + place[:, None] * (BLOCK // 2) + lane // 2, mask=inside[:, None], other=0
        )
        code = (byte.to(tl.int32) >> ((lane & 1) * 4)) & 15
    else:
        code = tl.load(codes + place[:, None] * BLOCK + lane, mask=inside[:, None], other=0)
        code = code.to(tl.int32)
    scale = tl.load(stored + place, mask=inside, other=0)
    if scale_values is None:
        s = scale
    else:
        scale = scale.to(tl.int32)
        s = tl.load(scale_values + scale)
    return values, code, scale, s, tl.load(g + row * g_stride)


@triton.jit
def _masks(x, q, inside):
    """Which elements are finite, and which are counted: x and q both finite."""
    finite = (tl.abs(x) < INFINITY) & inside[:, None]
    return finite, finite & (tl.abs(q) < INFINITY)


@triton.jit
def _amax_bin(amax, FIRST_EXPONENT: tl.constexpr):
    """`bins.amax_bin` of float32: a float64's exponent field, which has no subnormals here."""
    field = (amax.to(tl.float64).to(tl.int64, bitcast=True) >> 52).to(tl.int32)
    return tl.where(amax > 0, field - FLOAT64_EXPONENT - FIRST_EXPONENT + 1, 0)


@triton.jit
def _qsnr_bin(xx, ee, lost, edges, QSNR_COUNT: tl.constexpr):
    """`bins.qsnr_bin`: how many of the 127 edges, the last ones Inf, are below ee / xx."""
    nmse = tl.where(ee > 0, ee / tl.where(ee > 0, xx, 1.0), 0.0)
    below = tl.zeros_like(lost)
    for bit in tl.static_range(6, -1, -1):
        edge = tl.load(edges + below + ((1 << bit) - 1))
        below += tl.where(edge < nmse, 1 << bit, 0)
    return tl.where(lost == 0, QSNR_COUNT - 2 - below, QSNR_COUNT - 1)


@triton.jit
def _count(
    x, codes, stored, g, element_values, scale_values, qsnr_edges,
    row_xx, row_ee, row_lost, tile_ee, tile_lost, channels, sums, counts, largest,
    runs, rows, rows_at_once, blocks_in_row, row_stride, column_stride, g_stride,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, COPIES: tl.constexpr, PACKED: tl.constexpr,
    CODE_BINS: tl.constexpr, LARGEST_ELEMENT: tl.constexpr, INVERSE_WIDTH: tl.constexpr,
    QUOTIENT_BINS: tl.constexpr, FIRST_EXPONENT: tl.constexpr, CREST_FROM: tl.constexpr,
    CREST_PER_UNIT: tl.constexpr, CREST_COUNT: tl.constexpr, QSNR_COUNT: tl.constexpr,
):  # fmt: skip
    """Program i: run i % runs of blocks, through run i // runs of rows.

    row_*, tile_*: [rows, runs of blocks], a tile's sums and its worst block. channels: float64
    [3, K]. sums, counts: [COPIES, size], added to. largest: bits of float64 [3], raised.
    """
    run, copy = tl.program_id(0) % runs, tl.program_id(0) % COPIES
    sums += copy * SUMS_SIZE
    counts += copy * COUNTS_SIZE
    block = run * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks_in_row
    lane = tl.arange(0, BLOCK)[None, :]

    channel_xx = tl.zeros([BLOCKS, BLOCK], tl.float64)
    channel_ee, channel_xq = channel_xx, channel_xx
    qq, abs_sum, e_sum = channel_xx, channel_xx, channel_xx
    max_abs, max_rel = channel_xx, channel_xx
    of_elements = tl.zeros([BLOCKS, BLOCK], tl.int32)  # four counts of up to 255 rows
    largest_amax = tl.zeros([BLOCKS], tl.float32)
    ee_max = tl.zeros([BLOCKS], tl.float64)
    ee_other, ee_zero, crest_sum = ee_max, ee_max, ee_max
    code_counts = tl.zeros([CODE_BINS], tl.int32)
    quotient_counts = tl.zeros([128], tl.int32)

    first_row = tl.program_id(0) // runs * rows_at_once
    for row_in_run in range(0, tl.minimum(rows_at_once, rows - first_row)):
        row = (first_row + row_in_run).to(tl.int64)
        values, code, scale, s, outer = _load_tile(
            x, codes, stored, g, scale_values, row, block, blocks_in_row,
            row_stride, column_stride, g_stride, BLOCK, PACKED,
        )  # fmt: skip
        decoded = _decode(tl.load(element_values + code), s[:, None], outer)
        finite, counted = _masks(values, decoded, inside)
        magnitude = tl.where(finite, tl.abs(values), 0.0)
        amax = tl.max(magnitude, axis=1)
        all_xx = magnitude.to(tl.float64) * magnitude.to(tl.float64)
        power = tl.sum(all_xx, axis=1)
        lost = tl.sum((finite & (counted == 0)).to(tl.int32), axis=1)

        # From here on an element that is not counted is zero in x and q.
        magnitude = tl.where(counted, magnitude, 0.0)
        x32, q32 = tl.where(counted, values, 0.0), tl.where(counted, decoded, 0.0)
        x64, q64 = x32.to(tl.float64), q32.to(tl.float64)
        e = q64 - x64
        abs_e, ee, xx = tl.abs(e), e * e, tl.where(counted, all_xx, 0.0)
        channel_xx += xx
        channel_ee += ee
        channel_xq += x64 * q64
        qq += q64 * q64
        abs_sum += abs_e
        e_sum += e
        max_abs = tl.maximum(max_abs, abs_e)
        relative = abs_e / tl.where(x32 != 0, magnitude, 1.0).to(tl.float64)
        max_rel = tl.maximum(max_rel, tl.where(x32 != 0, relative, 0.0))

        limit = tl.abs(_decode(LARGEST_ELEMENT, s, outer))[:, None]
        saturated = (magnitude > limit) & (limit > 0)
        flushed = (x32 != 0) & (q32 == 0)
        of_elements += ((finite == 0) & inside[:, None]).to(tl.int32)
        of_elements += (x32 != 0).to(tl.int32) << 8
        of_elements += flushed.to(tl.int32) << 16
        of_elements += saturated.to(tl.int32) << 24

        # Blocks.
        block_xx, block_ee = tl.sum(xx, axis=1), tl.sum(ee, axis=1)
        largest_amax = tl.maximum(largest_amax, amax)
        is_largest = magnitude == tl.max(magnitude, axis=1)[:, None]
        first_largest = tl.min(tl.where(is_largest, lane, BLOCK), axis=1)
        of_max = tl.sum(tl.where(lane == first_largest[:, None], ee, 0.0), axis=1)
        ee_max += tl.where(s == 0, 0.0, of_max)
        ee_other += tl.where(s == 0, 0.0, block_ee - of_max)
        ee_zero += tl.where(s == 0, block_ee, 0.0)
        amax_bin = _amax_bin(amax, FIRST_EXPONENT)
        tl.atomic_add(counts + AMAX_BLOCKS + amax_bin, 1, mask=inside, sem="relaxed")
        tl.atomic_add(counts + AMAX_LOST + amax_bin, lost, mask=lost > 0, sem="relaxed")
        tl.atomic_add(sums + AMAX_XX + amax_bin, block_xx, mask=block_xx > 0, sem="relaxed")
        tl.atomic_add(sums + AMAX_EE + amax_bin, block_ee, mask=block_ee > 0, sem="relaxed")
        qsnr_bin = _qsnr_bin(block_xx, block_ee, lost, qsnr_edges, QSNR_COUNT)
        tl.atomic_add(counts + BLOCK_QSNR + qsnr_bin, 1, mask=inside, sem="relaxed")
        has_crest = (amax > 0) & (tl.sum(finite.to(tl.int32), axis=1) == BLOCK)
        crest = amax.to(tl.float64) / tl.sqrt(tl.where(has_crest, power, 1.0) / BLOCK)
        crest_bin = tl.minimum(tl.maximum((crest - CREST_FROM) * CREST_PER_UNIT, 0), CREST_COUNT - 1)
        crest_sum += tl.where(has_crest, crest, 0.0)
        tl.atomic_add(
            counts + CREST_COUNTS + crest_bin.to(tl.int32), 1, mask=has_crest, sem="relaxed"
        )
        if scale_values is None:
            scale_bin = tl.where(s == 0, 0, tl.where(s == s, 2, 1))
        else:
            scale_bin = scale
        tl.atomic_add(counts + SCALES + scale_bin, 1, mask=inside, sem="relaxed")

        # Codes, and the quotients |x| / (s g) with the errors in steps of s g.
        code_counts += tl.histogram(
            tl.reshape(tl.where(inside[:, None], code, CODE_BINS - 1), [BLOCKS * BLOCK]), CODE_BINS
        )
        step = tl.abs(s.to(tl.float64) * outer.to(tl.float64))
        usable = (step > 0) & (step < INFINITY)
        step = tl.where(usable, step, 1.0)[:, None]
        # Divided, not multiplied by a reciprocal: teeth of the sawtooth lie on edges of bins.
        quotient_bin = tl.minimum(
            magnitude.to(tl.float64) / step * INVERSE_WIDTH, QUOTIENT_BINS
        ).to(tl.int32)
        in_bin = counted & usable[:, None]
        steps = e * (1.0 / step)
        quotient_counts += tl.histogram(
            tl.reshape(tl.where(in_bin, quotient_bin, 127), [BLOCKS * BLOCK]), 128
        )
        outward = tl.where(x32 > 0, steps, -steps)
        nonzero_e = in_bin & (e != 0)
        tl.atomic_add(
            sums + QUOTIENT_E + quotient_bin, outward, mask=nonzero_e & (x32 != 0), sem="relaxed"
        )
        tl.atomic_add(
            sums + QUOTIENT_EE + quotient_bin, steps * steps, mask=nonzero_e, sem="relaxed"
        )

        # The row, and its worst block: most elements lost, then the largest error.
        tile = row * runs + run
        most_lost = tl.max(lost, axis=0)
        tl.store(row_xx + tile, tl.sum(block_xx, axis=0))
        tl.store(row_ee + tile, tl.sum(block_ee, axis=0))
        tl.store(row_lost + tile, tl.sum(lost, axis=0))
        tl.store(tile_lost + tile, most_lost)
        tl.store(tile_ee + tile, tl.max(tl.where(lost == most_lost, block_ee, 0.0), axis=0))

    width = blocks_in_row.to(tl.int64) * BLOCK
    channel = channels + block[:, None].to(tl.int64) * BLOCK + lane
    tl.atomic_add(channel, channel_xx, mask=inside[:, None], sem="relaxed")
    tl.atomic_add(channel + width, channel_ee, mask=inside[:, None], sem="relaxed")
    tl.atomic_add(channel + 2 * width, channel_xq, mask=inside[:, None], sem="relaxed")

    tl.atomic_add(sums + SUM_OF_ELEMENTS, _sum_of_all(qq), sem="relaxed")
    tl.atomic_add(sums + SUM_OF_ELEMENTS + 1, _sum_of_all(abs_sum), sem="relaxed")
    tl.atomic_add(sums + SUM_OF_ELEMENTS + 2, _sum_of_all(e_sum), sem="relaxed")
    tl.atomic_add(sums + SUM_OF_BLOCKS, tl.sum(ee_max, axis=0), sem="relaxed")
    tl.atomic_add(sums + SUM_OF_BLOCKS + 1, tl.sum(ee_other, axis=0), sem="relaxed")
    tl.atomic_add(sums + SUM_OF_BLOCKS + 2, tl.sum(ee_zero, axis=0), sem="relaxed")
    tl.atomic_add(sums + SUM_OF_BLOCKS + 3, tl.sum(crest_sum, axis=0), sem="relaxed")
    for which in tl.static_range(4):
        number = _sum_of_all((of_elements >> (8 * which)) & 255)
        tl.atomic_add(counts + COUNT_OF_ELEMENTS + which, number, sem="relaxed")
    tl.atomic_add(counts + CODES + tl.arange(0, CODE_BINS), code_counts, sem="relaxed")
    tl.atomic_add(counts + QUOTIENTS + tl.arange(0, 128), quotient_counts, sem="relaxed")

    # float64 numbers from 0 up are ordered as their bits are.
    _raise(largest, tl.max(tl.max(max_abs, axis=1), axis=0))
    _raise(largest + 1, tl.max(tl.max(max_rel, axis=1), axis=0))
    _raise(largest + 2, tl.max(largest_amax, axis=0).to(tl.float64))


@triton.jit
def _sum_of_all(tile):
    return tl.sum(tl.sum(tile, axis=1), axis=0)


@triton.jit
def _raise(largest, value):
    tl.atomic_max(largest, value.to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit
def _describe(
    x, codes, stored, g, element_values, scale_values, tiles, lost_out, ee_out, amax_out, x_out,
    runs, blocks_in_row, row_stride, column_stride, g_stride,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Program i writes what is told of worst blocks, of every block of the i-th of `tiles`."""
    tile = tl.load(tiles + tl.program_id(0))
    row, run = tile // runs, tile % runs
    block = (run * BLOCKS).to(tl.int32) + tl.arange(0, BLOCKS)
    values, code, scale, s, outer = _load_tile(
        x, codes, stored, g, scale_values, row, block, blocks_in_row,
        row_stride, column_stride, g_stride, BLOCK, PACKED,
    )  # fmt: skip
    decoded = _decode(tl.load(element_values + code), s[:, None], outer)
    finite, counted = _masks(values, decoded, block < blocks_in_row)
    x64 = tl.where(counted, values, 0.0).to(tl.float64)
    e = tl.where(counted, decoded, 0.0).to(tl.float64) - x64

    at = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    tl.store(lost_out + at, tl.sum((finite & (counted == 0)).to(tl.int32), axis=1))
    tl.store(ee_out + at, tl.sum(e * e, axis=1))
    tl.store(amax_out + at, tl.max(tl.where(finite, tl.abs(values), 0.0), axis=1))
    tl.store(x_out + at[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], values)




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
        in_tile = min(TILE // self.block, triton.next_power_of_2(self.blocks_in_row))
        return self.blocks_in_row, in_tile, triton.cdiv(self.blocks_in_row, in_tile)

    def constants(self) -> dict:
        return {"BLOCK": self.block, "PACKED": self.codes.shape[1] < self.block}


def count(piece: Piece, qsnr_edges: torch.Tensor, constants: dict) -> Totals:
    """One launch over the piece, on the current device.

    qsnr_edges: float64 [127], rising. constants: those of the kernel that say where bins are.
    """
    rows, width = piece.x.shape
    in_row, in_tile, runs = piece.cut()
    floats = {"dtype": torch.float64, "device": piece.x.device}
    tiles = torch.empty(3, rows, runs, **floats)
    lost = torch.empty(2, rows, runs, dtype=torch.int32, device=piece.x.device)
    sums = torch.zeros(COPIES * SUMS_SIZE.value + 3 * width + 3, **floats)
    sums, channels, largest = sums.split((COPIES * SUMS_SIZE.value, 3 * width, 3))
    counts = torch.zeros(COPIES, COUNTS_SIZE.value, dtype=torch.int32, device=piece.x.device)
    totals = Totals(
        tiles[0], tiles[1], lost[0], tiles[2], lost[1],
        channels.view(3, width), sums.view(COPIES, -1), counts, largest.view(torch.int64),
    )  # fmt: skip
    at_once = min(MOST_ROWS, triton.cdiv(rows * runs, PROGRAMS))
    _count[(runs * triton.cdiv(rows, at_once),)](
        *vars(piece).values(), qsnr_edges, *vars(totals).values(),
        runs, rows, at_once, in_row, *piece.x.stride(), int(len(piece.g) > 1),
        BLOCKS=in_tile, COPIES=COPIES, **piece.constants(), **constants,
        num_warps=WARPS, enable_fp_fusion=False,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    return totals


def describe(piece: Piece, tiles: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Every block of the tiles int64 [m] (row * runs + run), [m, blocks of a tile]: which block of
    the piece it is (beyond the row: -1), its lost elements, ee and amax, and x [m, ., block]."""
    in_row, in_tile, runs = piece.cut()
    shape, device = (len(tiles), in_tile), piece.x.device
    lost = torch.empty(shape, dtype=torch.int32, device=device)
    ee = torch.empty(shape, dtype=torch.float64, device=device)
    amax = torch.empty(shape, device=device)
    x = torch.empty(*shape, piece.block, device=device)
    _describe[(len(tiles),)](
        *vars(piece).values(), tiles, lost, ee, amax, x,
        runs, in_row, *piece.x.stride(), int(len(piece.g) > 1),
        BLOCKS=in_tile, **piece.constants(),
        num_warps=WARPS, enable_fp_fusion=False,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    block = (tiles % runs)[:, None] * in_tile + torch.arange(in_tile, device=device)
    index = (tiles // runs)[:, None] * in_row + block
    return index.where(block < in_row, -1), lost, ee, amax, x
