"""The decisions that `identify` infers: their choices, and what each choice is called.

A decision is a field of a `Recipe`. Its choices are those of its Literal in `rules`; a number's are
listed in NUMBERS, and `suggested` adds those that a kernel's output itself puts forward: the
smallest scale for a floor, the largest for a ceiling. To let `identify` find one more choice of a
name, teach it to `rules` (a rounding: to `formats`), and it is tried; of a number, add it to
NUMBERS. One more decision gets a line in DECISIONS.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from nvfp4lab import catalogue
from nvfp4lab.diagnose.observed import Observed, Output
from nvfp4lab.diagnose.outer_reading import simple_factor
from nvfp4lab.formats import E4M3
from nvfp4lab.rules import Recipe, Search


@dataclass(frozen=True)
class Decision:
    """path: the field, as "scale.rounding". judged_by: whether scale bytes or codes show it.

    says: what sets a kernel apart that chose otherwise than `nvfp4`, with {} for the choice; empty
    where that is nothing to mention. of_choice: other words for some choices. special: met by NaN
    and Inf alone, and reported only where something shows it.
    """

    path: str
    name: str
    judged_by: Literal["scales", "codes"]
    says: str
    of_choice: dict[Any, str] = field(default_factory=dict)
    special: bool = False

    def of(self, recipe: Recipe) -> Any:
        """The recipe's choice; None where it has no such part."""
        part, _, name = self.path.partition(".")
        value = getattr(recipe, part)
        return getattr(value, name) if name and value is not None else value

    def text(self, choice: Any) -> str:
        """What a choice sets apart, in words."""
        return self.of_choice.get(choice, self.says).format(plain(choice))


# In the order of their gravity: `causes` come in it.
DECISIONS = (
    Decision(
        "scale.overflow",
        "scale saturation",
        "scales",
        "scales beyond 448: {}",
        {
            "nan": "scales beyond 448 become NaN: the cast to E4M3 has no clamp",
            "mantissa-kept": "scales beyond 448 keep their mantissa: NaN or 256 and more",
            "top binade": "scales from 248 up become 448",
        },
    ),
    Decision(
        "elements.scale_read",
        "scale that divides",
        "codes",
        "elements are divided by: {}",
        {
            "unrounded": "elements are divided by the unrounded scale",
            "subnormals as normals": "subnormal scale bytes are decoded as normal ones: 0x01 as "
            "0.0088, not 2^-9",
            "encoder's": "elements are divided by the number that a NaN scale code replaces",
        },
    ),
    Decision(
        "scale.formula",
        "order of operations of the scale",
        "scales",
        "order of operations of the scale: {}",
        {"amax / d": "scales are not divided by the outer scale"},
    ),
    Decision(
        "elements.formula",
        "divide or reciprocal",
        "codes",
        "order of operations of the elements: {}",
        {
            "x / s": "elements are not divided by the outer scale",
            "x": "elements are not divided: the nearest of the decoded values is taken",
            "x * (1 / (s * g))": "elements are multiplied by a reciprocal: {}",
            "x * min(1 / (s * g), FLOAT32_MAX)": "elements are multiplied by a reciprocal: {}",
            "x * (G / s)": "elements are multiplied by a reciprocal: {}",
            "x * (G * (1 / s))": "elements are multiplied by a reciprocal: {}",
        },
    ),
    Decision(
        "specials.zero_divisor",
        "division by zero",
        "codes",
        "a zero divisor is taken for {}",
        {0.0: "blocks have scale 0 and codes that are not 0: no guard, and no floor of the scale"},
    ),
    Decision("scale.divisor", "divisor of amax", "scales", "scales are amax / {}, not amax / 6"),
    Decision("scale.factor", "factor on the scale", "scales", "scales are {} times amax / 6"),
    Decision("scale.subnormals", "subnormal scales", "scales", "subnormal scales: {}"),
    Decision("scale.floor", "scale floor", "scales", "scales are never below {}"),
    Decision("scale.ceiling", "scale ceiling", "scales", "scales are never above {}"),
    Decision("scale.amax_floor", "floor of amax", "scales", "amax is raised to {} first"),
    Decision("scale.of_raw_zero", "zero block", "scales", "a block of zeros gets the scale {}"),
    Decision("scale.of_zero", "scale that underflows", "scales", "a scale of 0 becomes {}"),
    Decision("scale.rounding", "scale rounding", "scales", "scales round {}"),
    Decision("scale.precision", "precision of the scale", "scales", "amax / 6 is rounded to {}"),
    Decision("search", "search over scales", "scales", "scales are searched: {}"),
    Decision("elements.rounding", "ties of elements", "codes", "ties of elements: {}"),
    Decision(
        "elements.overflow",
        "elements beyond 6",
        "codes",
        "elements whose magnitude is 7 and more: {}",
    ),
    Decision(
        "elements.precision", "precision of the quotient", "codes", "quotients are rounded to {}"
    ),
    Decision("elements.zero_sign", "sign of zero", "codes", "the sign of elements of code 0: {}"),
    Decision(
        "specials.zero_scale",
        "elements of a zero scale",
        "codes",
        "under a zero scale: {}",
        {"codes +-0": ""},
    ),
    Decision("outer.divides", "what the outer scale divides", "scales", ""),
    Decision("specials.nan_in_amax", "NaN in amax", "scales", "NaN in amax: {}", special=True),
    Decision("specials.nan_scale_code", "scale of NaN", "scales", "scale of a NaN block: {}",
             special=True),
    Decision("specials.outer_nan_scale_code", "scale under a NaN outer scale", "scales",
             "scale of a block under a NaN outer scale: {}", special=True),
    Decision("specials.invalid_scale_code", "scale of an invalid operation", "scales",
             "a scale that arithmetic on numbers makes NaN: {}", special=True),
    Decision("specials.nan_code", "code of NaN", "codes", "code of a NaN quotient: {}",
             special=True),
    Decision("specials.inf_over_inf", "Inf / Inf", "codes", "Inf / Inf: {}", special=True),
)  # fmt: skip

