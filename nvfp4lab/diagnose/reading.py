"""How a kernel's buffers are to be read: scale layout, nibble order, outer scale.

Each is decided before any rounding is looked at, by scale-free evidence: under the right layout a
scale follows its block's amax, under the right nibble order a code follows its element. To read one
more layout or order, add it to `_layouts` or `NIBBLE_ORDERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from nvfp4lab import layouts
from nvfp4lab.codec import LARGEST_BF16, iter_blocks
from nvfp4lab.formats import E2M1, E4M3
from nvfp4lab.outer import OuterScale

BLOCK = 16
ROWS_LOOKED_AT = 256
NEAR = 0.15  # in log2: the rounding of one E4M3 scale is at most 0.09


def _by_halves(packed: torch.Tensor) -> torch.Tensor:
    """Element j low, element j + 8 high in the bytes of each block, as llama.cpp packs."""
    blocks = packed.unflatten(-1, (-1, BLOCK // 2))
    return torch.cat([blocks & 0xF, blocks >> 4], -1).flatten(-2)


NIBBLE_ORDERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "low nibble first": layouts.unpack_nibbles,
    "high nibble first": lambda p: layouts.unpack_nibbles(p << 4 | p >> 4),
    "low nibbles, then high ones, of each 16": _by_halves,
}


@dataclass(frozen=True)
class Reading:
    """A kernel's output as codes (T, K), scale bytes (T, B) and an outer scale, and what was found.

    evidence: for each of the three decisions its choice, the alternatives with their agreement, and
    how many blocks it rests on. faults: what is amiss in the buffers themselves.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    outer: OuterScale | None
    outer_per: str | None  # "token" or "tensor"
    layout: str
    nibbles: str
    outer_reading: str
    evidence: list[dict] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def read(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, outer: torch.Tensor | None
) -> Reading:
    """Buffers of a kernel that quantized x (T, K), in the reading that the bytes support.

    Raises: TypeError or ValueError for buffers that cannot belong to x.
    """
    rows, width = x.shape
    packed = _packed_codes(codes, rows, width)
    candidates = _layouts(scales, rows, width // BLOCK)
    amax = block_amax(x)
    evidence, faults = [], []

    spreads = {name: _spread(bytes_, amax) for name, bytes_ in candidates.items()}
    layout = min(spreads, key=lambda name: spreads[name])
    stored = candidates[layout]
    evidence.append(_row("scale layout", layout, spreads, int(_usable(stored, amax).sum())))
    if layout == "128x4" and (padding := _padding(scales, rows, width // BLOCK)):
        faults.append(f"{padding} padding bytes of the 128x4 tiles are not zero")

    ratio = _row_ratios(stored, amax)
    head = slice(0, ROWS_LOOKED_AT)
    s = E4M3.decode(stored[head]).repeat_interleave(BLOCK, -1) * ratio[head]
    expected = E2M1.encode((x[head].float() / s).nan_to_num(0.0))
    agreements = {}
    for name, unpack in NIBBLE_ORDERS.items():
        agreements[name] = 1 - (unpack(packed[head]) == expected).float().mean().item()
    nibbles = min(agreements, key=lambda name: agreements[name])
    evidence.append(_row("nibble order", nibbles, agreements, expected.numel() // BLOCK))

    found, per, reading, missed = _outer(outer, amax, stored)
    evidence.append(_row("outer scale", reading, missed, int(_usable(stored, amax).sum())))
    return Reading(
        NIBBLE_ORDERS[nibbles](packed),
        stored,
        found,
        per,
        layout,
        nibbles,
        reading,
        evidence,
        faults,
    )


def block_amax(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each block, NaN skipped and Inf kept: float32 (T, B)."""
    amax = torch.empty(x.shape[0] * x.shape[1] // BLOCK)
    for start, stop, blocks in iter_blocks(x, BLOCK):
        amax[start:stop] = blocks.abs_().nan_to_num_(nan=0.0, posinf=math.inf).amax(-1)
    return amax.view(x.shape[0], -1)


def _packed_codes(codes: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    if codes.element_size() != 1 or codes.dtype == torch.bool:
        raise TypeError(f"codes are bytes (uint8, int8 or float4_e2m1fn_x2), got {codes.dtype}")
    if codes.numel() != rows * width // 2:
        raise ValueError(
            f"x ({rows}, {width}) has codes ({rows}, {width // 2}), got {tuple(codes.shape)}"
        )
    return codes.view(torch.uint8).reshape(rows, width // 2)


def _layouts(scales: torch.Tensor, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Every layout that the buffer's size allows -> its bytes (rows, columns)."""
    found = {}
    high, wide = -(-rows // 128) * 128, -(-columns // 4) * 4
    if scales.dtype == torch.int32:
        if columns % 4 == 0 and scales.numel() == rows * columns // 4:
            words = scales.reshape(rows, columns // 4)
            found["mega_moe int32 words"] = layouts.from_words(words)
        if columns % 4 == 0 and scales.numel() == high * columns // 4:
            words = scales.reshape(columns // 4, high)
            found["MN-major int32 words"] = layouts.from_mn_major(words, rows)
        if scales.numel() * 4 == high * wide:
            tiles = layouts.from_words(scales.reshape(1, -1))
            found["128x4"] = layouts.from_tiles(tiles, rows, columns)
    elif scales.element_size() == 1 and scales.dtype != torch.bool:
        bytes_ = scales.contiguous().view(torch.uint8)
        if scales.numel() == rows * columns:
            found["linear"] = bytes_.reshape(rows, columns)
        if scales.numel() == high * wide:
            found["128x4"] = layouts.from_tiles(bytes_, rows, columns)
    else:
        raise TypeError(f"scales are bytes or int32 words, got {scales.dtype}")
    if not found:
        raise ValueError(
            f"{rows} x {columns} scales are as many bytes, {high * wide} bytes in 128x4 tiles, or "
            f"int32 words of four; got {tuple(scales.shape)} {scales.dtype}"
        )
    return found


def _padding(scales: torch.Tensor, rows: int, columns: int) -> int:
    """How many padding bytes of the tiles are not zero."""
    bytes_ = scales.contiguous().view(torch.uint8)
    high, wide = -(-rows // 128) * 128, -(-columns // 4) * 4
    padded = layouts.from_tiles(bytes_, high, wide).clone()
    padded[:rows, :columns] = 0
    return int((padded != 0).sum())


def _usable(stored: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Blocks whose scale is normal and not the largest: there amax / 6 is within 7 % of it."""
    return (stored >= 0x08) & (stored < 0x7E) & (amax > 0) & amax.isfinite()


def _log_ratio(stored: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """log2 of amax / 6 over the scale, NaN where that says nothing: (T, B)."""
    ratio = (amax / (6 * E4M3.decode(stored))).log2()
    return ratio.where(_usable(stored, amax), math.nan)


def _row_ratios(stored: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """The outer scale that each row's scales suggest, 1 where they say nothing: (T, 1).

    From the larger half of its blocks, since smaller ones may stand on a floor.
    """
    ratio = _log_ratio(stored, amax)
    usable_amax = amax.where(~ratio.isnan(), math.nan)
    large = usable_amax >= usable_amax.nanmedian(-1, keepdim=True).values
    median = ratio.where(large, math.nan).nanmedian(-1, keepdim=True).values
    return torch.exp2(median.nan_to_num(0.0))


def _spread(stored: torch.Tensor, amax: torch.Tensor) -> float:
    """How far scales stray from what their amax says, in log2, each row's common factor apart."""
    ratio = _log_ratio(stored, amax)
    deviation = (ratio - ratio.nanmedian(-1, keepdim=True).values).abs()
    known = deviation[~deviation.isnan()]
    usable = (amax > 0) & amax.isfinite()
    if not len(known):
        return 0.0
    unusable = (usable & deviation.isnan()).sum() / max(1, int(usable.sum()))
    return float(known.clamp(max=8).mean() + unusable)


def _outer(
    given: torch.Tensor | None, amax: torch.Tensor, stored: torch.Tensor
) -> tuple[OuterScale | None, str | None, str, dict[str, float]]:
    """The outer scale in the reading that most scales support, with the share that does not."""
    one = torch.ones(())
    ratio = _log_ratio(stored, amax)
    known = ~ratio.isnan()
    tensor_amax = amax.where(amax.isfinite(), LARGEST_BF16).amax()
    row_amax = amax.where(amax.isfinite(), LARGEST_BF16).amax(-1, keepdim=True)
    readings: dict[str, tuple[torch.Tensor, bool]] = {}  # name -> g, and whether it is G's inverse
    if given is None:
        readings["none"] = (one, False)
        readings["missing: amax of the tensor / 2688"] = (tensor_amax / 2688, False)
        readings["missing: amax of the tensor / 1536"] = (tensor_amax / 1536, False)
        readings["missing: amax of the token / 2688"] = (row_amax / 2688, False)
    else:
        if given.numel() not in (1, len(amax)):
            raise ValueError(
                f"outer is one number or one for each of {len(amax)} tokens, "
                f"got {tuple(given.shape)}"
            )
        g = given.float().reshape(() if given.numel() == 1 else (-1, 1))
        readings["decode"] = (g, False)
        readings["encode"] = (one / g, True)
        readings["given but not used"] = (one, False)
    missed = {}
    for name, (g, _) in readings.items():
        off = (ratio - g.log2()).abs()[known]
        off = torch.minimum(off, (off - math.log2(1.5)).abs())  # 4/6 takes half as much again
        missed[name] = float((~(off < NEAR)).float().mean()) if len(off) else 0.0
    best = min(missed, key=lambda name: missed[name])
    if not known.any():  # no scale says anything: what was given is believed
        best = next(iter(readings))
    elif missed[best] > 0.7:  # a constant factor, as of a wrong calibration
        first = next(iter(readings))
        factor = _factor(readings[first][0], amax, stored)
        name = f"{first}, but off by a factor of {factor:.6g}"
        missed[name] = 0.0
        readings[name] = (readings[first][0] * factor, False)
        best = name
    g, inverse = readings[best]
    if best in ("none", "given but not used"):
        return None, None, best, missed
    encode = given.float().reshape(g.shape) if inverse and given is not None else one / g
    per = "tensor" if g.ndim == 0 else "token"
    return OuterScale(g, encode, tensor_amax if per == "tensor" else row_amax), per, best, missed


def _factor(g: torch.Tensor, amax: torch.Tensor, stored: torch.Tensor) -> float:
    """What g has to be multiplied by, as simple a ratio as every scale's rounding interval allows.

    A scale byte b of a block says that amax / 6 / g lies between the midpoints around b.
    """
    usable = _usable(stored, amax)
    steps = torch.tensor(E4M3.magnitudes)
    code = stored[usable].int()
    below, above = (steps[code] + steps[code - 1]) / 2, (steps[code] + steps[code + 1]) / 2
    exact = (amax / 6 / g).expand_as(stored)[usable].double()
    low, high = (
        float((exact / above)[: 1 << 20].quantile(0.99)),
        float((exact / below)[: 1 << 20].quantile(0.01)),
    )
    if low >= high:  # scales that no single factor explains
        return float((exact / steps[code]).median())
    middle = Fraction((low + high) / 2)
    for size in range(1, 4097):
        inverse = (1 / middle).limit_denominator(size)
        for simple in (middle.limit_denominator(size), 1 / inverse if inverse else middle):
            if low <= simple <= high:
                return float(simple)
    return float(middle)


def _row(decision: str, choice: str, scores: dict[str, float], blocks: int) -> dict:
    others = [name for name in scores if name != choice]
    open_ = [name for name in others if scores[name] - scores[choice] < 1e-3]
    return {
        "decision": decision,
        "choice": choice,
        "verdict": "open" if open_ else "supported",
        "blocks": blocks,
        "elements": 0,
        "refuted": ", ".join(n for n in others if n not in open_),
        "open": ", ".join(open_),
    }
