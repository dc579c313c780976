"""The error of a tensor against its codes, as Triton functions: each element seen, sums in float64.

`_count_blocks` and `_count_channels` add up the fields of `statistics.contents`, `_describe` writes
out single blocks; `counting` launches them. Bins are those of `statistics.bins`. In all three an
element is decoded by `_decode` and left out by `_masks`.

Totals go by atomics to one of several private copies: Triton adds nothing in shared memory, and in
a single copy all programs would wait for the same few bins. Launched so that no product is fused
with a sum: what torch rounds is rounded here, and sums of x^2 and e^2 that are equal stay equal. A
new field needs room in SUMS or COUNTS, its line here, and its reference in `statistics.in_torch`.
"""

# pyright: reportGeneralTypeIssues=false

import itertools

import triton
import triton.language as tl

FLOAT32_MAX, INFINITY = tl.constexpr(3.4028234663852886e38), tl.constexpr(float("inf"))
FLOAT64_EXPONENT = tl.constexpr(1022)  # what an exponent field is larger by than frexp's exponent
QUOTIENTS = tl.constexpr(128)  # room for their bins, and one to drop into
LARGEST = ("max_abs_e", "max_rel_e", "amax")


def _starts(room: dict[str, int]) -> dict[str, int]:
    """Where each part of a copy of the totals begins, and its size."""
    return dict(zip([*room, "size"], itertools.accumulate(room.values(), initial=0), strict=True))


SUMS = _starts(  # float64
    {
        "quotient_e": QUOTIENTS.value,
        "quotient_ee": QUOTIENTS.value,
        "amax_xx": 512,
        "amax_ee": 512,
        "sum_qq": 1,
        "sum_abs_e": 1,
        "sum_e": 1,
        "sum_ee_max": 1,
        "sum_ee_other": 1,
        "sum_ee_zero_scale": 1,
        "sum_crest": 1,
    }
)
COUNTS = _starts(  # int32
    {
        "quotient_elements": QUOTIENTS.value,
        "element_codes": 512,  # 256 codes, and one to drop into
        "scales": 256,  # by code; float32 ones: zero, NaN, neither
        "amax_blocks": 512,
        "amax_lost": 512,
        "block_qsnr": 128,
        "crest_counts": 128,
        "nonfinite_input": 1,
        "nonzero": 1,
        "flushed": 1,
        "saturated": 1,
    }
)
SUMS_SIZE, COUNTS_SIZE = tl.constexpr(SUMS["size"]), tl.constexpr(COUNTS["size"])
QUOTIENT_E, QUOTIENT_EE = tl.constexpr(SUMS["quotient_e"]), tl.constexpr(SUMS["quotient_ee"])
AMAX_XX, AMAX_EE = tl.constexpr(SUMS["amax_xx"]), tl.constexpr(SUMS["amax_ee"])
SUM_QQ = tl.constexpr(SUMS["sum_qq"])  # the other numbers follow
QUOTIENT_COUNTS = tl.constexpr(COUNTS["quotient_elements"])
CODES, SCALES = tl.constexpr(COUNTS["element_codes"]), tl.constexpr(COUNTS["scales"])
AMAX_BLOCKS, AMAX_LOST = tl.constexpr(COUNTS["amax_blocks"]), tl.constexpr(COUNTS["amax_lost"])
BLOCK_QSNR, CREST_COUNTS = tl.constexpr(COUNTS["block_qsnr"]), tl.constexpr(COUNTS["crest_counts"])
NONFINITE = tl.constexpr(COUNTS["nonfinite_input"])  # the other numbers follow


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
    value = tl.load(x + at, mask=inside, other=0.0)
    if x.dtype.element_ty == tl.bfloat16:  # by bits: the interpreter loses subnormals
        value = (value.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        value = value.to(tl.float32)
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
    CREST_COUNT: tl.constexpr, QSNR_COUNT: tl.constexpr,
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
    quotient_counts = tl.zeros([QUOTIENTS], tl.int32)

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
        for lane in range(BLOCK):
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
            quotient_counts += tl.histogram(tl.where(usable_here, bin, QUOTIENTS - 1), QUOTIENTS)

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

    tl.atomic_add(sums + SUM_QQ, tl.sum(qq, axis=0), sem="relaxed")
    tl.atomic_add(sums + SUM_QQ + 1, tl.sum(sum_abs_e, axis=0), sem="relaxed")
    tl.atomic_add(sums + SUM_QQ + 2, tl.sum(sum_e, axis=0), sem="relaxed")
    tl.atomic_add(sums + SUM_QQ + 3, tl.sum(ee_max, axis=0), sem="relaxed")
    tl.atomic_add(sums + SUM_QQ + 4, tl.sum(ee_other, axis=0), sem="relaxed")
    tl.atomic_add(sums + SUM_QQ + 5, tl.sum(ee_zero, axis=0), sem="relaxed")
    tl.atomic_add(sums + SUM_QQ + 6, tl.sum(sum_crest, axis=0), sem="relaxed")
    tl.atomic_add(counts + NONFINITE, tl.sum(nonfinite, axis=0), sem="relaxed")
    tl.atomic_add(counts + NONFINITE + 1, tl.sum(nonzero, axis=0), sem="relaxed")
    tl.atomic_add(counts + NONFINITE + 2, tl.sum(flushed, axis=0), sem="relaxed")
    tl.atomic_add(counts + NONFINITE + 3, tl.sum(saturated, axis=0), sem="relaxed")
    tl.atomic_add(
        counts + QUOTIENT_COUNTS + tl.arange(0, QUOTIENTS), quotient_counts, sem="relaxed"
    )

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
