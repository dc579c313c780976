"""Recipes as data: every numeric decision of a quantizer, named.

A `Recipe` is data: `catalogue` has those with a name, `codec` carries them out, `staging` knows
which ones have a kernel. The defaults of the parts below are the decisions of `nvfp4`, so that
every other recipe shows just where it differs. To allow a new choice within a decision, add it to
that decision's Literal, here or in `formats`, and to its one place in `blocks`, `outer` or
`formats`.

In formulas d is the largest element, g the outer scale that decodes and G the one that encodes
(each is float32(1 / the other); both are 1 where there is none), s the value of the block's scale
code. Each operation is one float32 rounding, read as written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, Literal, get_args, get_type_hints

import torch

from nvfp4lab.checks import unknown
from nvfp4lab.formats import E2M1, E4M3, Format, Overflow, Rounding, Subnormals

FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127

ScaleFormula = Literal[
    "amax / d / g",
    "amax / (d * g)",
    "amax * (1 / d)",  # where there is no outer scale, or it has divided the input
    "amax / d * G",
    "G * amax / d",
    "G * (amax * (1 / d))",
    "amax * (G * (1 / d))",
    "amax / d",  # the outer scale forgotten
]
ElementFormula = Literal[
    "x / (s * g)",
    "x * (1 / (s * g))",
    "x * min(1 / (s * g), FLOAT32_MAX)",
    "x * (G / s)",
    "x / (s / G)",
    "x * (G * (1 / s))",
    "x * G / s",
    "x / s * G",
    "x / s",  # the outer scale forgotten
    "x",  # not divided: the code of the value * s that is the least distance away
]
OuterFormula = Literal[
    "g = amax / n",
    "g = amax * (1 / n)",
    "G = n / amax",
    "G = (1 / amax) * n",
]
ElementRounding = Literal[Rounding, "least distance"]
Precision = Literal["float32", "input's"]


@dataclass(frozen=True)
class _Part:
    """Refuses a choice that its decision does not have, and a number that is none."""

    def __post_init__(self) -> None:
        choices = self.choices()
        for name, hint in _hints(type(self)).items():
            value = getattr(self, name)
            if name in choices:
                expected, fits = f"one of {choices[name]}", value in choices[name]
            elif hint is float:
                number = isinstance(value, (int, float))
                expected, fits = "a number from 0 up", number and value >= 0
            elif name == "block":
                expected, fits = "a whole number from 1 up", type(value) is int and value >= 1
            elif name == "format":
                expected, fits = "one of nvfp4lab.formats", isinstance(value, hint)
            else:
                continue
            if not fits:
                raise ValueError(f"{type(self).__name__}.{name}={value!r}; expected {expected}")

    @classmethod
    def choices(cls) -> dict[str, tuple[str, ...]]:
        """The choices of each decision that is one of a few names."""
        hints = {name: get_args(hint) for name, hint in _hints(cls).items()}
        return {name: args for name, args in hints.items() if args and isinstance(args[0], str)}


@cache
def _hints(part: type) -> dict[str, Any]:
    return get_type_hints(part)


@dataclass(frozen=True)
class Scale(_Part):
    """How a block's scale comes from its amax, and how it is stored."""

    format: Format | None = E4M3  # None: float32, not encoded
    block: int = 16  # elements that share a scale
    divisor: float = 6.0  # d, the largest element
    formula: ScaleFormula = "amax / d / g"
    precision: Precision = "float32"  # of the quotient amax / d
    amax_floor: float = 0.0  # amax is raised to this first
    factor: float = 1.0  # multiplies the formula's result
    of_raw_zero: float = 0.0  # the unrounded scale where the formula gives 0
    floor: float = 0.0  # the unrounded scale is raised to this
    ceiling: float = math.inf  # and lowered to this
    rounding: Rounding = "ties-to-even"
    subnormals: Subnormals = "gradual"
    overflow: Overflow = "saturate"
    of_zero: float = 0.0  # stored in place of a scale that was rounded to 0

    def decode(self, stored: torch.Tensor) -> torch.Tensor:
        """The value of each stored scale: of a code, or of a float32 scale itself: float32."""
        return stored if self.format is None else self.format.decode(stored)


