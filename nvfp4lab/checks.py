"""What a public function asks of a tensor or a name before it looks into it.

One check of each, so that whatever is given in its place meets the same words. May be changed: what
else no function here can read.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

import torch

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def require_tensor(
    name: str, given: object, dtypes: tuple[torch.dtype, ...] | None = None, least_ndim: int = 0
) -> None:
    """Raises: TypeError for anything but a plain strided tensor, or another dtype; ValueError for
    too few dimensions and for the meta device, which holds no values."""
    if not isinstance(given, torch.Tensor):
        raise TypeError(f"{name} is a torch.Tensor, got {type(given).__name__}")
    if given.layout is not torch.strided or given.is_nested or given.is_quantized:
        what = "nested" if given.is_nested else given.dtype if given.is_quantized else given.layout
        raise TypeError(f"{name} is a strided tensor, got {what}")
    if dtypes is not None and given.dtype not in dtypes:
        expected = [str(dtype).removeprefix("torch.") for dtype in dtypes]
        listed = " or ".join(filter(None, [", ".join(expected[:-1]), expected[-1]]))
        raise TypeError(f"{name} is {listed}, got {given.dtype}")
    if given.ndim < least_ndim:
        raise ValueError(f"{name} has {least_ndim} dimensions or more, got {tuple(given.shape)}")
    if given.is_meta:
        raise ValueError(f"{name} is on a device that holds its values, got meta")


def require_matrix(
    name: str, given: torch.Tensor, dtypes: tuple[torch.dtype, ...] | None = None
) -> None:
    """As `require_tensor`, and ValueError for other than two dimensions."""
    require_tensor(name, given, dtypes)
    if given.ndim != 2:
        raise ValueError(f"{name} has two dimensions, got shape {tuple(given.shape)}")


def unknown(what: str, given: object, known: Collection[str]) -> str:
    """What is said of a name that is none of the known ones: the nearest of them, or all."""
    near = difflib.get_close_matches(str(given), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(known)}"
    return f"unknown {what} {given!r}; {hint}"
