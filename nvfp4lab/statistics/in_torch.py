"""A piece of a tensor counted in torch: the reference, on any device, for every recipe.

`count` gives the fields of `contents` for one piece, as `in_triton.count` does. To fill a new
field, give it its line in `_counts_and_sums`, and in `in_triton` and its kernel.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from nvfp4lab.quantized import decode
from nvfp4lab.rules import Recipe
from nvfp4lab.statistics import bins
from nvfp4lab.statistics.merging import KEPT
from nvfp4lab.statistics.pieces import Counted, Piece


def count(
    piece: Piece,
    x: torch.Tensor,
    codes: torch.Tensor,
    stored: torch.Tensor,
    g: torch.Tensor | None,
    recipe: Recipe,
    last: tuple[int, float] | None = None,
) -> Counted:
    """x: [rows, k] or its blocks [n, block]; codes uint8 [n, block]; stored scales [n]; g: outer
    decode scale None, () or [rows, 1]. last: the elements lost and the error of the last of the
    worst blocks so far, if there are enough: no block that is no worse is among the candidates."""
    if g is not None and g.ndim:  # to each block
        g = g.expand(piece.rows, len(stored) // piece.rows).reshape(-1, 1)
    view = _View(recipe, x.reshape(codes.shape).float(), codes, stored, g)
    integers, floats = _counts_and_sums(view)
    channels = [part.view(piece.rows, -1).sum(0) for part in (view.xx, view.ee, view.xq)]
    worst = _worst(piece, view, last)
    return Counted(integers, floats, _largest(view), view.per_row(piece.rows), channels, worst)


def _worst(piece: Piece, view: _View, last: tuple[int, float] | None) -> dict[str, torch.Tensor]:
    lost, ee = view.block_lost, view.block_ee
    worse = (lost > 0) | (ee > 0)
    if last is not None:  # earlier blocks go first where they are alike
        worse = (lost > last[0]) | ((lost == last[0]) & (ee > last[1]))
    index = worse.nonzero()[:, 0]
    if len(index) > KEPT:
        order = np.lexsort((-ee[index].cpu().numpy(), -lost[index].cpu().numpy()))[:KEPT]
        index = index[torch.from_numpy(order).to(index.device)]
    in_row = len(ee) // piece.rows
    coded, g = view.stored.dtype == torch.uint8, view.g
    outer = (
        torch.tensor(math.nan, dtype=torch.float32, device="cpu")
        if g is None
        else g
        if g.ndim == 0
        else g[index, 0]
    )
    return {
        "token": piece.row + index // in_row,
        "block": piece.block + index % in_row,
        "lost": lost[index],
        "ee": ee[index],
        "amax": view.amax[index],
        "scale_code": view.stored[index].long() if coded else torch.full_like(index, -1),
        "scale": view.s[index, 0],
        "outer": outer.expand(len(index)),
        "x": view.given[index],
    }


class _View:
    """A piece and what several counts and sums are made of, float64; where an element is not
    counted, x and q are zero in it.

    Nearly every piece is finite, which the sums of its blocks show, so masks are made only for one
    that is not. torch.where is avoided where arithmetic does: on a CPU it takes ten times as long.
    """

    def __init__(self, recipe: Recipe, x, codes, stored, g):
        self.recipe, self.given, self.codes, self.stored, self.g = recipe, x, codes, stored, g
        self.s = recipe.scale.decode(stored)[:, None]
        x, q = x.double(), decode(codes, stored, g, recipe).double()
        self.block_lost = torch.zeros_like(stored, dtype=torch.int64)
        self.finite = self.counted = None  # masks [n, block]; None: all are
        self._set(x, q)
        if not bool(self.block_ee.isfinite().all()):
            self.finite, q_finite = x.isfinite(), q.isfinite()
            self.counted = self.finite & q_finite
            self.block_lost = (self.finite & ~q_finite).sum(-1)
            self._set(x.where(self.counted, 0.0), q.where(self.counted, 0.0))
            x = x.where(self.finite, 0.0)
            self.amax, self.power = x.abs().amax(-1), x.square().sum(-1)

    def _set(self, x: torch.Tensor, q: torch.Tensor) -> None:
        self.x, self.q, self.magnitude, self.e = x, q, x.abs(), q - x
        self.abs_e, self.ee = self.e.abs(), self.e.square()
        self.xx, self.xq = x.square(), x * q
        self.amax, self.first_largest = self.magnitude.max(-1)  # [n]; the first one, where alike
        self.block_xx = self.power = self.xx.sum(-1)  # power: of all finite x
        self.block_ee = self.ee.sum(-1)

    def per_row(self, rows: int) -> list[torch.Tensor]:
        """xx, ee and the count of lost elements of each row [rows]."""
        parts = (self.block_xx, self.block_ee, self.block_lost)
        return [part.view(rows, -1).sum(-1) for part in parts]

    def crest(self) -> torch.Tensor:
        """amax / rms of each block of finite x that is not all zero [m]."""
        has = self.amax > 0
        if self.finite is not None:
            has &= self.finite.all(-1)
        return self.amax[has] / (self.power[has] / self.codes.shape[1]).sqrt()

    def largest_decoded(self) -> torch.Tensor:
        """The magnitude that the largest code of each block decodes to: float32 [n, 1]."""
        code = torch.full_like(self.codes[:, :1], self.recipe.elements.format.code_of_max)
        return decode(code, self.stored, self.g, self.recipe).abs()


def _counts_and_sums(view: _View) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The int64 and the float64 fields of `contents`, but for rows, channels and largest values."""
    crest, zero_scale, amax_bin = view.crest(), view.s[:, 0] == 0, bins.amax_bin(view.amax)
    of_max = view.ee.gather(-1, view.first_largest[:, None])[:, 0]
    size, nonzero, limit = view.codes.numel(), view.x.count_nonzero(), view.largest_decoded()
    counts = {
        "nonfinite_input": torch.tensor(0, device="cpu")
        if view.finite is None
        else size - view.finite.sum(),
        "nonfinite_output": view.block_lost.sum(),
        "nonzero": nonzero,
        "flushed": nonzero - view.xq.count_nonzero(),  # no product of two float32 underflows
        "saturated": (view.magnitude > limit.where(limit > 0, math.inf)).sum(),
        "element_codes": torch.bincount(
            view.codes.flatten(), minlength=2**view.recipe.elements.format.bits
        ),
        "crest_blocks": torch.tensor(len(crest), device="cpu"),
        "crest_counts": _count(bins.crest_bin(crest), bins.CREST_COUNT),
        "amax_blocks": _count(amax_bin, bins.AMAX_COUNT),
        "amax_lost": _sum(amax_bin, view.block_lost, bins.AMAX_COUNT),
        "block_qsnr": _count(
            bins.qsnr_bin(view.block_xx, view.block_ee, view.block_lost), bins.QSNR_COUNT
        ),
        **_scale_counts(view.stored, view.recipe),
    }
    sums = {
        "sum_xx": view.block_xx.sum(),
        "sum_qq": view.q.square().sum(),
        "sum_xq": view.xq.sum(),
        "sum_ee": view.block_ee.sum(),
        "sum_abs_e": view.abs_e.sum(),
        "sum_e": view.e.sum(),
        "sum_ee_max": of_max.where(~zero_scale, 0.0).sum(),
        "sum_ee_other": (view.block_ee - of_max).where(~zero_scale, 0.0).sum(),
        "sum_ee_zero_scale": view.block_ee.where(zero_scale, 0.0).sum(),
        "sum_crest": crest.sum(),
        "amax_xx": _sum(amax_bin, view.block_xx, bins.AMAX_COUNT),
        "amax_ee": _sum(amax_bin, view.block_ee, bins.AMAX_COUNT),
    }
    by_quotient = _by_quotient(view)
    return counts | {"quotient_elements": by_quotient.pop("quotient_elements")}, sums | by_quotient


