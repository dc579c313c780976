"""compare: where two quantized forms of the same tensor differ, and why.

Each differing block or element gets one cause, the first of CAUSES that applies. To recognise
another, add it there and to `_cause_of_scales` or `_cause_of_codes`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
import torch

from nvfp4lab.checks import require_tensor
from nvfp4lab.codec import iter_blocks
from nvfp4lab.quantized import DTYPES, Quantized, outer_of_blocks

CAUSES = {
    "outer scale": "the outer scales differ",
    "NaN": "a NaN or Inf in the block, or a NaN scale",
    "zero scale": "one of the scales is zero",
    "saturation": "one of the scales is the largest, or the quotient is beyond the largest element",
    "scale code": "the scale codes differ otherwise",
    "other scale": "the element's block has another scale",
    "sign of zero": "the codes are +0 and -0",
    "tie": "the quotient is midway between the two values",
    "near-tie": "the quotient is within one float32 ulp of midway",
    "other": "none of these",
}
FIRST = 10


@dataclass(frozen=True)
class Comparison:
    """What differs between two results.

    counts: a row a cause that occurs: cause, scales (blocks whose scale or outer scale differs),
    codes (elements whose codes differ), meaning. first: the first ten differing elements (the
    first of a block whose scale alone differs): block, element, value, bits, got, want, got_scale,
    want_scale, cause; got is of the first result, want of the second.
    """

    blocks: int
    elements: int
    counts: pd.DataFrame
    first: pd.DataFrame

    @property
    def equal(self) -> bool:
        """Whether nothing differs."""
        return self.counts.empty

    def __str__(self) -> str:
        if self.equal:
            return f"{self.blocks} blocks, {self.elements} elements: nothing differs"
        return f"{self.counts.to_string(index=False)}\n\n{self.first.to_string(index=False)}"


@torch.no_grad()
def compare(q_a: Quantized, q_b: Quantized, x: torch.Tensor) -> Comparison:
    """Where q_a (got) and q_b (want) differ as quantized forms of x (..., K), and why.

    Both are compared code by code; the same layout is `Quantized.from_buffers`'s work. Quotients
    are x / (s g) under q_b's scales.

    Raises: ValueError if shapes, devices or formats differ.

    >>> from nvfp4lab import quantize
    >>> x = torch.tensor([[6.0, 2.5] + [0.0] * 14])
    >>> compare(quantize(x, "seed"), quantize(x, "nvfp4"), x).counts[["cause", "codes"]].values
    array([['tie', 1]], dtype=object)
    """
    _check(q_a, q_b, x)
    block, width = q_b.recipe.scale.block, q_b.scales.shape[-1]
    fmt = q_b.recipe.elements.format
    names = list(CAUSES)
    scales = torch.zeros(len(names), dtype=torch.int64, device="cpu")
    codes = torch.zeros(len(names), dtype=torch.int64, device="cpu")
    first: list[dict] = []
    all_codes = [q.element_codes().view(-1, block) for q in (q_a, q_b)]
    for start, stop, values in iter_blocks(x, block):
        got, want = (c[start:stop] for c in all_codes)
        scale_a, scale_b = (q.scales.view(-1, 1)[start:stop] for q in (q_a, q_b))
        outer_a, outer_b = (_outer(q, width, start, stop, x.device) for q in (q_a, q_b))
        of_scale = _cause_of_scales(values, (scale_a, scale_b), (outer_a, outer_b), q_b)
        of_code = _cause_of_codes(values, got, want, of_scale, scale_b, outer_b, q_b)
        scales += torch.bincount(of_scale[of_scale >= 0].cpu(), minlength=len(names))
        codes += torch.bincount(of_code[of_code >= 0].cpu(), minlength=len(names))
        if len(first) < FIRST:
            shown = of_code >= 0  # and the first element of a block that differs in its scale alone
            shown[:, 0] |= (of_scale[:, 0] >= 0) & ~shown.any(-1)
            for row, column in shown.nonzero()[: FIRST - len(first)].tolist():
                cause = max(of_code[row, column].item(), of_scale[row, 0].item())
                value = values[row, column]
                first.append(
                    {
                        "block": start + row,
                        "element": column,
                        "value": value.item(),
                        "bits": f"{int(value.view(torch.int32)) & 0xFFFFFFFF:08x}",
                        "got": int(got[row, column]),
                        "want": int(want[row, column]),
                        "got_scale": scale_a[row, 0].item(),
                        "want_scale": scale_b[row, 0].item(),
                        "cause": names[int(cause)],
                    }
                )
    found = [
        {"cause": n, "scales": int(s), "codes": int(c), "meaning": CAUSES[n]}
        for n, s, c in zip(names, scales, codes, strict=True)
        if s or c
    ]
    columns = ["cause", "scales", "codes", "meaning"]
    assert fmt.bits in (4, 8)
    return Comparison(
        q_b.scales.numel(), x.numel(), pd.DataFrame(found, columns=columns), pd.DataFrame(first)
    )


def _cause_of_scales(values, scales, outers, q: Quantized) -> torch.Tensor:
    """The index of the cause for each block whose scales differ, -1 for the others: [n, 1]."""
    names, fmt = list(CAUSES), q.recipe.scale.format
    decoded = [q.recipe.scale.decode(s) for s in scales]
    nan = ~values.isfinite().all(-1, keepdim=True) | decoded[0].isnan() | decoded[1].isnan()
    largest = float("inf") if fmt is None else fmt.max
    conditions = {
        "outer scale": ~_same(*outers),
        "NaN": nan,
        "zero scale": (decoded[0] == 0) | (decoded[1] == 0),
        "saturation": (decoded[0] == largest) | (decoded[1] == largest),
        "scale code": torch.ones_like(nan),
    }
    differs = ~_same(*scales) | ~_same(*outers)
    cause = torch.full(differs.shape, -1, device=values.device)
    for name in reversed(conditions):
        cause = cause.where(~conditions[name].expand_as(cause), names.index(name))
    return cause.where(differs, -1)


def _cause_of_codes(values, got, want, of_scale, scale, outer, q: Quantized) -> torch.Tensor:
    """The index of the cause for each element whose codes differ, -1 for the others: [n, block]."""
    names, fmt = list(CAUSES), q.recipe.elements.format
    s = q.recipe.scale.decode(scale)
    quotient = (values.double() / (s.double() * outer.double())).abs()
    middle = (fmt.decode(got).abs().double() + fmt.decode(want).abs().double()) / 2
    # Not by ldexp, which torch 2.11 runs on the current GPU, whichever its tensors are on.
    single = middle.float()
    ulp = (torch.nextafter(single, torch.full_like(single, math.inf)) - single).double()
    conditions = {
        "NaN": ~values.isfinite() | s.isnan(),
        "other scale": (of_scale >= 0).expand_as(got),
        "zero scale": (s == 0).expand_as(got),
        "sign of zero": (fmt.decode(got) == 0) & (fmt.decode(want) == 0),
        "tie": quotient == middle,
        "near-tie": (quotient - middle).abs() <= ulp,
        "saturation": quotient > fmt.max,
        "other": torch.ones_like(got, dtype=torch.bool),
    }
    cause = torch.full(got.shape, -1, device=values.device)
    for name in reversed(conditions):
        cause = cause.where(~conditions[name], names.index(name))
    return cause.where(got != want, -1)


def _same(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a == b) | (a.isnan() & b.isnan()) if a.is_floating_point() else a == b


def _outer(q: Quantized, width: int, start: int, stop: int, device) -> torch.Tensor:
    one = torch.ones((), dtype=torch.float32, device=device)
    return (one if q.outer is None else outer_of_blocks(q.outer, width, start, stop)).expand(
        stop - start, 1
    )


def _check(q_a: Quantized, q_b: Quantized, x: torch.Tensor) -> None:
    kinds = [type(value) for value in (q_a, q_b, x)]
    if not (issubclass(kinds[0], Quantized) and issubclass(kinds[1], Quantized)) or not isinstance(
        x, torch.Tensor
    ):
        got = ", ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"compare takes (Quantized, Quantized, torch.Tensor), got ({got})")
    require_tensor("x", x, DTYPES)
    if not q_a.shape == q_b.shape == x.shape:
        raise ValueError(
            f"x is {tuple(x.shape)}, the quantized forms {tuple(q_a.shape)} and {tuple(q_b.shape)}"
        )
    if not q_a.codes.device == q_b.codes.device == x.device:
        raise ValueError(f"devices differ: {x.device}, {q_a.codes.device}, {q_b.codes.device}")
    for part in ("scale", "elements"):
        formats = [getattr(q.recipe, part).format for q in (q_a, q_b)]
        if formats[0] != formats[1]:
            names = " and ".join(fmt.name if fmt is not None else "float32" for fmt in formats)
            raise ValueError(f"{part} formats differ: {names}")
