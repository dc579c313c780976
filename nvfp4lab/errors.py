"""The error of one tensor and its quantized form: as statistics that add up, or as frames.

`measure` walks over the tensor in pieces of whole rows and hands each, with its codes, to a
`Tally`; of a recipe it makes the codes on the way, so nothing of the tensor's size is written. On a
GPU the codes come from the recipe's staging kernel, where it has one for the tensor, and a kernel
counts. The frames (`element_errors`, `block_errors`, `token_errors`) are for tensors that a person
looks at. To add a measure see `statistics`; to add a column, add it here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import pandas as pd
import torch

from nvfp4lab import catalogue
from nvfp4lab.blocks import quantize_blocks
from nvfp4lab.checks import require_tensor
from nvfp4lab.codec import check_input, find_outer, quantize
from nvfp4lab.outer import OuterScale
from nvfp4lab.quantized import DTYPES, Quantized, chunk_on, refuse_capture
from nvfp4lab.rules import Recipe
from nvfp4lab.staging import stage
from nvfp4lab.statistics import Statistics, Tally, in_torch, in_triton
from nvfp4lab.statistics.measures import with_ratios
from nvfp4lab.statistics.pieces import Piece

COUNTED_BY_KERNEL = 1 << 26  # elements in one go: their codes are up to 64 MB beside the tensor


@torch.no_grad()
def measure(
    x: torch.Tensor,
    q: Quantized | Recipe | str,
    *,
    outer: float | torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Statistics:
    """The error of q against x, or of x quantized by a recipe, in one pass that keeps nothing.

    x: (..., K) of any dtype and device that `quantize` takes; q: its quantized form, whoever wrote
    the bytes, or a recipe, with `outer` and `generator` as of `quantize`. Both give the same to the
    bit (on a GPU, which adds in no fixed order, but for the last digits of sums; and under
    stochastic rounding a GPU draws by chunks). NaN and Inf are counted apart and enter no sum.

    Raises: ValueError if the shapes or devices differ, or outer or generator come with a Quantized;
    TypeError if x is none or both are swapped; otherwise as `quantize`.

    >>> stats = measure(torch.tensor([[6.0] + [1.1] * 15]), "nvfp4")
    >>> stats.max_abs_e, stats.flushed, stats.tokens
    (0.10000002384185791, 0, 1)
    """
    _check_order(x, q)
    if not isinstance(q, Quantized):
        recipe = catalogue.recipe(q)
        check_input(x, recipe, outer, generator)
        scale = find_outer(x, recipe, outer) if recipe.outer_per == "tensor" else None
        return measure_rows(x, recipe, scale, generator)
    if outer is not None or generator is not None:
        raise ValueError("outer and generator are for quantizing; q is quantized already")
    _check_pair(x, q)
    in_row, block, bits = q.scales.shape[-1], q.recipe.scale.block, q.recipe.elements.format.bits
    walk = _Walk(x, q.recipe)

    def written(piece: Piece, rows: torch.Tensor, blocks: torch.Tensor):
        start, count = piece.row * in_row + piece.block, blocks.numel() // block
        g = q.outer if q.outer is None or q.outer.ndim == 0 else q.outer.reshape(-1, 1)
        g = g if g is None or g.ndim == 0 else g[piece.row : piece.row + piece.rows]
        if walk.by_kernel:  # which takes two codes to a byte
            codes = q.codes.view(-1, block * bits // 8)[start : start + count]
        else:
            codes = q.blocks(start, start + count)[0]
        return codes, q.scales.view(-1)[start : start + count], g

    return walk.tallied(written)


def measure_rows(
    x: torch.Tensor,
    recipe: Recipe,
    outer: OuterScale | None = None,
    generator: torch.Generator | None = None,
    source: str = "",
    first_token: int = 0,
) -> Statistics:
    """The error of rows of something larger: as `measure` of a recipe, nothing checked.

    outer: the scale of the whole where the recipe has one for the tensor. source, first_token: name
    the worst blocks, row 0 of x being row `first_token` of the source.
    """
    scale = OuterScale.one(x.device) if outer is None else outer
    walk = _Walk(x, recipe)

    def quantized(piece: Piece, rows: torch.Tensor, blocks: torch.Tensor):
        nonlocal scale
        staged = (
            _staged(rows, recipe) if walk.by_kernel and blocks.numel() == rows.numel() else None
        )
        if staged is not None:
            return (
                staged.codes.view(-1, recipe.scale.block // 2),
                staged.scales.view(-1),
                staged.outer,
            )
        if recipe.outer_per == "token" and piece.block == 0:
            scale = find_outer(rows, recipe)
        codes, stored = _codes_in_torch(piece, blocks, scale, recipe, x, generator)
        return codes, stored, None if recipe.outer is None else scale.decode

    return walk.tallied(quantized, source, first_token)


class _Walk:
    """The way over x in pieces that suit whoever counts: the kernel or torch."""

    def __init__(self, x: torch.Tensor, recipe: Recipe):
        self.x, self.recipe = x, recipe
        self.by_kernel = in_triton.takes(recipe, x.device)

    def tallied(self, codes_of: Callable, source: str = "", first_token: int = 0) -> Statistics:
        """Every piece of x, with the codes, stored scales and outer scale that `codes_of` gives."""
        count = in_triton.count if self.by_kernel else in_torch.count
        tally = Tally(self.recipe, self.x.shape[-1], source, first_token, count)
        for piece, rows, blocks in self._pieces():
            tally.add(piece, blocks, *codes_of(piece, rows, blocks))
        return tally.statistics()

    def _pieces(self) -> Iterator[tuple[Piece, torch.Tensor, torch.Tensor]]:
        """Whole rows of about a chunk of elements, or parts of one row that is longer: with the
        rows [r, K] and the piece's own part of them, [r, k] for the kernel, else its blocks as
        float32 [n, block]."""
        x, block = self.x, self.recipe.scale.block
        *lead, width = x.shape
        if not x.numel():
            return
        chunk = COUNTED_BY_KERNEL if self.by_kernel else chunk_on(x.device)
        blocks_in_row, part, step = width // block, max(1, chunk // block), max(1, chunk // width)
        for row in range(0, math.prod(lead), step):
            rows = _rows(x, row, min(row + step, math.prod(lead)))
            for first in range(0, blocks_in_row, part if step == 1 else blocks_in_row):
                last = min(first + part, blocks_in_row) if step == 1 else blocks_in_row
                own = rows[:, first * block : last * block]
                own = own if self.by_kernel else own.reshape(-1, block).float()
                yield Piece(row, len(rows), first, last == blocks_in_row), rows, own


def _staged(rows: torch.Tensor, recipe: Recipe) -> Quantized | None:
    """The rows [r, K] by the recipe's staging kernel; None for what cannot be staged."""
    no_top_k = torch.empty(len(rows), 0, dtype=torch.int32, device=rows.device)
    try:
        return stage(rows, no_top_k.float(), no_top_k, recipe).quantized
    except (TypeError, ValueError):
        return None