def _by_quotient(view: _View) -> dict[str, torch.Tensor]:
    step = view.s.double() if view.g is None else view.s.double() * view.g.double()
    step = step.abs()  # a foreign scale byte may have a sign bit
    usable = (step > 0) & step.isfinite()
    step = step.where(usable, 1.0)
    width = bins.quotient_width(view.recipe.elements.format.max)
    index = bins.quotient_bin(view.magnitude / step, width)
    counted = usable if view.counted is None else view.counted & usable
    if not bool(counted.all()):
        index = index.where(counted, bins.QUOTIENT_COUNT)  # dropped below
    e = (view.e / step).flatten()
    weights = {"elements": None, "e": e * view.x.sign().flatten(), "ee": e.square()}
    size = bins.QUOTIENT_COUNT + 1
    return {
        f"quotient_{name}": torch.bincount(index.flatten(), weight, size)[:-1]
        for name, weight in weights.items()
    }


def _scale_counts(stored: torch.Tensor, recipe: Recipe) -> dict[str, torch.Tensor]:
    """How often each scale code occurs; of float32 scales, how many have which class."""
    if recipe.scale.format is not None:
        return {"scale_codes": torch.bincount(stored, minlength=256)}
    zero, nan = (stored == 0).sum(), stored.isnan().sum()
    return {"scale_zero": zero, "scale_nan": nan, "scale_normal": len(stored) - zero - nan}


def _largest(view: _View) -> dict[str, torch.Tensor]:
    relative = view.abs_e / view.magnitude
    if bool((view.x == 0).any()):
        relative = relative.where(view.x != 0, 0.0)
    return {
        "max_abs_e": view.abs_e.amax(),
        "max_rel_e": relative.amax(),
        "amax": view.amax.amax(),
    }


def _count(index: torch.Tensor, size: int) -> torch.Tensor:
    return torch.bincount(index, minlength=size)


def _sum(index: torch.Tensor, values: torch.Tensor, size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=values.dtype, device=values.device).index_add_(0, index, values)
