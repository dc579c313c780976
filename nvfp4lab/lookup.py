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

import numpy as np
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
STEPS, SIGN, SIGN_BIT = 7, 8, 3  # steps from code 0 to 7; the code's sign bit

# A thread holds Python's lock for a microsecond at each operation, and one that finds it held
# sleeps for fifty: so operations are few, and each has much to do.
CHUNKS = 2  # in a piece of work; fewer, down to one, where a thread would have no piece
THREADS = 8  # at most: each has 7 MB of intermediates
ROWS = 2  # compared at a time, which keeps it at that

# Four elements are a word: as BF16 an int64, in lanes of 16 bits; as codes an int32, in bytes.
ALL_LANES = 0x0001_0001_0001_0001
MAGNITUDE_BITS = 0x7FFF * ALL_LANES
# Times this, the two bytes of 16 bits are codes side by side in the upper one, the first one low;
# and the two upper bytes of 32 bits, lower ones cleared, are side by side in the upper half.
TO_UPPER_BYTE, UPPER_BYTES, TO_UPPER_HALF = 0x0110, 0xFF00_FF00 - (1 << 32), 0x0101


@dataclass(frozen=True)
class Table:
    """What a recipe makes of BF16 blocks whose amax has bits below `limit`.

    scale_codes: uint8 [2**15], of each amax. steps: int64 [7 or 8, 256], four times the same int16:
    above step i of a scale code the magnitude's code is i + 1 or more; above the eighth a negative
    element has its sign, without one every negative.
    """

    recipe: Recipe
    limit: int
    scale_codes: torch.Tensor
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
            self._quantize_below_limit(piece, codes[start:stop], of_scales, room)
            if room.amax.max() >= self.limit:
                beyond = (room.amax >= self.limit).nonzero()[:, 0]
                of_elements, of_scales[beyond] = quantize_blocks(
                    piece[beyond].float(), OuterScale.one(), self.recipe, piece.dtype
                )
                codes[start + beyond] = pack_nibbles(of_elements.to(torch.uint8))
            _ROOMS.append(room)

        block, workers = self.recipe.scale.block, min(THREADS, torch.get_num_threads())
        share = -(-len(scales) // workers) * block
        size = min(CHUNKS * quantized.CHUNK, max(quantized.CHUNK, share))
        threads.for_each(quantize_piece, spans(len(scales), block, size), THREADS)

    def _quantize_below_limit(
        self, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, room: _Room
    ) -> None:
        """The same for one piece, as if no block were beyond the limit."""
        np.copyto(room.words_array, x.view(torch.int16).numpy().view(np.int64).T)
        np.less(room.elements, 0, out=room.is_negative)
        room.words.bitwise_and_(MAGNITUDE_BITS)

        # Of what is largest in each lane the larger in each half, and of these two the larger.
        torch.amax(room.words.view(torch.int16), 0, out=room.largest)
        torch.bitwise_right_shift(room.largest.view(torch.int64), 32, out=room.index)
        torch.maximum(room.largest, room.index.view(torch.int16), out=room.largest)
        np.maximum(*room.largest_two, out=room.amax_array)
        torch.index_select(self.scale_codes, 0, room.amax, out=scales)
        room.index.copy_(scales)
        np.take(self.steps.numpy(), room.index_array, 1, out=room.steps, mode="clip")

        for elements, is_above, above, code, negative in room.rows:
            np.greater(elements, room.step_of_block, out=is_above)
            torch.sum(above[:STEPS], 0, dtype=torch.int32, out=code)
            if len(above) > STEPS:
                negative.bitwise_and_(above[STEPS])

        room.negative.bitwise_left_shift_(SIGN_BIT)
        room.code.bitwise_or_(room.negative)
        room.code.view(torch.int16).mul_(TO_UPPER_BYTE)
        room.code.bitwise_and_(UPPER_BYTES)
        room.code.mul_(TO_UPPER_HALF)
        codes.view(torch.int16).t().copy_(room.upper_halves)


class _Room:
    """Memory for the intermediates of a piece, all laid out with the blocks along the last axis, so
    that what belongs to a block is broadcast along rows as long as the piece: a row holds one word
    of each block.

    Arrays share it with numpy, whose comparisons write bytes eight times as fast as torch's.
    """

    def __init__(self, blocks: int, table: Table):
        words, steps = table.recipe.scale.block // 4, len(table.steps)
        self.key = blocks, words, *table.steps.shape
        self.words = _empty(words, blocks)
        self.words_array = self.words.numpy()
        self.elements = self.words_array.view(np.int16)
        self.largest = _empty(4 * blocks, dtype=torch.int16)
        self.largest_two = self.largest.numpy().reshape(blocks, 4).T[:2]
        self.amax, self.index = _empty(blocks), _empty(blocks)
        self.amax_array, self.index_array = self.amax.numpy(), self.index.numpy()
        self.steps = _empty(steps, blocks).numpy()
        self.step_of_block = self.steps.view(np.int16)[:, None]

        self.negative = _empty(words, blocks, dtype=torch.int32)
        self.code = torch.empty_like(self.negative)
        self.upper_halves = self.code.view(torch.int16)[:, 1::2]
        self.is_negative = _bools(self.negative)
        above = _empty(steps, min(ROWS, words), blocks, dtype=torch.int32)
        self.rows = []
        for start, stop in spans(words, 1, ROWS):
            here, of_rows = slice(start, stop), above[:, : stop - start]
            arrays = self.elements[here], _bools(of_rows)
            self.rows.append((*arrays, of_rows, self.code[here], self.negative[here]))


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


def _bools(words: torch.Tensor) -> np.ndarray:
    """The bytes of int32 [..., n], as bool [..., 4 n]."""
    return words.numpy().view(np.bool_)


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
    blocks = prepare(_values(amax)[:, None], OuterScale.one(), recipe, torch.bfloat16)
    scale_codes = encode_scale(blocks, recipe)[:, 0]
    met, row = scale_codes.unique(return_inverse=True)
    largest = torch.zeros_like(met, dtype=torch.int64).scatter_reduce_(0, row, amax, "amax")
    steps, limit = _find_steps(met[:, None], largest[:, None], recipe)
    if limit < ORDINARY:
        return None
    if (steps[STEPS] < 0).all():
        steps = steps[:STEPS]
    of_codes = torch.zeros(len(steps), 256, dtype=torch.int64, device="cpu")
    of_codes[:, met.int()] = (steps & 0xFFFF) * ALL_LANES
    scale_codes = torch.nn.functional.pad(scale_codes, (0, MAGNITUDES - INFINITY))
    return Table(recipe, limit, scale_codes, of_codes)


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

    largest: int64 [n, 1], the largest magnitude that meets each scale code, asked for in place of
    all above it. Whether a step is taken is asked at the end of every half binade, throughout the
    one in which it first is, and throughout those below the limit, down to one without fault. A
    code that were to leave its step and come back within any other would be missed; the tests ask
    everywhere.
    """

    def ask(bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        bits = bits.minimum(largest)
        return bits, *_steps_taken(bits, scale_codes, largest, recipe)

    half_binade = torch.arange(STRIDE, device="cpu")
    at_ends = ask(torch.arange(STRIDE - 1, INFINITY, STRIDE, device="cpu"))
    taken = at_ends[1]
    first = taken.int().argmax(-1)  # [8, n]
    closely = [ask(at[:, None] * STRIDE + half_binade) for at in first]
    before = torch.stack([(~taken_here[k]).sum(-1) for k, (_, taken_here, _) in enumerate(closely)])
    steps = (first * STRIDE + before - 1).where(taken.any(-1), NEVER)

    def least_wrong(bits: torch.Tensor, taken: torch.Tensor, regular: torch.Tensor) -> int:
        wrong = ((bits > steps[..., None]) != taken).any(0) | ~regular
        return int(bits.where(wrong, INFINITY).min())

    limit = min(least_wrong(*asked) for asked in (at_ends, *closely)) // STRIDE * STRIDE
    while limit and least_wrong(*ask(limit - STRIDE + half_binade)) < INFINITY:
        limit -= STRIDE
    return steps, limit


def _steps_taken(
    bits: torch.Tensor, scale_codes: torch.Tensor, amax: torch.Tensor, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each step is below magnitudes [n, m] under scale codes [n, 1]: bool [8, n, m], and
    whether codes are regular, a negative's that of its magnitude but for the sign: [n, m]."""
    x, amax = _values(bits), _values(amax)
    positive, negative = (
        encode_elements(
            Blocks(signed, amax, amax, OuterScale.one(), torch.bfloat16), scale_codes, recipe
        )
        for signed in (x, -x)
    )
    taken = [positive > step for step in range(STEPS)] + [negative >= SIGN]
    return torch.stack(taken), (positive < SIGN) & (negative & ~SIGN == positive)


def _values(bits: torch.Tensor) -> torch.Tensor:
    """The BF16 magnitudes with these bits, as float32."""
    return bits.to(torch.int16).view(torch.bfloat16).float()
