"""A kernel's input and output, block by block, held against what a recipe predicts.

Scales are judged against the block's amax, codes against the scale that was stored, so that a wrong
scale does not hide how elements round. `inference` chooses the recipes that are tried. A kind of
block that is rare and tells is added to `Output.sample`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from nvfp4lab.blocks import (
    Blocks,
    divisor_scale,
    encode_elements,
    encode_scale,
    prepare,
    quantize_blocks,
    quotient_of,
)
from nvfp4lab.codec import iter_blocks
from nvfp4lab.diagnose.reading import BLOCK, Reading, block_amax
from nvfp4lab.formats import E4M3
from nvfp4lab.outer import OuterScale
from nvfp4lab.rules import Recipe

EVEN = 6144  # blocks of a sample that are spread evenly
RARE = 192  # blocks of each rare kind


@dataclass(frozen=True)
class Observed:
    """Some blocks with what a kernel made of them."""

    x: torch.Tensor  # float32 [n, 16]
    stored: torch.Tensor  # scale bytes [n, 1]
    codes: torch.Tensor  # [n, 16]
    outer: OuterScale  # () or [n, 1]
    dtype: torch.dtype  # of the kernel's input
    _known: dict = field(default_factory=dict, repr=False, compare=False)

    def prepared(self, recipe: Recipe) -> Blocks:
        """The recipe's intermediates before rounding."""
        return prepare(self.x, self.outer, recipe, self.dtype)

    def scales(self, recipe: Recipe) -> torch.Tensor:
        """The scale bytes [n] that the recipe gives."""
        searched = (recipe.search, recipe.elements) if recipe.search is not None else None
        key = (recipe.scale, recipe.specials, recipe.outer, searched)
        if key not in self._known:  # elements are varied far more often than scales
            if searched:
                self._known[key] = quantize_blocks(self.x, self.outer, recipe, self.dtype)[1]
            else:
                self._known[key] = encode_scale(self.prepared(recipe), recipe)[:, 0]
        return self._known[key]

    def element_codes(self, recipe: Recipe) -> torch.Tensor:
        """The codes [n, 16] that the recipe gives under the scales that the kernel stored."""
        return encode_elements(self.prepared(recipe), self.stored, recipe)

    def quotients(self, recipe: Recipe) -> torch.Tensor:
        """What the recipe rounds to codes, under the scales that the kernel stored: [n, 16]."""
        before = self.prepared(recipe)
        return quotient_of(before, divisor_scale(self.stored, before.raw_scale, recipe), recipe)

    def differences(self, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
        """Which scales [n] and which codes [n, 16] the recipe does not give.

        Codes that are right under the recipe's own scale do not count: there the scale byte alone
        is wrong.
        """
        scales = self.scales(recipe)
        wrong_scales = scales != self.stored[:, 0]
        wrong_codes = self.element_codes(recipe) != self.codes
        both = (wrong_scales & wrong_codes.any(-1)).nonzero()[:, 0]
        if len(both):
            own = self.at(both)
            codes = encode_elements(own.prepared(recipe), scales[both, None], recipe)
            wrong_codes[both] &= (codes != own.codes).any(-1, keepdim=True)
        return wrong_scales, wrong_codes

    def wrong_scales(self, recipe: Recipe) -> int:
        """How many stored scales the recipe does not give."""
        return int((self.scales(recipe) != self.stored[:, 0]).sum())

    def wrong_codes(self, recipe: Recipe) -> int:
        """How many codes the recipe does not give."""
        return int((self.element_codes(recipe) != self.codes).sum())

    def at(self, index: torch.Tensor) -> Observed:
        """Those blocks alone."""
        parts = (self.outer.decode, self.outer.encode, self.outer.amax)
        outer = OuterScale(*(p if p.ndim == 0 else p[index] for p in parts))
        return Observed(self.x[index], self.stored[index], self.codes[index], outer, self.dtype)


class Output:
    """All blocks of one kernel's output, under one reading of its buffers."""

    def __init__(self, x: torch.Tensor, reading: Reading) -> None:
        self.x, self.reading = x, reading
        self.rows, self.columns = x.shape[0], x.shape[1] // BLOCK
        self.amax = block_amax(x).view(-1)
        self.stored = reading.scales.reshape(-1, 1)
        self.codes = reading.codes.reshape(-1, BLOCK)
        self.guessed = self.sample(even=512, rare=16)  # a few blocks, for a first guess

    def __len__(self) -> int:
        return len(self.amax)

    def _outer(self, blocks: torch.Tensor) -> OuterScale:
        outer = self.reading.outer
        if outer is None:
            return OuterScale.one()
        rows = blocks // self.columns
        parts = (outer.decode, outer.encode, outer.amax)
        return OuterScale(*(p if p.ndim == 0 else p[rows] for p in parts))

    def at(self, blocks: torch.Tensor) -> Observed:
        """The blocks of those indices, counted row-major."""
        return Observed(
            self.x.reshape(-1, BLOCK)[blocks].float(),
            self.stored[blocks],
            self.codes[blocks],
            self._outer(blocks),
            self.x.dtype,
        )

    def pieces(self) -> Iterator[tuple[int, int, Observed]]:
        """(start, stop, blocks) over all blocks, a chunk at a time."""
        for start, stop, values in iter_blocks(self.x, BLOCK):
            outer = self._outer(torch.arange(start, stop, device="cpu"))
            yield (
                start,
                stop,
                Observed(
                    values, self.stored[start:stop], self.codes[start:stop], outer, self.x.dtype
                ),
            )

    def sample(self, even: int = EVEN, rare: int = RARE) -> torch.Tensor:
        """Indices of blocks: evenly spread ones, the smallest and largest, some of rare kinds."""
        stored, amax = self.stored[:, 0], self.amax
        kinds = (
            amax == 0,
            ~amax.isfinite(),
            stored == 0,
            stored == 1,
            (stored > 1) & (stored < 8),
            stored == E4M3.code_of_max,
            stored > E4M3.code_of_max,
            (amax / 6 < E4M3.smallest_normal) & (amax > 0),
            amax / 6 > 440,
        )
        found = [spread(kind.nonzero()[:, 0], rare) for kind in kinds]
        by_size = amax.argsort() if len(self) <= 1 << 22 else torch.arange(len(self), device="cpu")
        every = spread(torch.arange(len(self), device="cpu"), even)
        return torch.cat([every, by_size[:rare], by_size[-rare:], *found]).unique()

    def unexplained(self, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
        """Over all blocks: whether the scale differs from the recipe's, and how many codes do."""
        scales = torch.zeros(len(self), dtype=torch.bool, device="cpu")
        codes = torch.zeros(len(self), dtype=torch.uint8, device="cpu")
        for start, stop, piece in self.pieces():
            wrong_scales, wrong_codes = piece.differences(recipe)
            scales[start:stop], codes[start:stop] = wrong_scales, wrong_codes.sum(-1)
        return scales, codes

    def gives(self, recipe: Recipe) -> bool:
        """Whether the recipe gives every scale and every code."""
        for _, _, piece in self.pieces():
            if piece.wrong_scales(recipe) or piece.wrong_codes(recipe):
                return False
        return True


def spread(index: torch.Tensor, count: int) -> torch.Tensor:
    """At most that many entries, evenly spread."""
    last, many = len(index) - 1, min(count, len(index))
    places = torch.linspace(0, last, many, dtype=torch.float64, device="cpu")
    return index[places.long()]
