"""Recipes: every numeric decision of a quantizer, named; and the recipes that have a name.

A `Recipe` is data. `codec` carries it out, `staging` knows which ones have a kernel. The defaults
of the parts below are the decisions of `nvfp4`, so that every other recipe shows just where it
differs. To add one, add it to `_RECIPES` at the end of this file; to allow a new choice within a
decision, add it to that decision's Literal here and to its one place in `codec` or `formats`.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args, get_type_hints

from nvfp4lab.formats import E2M1, E4M3, Format, Overflow, Rounding, Subnormals

ScaleFormula = Literal["amax / d / g"]
ElementFormula = Literal["x / (s * g)", "x * (1 / (s * g))"]
OuterFormula = Literal["amax / n"]


@dataclass(frozen=True)
class _Part:
    """Refuses a choice that its decision does not have."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            choices, given = get_args(hint), getattr(self, name)
            if choices and isinstance(choices[0], str) and given not in choices:
                raise ValueError(
                    f"{type(self).__name__}.{name}={given!r}; expected one of {choices}"
                )


@dataclass(frozen=True)
class Scale(_Part):
    """How a block's scale comes from its amax, and how it is stored.

    Formulas are read left to right, each operation one float32 rounding; d is the divisor, g the
    outer scale (1 where there is none, or where it has already divided the input).
    """

    format: Format | None = E4M3  # None: float32, not encoded
    block: int = 16  # elements that share a scale
    divisor: float = 6.0  # d, the largest element
    formula: ScaleFormula = "amax / d / g"
    amax_floor: float = 0.0  # amax is raised to this first
    floor: float = 0.0  # the unrounded scale is raised to this
    rounding: Rounding = "ties-to-even"
    subnormals: Subnormals = "gradual"
    overflow: Overflow = "saturate"


@dataclass(frozen=True)
class Elements(_Part):
    """How an element x becomes a code, given its block's scale s and the outer scale g."""

    format: Format = E2M1
    formula: ElementFormula = "x / (s * g)"
    scale_read: Literal["decoded", "encoder's"] = "decoded"  # s: what a consumer decodes, or the
    # number that the encoder had in hand, which for a NaN code is not NaN
    rounding: Rounding = "ties-to-even"
    zero_sign: Literal["kept", "from nonzero", "dropped"] = "kept"  # the sign of an element with
    # code zero: x's own, x's own unless the quotient is zero, none


@dataclass(frozen=True)
class Outer(_Part):
    """The float32 scale above the block scales: g = formula(amax of a token or of the tensor).

    For amax a NaN is skipped and Inf counts as the largest finite BF16.
    """

    per: Literal["token", "tensor"]
    formula: OuterFormula = "amax / n"
    range: float = 6.0 * 448.0  # n, the largest magnitude that a code and a scale express
    rounding: Literal["none", "up to a power of two"] = "none"
    floor: float = 0.0
    ceiling: float = math.inf
    of_zero: float = 1.0  # g where amax is 0
    divides: Literal["input", "scale"] = "scale"  # x := x / g before all else, or g in the formulas
    stored: Literal["decode", "encode"] = "decode"  # g multiplies the decoded value, or divides it


@dataclass(frozen=True)
class Specials(_Part):
    """What is done where arithmetic alone does not decide."""

    nan_in_amax: Literal["propagates", "ignored"] = "propagates"  # to the scale and so the block
    nan_code: int = 0x7  # of an element whose quotient is NaN
    zero_divisor: float = math.inf  # stands for s * g where that is 0; Inf gives codes +-0


@dataclass(frozen=True)
class Recipe:
    """One way of quantizing: its name, what sets it apart, its source, its decisions."""

    name: str
    summary: str
    source: str
    scale: Scale = Scale()
    elements: Elements = Elements()
    outer: Outer | None = None
    specials: Specials = Specials()

    def differences(self, other: Recipe) -> dict[str, tuple[object, object]]:
        """The decisions in which two recipes differ: {"scale.rounding": (own, other's)}."""
        found = {}
        for part in ("scale", "elements", "outer", "specials"):
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


def recipes() -> tuple[str, ...]:
    """The names that `recipe` knows.

    >>> recipes()[0]
    'nvfp4'
    """
    return tuple(_RECIPES)


def recipe(name: str | Recipe) -> Recipe:
    """The recipe of that name; a `Recipe` is given back as it is.

    Raises: ValueError for an unknown name (with the nearest ones), TypeError for anything else.

    >>> recipe("nvfp4-token").outer.per
    'token'
    """
    if isinstance(name, Recipe):
        return name
    if not isinstance(name, str):
        raise TypeError(f"a recipe is a name or a Recipe, got {type(name).__name__}")
    if name not in _RECIPES:
        near = difflib.get_close_matches(name, _RECIPES, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(_RECIPES)}"
        raise ValueError(f"unknown recipe {name!r}; {hint}")
    return _RECIPES[name]


NVFP4 = Recipe(
    "nvfp4",
    "Divides by the decoded scale as if exactly; no outer scale, gradual subnormal scales.",
    "This package; element rounding as PTX cvt.rn.satfinite.e2m1x2.",
)

SEED = Recipe(
    "seed",
    "The user's kernel bit for bit, faults kept: an unsigned exponent that wraps below 2**-7.",
    "nvfp4lab/kernels/seed.py",
    Scale(
        amax_floor=1e-4,
        rounding="ties-away",
        subnormals="exponent-wraps",
        overflow="mantissa-kept",
    ),
    Elements(
        formula="x * (1 / (s * g))",
        scale_read="encoder's",
        rounding="ties-away",
        zero_sign="from nonzero",
    ),
    specials=Specials(nan_in_amax="ignored", nan_code=0xF, zero_divisor=1e-6),
)

_RECIPES = {
    r.name: r
    for r in (
        NVFP4,
        replace(
            NVFP4,
            name="nvfp4-token",
            summary="A power of two for each token keeps block scales in range and x / g exact.",
            outer=Outer(
                per="token",
                rounding="up to a power of two",
                floor=2.0**-100,
                ceiling=2.0**117,
                divides="input",
            ),
        ),
        replace(
            NVFP4,
            name="nvfp4-tensor",
            summary="One outer scale amax / 2688 for the tensor, or a calibrated one.",
            outer=Outer(per="tensor"),
        ),
        replace(
            NVFP4,
            name="nvfp4-exact-scale",
            summary="amax / 6 kept in float32: the error of E2M1 alone, the theory's baseline.",
            scale=Scale(format=None),
        ),
        SEED,
        replace(
            SEED,
            name="seed-as-meant",
            summary="The user's kernel with a signed exponent; its other faults kept.",
            source="nvfp4lab/kernels/seed.py, read as it was meant",
            scale=replace(SEED.scale, subnormals="implicit-bit-lost"),
        ),
    )
}
