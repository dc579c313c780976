"""The dequantize kernel: E2M1 codes and block scales in; BF16, FP16 or float32 out.

Read from the bottom: `launch` picks the grid, `_dequantize` does one run of codes, the functions
above decode it. `nvfp4lab.quantized` says when it is used and what it computes, bit for bit. A
thread works on units of codes whose values fill 16 bytes, so that a warp reads and writes without
gaps and no value changes threads. May be changed: RUN and WARPS, and another scale format is one
more branch of `_decode_scale`.
"""

import torch
import triton
import triton.language as tl
from triton import knobs

from nvfp4lab.kernels import LAUNCHING

RUN = 512  # units that a program works on
WARPS = 4
LARGEST_GRID_Y = 65535


@triton.jit
def _decode_scale(byte, FORMAT: tl.constexpr, TIMES: tl.constexpr):
    """The value of a scale byte, uint8, times a power of two, as float32, exactly.

    FORMAT: E4M3, whose bit 7 is a sign, UE5M3 or E8M0. The bits are put into a wider format with
    as many exponents below its bias, subnormals included; a power of two makes up for the bias.
    """
    if FORMAT == "E4M3":
        bits = ((byte.to(tl.int32) << 7) & 0x3F80) | ((byte.to(tl.int32) << 8) & 0x8000)
        value = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * (256.0 * TIMES)
        return tl.where(tl.abs(value) > 448.0 * TIMES, float("nan"), value)
    elif FORMAT == "UE5M3":
        value = (byte.to(tl.int32) << 20).to(tl.float32, bitcast=True) * (2.0**112 * TIMES)
        return tl.where(value > 114688.0 * TIMES, float("nan"), value)
    else:
        tl.static_assert(FORMAT == "E8M0")
        bits = tl.maximum(byte.to(tl.int32) << 23, 0x400000)  # 2^-127 is subnormal
        return tl.where(byte == 0xFF, float("nan"), bits.to(tl.float32, bitcast=True) * TIMES)


@triton.jit
def _decode_elements(byte):
    """Two E2M1 codes, int32 [N, B] -> their values * 2^-14, float32 [N, 2 B], exactly.

    In FP16 the three bits of a magnitude at 11 to 9 are its exponent and mantissa, and code 1 is
    the subnormal that it should be. Both codes of a byte are put in place at once, the upper one in
    the upper half of the int32: each is the byte shifted by 12 more, a multiplication.
    """
    signs = (byte * 0x1001000) & -0x7FFF8000  # 0x80008000
    halves = signs | ((byte * 0x200200) & 0x0E000E00)
    even = halves.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    odd = (halves >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.reshape(tl.join(even, odd), [byte.shape[0], 2 * byte.shape[1]])


@triton.jit
def _to_bf16(value):
    """float32 -> BF16 to nearest even, as `value.to(tl.bfloat16)` does when it is compiled.

    Triton's interpreter rounds that up at ties and carries into no exponent, so it gets this.
    """
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    kept = tl.where(value == value, rounded, 0x7FC0)
    return kept.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit(
    do_not_specialize=["rows", "units"],
    do_not_specialize_on_alignment=["codes", "scales", "outer"],
)
def _dequantize(
    codes, scales, outer, out, rows,
    units: tl.int64,  # pyright: ignore[reportInvalidTypeForm]
    BLOCK: tl.constexpr, FORMAT: tl.constexpr, ROWS: tl.constexpr, LARGEST: tl.constexpr,
    BYTES: tl.constexpr, ALIGNED: tl.constexpr, RUN: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Program (p, y, z) does run p of a row, where a row has `units` units of BYTES bytes.

    outer: one float32 for each row, or None. FORMAT: of the scale bytes, None for float32 scales.
    ROWS: False where all units are one row. LARGEST: what products are clamped to, None where none
    is beyond it. ALIGNED: whether every unit can be loaded at once.
    """
    row = tl.zeros([], tl.int32)
    if ROWS:
        row = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    start = tl.program_id(0).to(tl.int64) * RUN
    first = row.to(tl.int64) * units + start
    unit = tl.arange(0, RUN)
    inside = unit < tl.where(row < rows, tl.minimum(units - start, RUN).to(tl.int32), 0)

    byte = codes + first * BYTES + (unit[:, None] * BYTES + tl.arange(0, BYTES)[None, :])
    if ALIGNED:
        byte = tl.multiple_of(byte, [BYTES, BYTES])
    packed = tl.load(byte, mask=inside[:, None], other=0).to(tl.int32)
    block = unit // (BLOCK // (2 * BYTES))
    first_block = first.to(tl.uint64) // (BLOCK // (2 * BYTES))
    stored = tl.load(scales + first_block + block, mask=inside, other=0)

    # The elements come times 2^-14. The scale makes up for it in a format where none overflows.
    TIMES: tl.constexpr = 16384.0 if FORMAT == "E4M3" or FORMAT == "UE5M3" else 1.0
    scale = stored if FORMAT is None else _decode_scale(stored, FORMAT, TIMES)
    value = (_decode_elements(packed) * (16384.0 / TIMES)) * scale[:, None]
    if outer is not None:
        value = value * tl.load(outer + row, mask=row < rows, other=0.0)
    if LARGEST is not None:
        clamped = tl.clamp(value, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        if FORMAT is None:
            clamped = tl.where((tl.abs(scale) == float("inf"))[:, None], value, clamped)
        value = clamped

    element = unit[:, None] * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :]
    if INTERPRETED and out.dtype.element_ty == tl.bfloat16:
        value = _to_bf16(value)
    value = value.to(out.dtype.element_ty)
    tl.store(out + first * (2 * BYTES) + element, value, mask=inside[:, None])


def launch(
    codes: torch.Tensor,
    scales: torch.Tensor,
    outer: torch.Tensor | None,
    out: torch.Tensor,
    block: int,
    scale_format: str | None,
    largest: float | None,
) -> None:
    """One launch over contiguous tensors on the current device; out is what the codes stand for.

    codes: uint8 (..., K // 2). scales: (..., K // block), bytes of `scale_format`, or float32
    where that is None. outer: float32, None, one number or one for each row of K. out: bfloat16,
    float16 or float32 (..., K). largest: what a product of finite factors is clamped to, None
    where none is beyond it.
    """
    if not out.numel():
        return
    unit = 16 // out.element_size()
    rows = 1 if outer is None else outer.numel()
    units = out.numel() // unit // rows
    slabs = triton.cdiv(rows, LARGEST_GRID_Y)
    grid = (triton.cdiv(units, RUN), triton.cdiv(rows, slabs), slabs)
    with LAUNCHING:
        _dequantize[grid](
            codes, scales, outer, out, rows, units,
            BLOCK=block, FORMAT=scale_format, LARGEST=largest,
            ROWS=outer is not None and outer.ndim > 0,
            BYTES=unit // 2, ALIGNED=codes.data_ptr() % (unit // 2) == 0,
            RUN=RUN, INTERPRETED=knobs.runtime.interpret,
            num_warps=WARPS,  # pyright: ignore[reportCallIssue]  (Triton's own argument)
        )  # fmt: skip
