"""How a kernel's outer scale is to be read, by what its block scales say.

A normal scale s of a block whose amax is a says that g is near a / (6 s); the largest scale says
that g is no larger, a subnormal one that it is no smaller. A reading is judged by the share of
blocks that contradict it; its rule, by the values themselves. To look for one more rule, give it to
a recipe, or add it to `_RULES`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

import torch

from nvfp4lab import catalogue
from nvfp4lab.codec import LARGEST_BF16
from nvfp4lab.formats import E4M3
from nvfp4lab.outer import POWERS_OF_TWO, OuterScale, outer_from_amax
from nvfp4lab.rules import Outer

NEAR = 0.15  # in log2: the rounding of one E4M3 scale is at most 0.09
DOUBTFUL = 0.1  # share of blocks that contradict a reading above which it is doubtful
LARGER = math.log2(1.5)  # 4/6 takes half as much again
ENOUGH = 8  # blocks that a constant factor must rest on
NOT_USED = "given but not used"
OFF = "decode, but "  # how the name of a reading begins whose values are a factor off
NO_SCALE = "outer scale holds values that are none: zero, negative, NaN or Inf"
FAULTS = {  # a reading that is not here is a fault under its own name
    "none": "",
    "decode": "",
    "encode": "the outer scale is the encode scale, the inverse of a decode multiplier",
    "amax": "the outer scale is amax itself, not amax / 2688",
    "amax of 4/6": "the outer scale is amax itself, not amax / 1536",
}


@dataclass(frozen=True)
class OuterReading:
    """name: what the values are, or what is amiss with them. outer: None where there is none or it
    was not used. per: "token" or "tensor". missed: the share of blocks that contradict each
    reading."""

    name: str
    outer: OuterScale | None
    per: str | None
    missed: dict[str, float]

    @property
    def misses(self) -> float:
        """The share of blocks that contradict this reading."""
        return self.missed[self.name]

    @property
    def side(self) -> Literal["decode", "encode"]:
        """Which of g and G the values are."""
        return "encode" if self.name == "encode" else "decode"

    @property
    def fault(self) -> str:
        """What is amiss, empty where nothing is."""
        return FAULTS.get(self.name, f"outer scale {self.name}")

    @property
    def contradicts(self) -> bool:
        """Whether the values that were given cannot be what the scales were made under."""
        return self.name == NOT_USED or self.name.startswith(OFF)


def of_named_rules() -> list[Outer]:
    """Every rule that a recipe has, and amax / 2688 rounded to powers of two, each once."""
    rules = [catalogue.recipe(name).outer for name in catalogue.recipes()]
    rules += [Outer("token", rounding=rounding) for rounding in POWERS_OF_TWO]  # type: ignore[arg-type]
    rules += [Outer("token", range=6.0 * 256.0)]
    return list(dict.fromkeys(replace(rule, per="token") for rule in rules if rule is not None))


_RULES = of_named_rules()


def read_outer(
    given: torch.Tensor | None, amax: torch.Tensor, stored: torch.Tensor, dtype: torch.dtype
) -> list[OuterReading]:
    """The readings of the outer scale that some blocks bear out, the likeliest first.

    given: float32 of one value or one a token, or None. amax: (T, B). stored: scale bytes (T, B).
    """
    finite = amax.where(amax.isfinite(), LARGEST_BF16)
    of_tensor, of_tokens = finite.amax(), finite.amax(-1, keepdim=True)
    one = torch.ones((), dtype=torch.float32, device="cpu")
    readings: dict[str, torch.Tensor | None] = {}
    if given is None:
        readings["none"] = None
        readings["missing: amax of the tensor / 2688"] = of_tensor / 2688
        readings["missing: amax of the tensor / 1536"] = of_tensor / 1536
        readings["missing: amax of the token / 2688"] = of_tokens / 2688
        powers = outer_from_amax(of_tokens, Outer("token", rounding="up to a power of two"), dtype)
        readings["missing: amax of the token / 2688, up to a power of two"] = powers.decode
    else:
        decode = by_row(given)
        readings["decode"] = decode
        readings["encode"] = one / decode
        readings["amax"] = decode / 2688
        readings["amax of 4/6"] = decode / 1536
        readings[NOT_USED] = None
    missed = {
        name: _contradicted(one if g is None else g, amax, stored) for name, g in readings.items()
    }
    if given is not None and min(missed.values()) > DOUBTFUL:
        decode = by_row(given)
        off = simple_factor(decode, amax, stored)
        if off is not None and (scaled := _contradicted(decode * off, amax, stored)) < DOUBTFUL:
            wrong = f"{1 / off:.6g} times too large" if off < 1 else f"{off:.6g} times too small"
            readings[OFF + wrong], missed[OFF + wrong] = decode * off, scaled
    order = sorted(readings, key=lambda name: missed[name])
    first = next(iter(readings))
    if missed[first] <= missed[order[0]] + 0.01:  # nothing tells: what was given is believed
        order.remove(first)
        order.insert(0, first)
    likely = [n for n in order if n == order[0] or missed[n] < missed[order[0]] + 0.05]
    if given is not None and first not in likely:
        likely.append(first)  # where the scales alone forget the outer scale
    found = []
    for name in likely:
        g = readings[name]
        if g is None:
            found.append(OuterReading(name, None, None, missed))
            continue
        per = "tensor" if g.ndim == 0 else "token"
        encode = by_row(given) if name == "encode" and given is not None else one / g
        of = of_tensor if per == "tensor" else of_tokens
        found.append(OuterReading(name, OuterScale(g, encode, of), per, missed))
    return found


def exact_outers(found: OuterReading, dtype: torch.dtype) -> Iterator[OuterReading]:
    """The same reading under each rule that gives it, or comes within 2**-20 of it.

    A scale that was not given is known to an ulp or so; its rule gives it exactly. Of one that was
    given, the other side, g of G or G of g, is.
    """
    if found.outer is None:
        return
    seen = [found.outer]
    for rule in _RULES:
        outer = outer_from_amax(found.outer.amax, replace(rule, per=found.per), dtype)  # type: ignore[arg-type]
        near = (outer.decode / found.outer.decode - 1).abs() < 2.0**-20
        if found.name == found.side:  # these very values were written
            near = getattr(outer, found.side) == getattr(found.outer, found.side)
        known = any(
            torch.equal(outer.decode, o.decode) and torch.equal(outer.encode, o.encode)
            for o in seen
        )
        if (near | (found.outer.amax == 0)).all() and not known:
            seen.append(outer)
            yield replace(found, outer=outer)


def rules_of(given: torch.Tensor | None, found: OuterReading, dtype: torch.dtype) -> list[str]:
    """The rules that give every value of the outer scale exactly, in words."""
    if found.outer is None or given is None or found.contradicts:
        return []
    amax = found.outer.amax
    values = bits(getattr(found.outer, found.side))
    texts = []
    for of, what in ((amax, found.per), (amax.amax().expand_as(amax), "tensor")):
        for rule in _RULES:
            if torch.equal(bits(getattr(outer_from_amax(of, rule, dtype), found.side)), values):
                texts.append(rule_text(rule, str(what)))
        if found.per == "tensor" or texts:
            break
    return list(dict.fromkeys(texts))


def rule_text(rule: Outer, of: str) -> str:
    """A rule in words: g = amax / n of the token, n = 2688."""
    extra = "" if rule.rounding == "none" else f", {rule.rounding}"
    floor = f", amax at least {rule.amax_floor}" if rule.amax_floor else ""
    return f"{rule.formula} of the {of}, n = {rule.range:g}{extra}{floor}"


def has_size(amax: torch.Tensor) -> torch.Tensor:
    """Blocks with a finite amax above 0: (T, B)."""
    return (amax > 0) & amax.isfinite()


def by_row(given: torch.Tensor) -> torch.Tensor:
    """An outer scale of one value or one a token as () or (T, 1)."""
    return given.reshape(() if given.numel() == 1 else (-1, 1))


def usable(stored: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Blocks whose scale is normal and not the largest: there amax / 6 is within 7 % of it."""
    normal = (stored >= 0x08) & (stored < E4M3.code_of_max)
    return normal & has_size(amax)


