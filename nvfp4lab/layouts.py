"""Where the bytes lie: nibble order, int32 scale words, 128x4 tiles, MN-major words.

Each layout is a pair of inverse functions between it and the plain row-major array. They move
bytes and know nothing of formats. To add a layout of scales, add its pair here and its name to
`quantized.SCALE_LAYOUTS`.
"""

from __future__ import annotations

import torch

from nvfp4lab.checks import INTEGERS, require_matrix, require_tensor

TILE_ROWS, TILE_COLUMNS = 128, 4
GGUF_BLOCK, GGUF_SUBBLOCK = 64, 16


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes to a byte, the even element low: uint8 (..., K) -> uint8 (..., K // 2).

    Raises: ValueError for an odd K.
    """
    require_tensor("codes", codes, INTEGERS, least_ndim=1)
    if codes.shape[-1] % 2:
        raise ValueError(f"a byte holds two codes; got {codes.shape[-1]} codes in a row")
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack_nibbles`: uint8 (..., K // 2) -> uint8 (..., K)."""
    require_tensor("packed", packed, INTEGERS, least_ndim=1)
    return torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)


def to_words(scales: torch.Tensor) -> torch.Tensor:
    """Four scale bytes to an int32, block k at bits 8 * (k % 4).

    uint8 (..., B) -> int32 (..., B // 4).

    Raises: ValueError if B is not a multiple of 4.
    """
    require_tensor("scales", scales, (torch.uint8,), least_ndim=1)
    if scales.shape[-1] % 4:
        raise ValueError(f"scale words hold 4 blocks; got {scales.shape[-1]} blocks in a row")
    return scales.contiguous().view(torch.int32)  # little-endian, as every target of Triton is


def from_words(words: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_words`: int32 (..., W) -> uint8 (..., 4 * W)."""
    require_tensor("words", words, (torch.int32,), least_ndim=1)
    return words.contiguous().view(torch.uint8)


def to_tiles(scales: torch.Tensor) -> torch.Tensor:
    """The 128x4 tiles that cuBLAS, CUTLASS and vLLM read: uint8 (T, B) -> uint8 (T', B').

    T' and B' are T and B rounded up to multiples of 128 and 4, the padding zero. Inside a tile the
    scale of (row, column) lies at row % 32 * 16 + row % 128 // 32 * 4 + column % 4; the tiles
    follow each other row-major. The shape says how much there is; the order is that of the bytes.
    """
    require_matrix("scales", scales, (torch.uint8,))
    rows, columns = scales.shape
    high, wide = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    padded = scales.new_zeros(high * TILE_ROWS, wide * TILE_COLUMNS)
    padded[:rows, :columns] = scales
    tiles = padded.view(high, 4, 32, wide, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(padded.shape)


def from_tiles(tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `to_tiles`: uint8 of any shape with T' * B' entries -> uint8 (rows, columns).

    Raises: ValueError if the number of entries is not that of the padded tiles.
    """
    high, wide = -(-rows // TILE_ROWS), -(-columns // TILE_COLUMNS)
    expected = high * wide * TILE_ROWS * TILE_COLUMNS
    require_tensor("tiles", tiles)
    if tiles.numel() != expected:
        raise ValueError(
            f"128x4 tiles for {rows} x {columns} scales have {expected} bytes; got {tiles.numel()}"
        )
    padded = tiles.reshape(high, wide, 32, 4, 4).permute(0, 3, 2, 1, 4)
    return padded.reshape(high * TILE_ROWS, wide * TILE_COLUMNS)[:rows, :columns].contiguous()


def to_mn_major(scales: torch.Tensor) -> torch.Tensor:
    """DeepGEMM's words for SM100: uint8 (T, B) -> int32 (B // 4, T').

    T' is T rounded up to a multiple of 128, the padding zero. Entry [w, p] holds blocks 4 w to
    4 w + 3 of the row that p stands for: inside each 128 rows, row m lies at m % 32 * 4 + m % 128
    // 32.

    Raises: ValueError if B is not a multiple of 4.
    """
    require_matrix("scales", scales, (torch.uint8,))
    words = to_words(scales)
    rows = words.shape[0]
    high = -(-rows // TILE_ROWS)
    padded = words.new_zeros(high * TILE_ROWS, words.shape[1])
    padded[:rows] = words
    return padded.view(high, 4, 32, -1).permute(3, 0, 2, 1).reshape(words.shape[1], -1)


def from_mn_major(words: torch.Tensor, rows: int) -> torch.Tensor:
    """The inverse of `to_mn_major`: int32 (W, T') -> uint8 (rows, 4 * W).

    Raises: ValueError if T' is not `rows` rounded up to a multiple of 128.
    """
    require_tensor("words", words, (torch.int32,))
    high = -(-rows // TILE_ROWS)
    if words.ndim != 2 or words.shape[1] != high * TILE_ROWS:
        raise ValueError(
            f"MN-major words for {rows} rows have shape (W, {high * TILE_ROWS}); "
            f"got {tuple(words.shape)}"
        )
    padded = words.reshape(-1, high, 32, 4).permute(1, 3, 2, 0)
    return from_words(padded.reshape(high * TILE_ROWS, -1)[:rows])


def to_gguf(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """llama.cpp's superblocks: uint8 codes (T, K // 2), scales (T, K // 16) -> (T, K // 16 * 9).

    64 elements to 36 bytes: the four scales, then 8 bytes for each 16 elements, of which byte j
    holds element j in its low and element j + 8 in its high nibble.

    Raises: ValueError if K is not a multiple of 64.
    """
    require_matrix("codes", codes, (torch.uint8,))
    require_matrix("scales", scales, (torch.uint8,))
    rows, width = codes.shape[0], codes.shape[1] * 2
    if scales.shape != (rows, width // GGUF_SUBBLOCK):
        raise ValueError(f"codes {tuple(codes.shape)} do not go with scales {tuple(scales.shape)}")
    if width % GGUF_BLOCK:
        raise ValueError(f"superblocks hold {GGUF_BLOCK} elements; got rows of {width}")
    elements = unpack_nibbles(codes).view(rows, -1, 4, 2, GGUF_SUBBLOCK // 2)
    packed = (elements[:, :, :, 0] | elements[:, :, :, 1] << 4).flatten(2)
    return torch.cat([scales.reshape(rows, -1, 4), packed], -1).flatten(1)


def from_gguf(blocks: torch.Tensor, rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `to_gguf`: bytes of any shape -> codes (rows, width // 2), scales.

    Raises: ValueError if the number of bytes is not that of the superblocks.
    """
    require_tensor("blocks", blocks, (torch.uint8,))
    expected = rows * width // GGUF_BLOCK * 36
    if width % GGUF_BLOCK or blocks.numel() != expected:
        raise ValueError(
            f"superblocks for {rows} x {width} elements have {expected} bytes; got {blocks.numel()}"
        )
    parts = blocks.reshape(rows, width // GGUF_BLOCK, 36)
    packed = parts[:, :, 4:].reshape(rows, -1, 4, GGUF_SUBBLOCK // 2)
    elements = torch.stack([packed & 0xF, packed >> 4], dim=3).reshape(rows, width)
    return pack_nibbles(elements), parts[:, :, :4].reshape(rows, -1).contiguous()
