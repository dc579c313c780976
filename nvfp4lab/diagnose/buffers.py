"""The arrangements in which a kernel's buffers may lie: by their dtype and size alone.

To read one more layout of scales or order of nibbles, add it to `scale_layouts` or NIBBLE_ORDERS;
`reading` finds out which one it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nvfp4lab import layouts

BLOCK = 16


def _by_halves(packed: torch.Tensor) -> torch.Tensor:
    """Element j low, element j + 8 high in the bytes of each block, as llama.cpp packs."""
    blocks = packed.unflatten(-1, (-1, BLOCK // 2))
    return torch.cat([blocks & 0xF, blocks >> 4], -1).flatten(-2)


def _other_way_round(bytes_: torch.Tensor) -> torch.Tensor:
    return bytes_.unflatten(-1, (-1, 4)).flip(-1).flatten(-2)


def _big_endian(packed: torch.Tensor) -> torch.Tensor:
    """The bytes of each 32-bit word the other way round."""
    return layouts.unpack_nibbles(_other_way_round(packed))


NIBBLE_ORDERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "low nibble first": layouts.unpack_nibbles,
    "high nibble first": lambda p: layouts.unpack_nibbles(p << 4 | p >> 4),
    "low nibbles, then high ones, of each 16": _by_halves,
    "big-endian words, low nibble first": _big_endian,
    "big-endian words, high nibble first": lambda p: _big_endian(p << 4 | p >> 4),
}
SOUND_LAYOUTS = ("linear", "mega_moe int32 words", "MN-major int32 words")


def packed_codes(codes: torch.Tensor, rows: int, width: int) -> torch.Tensor:
    """A kernel's codes, two to a byte in any shape of that size, as uint8 (rows, width / 2).

    Raises: TypeError unless they are bytes, ValueError for another number of them.
    """
    if codes.element_size() != 1 or codes.dtype == torch.bool:
        raise TypeError(f"codes are bytes (uint8, int8 or float4_e2m1fn_x2), got {codes.dtype}")
    if codes.numel() != rows * width // 2:
        raise ValueError(
            f"x ({rows}, {width}) has codes ({rows}, {width // 2}), got {tuple(codes.shape)}"
        )
    return codes.contiguous().view(torch.uint8).reshape(rows, width // 2)


def scale_layouts(scales: torch.Tensor, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Every layout that the buffer's size allows -> its bytes (rows, columns).

    Raises: ValueError if there is none, TypeError unless it holds bytes or int32 words.
    """
    found = {}
    high, wide = -(-rows // 128) * 128, -(-columns // 4) * 4
    if scales.dtype in (torch.int32, torch.uint32):
        words = scales.contiguous().view(torch.int32)
        if columns % 4 == 0 and words.numel() == rows * columns // 4:
            bytes_ = layouts.from_words(words.reshape(rows, -1))
            found["mega_moe int32 words"] = bytes_
            found["int32 words, big-endian"] = _other_way_round(bytes_)
            if words.shape == (columns // 4, rows):
                found["int32 words, transposed"] = layouts.from_words(words.T.contiguous())
        if columns % 4 == 0 and words.numel() == high * columns // 4:
            tiled = words.reshape(columns // 4, high)
            found["MN-major int32 words"] = layouts.from_mn_major(tiled, rows)
        if words.numel() * 4 == high * wide:
            flat = layouts.from_words(words.reshape(1, -1))
            found["128x4"] = layouts.from_tiles(flat, rows, columns)
    elif scales.element_size() == 1 and scales.dtype != torch.bool:
        bytes_ = scales.contiguous().view(torch.uint8)
        if scales.numel() == rows * columns:
            found["linear"] = bytes_.reshape(rows, columns)
            if columns % 4 == 0:
                found["linear, words big-endian"] = _other_way_round(found["linear"])
            found["linear, transposed"] = bytes_.reshape(columns, rows).T.contiguous()
        if scales.numel() == high * wide:
            found["128x4"] = layouts.from_tiles(bytes_, rows, columns)
            if scales.numel() != rows * columns:
                padded = bytes_.reshape(high, wide)[:rows, :columns].contiguous()
                found["linear, padded to whole tiles"] = padded
    else:
        raise TypeError(f"scales are bytes or int32 words, got {scales.dtype}")
    if not found:
        raise ValueError(
            f"{rows} x {columns} scales, E4M3 for blocks of {BLOCK}, are as many bytes, "
            f"{high * wide} bytes in 128x4 tiles, or int32 words of four; got "
            f"{tuple(scales.shape)} {scales.dtype}"
        )
    return found


def tile_padding(scales: torch.Tensor, rows: int, columns: int) -> int:
    """How many padding bytes of the tiles are not zero."""
    bytes_ = scales.contiguous().view(torch.uint8)
    high, wide = -(-rows // 128) * 128, -(-columns // 4) * 4
    padded = layouts.from_tiles(bytes_, high, wide).clone()
    padded[:rows, :columns] = 0
    return int((padded != 0).sum())