@dataclass(frozen=True)
class Elements(_Part):
    """How an element x becomes a code, given its block's scale s and the outer scale."""

    format: Format = E2M1
    formula: ElementFormula = "x / (s * g)"
    precision: Precision = "float32"  # of the quotient x / s
    scale_read: Literal["decoded", "encoder's", "unrounded", "subnormals as normals"] = "decoded"
    # s: what a consumer decodes; the number that the encoder had in hand, which for a NaN code is
    # not NaN; the scale before it was rounded; a subnormal code with an implicit bit and field 1
    rounding: ElementRounding = "ties-to-even"
    # least distance: the first code whose float32 distance from the quotient is the least
    overflow: Literal["saturate", "sign bit"] = "saturate"  # from 7 up: clamped, or carried into 8;
    # then an infinite quotient becomes NaN
    zero_sign: Literal["kept", "from nonzero", "dropped", "unless positive"] = "kept"  # the sign of
    # an element with code zero: x's own, x's own unless the quotient is zero, none, - unless x > 0


@dataclass(frozen=True)
class Outer(_Part):
    """The float32 scale above the block scales, from the amax of a token or of the tensor."""

    per: Literal["token", "tensor"]
    formula: OuterFormula = "g = amax / n"
    range: float = 6.0 * 448.0  # n, the largest magnitude that a code and a scale express
    precision: Precision = "float32"  # of each operation
    amax_floor: float | Literal["smallest normal"] = (
        0.0  # the smallest normal: of the input's dtype
    )
    rounding: Literal[
        "none", "up to a power of two", "down to a power of two", "to the nearest power of two"
    ] = "none"
    floor: float = 0.0
    ceiling: float = math.inf
    of_zero: float | None = 1.0  # where amax is 0; None: what the formula gives
    of_inf: float | None = None  # where amax is Inf
    of_nonfinite: float | None = None  # where the formula gives NaN or Inf
    reciprocal_of_zero: float = math.inf  # g where G is 0
    nan_in_amax: Literal["ignored", "propagates"] = "ignored"
    inf_in_amax: Literal["the largest BF16", "kept"] = "the largest BF16"
    divides: Literal["input", "scale"] = "scale"  # x := x / g before all else, or in the formulas

    @property
    def encodes(self) -> bool:
        """Whether the formula gives G, of which g is the reciprocal, or g."""
        return self.formula.startswith("G")


@dataclass(frozen=True)
class Specials(_Part):
    """What is done where arithmetic alone does not decide."""

    nan_in_amax: Literal["propagates", "ignored"] = "propagates"  # to the scale and so the block
    nan_scale_code: int | None = None  # where amax is NaN; None: the format's own
    outer_nan_scale_code: int | None = None  # where only the outer scale is NaN
    invalid_scale_code: int | None = None  # where the formula makes a NaN of numbers; None: as 0
    nan_code: int = 0x7  # of an element whose quotient is NaN
    nan_scale_nan_code: int | None = None  # that code where the NaN comes from the scale's code
    nan_sign: Literal["none", "x86"] = "none"  # x86: bit 3 is set where the NaN has its sign bit
    # set, as the x86 leaves it: x's own, and - where numbers alone made the NaN
    zero_divisor: float = math.inf  # stands for s * g, or s, where that is 0; Inf: codes +-0
    zero_scale: Literal["divides", "codes +0", "codes +-0"] = "divides"  # what elements get whose
    # stored scale is zero
    inf_over_inf: Literal["Inf", "NaN"] = "Inf"


@dataclass(frozen=True)
class Search(_Part):
    """Several scales are tried on a block and the one with the smallest error is kept.

    Ties go to the candidate that comes first. Errors are those of the decoded block against x.
    """

    factors: tuple[float, ...] | None  # of the unrounded scale; None: every finite scale code
    criterion: Literal["mse", "mae", "max"] = "mse"
    decoding: Literal["v * s * g", "v * s * amax / n"] = "v * s * g"  # amax: of the outer scale
    precision: Literal["float32", "float64"] = "float32"  # of the error and of its sum


