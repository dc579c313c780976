"""Quantizing BF16 on a CPU by a table that is read off the reference.

Where a recipe has no outer scale, a block's scale code is a function of its amax, of which BF16 has
2**15; and under one scale code an element's code steps up at most seven times as its magnitude
grows. A `Table` holds the scale code of every amax and, for each scale code, the magnitudes above
which the steps are, all as bits: BF16 magnitudes order as their bits do. Quantizing is then 16-bit
integer comparison, without a division or a conversion.

`table_of` asks `blocks` for all of it, so that no rule is written twice, and refuses what steps
cannot say. To make more recipes fast, widen `_applies`; what a recipe means is decided in `blocks`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

from nvfp4lab import quantized, threads
from nvfp4lab.blocks import Blocks, encode_elements, encode_scale, prepare, quantize_blocks
from nvfp4lab.layouts import pack_nibbles
from nvfp4lab.outer import OuterScale
from nvfp4lab.quantized import spans
from nvfp4lab.rules import Recipe

MAGNITUDES = 1 << 15  # of BF16
INFINITY = 0x7F80  # its bits, and the number of finite magnitudes
ORDINARY = 0x4780  # 2**16: a table that ends below it is not worth having
STRIDE = 64  # magnitudes between those that `_find_steps` samples: half a binade
NEVER = 0x7FFF  # no magnitude is above it
THREADS = 8  # at most: each has 6 MB of intermediates, and they wait for each other in Python
STEPS, SIGN = 7, 8  # steps from code 0 to 7; the code's sign bit

# Four BF16 are worked on as one int64 where that is faster, each in a lane of 16 bits.
ALL_LANES = 0x0001_0001_0001_0001
MAGNITUDE_BITS = 0x7FFF * ALL_LANES
TO_TOP = sum(1 << 12 * lane for lane in range(1, 5))  # four codes, times this: in the top 16 bits


@dataclass(frozen=True)
class Table:
    """What a recipe makes of BF16 blocks whose amax has bits below `limit`.

    scale_codes: uint8 [2**15], of each amax. rows: int32 [2**15], where `steps` has that code.
    steps: int64 [7 or 8, scale codes], four times the same int16: above step i the magnitude's code
    is i + 1 or more; above the eighth a negative element has its sign, without one every negative.
    """

    recipe: Recipe
    limit: int
    scale_codes: torch.Tensor
    rows: torch.Tensor
    steps: torch.Tensor

    def quantize(
        self,
        piece_of: Callable[[int, int], torch.Tensor],
        codes: torch.Tensor,
        scales: torch.Tensor,
    ) -> None:
        """Fill packed codes uint8 [n, block / 2] and scales uint8 [n].

        piece_of(start, stop): these of the n blocks, BF16 [stop - start, block], contiguous.
        """

        def quantize_piece(span: tuple[int, int]) -> None:
            start, stop = span
            room = _room(stop - start, self)
            piece, of_scales = piece_of(start, stop), scales[start:stop]
            amax = self._quantize_below_limit(piece, codes[start:stop], of_scales, room)
            if amax.max() >= self.limit:
                beyond = (amax >= self.limit).nonzero()[:, 0]
                of_elements, of_scales[beyond] = quantize_blocks(
                    piece[beyond].float(), _one(), self.recipe, piece.dtype
                )
                codes[start + beyond] = pack_nibbles(of_elements.to(torch.uint8))
            _ROOMS.append(room)

        pieces = spans(len(scales), self.recipe.scale.block, quantized.CHUNK)
        threads.for_each(quantize_piece, pieces, THREADS)

    def _quantize_below_limit(
        self, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, room: _Room
    ) -> torch.Tensor:
        """The same for one piece as if no block were beyond the limit; its amax, int16 [n]."""
        if x.storage_offset() % 4:
            x = x.clone()
        torch.bitwise_or(x.view(torch.int64).t(), 0, out=room.words)  # copy_ takes 3 times as long
        torch.lt(room.elements, 0, out=room.negative)
        room.words.bitwise_and_(MAGNITUDE_BITS)

        torch.amax(room.elements, 0, out=room.amax_of_lane)
        torch.amax(room.amax_of_lane.view(-1, 4), 1, out=room.amax)
        room.index.copy_(room.amax)
        torch.index_select(self.scale_codes, 0, room.index, out=scales)
        torch.index_select(self.rows, 0, room.index, out=room.row)
        torch.add(room.row, room.row_of_step, out=room.index_of_step)
        torch.index_select(self.steps.view(-1), 0, room.index_of_step.view(-1), out=room.steps)

        torch.gt(room.elements, room.step_of_block, out=room.above)
        torch.sum(room.above[:STEPS], 0, dtype=torch.int16, out=room.code)
        if len(room.above) > STEPS:
            room.negative.mul_(room.above[STEPS])
        room.code.add_(room.negative, alpha=SIGN)
        room.code_words.mul_(TO_TOP)
        codes.view(torch.int16).t().copy_(room.top)
        return room.amax


class _Room:
    """Memory for the intermediates of a piece, all laid out with the blocks along the last axis, so
    that what belongs to a block is broadcast along rows as long as the piece.

    A row holds, for each block, the four elements of one word.
    """

    def __init__(self, blocks: int, table: Table):
        words = table.recipe.scale.block // 4
        self.key = blocks, words, *table.steps.shape
        self.words = _empty(words, blocks)
        self.elements = _lanes(self.words)
        self.negative = torch.empty_like(self.elements)
        self.amax_of_lane = _empty(4 * blocks, dtype=torch.int16)
        self.amax = _empty(blocks, dtype=torch.int16)
        self.index = _empty(blocks, dtype=torch.int32)
        self.row = _empty(blocks, dtype=torch.int32)
        steps, rows = table.steps.shape
        self.row_of_step = rows * torch.arange(steps, dtype=torch.int32, device="cpu")[:, None]
        self.index_of_step = _empty(steps, blocks, dtype=torch.int32)
        self.steps = _empty(steps * blocks)
        self.step_of_block = _lanes(self.steps).view(steps, 1, 4 * blocks)
        self.above = _empty(steps, words, 4 * blocks, dtype=torch.int16)
        self.code_words = torch.empty_like(self.words)
        self.code = _lanes(self.code_words)
        self.top = self.code.view(words, blocks, 4)[:, :, 3]


_ROOMS: deque[_Room] = deque(maxlen=2)  # that no thread is in: new memory costs as much as the work


def _room(blocks: int, table: Table) -> _Room:
    try:
        room = _ROOMS.pop()
    except IndexError:
        return _Room(blocks, table)
    fits = room.key == (blocks, table.recipe.scale.block // 4, *table.steps.shape)
    return room if fits else _Room(blocks, table)


def _empty(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="cpu")


def _lanes(words: torch.Tensor) -> torch.Tensor:
    return words.view(torch.int16)


@lru_cache(maxsize=32)
def table_of(recipe: Recipe) -> Table | None:
    """The table of a recipe, read off the reference at its first use, or None if it has none.

    None where a scale code depends on more than the block's amax; where an element's code depends
    on more than that scale code, its magnitude and its sign, or does not grow with the magnitude;
    and where a negative element's code is not its magnitude's with or without the sign bit.
    """
    if not _applies(recipe):
        return None
    amax = torch.arange(INFINITY, device="cpu")
    blocks = prepare(_values(amax)[:, None], _one(), recipe, torch.bfloat16)
    scale_codes = encode_scale(blocks, recipe)[:, 0]
    met, row = scale_codes.unique(return_inverse=True)
    largest = torch.zeros_like(met, dtype=torch.int64).scatter_reduce_(0, row, amax, "amax")
    steps, limit = _find_steps(met[:, None], largest[:, None], recipe)
    if limit < ORDINARY:
        return None
    if (steps[STEPS] < 0).all():
        steps = steps[:STEPS]
    beyond = (0, MAGNITUDES - INFINITY)
    return Table(
        recipe,
        limit,
        torch.nn.functional.pad(scale_codes, beyond),
        torch.nn.functional.pad(row.int(), beyond),
        (steps & 0xFFFF) * ALL_LANES,
    )


def _applies(recipe: Recipe) -> bool:
    """Whether codes depend on nothing but what a table knows, as far as decisions tell."""
    scale, elements = recipe.scale, recipe.elements
    return (
        recipe.outer is None
        and recipe.search is None
        and scale.format is not None
        and scale.block % 4 == 0
        and elements.format.bits == 4
        and elements.format.sign_mask == SIGN
        and elements.rounding != "stochastic"
        and elements.scale_read != "unrounded"
    )


def _find_steps(
    scale_codes: torch.Tensor, largest: torch.Tensor, recipe: Recipe
) -> tuple[torch.Tensor, int]:
    """The steps int64 [8, n] under scale codes [n, 1], and below which magnitude they are right.

    largest: int64 [n, 1], the largest magnitude that meets each scale code; steps above it are not
    looked at. Whether a step is taken is asked at the end of every half binade and throughout the
    one in which it first is; so a code that were to leave its step and come back within half a
    binade would be missed. The tests ask everywhere.
    """
    ends = torch.arange(STRIDE - 1, INFINITY, STRIDE, device="cpu")[None]
    taken, regular = _steps_taken(ends, scale_codes, largest, recipe)
    first = taken.int().argmax(-1)  # [8, n]
    within = first[..., None] * STRIDE + torch.arange(STRIDE, device="cpu")  # [8, n, STRIDE]
    closely = [_steps_taken(bits, scale_codes, largest, recipe) for bits in within]
    before = torch.stack([(~taken_here[k]).sum(-1) for k, (taken_here, _) in enumerate(closely)])
    steps = (first * STRIDE + before - 1).where(taken.any(-1), NEVER)

    limit = INFINITY
    asked = [(ends, taken, regular), *((b, *c) for b, c in zip(within, closely, strict=True))]
    for bits, taken, regular in asked:
        wrong = ((bits > steps[..., None]) != taken).any(0) | ~regular
        limit = min(limit, int(bits.where(wrong & (bits <= largest), INFINITY).min()))
    return steps, limit - limit % STRIDE


def _steps_taken(
    bits: torch.Tensor, scale_codes: torch.Tensor, amax: torch.Tensor, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each step is below magnitudes [1 or n, m] under scale codes [n, 1]: bool [8, n, m],
    and whether codes are regular, a negative's that of its magnitude but for the sign: [n, m]."""
    x, amax = _values(bits.expand(len(scale_codes), -1)), _values(amax)
    positive, negative = (
        encode_elements(Blocks(signed, amax, amax, _one(), torch.bfloat16), scale_codes, recipe)
        for signed in (x, -x)
    )
    taken = [positive > step for step in range(STEPS)] + [negative >= SIGN]
    return torch.stack(taken), (positive < SIGN) & (negative & ~SIGN == positive)


def _values(bits: torch.Tensor) -> torch.Tensor:
    """The BF16 magnitudes with these bits, as float32."""
    return bits.to(torch.int16).view(torch.bfloat16).float()


def _one() -> OuterScale:
    return OuterScale.one(torch.device("cpu"))
