"""Small number formats as exact tables: encode, decode, limits, the class of a code.

A format is its list of magnitudes. A rounding is a list of thresholds between them, and the code of
a value is the number of thresholds that lie below it: every tie rule and direction is the same one
search over another list. To add a format of 4 or 8 bits, add a constant at the end of this file;
nothing else needs to know it. To add a rounding, add it to `Rounding` and to `_threshold_table`.
This module is the bottom of the package and imports `checks` alone of it.

E2M1 and E8M0 are those of OCP Microscaling Formats 1.0, E4M3 that of OCP FP8 1.0, UE5M3 that of
arXiv 2601.19026; integers have no fraction bits, where OCP's INT8 has six.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, get_args

import numpy as np
import torch

from nvfp4lab.checks import INTEGERS, require_tensor

Rounding = Literal[
    "ties-to-even",
    "ties-to-odd",
    "ties-away",
    "ties-to-zero",
    "ties-up",
    "ties-down",
    "stochastic",
    "up",
    "down",
    "toward-zero",
    "up-from-three-quarters",
]
Subnormals = Literal["gradual", "flush", "capped", "implicit-bit-lost", "exponent-wraps"]
Overflow = Literal["saturate", "nan", "mantissa-kept", "top binade"]


class CodeClass(enum.IntEnum):
    """What kind of number a code stands for; the values that `Format.class_of` returns."""

    ZERO = 0
    SUBNORMAL = 1
    NORMAL = 2
    NAN = 3


@dataclass(frozen=True)
class Format:
    """A number format of at most 8 bits. Equal if the names are equal."""

    name: str
    bits: int  # bits of one code
    mantissa_bits: int = field(compare=False)  # bits after the implicit one
    magnitudes: tuple[float, ...] = field(compare=False, repr=False)  # of codes 0, 1, 2, ...
    smallest_normal: float = field(compare=False)
    negative: Literal["sign bit", "two's complement", "none"] = field(compare=False)
    nan_code: int | None = field(default=None, compare=False)  # its magnitude is what an encoder
    # that forgets the reservation takes it for: 480 for 0x7F in E4M3

    @property
    def code_of_max(self) -> int:
        """The code of the largest finite magnitude."""
        return len(self.magnitudes) - 1 - (self.nan_code is not None)

    @property
    def max(self) -> float:
        """The largest finite value."""
        return self.magnitudes[self.code_of_max]

    @property
    def smallest_subnormal(self) -> float | None:
        """The smallest nonzero magnitude below the normals, or None where there is none."""
        first = next(m for m in self.magnitudes if m > 0)
        return first if first < self.smallest_normal else None

    @property
    def sign_mask(self) -> int:
        """The bit that holds the sign, 0 in a format without one."""
        return 1 << (self.bits - 1) if self.negative == "sign bit" else 0

    @property
    def values(self) -> tuple[float, ...]:
        """The value of every code from 0 to 2**bits - 1, NaN for the codes that are none."""
        magnitudes = [
            float("nan") if c == self.nan_code else m for c, m in enumerate(self.magnitudes)
        ]
        match self.negative:
            case "sign bit":
                return (*magnitudes, *(-m for m in magnitudes))
            case "two's complement":
                return (*magnitudes, -(magnitudes[-1] + 1), *(-m for m in reversed(magnitudes[1:])))
            case _:
                return tuple(magnitudes)

    def encode(
        self,
        x: torch.Tensor,
        rounding: Rounding = "ties-to-even",
        *,
        subnormals: Subnormals = "gradual",
        overflow: Overflow = "saturate",
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """The code of each value, rounded once: float32 of any shape -> uint8 of that shape.

        `up` and `down` are directed (towards +Inf, -Inf), `ties-up` and `ties-down` at ties alone;
        the `ties-` roundings are to nearest; `up-from-three-quarters` takes the next magnitude
        from 3/4 of the way to it.
        Values beyond the largest finite one saturate, become the NaN code (`nan`), or keep their
        mantissa under the largest exponent (`mantissa-kept`); two's complement saturates at +-max.
        Under `top binade` all that round into the largest exponent field become the largest value.
        `subnormals`: rounded gradually; `flush`ed to zero; `capped` at the largest subnormal, which
        float32(x / smallest + 1/2) counts; `implicit-bit-lost`, exponent field 0
        with the mantissa of the normal that the value would be; `exponent-wraps`, the same just
        below the normals and the largest exponent field below that, as unsigned arithmetic gives.
        NaN becomes the NaN code, or +max where there is none (as PTX's cvt does). The sign of -0
        is kept where there is a sign bit; a format without one takes magnitudes.

        Raises: TypeError for a dtype other than float32, ValueError for an unknown rule or a
        generator on a rounding that draws nothing; subnormals or overflow by fields, stochastic.
        """
        self._check(x, rounding, subnormals, overflow, generator)
        magnitude = x.abs()
        index = self._index(x, magnitude, rounding, generator)
        if subnormals != "gradual":
            index = self._below_normals(magnitude, index, rounding, subnormals)
        if overflow == "nan":
            index = index.where(
                magnitude <= _overflow_threshold(self, rounding), self.nan_code or 0
            )
        elif overflow == "mantissa-kept":
            top = self.magnitudes[-1 << self.mantissa_bits]
            index = index.where(magnitude < top, self._top_binade(magnitude, rounding))
        elif overflow == "top binade":
            first = len(self.magnitudes) - (1 << self.mantissa_bits)
            index = index.where(index < first, self.code_of_max)
        nan = self.code_of_max if self.nan_code is None else self.nan_code
        index = index.where(x == x, nan)
        match self.negative:
            case "sign bit":
                negative = (torch.signbit(x) & (x == x)).to(torch.uint8)
                index = index + negative * self.sign_mask
            case "two's complement":
                index = index.where(~(x < 0), -index) & (2**self.bits - 1)
        return index.to(torch.uint8)

    def boundaries(self, rounding: Rounding = "ties-to-even") -> np.ndarray:
        """The exact magnitudes at which a nonnegative number's code steps up: float64, sorted.

        The last one is the step out of the largest finite value. For `stochastic` they are the
        magnitudes themselves, between which a code is drawn.

        Raises: ValueError for an unknown rounding.
        """
        if not isinstance(rounding, str) or rounding not in get_args(Rounding):
            raise ValueError(f"{rounding!r} is not one of {', '.join(get_args(Rounding))}")
        return _boundaries(self, _of_magnitudes(rounding))

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """The value of each code, NaN for a NaN code: uint8 -> float32 of the same shape."""
        require_tensor("codes", codes, INTEGERS)
        return _values(self, codes.device)[codes.int()]

    def decode_as_number(self, codes: torch.Tensor) -> torch.Tensor:
        """As `decode` for a format of magnitudes, but the NaN code read as the number it replaces.

        It is what an encoder divides by that builds its scale from bits and forgets the NaN.
        """
        return _magnitudes(self, codes.device)[(codes & (len(self.magnitudes) - 1)).int()]

    def class_of(self, codes: torch.Tensor) -> torch.Tensor:
        """The `CodeClass` of each code: uint8 of any shape -> uint8 of that shape."""
        require_tensor("codes", codes, INTEGERS)
        return _classes(self, codes.device)[codes.int()]

    def by_class(self, of_code: np.ndarray) -> dict[str, Any]:
        """What is counted of each code [2**bits], by class: zero, subnormal, normal, saturated (the
        largest finite code, which is in no other class), nan.

        Raises: ValueError for another number of counts.
        """
        kind = _classes(self, torch.device("cpu")).numpy()
        if not isinstance(of_code, np.ndarray) or of_code.shape != kind.shape:
            got = getattr(of_code, "shape", type(of_code).__name__)
            raise ValueError(f"of_code is an array of {len(kind)} counts, got {got}")
        sums = {c.name.lower(): of_code[kind == c].sum() for c in CodeClass}
        largest = of_code[[abs(v) == self.max for v in self.values]].sum()
        return {
            "zero": sums["zero"],
            "subnormal": sums["subnormal"],
            "normal": sums["normal"] - largest,
            "saturated": largest,
            "nan": sums["nan"],
        }

    def _check(self, x, rounding, subnormals, overflow, generator) -> None:
        require_tensor(f"x of {self.name}.encode", x, (torch.float32,))
        rules = {rounding: Rounding, subnormals: Subnormals, overflow: Overflow}
        for given, choices in rules.items():
            if not isinstance(given, str) or given not in get_args(choices):
                raise ValueError(f"{given!r} is not one of {', '.join(get_args(choices))}")
        if overflow == "nan" and self.nan_code is None:
            raise ValueError(f"overflow='nan' needs a NaN code; {self.name} has none")
        if generator is not None and rounding != "stochastic":
            raise ValueError(f"a generator is for rounding='stochastic', got {rounding!r}")
        by_fields = overflow in ("mantissa-kept", "top binade") or subnormals not in (
            "gradual",
            "flush",
        )
        if by_fields and rounding == "stochastic":
            raise ValueError("an encoder that rounds the mantissa alone does not do so at random")

    def _index(self, x, magnitude, rounding, generator) -> torch.Tensor:
        """The index of the rounded magnitude, saturating."""

        def search(steps: str) -> torch.Tensor:
            return _count_below(magnitude, _threshold_table(self, steps)[:-1])

        match rounding:
            case "stochastic":
                below = search("toward-zero").int()
                low = _magnitudes(self, x.device)[below]
                high = _magnitudes(self, x.device)[(below + 1).clamp(max=self.code_of_max)]
                draw = torch.rand(
                    x.shape, generator=generator, dtype=torch.float32, device=x.device
                )
                return below + (draw * (high - low) < magnitude - low) * (high > low)
            case "up" | "down" | "ties-up" | "ties-down":
                grows = (x < 0) if rounding.endswith("down") else ~(x < 0)
                away, back = (
                    ("ties-away", "ties-to-zero")
                    if rounding.startswith("ties")
                    else ("from-zero", "toward-zero")
                )
                return search(away).where(grows, search(back))
            case _:
                return search(rounding)

    def _below_normals(self, magnitude, index, rounding, subnormals) -> torch.Tensor:
        if subnormals == "flush":
            return index.where(self.class_of(index.to(torch.uint8)) != CodeClass.SUBNORMAL, 0)
        if subnormals == "capped":
            steps = (magnitude / self.magnitudes[1] + 0.5).clamp(max=(1 << self.mantissa_bits) - 1)
            return index.where(magnitude >= self.smallest_normal, steps.floor().to(index.dtype))
        index = index.where(magnitude >= self.smallest_normal, self._mantissa(magnitude, rounding))
        if subnormals == "exponent-wraps":
            wrapped = self._top_binade(magnitude, rounding)
            index = index.where(magnitude >= self.smallest_normal / 2, wrapped)
        return index

    def _top_binade(self, magnitude, rounding) -> torch.Tensor:
        """The mantissa under the largest exponent field; one that rounds up to 2 starts again."""
        binade = 1 << self.mantissa_bits
        return len(self.magnitudes) - binade + self._mantissa(magnitude, rounding) % binade

    def _mantissa(self, magnitude, rounding) -> torch.Tensor:
        """The mantissa rounded in the value's own binade, 2**mantissa_bits where it carries."""
        one = torch.ones((), dtype=torch.float32, device=magnitude.device)
        significand = (magnitude.view(torch.int32) & 0x7FFFFF | 0x3F800000).view(torch.float32)
        return self._index(significand, significand, rounding, None) - self._index(
            one, one, "ties-to-even", None
        )


def _float_magnitudes(exponent_bits: int, mantissa_bits: int, bias: int) -> tuple[float, ...]:
    """Every magnitude of an IEEE-like format with gradual subnormals, reserved codes included."""
    subnormal_step = 2.0 ** (1 - bias - mantissa_bits)
    return tuple(
        m * subnormal_step if e == 0 else (2**mantissa_bits + m) * subnormal_step * 2.0 ** (e - 1)
        for e in range(2**exponent_bits)
        for m in range(2**mantissa_bits)
    )


def _as_float32(numbers) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(numbers, dtype=np.float32)


@lru_cache
def _threshold_table(fmt: Format, rounding: str) -> np.ndarray:
    """float32 thresholds t_0 < t_1 < ...: a magnitude rounds to index i + 1 or more iff > t_i.

    One for each of `_boundaries`; a step taken *at* its boundary has the float32 just below it.
    """
    boundaries = _boundaries(fmt, rounding)
    index = np.arange(len(boundaries))
    match rounding:
        case "toward-zero" | "ties-away" | "up-from-three-quarters":
            taken_at = index >= 0
        case "from-zero" | "ties-to-zero":
            taken_at = index < 0
        case "ties-to-even":
            taken_at = index % 2 == 1
        case "ties-to-odd":
            taken_at = index % 2 == 0
        case _:
            raise AssertionError(rounding)
    nearest = _as_float32(boundaries)
    return np.where(taken_at, np.nextafter(nearest, np.float32(-np.inf)), nearest)


def _boundaries(fmt: Format, rounding: str) -> np.ndarray:
    """float64: the magnitude at which index i becomes i + 1, the last out of the largest finite."""
    steps = [float(m) for m in fmt.magnitudes[: fmt.code_of_max + 1]]
    beyond = fmt.magnitudes[-1] if fmt.nan_code is not None else 2 * steps[-1] - steps[-2]
    low, high = np.array(steps), np.array([*steps[1:], beyond])
    match rounding:
        case "toward-zero":
            return high
        case "from-zero":
            return low
        case "up-from-three-quarters":
            return (low + 3 * high) / 4
        case _:
            return (low + high) / 2


def _of_magnitudes(rounding: Rounding) -> str:
    """What a rounding does to a nonnegative number, and `encode` to all of a format without sign.

    Stochastic rounding takes the magnitude below or above; its steps are between those.
    """
    return {
        "up": "from-zero",
        "down": "toward-zero",
        "stochastic": "toward-zero",
        "ties-up": "ties-away",
        "ties-down": "ties-to-zero",
    }.get(rounding, rounding)


def _overflow_threshold(fmt: Format, rounding: Rounding) -> float:
    """A magnitude above this one rounds past the largest finite value."""
    return float(_threshold_table(fmt, _of_magnitudes(rounding))[-1])


def _count_below(magnitude: torch.Tensor, thresholds: np.ndarray) -> torch.Tensor:
    """How many of the sorted thresholds are below each magnitude."""
    if len(thresholds) > 16:
        table = torch.from_numpy(thresholds.copy()).to(magnitude.device)
        return torch.bucketize(magnitude, table, out_int32=True)
    count = torch.zeros(magnitude.shape, dtype=torch.uint8, device=magnitude.device)
    for threshold in thresholds.tolist():  # a few compares are 3 times as fast as a search
        count += magnitude > threshold
    return count


@lru_cache
def _values(fmt: Format, device: torch.device) -> torch.Tensor:
    return torch.tensor(fmt.values, dtype=torch.float32, device=device)


@lru_cache
def _magnitudes(fmt: Format, device: torch.device) -> torch.Tensor:
    return torch.tensor(fmt.magnitudes, dtype=torch.float32, device=device)


@lru_cache
def _classes(fmt: Format, device: torch.device) -> torch.Tensor:
    def class_of(value: float) -> CodeClass:
        if value != value:
            return CodeClass.NAN
        if value == 0:
            return CodeClass.ZERO
        return CodeClass.NORMAL if abs(value) >= fmt.smallest_normal else CodeClass.SUBNORMAL

    return torch.tensor([class_of(v) for v in fmt.values], dtype=torch.uint8, device=device)


E2M1 = Format("E2M1", 4, 1, _float_magnitudes(2, 1, bias=1), 1.0, "sign bit")
"""The FP4 element: 0, .5, 1, 1.5, 2, 3, 4, 6; sign in bit 3; neither Inf nor NaN."""

E4M3 = Format("E4M3", 8, 3, _float_magnitudes(4, 3, bias=7), 2.0**-6, "sign bit", nan_code=0x7F)
"""FP8, and as the scale "UE4M3" with bit 7 zero: subnormals from 2**-9, max 448, 0x7F is NaN."""

UE5M3 = Format("UE5M3", 8, 3, _float_magnitudes(5, 3, bias=15), 2.0**-14, "none", nan_code=0xFF)
"""An unsigned scale with more range than E4M3: subnormals from 2**-17, max 114688, 0xFF is NaN."""

E8M0 = Format(
    "E8M0", 8, 0, tuple(2.0 ** (e - 127) for e in range(256)), 2.0**-127, "none", nan_code=0xFF
)
"""The power-of-two scale of the MX formats, 2**(code - 127); no zero, 0xFF is NaN."""

INT4 = Format("INT4", 4, 0, tuple(float(i) for i in range(8)), 1.0, "two's complement")
"""Two's complement; encodes symmetrically to -7..7, decodes -8 as well."""

INT8 = Format("INT8", 8, 0, tuple(float(i) for i in range(128)), 1.0, "two's complement")
"""Two's complement; encodes symmetrically to -127..127, decodes -128 as well."""
