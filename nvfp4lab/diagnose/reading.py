"""How a kernel's buffers are to be read: scale layout, nibble order, signs, outer scale.

Each is decided before any rounding is looked at: under the right layout a scale follows its block's
amax, under the right nibble order a code follows its element. `read` gives the readings that the
buffers allow (`buffers`), the likeliest first. May be changed: the thresholds;
tests/test_identification.py holds what they have to tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from nvfp4lab.codec import iter_blocks
from nvfp4lab.diagnose.buffers import (
    BLOCK,
    NIBBLE_ORDERS,
    SOUND_LAYOUTS,
    packed_codes,
    scale_layouts,
    tile_padding,
)
from nvfp4lab.diagnose.outer_reading import (
    DOUBTFUL,
    LARGER,
    NO_SCALE,
    OuterReading,
    bits,
    by_row,
    exact_outers,
    has_size,
    log_ratio,
    read_outer,
    rules_of,
)
from nvfp4lab.formats import E2M1, E4M3
from nvfp4lab.outer import OuterScale, outer_from_amax
from nvfp4lab.rules import Recipe

ROWS_LOOKED_AT = 256
STRAYS = 0.09  # log2: scales under their own layout stray by less, whatever their rounding
# The share of nonzero elements whose codes a nibble order misses: from MOSTLY up it is not this
# one, unless it misses AHEAD less than every other; from PARTLY up it may not be, should nothing
# explain the codes.
MOSTLY, AHEAD, PARTLY = 0.5, 0.1, 0.3
CLOSE = 0.02  # readings that score this near to each other cannot be told apart


@dataclass(frozen=True)
class Reading:
    """A kernel's output as codes (T, K), scale bytes (T, B) and an outer scale, and what was found.

    evidence: for each decision its choice, the alternatives with their agreement, and how many
    blocks it rests on. faults: what is amiss in the buffers themselves, the gravest first. doubts:
    what is, should no decisions explain the "scales" or the "codes". contradicted: whether a
    buffer, as it was given, does not fit the others.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    layout: str
    nibbles: str
    evidence: list[dict] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    doubts: list[tuple[str, str]] = field(default_factory=list)
    contradicted: bool = False
    outer: OuterScale | None = None
    outer_per: str | None = None  # "token" or "tensor"
    outer_reading: str = "none"
    outer_rules: list[str] = field(default_factory=list)  # those that give its very values
    outer_given: bool = False

    def has_outer_of(self, recipe: Recipe, dtype: torch.dtype) -> bool:
        """Whether the recipe's own rule gives the outer scale, or there is none in either.

        A calibrated one, which no rule gives, is any recipe's that has one for the tensor.
        """
        rule = recipe.outer
        if rule is None or self.outer is None:
            return rule is None and self.outer is None
        if rule.per != "tensor" and self.outer_per == "tensor":
            return False
        missing = self.outer_reading.startswith("missing")
        if not missing and not self.outer_rules:
            return rule.per == self.outer_per == "tensor"
        amax = self.outer.amax
        outer = outer_from_amax(
            amax.amax().expand_as(amax) if rule.per == "tensor" else amax, rule, dtype
        )
        side = "encode" if self.outer_reading == "encode" else "decode"
        return torch.equal(bits(getattr(outer, side)), bits(getattr(self.outer, side)))