NUMBERS: dict[str, tuple] = {
    "scale.amax_floor": (0.0, 1e-12, 1e-4),
    "scale.divisor": (6.0,),
    "scale.factor": (1.0, 17 / 16, 1.5),
    "scale.floor": (0.0, 2.0**-9, 2.0**-6),
    "scale.ceiling": (math.inf, 448.0),
    "scale.of_raw_zero": (0.0, 1.0),
    "scale.of_zero": (0.0, 2.0**-9, 0.125, 1.0),
    "specials.invalid_scale_code": (None, 0x7E, 0x7F, 0xFE, 0xFF),
    "specials.outer_nan_scale_code": (None, 0x7E),
    "specials.nan_scale_code": (None, 0x7E, 0xFF),
    "specials.zero_divisor": (math.inf, 0.0, 1e-6, 1e8),
}
CRITERIA = ("mse", "mae", "max")
DECODINGS = ("v * s * g", "v * s * amax / n")
# Choices that are no scale's or no element's, or another name of the same.
NOT_FOR = {
    "scale.rounding": {"stochastic", "ties-up", "ties-down", "down", "up-from-three-quarters"},
    "elements.rounding": {"stochastic", "up-from-three-quarters", "least distance"},
}
WITHOUT_OUTER = {
    "scale.formula": ("amax / d / g", "amax * (1 / d)"),
    "elements.formula": ("x / (s * g)", "x * (1 / (s * g))", "x"),
}


def with_choice(recipe: Recipe, path: str, choice: Any) -> Recipe:
    """The recipe, under its name, with one decision set to another choice."""
    changes = {path: choice}
    if path == "elements.formula" and (choice == "x") != (recipe.elements.formula == "x"):
        # undivided, only the least distance makes sense
        changes["elements.rounding"] = "least distance" if choice == "x" else "ties-to-zero"
    return recipe.changed(changes, recipe.name)


