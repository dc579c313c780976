"""What decisions leave unexplained: how much, where it lies, how near to ties it is; in words.

To recognise one more kind of leftover, add it to `_where` (a property or a place of the blocks) or
to `_nearness` (of single codes).
"""

from __future__ import annotations

import math

import torch

from nvfp4lab.diagnose.observed import Output
from nvfp4lab.diagnose.reading import BLOCK
from nvfp4lab.formats import E2M1, E4M3
from nvfp4lab.rules import Recipe

MOST = 0.25  # share of scales or codes from which what is unexplained is no exception
LISTED = 8  # rows of an input that are named
DOUBTED = 0.2  # share of scales or codes that is unexplained above which their reading is doubted
FEW = 8  # codes below which differing ones may be next to their quotient by chance
RANDOM = 0.005  # share of codes below which they are exceptions, not a way of rounding


def tells(scales: torch.Tensor, codes: torch.Tensor) -> bool:
    """Whether enough is explained for the rest to be an exception."""
    return max(float(scales.float().mean()), float(codes.float().mean()) / BLOCK) < MOST


def causes_of(
    output: Output,
    apart: list[str],
    nearness: str,
    scales: torch.Tensor,
    codes: torch.Tensor,
) -> list[str]:
    """What sets the bytes apart, the gravest first; last, what is left and where."""
    reading, amax = output.reading, output.amax
    share = float(scales.float().mean()), float(codes.float().mean()) / BLOCK
    doubts = [text for part, text in reading.doubts if share[part == "codes"] > DOUBTED]
    causes = [*(doubts or reading.faults), *apart]
    nan_scales = (output.stored & 0x7F == E4M3.nan_code).any()
    if bool((amax == 0).all()) and reading.outer_given and nan_scales:
        causes.insert(0, "an all-zero input: its outer scale is 0 or Inf, its scales NaN")
    wrong_scales, wrong_codes = int(scales.sum()), int(codes.sum())
    where = _where(output, scales | (codes > 0))
    if nearness:
        causes.insert(len(reading.faults), nearness.format(count(wrong_codes, "code")) + where)
    if wrong_scales + (0 if nearness else wrong_codes):
        causes.append(f"no explanation for {counts(wrong_scales, wrong_codes)}{where}")
    return causes


def _where(output: Output, wrong: torch.Tensor) -> str:
    """What the blocks that are wrong have in common: their values, their scales, or their place."""
    if not wrong.any():
        return ""
    index = wrong.nonzero()[:, 0]
    amax, stored = output.amax[index], output.stored[index, 0]
    kinds = {
        "blocks of zeros": amax == 0,
        "blocks with a NaN or Inf": ~output.at(index).x.isfinite().all(-1),
        "under a zero scale": stored == 0,
        "under a subnormal scale": (stored > 0) & (stored < 8),
        "under the largest scale": stored == E4M3.code_of_max,
        "under a NaN scale": stored & 0x7F == E4M3.nan_code,
    }
    if 2 * len(index) < len(wrong):
        smaller = (output.amax <= amax.max()) & ~wrong & (output.amax > 0)
        kinds[f"with an amax of at most {amax.max():.3g}"] = ~smaller.any().expand_as(amax)
    found = ""
    grid = wrong.view(output.rows, output.columns)
    for what, axis, total in (("row", 1, output.rows), ("block column", 0, output.columns)):
        places = grid.any(axis).nonzero()[:, 0].tolist()
        if len(places) == 1 or len(places) <= 0.1 * total:
            span = places[-1] - places[0] + 1 == len(places) > 1
            shown = f"{places[0]} to {places[-1]}" if span else ", ".join(map(str, places[:LISTED]))
            more = "" if span or len(places) <= LISTED else f" and {len(places) - LISTED} more"
            found = f", all in {what}{'s' * (len(places) > 1)} {shown}{more} of {total}"
            break
    kind = next((f", all {kind}" for kind, of_kind in kinds.items() if of_kind.all()), "")
    return found + kind


def near_ties(
    output: Output, best: Recipe, scales: torch.Tensor, codes: torch.Tensor
) -> tuple[Recipe, torch.Tensor, torch.Tensor, str]:
    """If every code that the recipe, or else its plainest form, does not give is next to a tie:
    that recipe, what it leaves unexplained, and how near they are, with {} for their number."""
    plainest = best.changed(
        {
            "elements.rounding": "ties-to-even",
            "elements.formula": "x / (s * g)",
            "elements.overflow": "saturate",
        },
        best.name,
    )
    text = _nearness(output, best, codes)
    if text or plainest == best:
        return best, scales, codes, text
    left = output.unexplained(plainest)
    few = int(left[1].sum()) < 0.05 * output.codes.numel()
    if few and left[1].any() and (text := _nearness(output, plainest, left[1])):
        return plainest, *left, text
    return best, scales, codes, ""


def _nearness(output: Output, recipe: Recipe, wrong_codes: torch.Tensor) -> str:
    """How near to ties the codes are that the recipe does not give; empty where some are not next
    to their quotient."""
    steps = torch.tensor(E2M1.magnitudes[: E2M1.code_of_max + 1], dtype=torch.float64, device="cpu")
    piece = output.at(wrong_codes.nonzero()[: 1 << 18, 0])
    codes = piece.element_codes(recipe)
    wrong = codes != piece.codes
    got, want = (steps[(c[wrong] & 7).long()] for c in (piece.codes, codes))
    before = piece.prepared(recipe)
    s = E4M3.decode(piece.stored).double() * before.outer.decode.double()
    quotient = (before.x.double() / s).abs()[wrong]
    low, high = torch.minimum(got, want), torch.maximum(got, want)
    adjacent = torch.searchsorted(steps, high) - torch.searchsorted(steps, low) == 1
    if not (adjacent & (low <= quotient) & (quotient <= high)).all():
        return ""
    farthest = float((quotient / ((low + high) / 2) - 1).abs().max())
    if farthest == 0:
        return "another tie rule, or approximate division: {} differ, each at an exact tie"
    if farthest <= 4 * 2.0**-23:
        return "approximate division: {} differ, each within 4 float32 ulp of a tie"
    if len(quotient) < FEW:
        return ""
    if farthest <= 2.0**-6:
        near = f"2^{math.ceil(math.log2(farthest))}"
        return f"division of low precision: {{}} differ, each within {near} of a tie"
    if int(wrong_codes.sum()) < RANDOM * output.codes.numel():
        return ""
    if len(low.unique()) == 1 and len(got.unique()) == 1:
        span = f"{float(quotient.min()):.6g} to {float(quotient.max()):.6g}"
        return f"another threshold: {{}} differ, of quotients {span}, each rounded to {got[0]:g}"
    return (
        "rounded at random, or by an unknown rule: {} differ, each one of the two values around "
        "its quotient"
    )


def counts(scales: int, codes: int) -> str:
    """How many scales and codes, in words."""
    return f"{count(scales, 'scale')} and {count(codes, 'code')}"


def count(number: int, what: str) -> str:
    """A number of things, in words."""
    return f"{number} {what}{'s' * (number != 1)}"