@dataclass(frozen=True)
class Recipe:
    """One way of quantizing: its name, what sets it apart, its source, its decisions.

    scale, elements, outer, specials, search: the parts of this module, whose fields are the
    decisions; what is left out is decided as `nvfp4` does.

    Raises: ValueError, in the parts, for a choice that a decision does not have.

    >>> nvfp4 = Recipe("a", "All as nvfp4.", "made up")
    >>> away = nvfp4.changed({"scale.rounding": "ties-away"})
    >>> away.name, away.differences(nvfp4)
    ('a with scale.rounding ties-away', {'scale.rounding': ('ties-away', 'ties-to-even')})
    """

    name: str
    summary: str
    source: str
    scale: Scale = Scale()
    elements: Elements = Elements()
    outer: Outer | None = None
    specials: Specials = Specials()
    search: Search | None = None

    @property
    def outer_per(self) -> Literal["token", "tensor"] | None:
        """Of what it has an outer scale: each token, the tensor, or nothing."""
        return None if self.outer is None else self.outer.per

    def differences(self, other: Recipe) -> dict[str, tuple[object, object]]:
        """The decisions in which two recipes differ: {"scale.rounding": (own, other's)}; of a part
        that one of them does not have, the part: {"outer": (None, other's)}."""
        found = {}
        for part in _PARTS:
            mine, theirs = getattr(self, part), getattr(other, part)
            if mine is None or theirs is None:
                if mine != theirs:
                    found[part] = (mine, theirs)
                continue
            for decision in fields(mine):
                pair = getattr(mine, decision.name), getattr(theirs, decision.name)
                if pair[0] != pair[1]:
                    found[f"{part}.{decision.name}"] = pair
        return found

    def changed(self, decisions: Mapping[str, object], name: str | None = None) -> Recipe:
        """The recipe with these decisions in place of its own, under the names that `differences`
        gives them: {"elements.rounding": "ties-away", "outer": None}.

        name: of the new recipe; None: this one's with the decisions that differ behind it. Summary
        and source stay.

        Raises: ValueError for a decision that there is not or a choice that it does not have,
        TypeError for a part of another kind.
        """
        recipe: Any = self
        for path, choice in decisions.items():
            recipe = replace(recipe, **_part_with(recipe, path, choice))
        if name is None:
            differing = {path: own for path, (own, _) in recipe.differences(self).items()}
            said = ", ".join(f"{path} {_said(choice)}" for path, choice in differing.items())
            name = self.name + (f" with {said}" if said else "")
        return replace(recipe, name=name)


_PARTS = {"scale": Scale, "elements": Elements, "outer": Outer, "specials": Specials}
_PARTS |= {"search": Search}
_DECISIONS = [
    name
    for part, kind in _PARTS.items()
    for name in (part, *(f"{part}.{decision.name}" for decision in fields(kind)))
]


def _part_with(recipe: Recipe, path: str, choice: Any) -> dict[str, Any]:
    """The part that a decision is of, where it is this choice."""
    if path not in _DECISIONS:
        raise ValueError(unknown("decision", path, _DECISIONS))
    part, dot, decision = path.partition(".")
    kind, own = _PARTS[part], getattr(recipe, part)
    if not dot:
        if not isinstance(choice, kind) and not (choice is None and part in ("outer", "search")):
            raise TypeError(f"{part} is a rules.{kind.__name__}, got {type(choice).__name__}")
        return {part: choice}
    if own is None:
        raise ValueError(
            f"{recipe.name} has no {part} and so no {path}; give {part!r} a rules.{kind.__name__}"
        )
    return {part: replace(own, **{decision: choice})}


def _said(choice: object) -> str:
    """A choice in the name of a recipe."""
    if isinstance(choice, Format):
        return choice.name
    return "of its own" if isinstance(choice, _Part) else str(choice).lower()
