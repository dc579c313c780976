"""The error of one tensor and its quantized form.

`measure` walks over both in chunks and adds float64 sums; what users read is derived from the sums,
so two `Errors` add up to the error of both tensors. To add a measure that the sums give, add a
property; one that needs a new sum adds a field and its line in `measure`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import pandas as pd
import torch

from nvfp4lab.codec import iter_blocks, quantize
from nvfp4lab.formats import CodeClass
from nvfp4lab.quantized import Quantized
from nvfp4lab.rules import Recipe


@dataclass(frozen=True)
class Errors:
    """Counts, and float64 sums over the elements where x and its decoded value q are finite."""

    elements: int
    nonfinite_input: int  # elements of x that are NaN or Inf: counted, in no sum
    nonfinite_output: int  # finite elements of x whose decoded value is NaN or Inf: in no sum
    blocks: int
    scale_zero: int  # blocks by the class of their scale code
    scale_subnormal: int
    scale_normal: int
    scale_saturated: int  # normal, and the format's largest
    scale_nan: int
    nonzero: int  # elements of x that are not zero, among those in the sums
    flushed: int  # of these, the ones that decode to zero
    sum_xx: float
    sum_qq: float
    sum_xq: float
    sum_ee: float  # of (q - x)^2
    sum_abs_e: float
    max_abs_e: float

    def __add__(self, other: Errors) -> Errors:
        def merged(name: str):
            mine, theirs = getattr(self, name), getattr(other, name)
            return max(mine, theirs) if name.startswith("max") else mine + theirs

        return Errors(**{f.name: merged(f.name) for f in fields(self)})

    @property
    def counted(self) -> int:
        """The elements in the sums."""
        return self.elements - self.nonfinite_input - self.nonfinite_output

    @property
    def mse(self) -> float:
        """Mean squared error over the counted elements."""
        return _ratio(self.sum_ee, self.counted)

    @property
    def nmse(self) -> float:
        """Sum of (q - x)^2 over sum of x^2; 0 for a zero tensor that stays zero."""
        return _ratio(self.sum_ee, self.sum_xx)

    @property
    def qsnr_db(self) -> float:
        """-10 log10(NMSE), in dB; Inf without any error."""
        if math.isnan(self.nmse):
            return math.nan
        return -10 * math.log10(self.nmse) if self.nmse > 0 else math.inf

    @property
    def gain(self) -> float:
        """<x, q> / <x, x>: 1 for an unbiased magnitude. Cosine alone does not see it."""
        return _ratio(self.sum_xq, self.sum_xx, of_zeros=1.0)

    @property
    def cosine(self) -> float:
        """<x, q> / (|x| |q|)."""
        return _ratio(self.sum_xq, math.sqrt(self.sum_xx) * math.sqrt(self.sum_qq), of_zeros=1.0)

    @property
    def flushed_share(self) -> float:
        """The share of the nonzero elements that decode to zero."""
        return _ratio(self.flushed, self.nonzero)

    def to_frame(self) -> pd.DataFrame:
        """One row: every count, sum and derived measure under its name."""
        derived = ("mse", "nmse", "qsnr_db", "gain", "cosine", "flushed_share")
        row = {f.name: getattr(self, f.name) for f in fields(self)}
        return pd.DataFrame([row | {name: getattr(self, name) for name in derived}])


@torch.no_grad()
def measure(x: torch.Tensor, q: Quantized | Recipe | str) -> Errors:
    """The error of q against x, or of x quantized by a recipe.

    x: (..., K) of any dtype that `quantize` takes; q: its quantized form, whoever wrote the bytes,
    or a recipe. NaN and Inf are counted apart and enter no sum.

    Raises: ValueError if the shapes or devices differ.
    """
    if not isinstance(q, Quantized):
        q = quantize(x, q)
    if q.shape != x.shape:
        raise ValueError(f"x is {tuple(x.shape)}, its quantized form {tuple(q.shape)}")
    if q.codes.device != x.device:
        raise ValueError(f"x is on {x.device}, its quantized form on {q.codes.device}")
    classes = scale_classes(q)
    counts = torch.zeros(4, dtype=torch.int64, device=x.device)  # of _tally's integers
    sums = torch.zeros(6, dtype=torch.float64, device=x.device)
    for start, stop, blocks in iter_blocks(x, q.recipe.scale.block):
        chunk_counts, chunk_sums = _tally(blocks.double(), q.decode_blocks(start, stop).double())
        counts += chunk_counts
        sums[5] = torch.maximum(sums[5], chunk_sums[5])
        sums[:5] += chunk_sums[:5]
    nonfinite_input, nonfinite_output, nonzero, flushed = counts.tolist()
    xx, qq, xq, ee, abs_e, max_e = sums.tolist()
    return Errors(
        elements=x.numel(),
        nonfinite_input=nonfinite_input,
        nonfinite_output=nonfinite_output,
        blocks=q.scales.numel(),
        **{f"scale_{name}": count for name, count in classes.items()},
        nonzero=nonzero,
        flushed=flushed,
        sum_xx=xx,
        sum_qq=qq,
        sum_xq=xq,
        sum_ee=ee,
        sum_abs_e=abs_e,
        max_abs_e=max_e,
    )


def scale_classes(q: Quantized) -> dict[str, int]:
    """How many block scales are zero, subnormal, normal, saturated (the format's largest), NaN."""
    names = ("zero", "subnormal", "normal", "saturated", "nan")
    fmt = q.recipe.scale.format
    if fmt is None:
        zero, nan = int((q.scales == 0).sum()), int(q.scales.isnan().sum())
        return dict(zip(names, (zero, 0, q.scales.numel() - zero - nan, 0, nan), strict=True))
    of_code = torch.bincount(q.scales.flatten().int(), minlength=256)
    of_class = torch.zeros(4, dtype=torch.int64, device=q.scales.device)
    every_code = torch.arange(len(fmt.values), device=q.scales.device)
    of_class.index_add_(0, fmt.class_of(every_code).int(), of_code)
    saturated = int(of_code[fmt.code_of_max])
    zero, subnormal, normal, nan = (int(of_class[c]) for c in CodeClass)
    return dict(zip(names, (zero, subnormal, normal - saturated, saturated, nan), strict=True))


def scale_histogram(q: Quantized) -> pd.DataFrame:
    """How often each scale byte occurs: columns scale_code, scale, share; a row a nonnegative code.

    Raises: ValueError for float32 scales, which have no codes.
    """
    fmt = q.recipe.scale.format
    if fmt is None:
        raise ValueError(f"{q.recipe.name} keeps its scales in float32; they have no bytes")
    codes = torch.arange(len(fmt.magnitudes), dtype=torch.uint8)
    counts = torch.bincount(q.scales.flatten().int(), minlength=len(codes))[: len(codes)].cpu()
    return pd.DataFrame(
        {
            "scale_code": codes.numpy(),
            "scale": fmt.decode(codes).numpy(),
            "share": (counts / max(1, q.scales.numel())).numpy(),
        }
    )


def _tally(x: torch.Tensor, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of one chunk, float64 [n, block]: the four counts and the six sums of `measure`."""
    x_finite, q_finite = x.isfinite(), q.isfinite()
    counted = x_finite & q_finite
    x, q = x.where(counted, 0), q.where(counted, 0)
    e = q - x
    counts = [~x_finite, x_finite & ~q_finite, x != 0, (x != 0) & (q == 0)]
    sums = [x * x, q * q, x * q, e * e, e.abs()]
    worst = e.abs().amax() if e.numel() else e.new_zeros(())
    return (
        torch.stack([c.sum() for c in counts]),
        torch.stack([*(s.sum() for s in sums), worst]),
    )


def _ratio(part: float, whole: float, of_zeros: float = 0.0) -> float:
    if whole:
        return part / whole
    return of_zeros if part == 0 else math.inf