def choices(decision: Decision, recipe: Recipe, seen: Observed, suggestions: dict) -> list[Any]:
    """The other choices of a decision that mean something for this recipe and these blocks."""
    path = decision.path
    part, _, name = path.partition(".")
    if getattr(recipe, part) is None and name:
        return []
    current = decision.of(recipe)
    if path == "search":
        every: Iterable = _searches(recipe)
    elif path == "specials.nan_code":
        nan = seen.x.isnan() | seen.quotients(recipe).isnan()
        every = seen.codes[nan].unique().tolist()
    elif path in NUMBERS:
        every = dict.fromkeys((*NUMBERS[path], *suggestions.get(path, ())))
    else:
        every = type(getattr(recipe, part)).choices()[name]
    if path in WITHOUT_OUTER and (recipe.outer is None or recipe.outer.divides == "input"):
        every = WITHOUT_OUTER[path]
    elif path == "scale.formula":
        every = [c for c in every if c != "amax * (1 / d)"]  # it has no place for an outer scale
    if path == "elements.scale_read" and not (seen.stored & 0x7F == E4M3.nan_code).any():
        every = [c for c in every if c != "encoder's"]  # it differs for a NaN code alone
    if path == "elements.rounding" and recipe.elements.rounding == "least distance":
        every = [c for c in every if c != "ties-to-zero"]  # another name of the same
        if recipe.elements.formula == "x":
            every = []
    return [c for c in every if c != current and c not in NOT_FOR.get(path, ())]


def _searches(recipe: Recipe) -> list[Search | None]:
    decodings = DECODINGS if recipe.outer is not None else DECODINGS[:1]
    orders = [(1.0, 1.5)] if recipe.search is None else [(1.0, 1.5), (1.5, 1.0)]
    return [None, *(Search(o, c, d) for o in orders for c in CRITERIA for d in decodings)]  # type: ignore[arg-type]


def suggested(output: Output) -> dict[str, tuple]:
    """Numbers that the output itself puts forward, by decision."""
    stored, amax = output.stored[:, 0], output.amax
    outer = output.reading.outer
    g = (
        torch.ones((1, 1), dtype=torch.float32, device="cpu")
        if outer is None
        else outer.decode.reshape(-1, 1)
    )
    raw = (amax.view(output.rows, -1) / 6 / g).view(-1)
    finite = amax.isfinite() & (stored <= E4M3.code_of_max)
    found: dict[str, tuple] = {}

    def value_of(codes: torch.Tensor, pick) -> tuple:
        return (E4M3.magnitudes[int(pick(codes.long()))],) if len(codes) else ()

    def commonest(codes: torch.Tensor) -> torch.Tensor:
        return torch.bincount(codes).argmax()

    some = stored[finite & (amax > 0) & (stored > 0)]
    floor = value_of(some, torch.min)
    found["scale.floor"] = floor
    found["scale.amax_floor"] = tuple(6 * f for f in floor)
    found["scale.ceiling"] = tuple(c for c in value_of(some, torch.max) if c < E4M3.max)
    found["scale.of_raw_zero"] = value_of(stored[finite & (amax == 0)], commonest)
    vanishes = (raw > 0) & (raw < 2.0**-10)
    found["scale.of_zero"] = value_of(stored[finite & vanishes], commonest)
    rows = output.rows
    factor = simple_factor(
        g if outer is not None else g[0, 0], amax.view(rows, -1), output.reading.scales
    )
    if factor is not None and factor != 1:
        found["scale.factor"] = (1 / factor,)
        divisor = 6 * factor
        if abs(round(divisor) / divisor - 1) < 1e-6:
            found["scale.divisor"] = (float(round(divisor)),)
    return {path: values for path, values in found.items() if values}


def default_of(decision: Decision) -> Any:
    """The choice of `nvfp4`, which is the plainest."""
    if decision.path == "outer.divides":
        return "scale"
    return decision.of(catalogue.NVFP4)


def plain(choice: Any) -> str:
    """A choice in a report: powers of two as such, codes in hexadecimal."""
    if isinstance(choice, Search):
        return f"{choice.criterion} over factors {choice.factors}, {choice.decoding}"
    if choice is None:
        return "none"
    if isinstance(choice, int):
        return f"0x{choice:02X}"
    if isinstance(choice, float):
        mantissa, exponent = math.frexp(choice)
        if mantissa == 0.5 and not 0.1 < choice < 1000:
            return f"2^{exponent - 1}"
        return f"{choice:g}"
    return "the input's dtype" if choice == "input's" else str(choice)
