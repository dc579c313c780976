"""What the engines' hooks call: which rows of a forward pass are recorded, and in which dtypes.

An engine says `begin` with the positions and which rows are padding, `take` for each layer, and
`end`; then that pass is in the capture folder, or on an error none of it is. Sampling, the token
budget and the byte budget are decided here, once for all engines; the files are folder.py's. A new
way to choose tokens is added to `begin`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from nvfp4lab.capture.folder import CaptureFolder, describe, row_bytes
from nvfp4lab.records import DTYPES, NO_EXPERT

GIGABYTE = 10**9


class Recorder:
    """Records forward passes into the capture folder `out`, going on with what is there.

    provenance: what the activations are; `provenance["is"]` says it in a sentence.
    layers: record only these. tokens: stop after so many recorded tokens. keep: the share of tokens
    to keep, each drawn by `seed` and its number in the stream, so that how the stream is cut into
    passes does not matter. max_bytes: stop before the records of all layers exceed it.

    `rows` tokens have been recorded, in `passes` forward passes: to go on after a kill, run the
    same passes but for the first `passes`. `full`: a budget is used up, and nothing more is
    recorded; what it cut off the last pass does not come back when the budget is raised.

    Raises: ValueError for a share, budget or layer that cannot be; what CaptureFolder raises.
    """

    def __init__(
        self,
        out: str | Path,
        provenance: Mapping[str, Any],
        *,
        layers: Iterable[int] | None = None,
        tokens: int | None = None,
        keep: float = 1.0,
        seed: int = 0,
        max_bytes: int | None = None,
        shard_bytes: int = GIGABYTE,
    ):
        if not 0 < keep <= 1:
            raise ValueError(f"expected a share of tokens to keep in (0, 1], got {keep}")
        budgets = {"tokens": tokens, "max_bytes": max_bytes, "shard_bytes": shard_bytes}
        for name, budget in budgets.items():
            if budget is not None and budget < 1:
                raise ValueError(f"expected {name} of 1 or more, got {budget}")
        self.layers = None if layers is None else frozenset(layers)
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError(f"expected layers of 0 or more, got {sorted(self.layers)}")
        self._keep, self._seed, self._tokens, self._max_bytes = keep, seed, tokens, max_bytes
        settings = {
            "layers": None if self.layers is None else sorted(self.layers),
            "keep": keep,
            "seed": seed,
        }
        self._folder = CaptureFolder(out, provenance, settings, shard_bytes)
        self._rows: torch.Tensor | None = None  # of the pass under way, those to record
        self._length = 0  # tokens of the pass under way, padding included
        self._seen = self._folder.state["tokens_seen"]
        self._positions = torch.empty(0, dtype=torch.int64)
        self._taken: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
        self._out_of_bytes = False

    @property
    def rows(self) -> int:
        """Tokens in the folder, of this capture and those that it goes on from."""
        return self._folder.state["rows"]

    @property
    def passes(self) -> int:
        """Forward passes in the folder: how many to leave out when going on."""
        return self._folder.state["passes"]

    @property
    def bytes(self) -> int:
        """Bytes of the records of all layers in the folder, headers not counted."""
        return self._folder.state["bytes"]

    @property
    def full(self) -> bool:
        """Whether a budget is used up; then nothing more is recorded."""
        return self._out_of_bytes or (self._tokens is not None and self.rows >= self._tokens)

    @property
    def recording(self) -> bool:
        """A pass is under way."""
        return self._rows is not None

    def begin(self, positions: torch.Tensor, valid: torch.Tensor | None = None) -> None:
        """A pass of T tokens: positions integer [T]; valid bool [T], False where it is padding.

        Raises: ValueError for other shapes, RuntimeError if a pass is under way.
        """
        if self.recording:
            raise RuntimeError("begin: the pass before has not ended")
        if self.full:
            return
        positions = positions.detach().cpu().to(torch.int64)
        if positions.ndim != 1 or (valid is not None and valid.shape != positions.shape):
            shape = None if valid is None else tuple(valid.shape)
            raise ValueError(
                f"expected positions [T] and valid [T], got {tuple(positions.shape)} and {shape}"
            )
        rows = (
            torch.arange(len(positions)) if valid is None else valid.detach().cpu().nonzero()[:, 0]
        )
        seen = self._folder.state["tokens_seen"]
        self._seen = seen + len(rows)
        rows = rows[_kept(self._seed, seen, len(rows), self._keep)]
        if self._tokens is not None:
            rows = rows[: self._tokens - self.rows]
        self._rows, self._length, self._positions = rows, len(positions), positions[rows]
        self._taken = {}

    def take(
        self,
        layer: int,
        hidden: torch.Tensor,
        topk_ids: torch.Tensor | None = None,
        topk_weights: torch.Tensor | None = None,
        *,
        site: str = "expert_input",
    ) -> None:
        """What enters one layer in this pass: hidden [T, D], ids [T, k], weights [T, k].

        The chosen rows are copied at once: hidden to BF16, weights to float32, all to the CPU.

        Raises: ValueError for other shapes, ids without weights, or ids that are none;
        RuntimeError outside a pass, or for a layer and site that came before in it.
        """
        if self.full or (self.layers is not None and layer not in self.layers):
            return
        if self._rows is None:
            raise RuntimeError(f"take: layer {layer} came outside a pass")
        if (layer, site) in self._taken:
            raise RuntimeError(f"take: layer {layer}, {site} came twice in a pass")
        columns = {"hidden": hidden, "topk_ids": topk_ids, "topk_weights": topk_weights}
        given = {name: tensor for name, tensor in columns.items() if tensor is not None}
        shapes = {name: tuple(tensor.shape) for name, tensor in given.items()}
        if any(len(shape) != 2 or shape[0] != self._length for shape in shapes.values()):
            raise ValueError(f"layer {layer}: expected {self._length} rows each, got {shapes}")
        if (topk_ids is None) != (topk_weights is None):
            raise ValueError(f"layer {layer}: expected topk ids and weights, or neither")
        if topk_ids is not None and (topk_ids.is_floating_point() or topk_ids.dtype == torch.bool):
            raise ValueError(f"layer {layer}: expected integer topk ids, got {topk_ids.dtype}")
        taken = {}
        for name, tensor in given.items():
            rows = tensor.detach()[self._rows.to(tensor.device)]
            dtype = tensor.dtype if tensor.dtype in DTYPES[name] else DTYPES[name][-1]
            taken[name] = rows.to(dtype).cpu().clone()
        if "topk_ids" in taken and taken["topk_ids"].lt(NO_EXPERT).any():
            lowest = int(taken["topk_ids"].min())
            raise ValueError(
                f"layer {layer}: expected topk ids of {NO_EXPERT} or more, got {lowest}"
            )
        self._taken[layer, site] = taken | {"positions": self._positions}

    def end(self) -> None:
        """The pass is over: commit its rows of all layers, as many as the byte budget allows."""
        if self._rows is None:
            if not self.full:
                raise RuntimeError("end: no pass has begun")
            return
        records = self._taken
        if self._max_bytes is not None and records:
            sites = describe(records)
            row = sum(map(row_bytes, sites.values()))
            fit = (self._max_bytes - self.bytes) // row
            if fit < len(self._positions):
                self._out_of_bytes = True
                records = {
                    key: {name: tensor[:fit] for name, tensor in columns.items()}
                    for key, columns in records.items()
                }
        self._folder.commit(records, self._seen)
        self.discard()

    def discard(self) -> None:
        """Forget the pass that was begun, if any."""
        self._rows, self._taken = None, {}

    def finish(self) -> None:
        """Seal the shards and give the folder up; a pass that has not ended is forgotten."""
        self.discard()
        self._folder.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.finish()


def _kept(seed: int, first: int, count: int, share: float) -> torch.Tensor:
    """bool [count]: whether each of the tokens numbered first, first + 1, ... is kept.

    Philox gives four numbers at each place of its stream, so the draw of a token is found from its
    number alone.
    """
    if share == 1:
        return torch.ones(count, dtype=torch.bool)
    skipped = first % 4
    stream = np.random.Philox(key=seed).advance(first // 4)
    drawn = np.random.Generator(stream).random(skipped + count)[skipped:]
    return torch.from_numpy(drawn < share)