def read(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, outer: torch.Tensor | None
) -> Iterator[Reading]:
    """The readings of the buffers of a kernel that quantized x (T, K), the likeliest first.

    Raises: TypeError or ValueError for buffers that cannot belong to x.
    """
    rows, width = x.shape
    packed = packed_codes(codes, rows, width)
    arrangements = scale_layouts(scales, rows, width // BLOCK)
    if outer is not None and outer.numel() not in (1, rows):
        raise ValueError(
            f"outer is one number or one for each of {rows} tokens, got {tuple(outer.shape)}"
        )
    amax = block_amax(x)
    middle = {name: _strays(bytes_, amax) for name, bytes_ in arrangements.items()}
    silent = {name: _silent(bytes_, amax) for name, bytes_ in arrangements.items()}
    strays = {name: middle[name] + 0.2 * silent[name] for name in arrangements}
    for layout in _by_score(strays):
        stored = arrangements[layout]
        outers = read_outer(outer, amax, stored, x.dtype)
        astray = middle[layout] > STRAYS
        doubts = _doubts(stored, amax, astray)
        orders, signs = _nibble_orders(x, packed, stored, amax, outer)
        for nibbles in _by_score(orders):
            reading = _reading(
                NIBBLE_ORDERS[nibbles](packed), stored, layout, nibbles, strays, orders, astray
            )
            reading.doubts[:0] = doubts
            reading = _with_signs(reading, x, signs[nibbles])
            if layout == "128x4" and (padding := tile_padding(scales, rows, width // BLOCK)):
                reading.faults.append(f"{padding} padding bytes of the 128x4 tiles are not zero")
            for found in outers:
                for exact in (found, *exact_outers(found, x.dtype)):
                    yield _with_outer(reading, exact, outer, x.dtype)


def block_amax(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each block, NaN skipped and Inf kept: float32 (T, B)."""
    amax = torch.empty(x.shape[0] * x.shape[1] // BLOCK, dtype=torch.float32, device="cpu")
    for start, stop, blocks in iter_blocks(x, BLOCK):
        amax[start:stop] = blocks.abs_().nan_to_num_(nan=0.0, posinf=math.inf).amax(-1)
    return amax.view(x.shape[0], -1)


def _by_score(scores: dict[str, float]) -> list[str]:
    """The best name and those that cannot be told from it, the usual first."""
    best = min(scores.values())
    return [name for name in scores if scores[name] - best < CLOSE]


def _strays(stored: torch.Tensor, amax: torch.Tensor) -> float:
    """How far the middle one of the scales strays from what its amax says, in log2, each row's
    common factor apart."""
    ratio = log_ratio(stored, amax)
    off = ratio - ratio.nanmedian(-1, keepdim=True).values
    off = torch.stack([off.abs(), (off - LARGER).abs(), (off + LARGER).abs()]).amin(0)
    known = off[~off.isnan()]
    return float(known.median()) if len(known) else 0.0


def _silent(stored: torch.Tensor, amax: torch.Tensor) -> float:
    """The share of blocks with an amax that have a zero scale: a little against a layout."""
    says = has_size(amax)
    return float((says & (stored == 0)).sum() / max(1, int(says.sum())))


def _doubts(stored: torch.Tensor, amax: torch.Tensor, astray: bool) -> list[tuple[str, str]]:
    """What is to be said of the scales, should no decisions explain them."""
    if _powers_of_two(stored, amax):
        return [("scales", "the scale bytes are powers of two (E8M0), not E4M3")]
    if astray:
        return [("scales", "the scales follow their blocks' amax under no layout that is known")]
    return []


def _powers_of_two(stored: torch.Tensor, amax: torch.Tensor) -> bool:
    """Whether the scale bytes follow amax as E8M0, an octave a step."""
    says = has_size(amax) & (stored > 0)
    off = (amax.log2() - (stored.float() - 127))[says]
    return len(off) > 0 and bool(((off - off.median()).abs() <= 1.1).float().mean() > 0.98)


def _nibble_orders(
    x: torch.Tensor, packed: torch.Tensor, stored: torch.Tensor, amax: torch.Tensor, outer
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """The share of nonzero elements whose magnitude each order misses; where it has them right.

    Under the outer scale that the block scales suggest, none, or the one given, either way round:
    whichever makes an order fit best.
    """
    head = slice(0, ROWS_LOOKED_AT)
    s = E4M3.decode(stored[head]).repeat_interleave(BLOCK, -1)
    missed, right = {}, {}
    factors = [_row_ratios(stored, amax)[head], torch.ones((), dtype=torch.float32, device="cpu")]
    if outer is not None:
        given = by_row(outer)
        given = given if given.ndim == 0 else given[head]
        factors += [given, 1 / given]
    quotients = [x[head].float() / (s * factor) for factor in factors]
    expected = [E2M1.encode(q.nan_to_num(0.0)) & 7 for q in quotients]
    asked = max(int((e != 0).sum()) for e in expected)
    expected = [e for e in expected if 10 * int((e != 0).sum()) >= asked]
    for name, unpack in NIBBLE_ORDERS.items():
        if name.startswith("big-endian") and packed.shape[-1] % 4:
            continue
        magnitude = unpack(packed[head]) & 7
        right[name], missed[name] = torch.zeros_like(magnitude, dtype=torch.bool), 1.0
        for e in expected:
            nonzero = e != 0
            agree = nonzero & (magnitude == e)
            share = 1 - int(agree.sum()) / max(1, int(nonzero.sum())) if asked else 0.0
            if share < missed[name]:
                right[name], missed[name] = agree, share
    return missed, right


def _with_signs(reading: Reading, x: torch.Tensor, right: torch.Tensor) -> Reading:
    """The reading with its signs set right, where they were inverted or lost."""
    negative = x[: len(right)][right].float().signbit()
    set_ = reading.codes[: len(right)][right] >> 3 != 0
    if len(set_) < BLOCK or not negative.any():
        return reading
    if (set_ != negative).float().mean() > 0.95:
        fault, codes = "signs are inverted: bit 3 is set for positive values", reading.codes ^ 8
    elif not set_.any():
        nonzero = reading.codes != 0
        codes = reading.codes | (x.float().signbit() & nonzero).to(torch.uint8) << 3
        fault = "signs are lost: bit 3 is never set"
    else:
        return reading
    return replace(reading, codes=codes, faults=[fault, *reading.faults], contradicted=True)


def _row_ratios(stored: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """The outer scale that each row's scales suggest, 1 where they say nothing: (T, 1).

    From the larger half of its blocks, since smaller ones may stand on a floor.
    """
    ratio = log_ratio(stored, amax)
    usable_amax = amax.where(~ratio.isnan(), math.nan)
    large = usable_amax >= usable_amax.nanmedian(-1, keepdim=True).values
    median = ratio.where(large, math.nan).nanmedian(-1, keepdim=True).values
    return torch.exp2(median.nan_to_num(0.0))


def _reading(
    codes: torch.Tensor,
    stored: torch.Tensor,
    layout: str,
    nibbles: str,
    strays: dict[str, float],
    orders: dict[str, float],
    astray: bool,
) -> Reading:
    others = [missed for name, missed in orders.items() if name != nibbles]
    nowhere = orders[nibbles] > max(MOSTLY, min(others) - AHEAD)
    evidence = [
        _row("scale layout", layout, strays, codes.numel() // BLOCK, astray),
        _row("nibble order", nibbles, orders, codes.numel() // BLOCK, nowhere),
    ]
    faults, doubts = [], []
    if nowhere or orders[nibbles] > PARTLY:
        text = "codes follow their elements in no nibble order that is known"
        doubts.append(("codes", text))
    if not nowhere and nibbles != "low nibble first":
        faults.append(f"nibble order: {nibbles}")
    if layout == "128x4":
        faults.append("the scales lie in 128x4 tiles, not row by row")
    elif layout not in SOUND_LAYOUTS:
        faults.append(f"the scales lie as: {layout}")
    return Reading(codes, stored, layout, nibbles, evidence, faults, doubts)


def _with_outer(
    reading: Reading, found: OuterReading, given: torch.Tensor | None, dtype: torch.dtype
) -> Reading:
    """The reading with its outer scale."""
    rules = rules_of(given, found, dtype)
    blocks = reading.scales.numel()
    rows = [_row("outer scale", found.name, found.missed, blocks, found.misses > DOUBTFUL)]
    if found.outer is not None and given is not None and not found.contradicts:
        choice = rules[0] if rules else "none that is known: calibrated, or of another amax"
        per = f"{choice} (one for each token)" if found.per == "token" else choice
        verdict = "unclear" if not rules else "open" if rules[1:] else "supported"
        row = _row("outer scale rule", per, {per: 0.0}, blocks, poor=False)
        rows.append(row | {"verdict": verdict, "open": ", ".join(rules[1:])})
    faults = list(reading.faults)
    if found.contradicts and given is not None and not (given.isfinite() & (given > 0)).all():
        faults.append(NO_SCALE)
    elif found.fault and found.misses <= max(DOUBTFUL, min(found.missed.values())):
        faults.append(found.fault)
    return replace(
        reading,
        outer=found.outer,
        outer_per=found.per,
        outer_rules=rules,
        outer_reading=found.name,
        outer_given=given is not None,
        evidence=[*reading.evidence, *rows],
        faults=faults,
        contradicted=reading.contradicted or found.contradicts,
    )


def _row(decision: str, choice: str, scores: dict[str, float], blocks: int, poor: bool) -> dict:
    others = [name for name in scores if name != choice]
    open_ = [name for name in others if scores[name] - scores[choice] < CLOSE]
    verdict = "unclear" if poor else "open" if open_ else "supported"
    return {
        "decision": decision,
        "choice": choice,
        "verdict": verdict,
        "blocks": blocks,
        "elements": 0,
        "refuted": ", ".join(n for n in others if n not in open_),
        "open": ", ".join(open_),
    }