def _codes_in_torch(
    piece: Piece,
    part: torch.Tensor,
    scale: OuterScale,
    recipe: Recipe,
    x: torch.Tensor,
    generator: torch.Generator | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The codes uint8 [n, block] and stored scales [n] of a piece in torch, a chunk at a time."""
    blocks = part.reshape(-1, recipe.scale.block)
    in_row, step = x.shape[-1] // blocks.shape[1], max(1, chunk_on(x.device) // blocks.shape[1])
    done = []
    for start in range(0, len(blocks), step):
        stop = min(start + step, len(blocks))
        own = scale.of_blocks(in_row, piece.block + start, piece.block + stop)
        done.append(quantize_blocks(blocks[start:stop].float(), own, recipe, x.dtype, generator))
    codes, stored = zip(*done, strict=True)
    return (codes[0], stored[0]) if len(done) == 1 else (torch.cat(codes), torch.cat(stored))


def _rows(x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Rows start to stop of x (..., K) as [stop - start, K], a view where there can be one."""
    try:
        return x.view(-1, x.shape[-1])[start:stop]
    except RuntimeError:  # its strides allow no view
        index = torch.unravel_index(torch.arange(start, stop, device=x.device), x.shape[:-1])
        return x[index]


def _check_order(x: object, q: object) -> None:
    if isinstance(x, Quantized):
        raise TypeError("the tensor comes first, its quantized form second: got them swapped")
    if isinstance(q, torch.Tensor):
        shape = "nested" if q.is_nested else tuple(q.shape)
        raise TypeError(f"q is a Quantized or a recipe, got a tensor {shape}")


def _check_pair(x: torch.Tensor, q: Quantized) -> None:
    require_tensor("x", x, DTYPES)
    if q.shape != x.shape:
        raise ValueError(f"x is {tuple(x.shape)}, its quantized form {tuple(q.shape)}")
    refuse_capture(x.device)
    if q.codes.device != x.device:
        raise ValueError(f"x is on {x.device}, its quantized form on {q.codes.device}")


def scale_histogram(q: Quantized) -> pd.DataFrame:
    """How often each scale byte occurs: columns scale_code, scale, share; a row a nonnegative code.

    Raises: ValueError for float32 scales, which have no codes.
    """
    if not isinstance(q, Quantized):
        raise TypeError(f"q is a Quantized, got {type(q).__name__}")
    fmt = q.recipe.scale.format
    if fmt is None:
        raise ValueError(f"{q.recipe.name} keeps its scales in float32; they have no bytes")
    codes = torch.arange(len(fmt.magnitudes), dtype=torch.uint8, device="cpu")
    counts = torch.bincount(q.scales.flatten().int(), minlength=len(codes))[: len(codes)].cpu()
    return pd.DataFrame(
        {
            "scale_code": codes.numpy(),
            "scale": fmt.decode(codes).numpy(),
            "share": (counts.float() / max(1, q.scales.numel())).numpy(),
        }
    )


def element_errors(x: torch.Tensor, q: Quantized | Recipe | str) -> pd.DataFrame:
    """A row an element: columns token, block (in the row), channel, x, code, q, e (q - x).

    x, q: as of `measure`, of a size for a frame. NaN and Inf stand as they are.
    """
    x, q = _quantized_pair(x, q)
    token, channel = _places(x.shape[-1], x.numel())
    decoded = q.dequantize()
    columns = {"x": x.float(), "code": q.element_codes(), "q": decoded}
    flat = {name: column.flatten().cpu().numpy() for name, column in columns.items()}
    error = flat["q"].astype(np.float64) - flat["x"]
    place = {"token": token, "block": channel // q.recipe.scale.block, "channel": channel}
    return pd.DataFrame({**place, **flat, "e": error})


def block_errors(x: torch.Tensor, q: Quantized | Recipe | str) -> pd.DataFrame:
    """A row a block: columns token, block (in the row), amax, crest, scale_code, scale, outer, xx,
    ee, xq, flushed, lost, nmse, qsnr_db, gain.

    Sums are over the elements where x and q are finite; lost counts the finite elements that decode
    to NaN or Inf, amax and crest are of the finite elements of x. scale_code is None where scales
    are float32, outer where the recipe has none. x, q: as of `measure`, of a size for a frame.
    """
    x, q = _quantized_pair(x, q)
    token, block = _places(q.scales.shape[-1], q.scales.numel())
    frame = _sums(x, q, q.recipe.scale.block)
    stored = q.scales.flatten().cpu().numpy()
    none = [None] * len(stored)
    outer = none if q.outer is None else q.outer.expand(q.scales.shape).flatten().cpu().numpy()
    first = {"token": token, "block": block, "amax": frame.pop("amax"), "crest": frame.pop("crest")}
    scales = {
        "scale_code": none if q.recipe.scale.format is None else stored,
        "scale": q.decoded_scales().flatten().cpu().numpy(),
        "outer": outer,
    }
    return with_ratios(pd.DataFrame({**first, **scales, **frame}))


def token_errors(x: torch.Tensor, q: Quantized | Recipe | str) -> pd.DataFrame:
    """A row a token: columns token, amax, crest, outer, xx, ee, xq, flushed, lost, nmse, qsnr_db,
    gain; as `block_errors`, with crest that of the whole row."""
    x, q = _quantized_pair(x, q)
    frame = _sums(x, q, max(1, x.shape[-1]))
    outer = [None] * len(frame["xx"])
    if q.outer is not None:
        outer = q.outer.expand(*x.shape[:-1], 1).flatten().cpu().numpy()[: len(outer)]
    first = {"token": np.arange(len(frame["xx"])), "amax": frame.pop("amax")}
    first |= {"crest": frame.pop("crest"), "outer": outer}
    return with_ratios(pd.DataFrame({**first, **frame}))


def sampled_nmse(frame: pd.DataFrame) -> tuple[float, float]:
    """(NMSE, its standard error) over the rows of `block_errors` or `token_errors`.

    The standard error is that of a ratio of sums whose rows are drawn independently (by the delta
    method), good to about 1 / sqrt(2 rows) of it; NaN for a single row.

    Raises: ValueError for a frame without a row.
    """
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(f"a frame of block_errors or token_errors, got {type(frame).__name__}")
    if not len(frame):
        raise ValueError("no row, so there is no error and none of its own")
    ee, xx = frame["ee"].to_numpy(), frame["xx"].to_numpy()
    nmse = ee.sum() / xx.sum()
    spread = (ee - nmse * xx).std(ddof=1) if len(frame) > 1 else math.nan
    return float(nmse), float(spread * math.sqrt(len(frame)) / xx.sum())


def _quantized_pair(x: torch.Tensor, q: Quantized | Recipe | str) -> tuple[torch.Tensor, Quantized]:
    _check_order(x, q)
    x = x.detach() if isinstance(x, torch.Tensor) else x
    q = q if isinstance(q, Quantized) else quantize(x, q)
    _check_pair(x, q)
    return x, q


def _places(length: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Which row, and where in it, each of `count` things is, `length` to a row."""
    return np.divmod(np.arange(count), max(1, length))


def _sums(x: torch.Tensor, q: Quantized, length: int) -> dict[str, np.ndarray]:
    """Sums and counts over consecutive elements, `length` at a time."""
    x = x.reshape(-1, length).double()
    decoded = q.dequantize().reshape(-1, length).double()
    finite, lost = x.isfinite(), x.isfinite() & ~decoded.isfinite()
    x = x.where(finite, 0.0)
    amax, power = x.abs().amax(-1), x.square().sum(-1)
    x, decoded = x.where(~lost, 0.0), decoded.where(finite & ~lost, 0.0)
    sums = {
        "amax": amax,
        "crest": amax / (power / finite.sum(-1)).sqrt(),  # NaN where all are zero
        "xx": x.square().sum(-1),
        "ee": (decoded - x).square().sum(-1),
        "xq": (x * decoded).sum(-1),
        "flushed": ((x != 0) & (decoded == 0)).sum(-1),
        "lost": lost.sum(-1),
    }
    return {name: values.cpu().numpy() for name, values in sums.items()}
