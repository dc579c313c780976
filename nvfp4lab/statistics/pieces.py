"""A piece of a tensor, and what is counted of it: what passes between `tally` and its counters.

There are two counters, `in_torch.count` and `in_triton.count`, which give the same; `tally` adds up
what either gives. A field that is known without looking at elements (`tokens`, `elements`,
`blocks`) or that follows from another one is `tally`'s. A new field of `contents` goes through the
dictionaries as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Piece:
    """Where a chunk lies in the tensor: whole rows, or blocks of one row."""

    row: int
    rows: int
    block: int = 0  # other than 0 in a part of a row
    ends_row: bool = True


@dataclass(frozen=True, eq=False)
class Counted:
    """What one piece adds to `contents`, on its device."""

    integers: dict[str, torch.Tensor]  # int64 fields by name, to be added
    floats: dict[str, torch.Tensor]  # float64 fields, to be added
    largest: dict[str, torch.Tensor]  # float64 fields, of which the larger one counts
    rows: list[torch.Tensor]  # [rows] each: xx and ee float64, lost int64
    channels: list[torch.Tensor]  # float64 [k] each: xx, ee, xq
    worst: dict[str, torch.Tensor]  # candidates for the worst blocks, in columns of WORST
