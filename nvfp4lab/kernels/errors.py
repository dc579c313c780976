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
BLOCKS = 64  # blocks of a row that a program works on together, one for each thread
CHANNELS = 512  # the same of channels
PROGRAMS = 4096  # a launch has about as many, however many rows there are
COUNTED_AT_ONCE = False  # quotients: by `tl.histogram`, or each by an atomic
UNROLL = 2  # elements of a block in a turn of the loop

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
def _load_scale(stored, scale_values, place, inside):
    """The scales as they count, int32 codes or 0 for zero, 1 for NaN, 2 for another float32; and
    their values, float32."""
    scale = tl.load(stored + place, mask=inside, other=0)
    if scale_values is None:
        return tl.where(scale == 0, 0, tl.where(scale == scale, 2, 1)), scale
    else:
        code = scale.to(tl.int32)
        return code, tl.load(scale_values + code)


@triton.jit
def _load_element(x, codes, at, place, inside, PACKED: tl.constexpr):
    """x at `at` as float32, and the code of the element `place`, counted row-major, as int32."""
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if PACKED:
        byte = tl.load(codes + place // 2, mask=inside, other=0).to(tl.int32)
        return value, (byte >> (place & 1).to(tl.int32) * 4) & 15
    else:
        return value, tl.load(codes + place, mask=inside, other=0).to(tl.int32)


@triton.jit
def _masks(x, q, inside):
    """Which elements are finite, and which are counted: x and q both finite."""
    finite = (tl.abs(x) < INFINITY) & inside
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


@triton.jit(do_not_specialize=["runs", "rows", "rows_at_once", "blocks_in_row"])
def _count_channels(
    x, codes, stored, g, element_values, scale_values, channels, counts,
    runs, rows, rows_at_once, blocks_in_row, row_stride, column_stride, g_stride,
    BLOCK: tl.constexpr, SIZE: tl.constexpr, COPIES: tl.constexpr, PACKED: tl.constexpr,
    CODE_BINS: tl.constexpr,
):  # fmt: skip
    """Program i: run i % runs of SIZE channels, through run i // runs of rows.

    Added to channels, float64 [3, K], and how often each code occurs to counts [COPIES, size].
    """
    counts += (tl.program_id(0) % COPIES) * COUNTS_SIZE
    width = blocks_in_row * BLOCK
    channel = (tl.program_id(0) % runs).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    inside = channel < width
    sum_xx = tl.zeros([SIZE], tl.float64)
    sum_ee, sum_xq = sum_xx, sum_xx
    code_counts = tl.zeros([CODE_BINS], tl.int32)

    first_row = (tl.program_id(0) // runs).to(tl.int64) * rows_at_once
    for row_in_run in range(tl.minimum(rows_at_once, rows - first_row)):
        row = first_row + row_in_run
        at, place = row * row_stride + channel * column_stride, row * width + channel
        x32, code = _load_element(x, codes, at, place, inside, PACKED)
        _, s = _load_scale(stored, scale_values, place // BLOCK, inside)
        q32 = _decode(tl.load(element_values + code), s, tl.load(g + row * g_stride))
        _, counted = _masks(x32, q32, inside)
        x64 = tl.where(counted, x32, 0.0).to(tl.float64)
        q64 = tl.where(counted, q32, 0.0).to(tl.float64)
        e = q64 - x64
        sum_xx += x64 * x64
        sum_ee += e * e
        sum_xq += x64 * q64
        code_counts += tl.histogram(tl.where(inside, code, CODE_BINS - 1), CODE_BINS)

    tl.atomic_add(channels + channel, sum_xx, mask=inside, sem="relaxed")
    tl.atomic_add(channels + width + channel, sum_ee, mask=inside, sem="relaxed")
    tl.atomic_add(channels + 2 * width + channel, sum_xq, mask=inside, sem="relaxed")
    tl.atomic_add(counts + CODES + tl.arange(0, CODE_BINS), code_counts, sem="relaxed")


@triton.jit(do_not_specialize=["runs", "rows", "rows_at_once", "blocks_in_row"])
def _count_blocks(
    x, codes, stored, g, element_values, scale_values, qsnr_edges,
    row_xx, row_ee, row_lost, tile_ee, tile_lost, sums, counts, largest,
    runs, rows, rows_at_once, blocks_in_row, row_stride, column_stride, g_stride,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, COPIES: tl.constexpr, PACKED: tl.constexpr,
    LARGEST_ELEMENT: tl.constexpr, INVERSE_WIDTH: tl.constexpr, QUOTIENT_BINS: tl.constexpr,
    FIRST_EXPONENT: tl.constexpr, CREST_FROM: tl.constexpr, CREST_PER_UNIT: tl.constexpr,
    CREST_COUNT: tl.constexpr, QSNR_COUNT: tl.constexpr, COUNTED_AT_ONCE: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Program i: run i % runs of BLOCKS blocks, one for each thread, through run i // runs of rows.

    row_*, tile_*: [rows, runs], the sums of a tile and its worst block. sums, counts: [COPIES,
    size], added to. largest: the bits of float64 [3], raised.
    """
    run = tl.program_id(0) % runs
    sums += (tl.program_id(0) % COPIES) * SUMS_SIZE
    counts += (tl.program_id(0) % COPIES) * COUNTS_SIZE
    block = run * BLOCKS + tl.arange(0, BLOCKS)
    inside = block < blocks_in_row

    qq = tl.zeros([BLOCKS], tl.float64)
    sum_abs_e, sum_e, ee_max, ee_other, ee_zero, sum_crest = qq, qq, qq, qq, qq, qq
    max_abs_e, max_rel_e = qq, qq
    largest_amax = tl.zeros([BLOCKS], tl.float32)
    nonfinite = tl.zeros([BLOCKS], tl.int32)
    nonzero, flushed, saturated = nonfinite, nonfinite, nonfinite
    quotient_counts = tl.zeros([128], tl.int32)

    first_row = (tl.program_id(0) // runs).to(tl.int64) * rows_at_once
    for row_in_run in range(tl.minimum(rows_at_once, rows - first_row)):
        row = first_row + row_in_run
        place = row * blocks_in_row + block
        scale, s = _load_scale(stored, scale_values, place, inside)
        outer = tl.load(g + row * g_stride)
        limit = tl.abs(_decode(LARGEST_ELEMENT, s, outer))
        limit = tl.where(limit > 0, limit, INFINITY)
        step = tl.abs(s.to(tl.float64) * outer.to(tl.float64))
        usable = (step > 0) & (step < INFINITY)
        step = tl.where(usable, step, 1.0)
        per_step = 1.0 / step

        xx = tl.zeros([BLOCKS], tl.float64)
        ee, power, of_max = xx, xx, xx
        amax = tl.zeros([BLOCKS], tl.float32)
        largest_counted = amax - 1.0
        lost = tl.zeros([BLOCKS], tl.int32)
        finite_count = lost
        for lane in tl.range(0, BLOCK, loop_unroll_factor=UNROLL):
            at = row * row_stride + (block.to(tl.int64) * BLOCK + lane) * column_stride
            x32, code = _load_element(x, codes, at, place * BLOCK + lane, inside, PACKED)
            q32 = _decode(tl.load(element_values + code), s, outer)
            finite, counted = _masks(x32, q32, inside)
            magnitude = tl.where(finite, tl.abs(x32), 0.0)
            amax = tl.maximum(amax, magnitude)
            x_finite = magnitude.to(tl.float64)
            power += x_finite * x_finite
            finite_count += finite.to(tl.int32)
            lost += (finite & (counted == 0)).to(tl.int32)

            # From here on an element that is not counted is zero in x and q.
            x32, q32 = tl.where(counted, x32, 0.0), tl.where(counted, q32, 0.0)
            magnitude = tl.abs(x32)
            x64, q64 = x32.to(tl.float64), q32.to(tl.float64)
            e = q64 - x64
            abs_e, squared = tl.abs(e), e * e
            xx += x64 * x64
            ee += squared
            qq += q64 * q64
            sum_abs_e += abs_e
            sum_e += e
            is_larger = magnitude > largest_counted  # the first one, where alike
            largest_counted = tl.where(is_larger, magnitude, largest_counted)
            of_max = tl.where(is_larger, squared, of_max)
            nonzero += (x32 != 0).to(tl.int32)
            flushed += ((x32 != 0) & (q32 == 0)).to(tl.int32)
            saturated += (magnitude > limit).to(tl.int32)
            max_abs_e = tl.maximum(max_abs_e, abs_e)
            relative = abs_e / tl.where(x32 != 0, magnitude, 1.0).to(tl.float64)
            max_rel_e = tl.maximum(max_rel_e, tl.where(x32 != 0, relative, 0.0))

            # Divided, not multiplied by a reciprocal: the sawtooth has its teeth on edges of bins.
            quotient = magnitude.to(tl.float64) / step
            bin = tl.minimum(quotient * INVERSE_WIDTH, QUOTIENT_BINS).to(tl.int32)
            usable_here = counted & usable
            in_steps = e * per_step
            outward = tl.where(x32 > 0, in_steps, -in_steps)
            wrong = usable_here & (e != 0)
            tl.atomic_add(sums + QUOTIENT_E + bin, outward, mask=wrong & (x32 != 0), sem="relaxed")
            tl.atomic_add(sums + QUOTIENT_EE + bin, in_steps * in_steps, mask=wrong, sem="relaxed")
            if COUNTED_AT_ONCE:
                quotient_counts += tl.histogram(tl.where(usable_here, bin, 127), 128)
            else:
                tl.atomic_add(counts + QUOTIENTS + bin, 1, mask=usable_here, sem="relaxed")

        nonfinite += tl.where(inside, BLOCK - finite_count, 0)
        largest_amax = tl.maximum(largest_amax, amax)
        ee_max += tl.where(s == 0, 0.0, of_max)
        ee_other += tl.where(s == 0, 0.0, ee - of_max)
        ee_zero += tl.where(s == 0, ee, 0.0)
        amax_bin = _amax_bin(amax, FIRST_EXPONENT)
        tl.atomic_add(counts + AMAX_BLOCKS + amax_bin, 1, mask=inside, sem="relaxed")
        tl.atomic_add(counts + AMAX_LOST + amax_bin, lost, mask=lost > 0, sem="relaxed")
        tl.atomic_add(sums + AMAX_XX + amax_bin, xx, mask=xx > 0, sem="relaxed")
        tl.atomic_add(sums + AMAX_EE + amax_bin, ee, mask=ee > 0, sem="relaxed")
        qsnr_bin = _qsnr_bin(xx, ee, lost, qsnr_edges, QSNR_COUNT)
        tl.atomic_add(counts + BLOCK_QSNR + qsnr_bin, 1, mask=inside, sem="relaxed")
        tl.atomic_add(counts + SCALES + scale, 1, mask=inside, sem="relaxed")
        has_crest = (amax > 0) & (finite_count == BLOCK)
        crest = amax.to(tl.float64) / tl.sqrt(tl.where(has_crest, power, 1.0) / BLOCK)
        crest_bin = (crest - CREST_FROM) * CREST_PER_UNIT
        crest_bin = tl.minimum(tl.maximum(crest_bin, 0.0), CREST_COUNT - 1).to(tl.int32)
        sum_crest += tl.where(has_crest, crest, 0.0)
        tl.atomic_add(counts + CREST_COUNTS + crest_bin, 1, mask=has_crest, sem="relaxed")

        # The row, and its worst block: most elements lost, then the largest error.
        tile = row * runs + run
        most_lost = tl.max(lost, axis=0)
        tl.store(row_xx + tile, tl.sum(xx, axis=0))
        tl.store(row_ee + tile, tl.sum(ee, axis=0))
        tl.store(row_lost + tile, tl.sum(lost, axis=0))
        tl.store(tile_lost + tile, most_lost)
        tl.store(tile_ee + tile, tl.max(tl.where(lost == most_lost, ee, 0.0), axis=0))

    tl.atomic_add(sums + SUM_OF_ELEMENTS, tl.sum(qq, axis=0), sem="relaxed")
    tl.atomic_add(sums + SUM_OF_ELEMENTS + 1, tl.sum(sum_abs_e, axis=0), sem="relaxed")
    tl.atomic_add(sums + SUM_OF_ELEMENTS + 2, tl.sum(sum_e, axis=0), sem="relaxed")
    tl.atomic_add(sums + SUM_OF_BLOCKS, tl.sum(ee_max, axis=0), sem="relaxed")
    tl.atomic_add(sums + SUM_OF_BLOCKS + 1, tl.sum(ee_other, axis=0), sem="relaxed")
    tl.atomic_add(sums + SUM_OF_BLOCKS + 2, tl.sum(ee_zero, axis=0), sem="relaxed")
    tl.atomic_add(sums + SUM_OF_BLOCKS + 3, tl.sum(sum_crest, axis=0), sem="relaxed")
    tl.atomic_add(counts + COUNT_OF_ELEMENTS, tl.sum(nonfinite, axis=0), sem="relaxed")
    tl.atomic_add(counts + COUNT_OF_ELEMENTS + 1, tl.sum(nonzero, axis=0), sem="relaxed")
    tl.atomic_add(counts + COUNT_OF_ELEMENTS + 2, tl.sum(flushed, axis=0), sem="relaxed")
    tl.atomic_add(counts + COUNT_OF_ELEMENTS + 3, tl.sum(saturated, axis=0), sem="relaxed")
    if COUNTED_AT_ONCE:
        tl.atomic_add(counts + QUOTIENTS + tl.arange(0, 128), quotient_counts, sem="relaxed")

    # float64 numbers from 0 up are ordered as their bits are.
    _raise(largest, tl.max(max_abs_e, axis=0))
    _raise(largest + 1, tl.max(max_rel_e, axis=0))
    _raise(largest + 2, tl.max(largest_amax, axis=0).to(tl.float64))


@triton.jit
def _raise(largest, value):
    tl.atomic_max(largest, value.to(tl.int64, bitcast=True), sem="relaxed")


@triton.jit(do_not_specialize=["runs", "blocks_in_row"])
def _describe(
    x, codes, stored, g, element_values, scale_values, tiles, lost_out, ee_out, amax_out, x_out,
    runs, blocks_in_row, row_stride, column_stride, g_stride,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Program i writes what is told of worst blocks, of every block of the i-th of `tiles`."""
    tile = tl.load(tiles + tl.program_id(0))
    row, block = tile // runs, tile % runs * BLOCKS + tl.arange(0, BLOCKS)
    place, inside = row * blocks_in_row + block, block < blocks_in_row
    _, s = _load_scale(stored, scale_values, place, inside)
    outer = tl.load(g + row * g_stride)
    ee = tl.zeros([BLOCKS], tl.float64)
    amax = tl.zeros([BLOCKS], tl.float32)
    lost = tl.zeros([BLOCKS], tl.int32)
    slot = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    for lane in tl.range(0, BLOCK):
        at = row * row_stride + (block * BLOCK + lane) * column_stride
        x32, code = _load_element(x, codes, at, place * BLOCK + lane, inside, PACKED)
        q32 = _decode(tl.load(element_values + code), s, outer)
        finite, counted = _masks(x32, q32, inside)
        x64 = tl.where(counted, x32, 0.0).to(tl.float64)
        e = tl.where(counted, q32, 0.0).to(tl.float64) - x64
        ee += e * e
        amax = tl.maximum(amax, tl.where(finite, tl.abs(x32), 0.0))
        lost += (finite & (counted == 0)).to(tl.int32)
        tl.store(x_out + slot * BLOCK + lane, x32)
    tl.store(lost_out + slot, lost)
    tl.store(ee_out + slot, ee)
    tl.store(amax_out + slot, amax)


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
        in_tile = min(BLOCKS, triton.next_power_of_2(self.blocks_in_row))
        return self.blocks_in_row, in_tile, triton.cdiv(self.blocks_in_row, in_tile)

    def constants(self) -> dict:
        return {"BLOCK": self.block, "PACKED": self.codes.shape[1] < self.block}


def count(piece: Piece, qsnr_edges: torch.Tensor, constants: dict) -> Totals:
    """Two launches over the piece, on the current device.

    qsnr_edges: float64 [127], rising. constants: those of `_count_blocks` that say where bins are.
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
    code_bins = 512 if len(piece.element_values) > 16 else 32  # one more than there are codes
    strides = (*piece.x.stride(), int(len(piece.g) > 1))
    options: dict = {"enable_fp_fusion": False}
    channel_runs = triton.cdiv(width, CHANNELS)
    at_once = triton.cdiv(rows * channel_runs, PROGRAMS)
    _count_channels[(channel_runs * triton.cdiv(rows, at_once),)](
        *vars(piece).values(), totals.channels, totals.counts,
        channel_runs, rows, at_once, in_row, *strides, SIZE=CHANNELS, COPIES=COPIES,
        **piece.constants(), CODE_BINS=code_bins, num_warps=4, **options,
    )  # fmt: skip
    at_once = triton.cdiv(rows * runs, PROGRAMS)
    of_blocks = [part for name, part in vars(totals).items() if name != "channels"]
    _count_blocks[(runs * triton.cdiv(rows, at_once),)](
        *vars(piece).values(), qsnr_edges, *of_blocks,
        runs, rows, at_once, in_row, *strides, BLOCKS=in_tile, COPIES=COPIES,
        **piece.constants(), **constants, COUNTED_AT_ONCE=COUNTED_AT_ONCE, UNROLL=UNROLL,
        num_warps=triton.cdiv(in_tile, 32), **options,
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
        num_warps=triton.cdiv(in_tile, 32), enable_fp_fusion=False,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    block = (tiles % runs)[:, None] * in_tile + torch.arange(in_tile, device=device)
    index = (tiles // runs)[:, None] * in_row + block
    return index.where(block < in_row, -1), lost, ee, amax, x
