"""Tally: pieces of a tensor and of its codes into `Statistics`, on any device.

The caller cuts the rows into pieces: any number of whole rows, or a part of one row. Each block's
and each row's own sums depend on nothing outside it, so histograms and worst blocks do not depend
on the cut; sums carry their rounding error along from piece to piece (Knuth's two-sum). What a
piece adds is counted by `in_torch` or by `in_triton`; with the latter a GPU is waited for only in
`statistics`. May be changed: how parts are added up; a field that a counter gives needs nothing
here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from nvfp4lab.rules import Recipe
from nvfp4lab.statistics import bins, in_torch
from nvfp4lab.statistics.contents import CHANNELS, WORST
from nvfp4lab.statistics.merging import KEPT, Statistics, merged_worst
from nvfp4lab.statistics.pieces import Counted, Piece


class Tally:
    """Counts and sums of one tensor (..., K) under one recipe, a piece at a time in their order.

    source, first_token: where the tensor is from, and which of its rows is the tensor's row 0.
    count: `in_torch.count` or `in_triton.count`.
    """

    def __init__(
        self,
        recipe: Recipe,
        width: int,
        source: str = "",
        first_token: int = 0,
        count: Callable[..., Counted] = in_torch.count,
    ):
        self.recipe, self._source, self._first_token = recipe, source, first_token
        self._start = Statistics.empty(recipe, width)
        self._count, self._worst, self._candidates = count, self._start.worst, []
        self._known = {"elements": 0, "blocks": 0, "tokens": 0}
        self._row, self._integers, self._floats, self._errors, self._largest = None, {}, {}, {}, {}

    def add(
        self,
        piece: Piece,
        x: torch.Tensor,
        codes: torch.Tensor,
        stored: torch.Tensor,
        g: torch.Tensor | None,
    ) -> None:
        """One piece: x [rows, k] or its blocks [n, block], their codes uint8 [n, block], or two to
        a byte for `in_triton`; stored scales [n], outer decode scale None, () or [rows, 1]."""
        if not len(stored):
            return
        counted = self._count(piece, x, codes, stored, g, self.recipe, self._last_kept())
        self._known["elements"] += x.numel()
        self._known["blocks"] += len(stored)
        for name, part in counted.integers.items():
            _take_in(self._integers, name, part, torch.add)
        for name, part in counted.largest.items():
            _take_in(self._largest, name, part, torch.maximum)
        for name, part in counted.floats.items():
            self._add_exactly(name, part)
        first = piece.block * self.recipe.scale.block
        for name, columns in zip(CHANNELS, counted.channels, strict=True):
            around = (first, (self._start.width or 0) - first - len(columns))
            whole = torch.nn.functional.pad(columns, around) if any(around) else columns
            self._add_exactly(name, whole)
        self._add_rows(piece, counted.rows)
        if len(counted.worst["token"]):
            self._candidates.append(counted.worst)
        if self._count is in_torch.count:  # it waits anyway, and then passes over all the others
            self._merge_candidates()

    def statistics(self) -> Statistics:
        """What was added up so far."""
        self._merge_candidates()
        floats = {
            n: t + self._errors[n] if n in self._errors else t for n, t in self._floats.items()
        }
        values = {**_fetched(self._integers), **_fetched(floats | self._largest), **self._known}
        fmt = self.recipe.scale.format
        if fmt is not None and "scale_codes" in values:
            classes = fmt.by_class(values["scale_codes"])
            values |= {f"scale_{name}": int(count) for name, count in classes.items()}
        return replace(self._start, **values, worst=self._worst)

    def _add_rows(self, piece: Piece, rows: list[torch.Tensor]) -> None:
        if self._row is not None:
            rows = [own + carried for own, carried in zip(rows, self._row, strict=True)]
        self._row = None if piece.ends_row else rows
        if piece.ends_row:
            index = bins.qsnr_bin(*rows)
            counts = torch.zeros(bins.QSNR_COUNT, dtype=torch.int64, device=index.device)
            counts.index_add_(0, index, torch.ones_like(index))
            _take_in(self._integers, "token_qsnr", counts, torch.add)
            self._known["tokens"] += piece.rows

    def _add_exactly(self, name: str, part: torch.Tensor) -> None:
        total = self._floats.get(name)
        if total is None:
            self._floats[name] = part
            return
        self._floats[name] = new = total + part
        of_part = new - total
        _take_in(self._errors, name, (total - (new - of_part)) + (part - of_part), torch.add)

    def _last_kept(self) -> tuple[int, float] | None:
        """The lost elements and the error of the last of the worst blocks, if there are enough."""
        if len(self._worst["ee"]) < KEPT:
            return None
        return self._worst["lost"][-1].item(), self._worst["ee"][-1].item()

    def _merge_candidates(self) -> None:
        for candidates in self._candidates:
            found = {name: column.cpu().numpy() for name, column in candidates.items()}
            bad = (found["lost"] > 0) | (found["ee"] > 0)
            columns = {name: c[bad].astype(WORST[name]) for name, c in found.items()}
            columns["token"] += self._first_token
            columns["source"] = np.array([self._source] * len(columns["token"]))
            self._worst = merged_worst(self._worst, columns)
        self._candidates = []


def _take_in(fields: dict[str, torch.Tensor], name: str, part: torch.Tensor, how: Callable) -> None:
    fields[name] = how(fields[name], part) if name in fields else part


def _fetched(fields: dict[str, torch.Tensor]) -> dict:
    """Numbers and arrays of tensors of one dtype, in one transfer from where they are."""
    if not fields:
        return {}
    flat = torch.cat(
        [f.reshape(-1).to(next(iter(fields.values())).device) for f in fields.values()]
    )
    parts = np.split(flat.cpu().numpy(), np.cumsum([f.numel() for f in fields.values()])[:-1])
    return {n: p if fields[n].ndim else p.item() for n, p in zip(fields, parts, strict=True)}