def on_floor(stored: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """Blocks under the smallest scale, where blocks of different sizes share it: (T, B)."""
    says = has_size(amax) & (stored > 0)
    lowest = says & (stored == stored.where(says, 0xFF).min())
    sizes = amax[lowest]
    return lowest & bool(len(sizes) and sizes.max() > 2 * sizes.min())


def log_ratio(stored: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """log2 of amax / 6 over the scale, NaN where that says nothing or is a floor: (T, B)."""
    ratio = (amax / (6 * E4M3.decode(stored))).log2()
    return ratio.where(usable(stored, amax) & ~on_floor(stored, amax), math.nan)


def _contradicted(g: torch.Tensor, amax: torch.Tensor, stored: torch.Tensor) -> float:
    """The share of the blocks with a finite amax above 0 whose scales cannot stand under g."""
    says = has_size(amax)
    off = (amax / 6).log2() - g.log2()  # NaN or infinite where g is no scale: never near
    s = E4M3.decode(stored).log2()
    near = torch.minimum((off - s).abs(), (off - s + LARGER).abs()) < NEAR
    near |= (stored == E4M3.code_of_max) & (off > math.log2(E4M3.max) - NEAR)
    near |= (stored < 0x08) & (off < math.log2(E4M3.smallest_normal) + NEAR)
    near |= on_floor(stored, amax) & (off < s)  # there g may be as small as it likes
    near &= off.isfinite()
    return float((says & ~near).sum() / max(1, int(says.sum())))


def simple_factor(g: torch.Tensor, amax: torch.Tensor, stored: torch.Tensor) -> float | None:
    """What g has to be multiplied by, as simple a ratio as every scale's rounding interval allows.

    A scale byte b of a block says that amax / 6 / g lies between the midpoints around b.
    """
    known = usable(stored, amax) & g.isfinite() & (g > 0)
    if int(known.sum()) < ENOUGH:
        return None
    steps = torch.tensor(E4M3.magnitudes, dtype=torch.float32, device="cpu")
    code = stored[known].int()
    below, above = (steps[code] + steps[code - 1]) / 2, (steps[code] + steps[code + 1]) / 2
    exact = (amax / 6 / g).expand_as(stored)[known].double()
    low = float((exact / above)[: 1 << 20].quantile(0.99))
    high = float((exact / below)[: 1 << 20].quantile(0.01))
    if low >= high:  # no single factor explains all of them
        return float((exact / steps[code]).median())
    for known_factor in (1.0, 1 / 2688, 2688.0, 1 / 6, 6.0, 1 / 448, 448.0):
        if low <= known_factor <= high:
            return known_factor
    middle = Fraction((low + high) / 2)
    for size in range(1, 4097):
        inverse = (1 / middle).limit_denominator(size)
        for simple in (middle.limit_denominator(size), 1 / inverse if inverse else middle):
            if low <= simple <= high:
                return float(simple)
    return float(middle)


def bits(x: torch.Tensor) -> torch.Tensor:
    """float32 as int32, so that equal means the same bits."""
    return x.contiguous().view(torch.int32)
