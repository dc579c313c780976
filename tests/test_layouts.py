"""Each layout against its definition written as a loop, and against its inverse."""

import pytest
import torch

from nvfp4lab import layouts


def random_bytes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


SHAPES = [(1, 4), (3, 8), (128, 4), (129, 12), (300, 40)]


def test_nibbles_put_the_even_element_low():
    codes = torch.tensor([[0x1, 0x2, 0xF, 0x0]], dtype=torch.uint8)
    assert layouts.pack_nibbles(codes).tolist() == [[0x21, 0x0F]]


def test_nibbles_round_trip():
    packed = random_bytes(5, 7, 16)
    assert layouts.pack_nibbles(layouts.unpack_nibbles(packed)).equal(packed)


def test_word_holds_block_k_at_bits_8_times_k_mod_4():
    scales = torch.tensor([[1, 2, 3, 0x7E, 5, 6, 7, 8]], dtype=torch.uint8)
    assert layouts.to_words(scales).tolist() == [[0x7E030201, 0x08070605]]


@pytest.mark.parametrize("shape", SHAPES)
def test_words_round_trip(shape):
    scales = random_bytes(*shape)
    assert layouts.from_words(layouts.to_words(scales)).equal(scales)


@pytest.mark.parametrize("shape", [*SHAPES, (5, 3), (130, 37)])
def test_tiles_follow_the_offset_formula(shape):
    rows, columns = shape
    scales = random_bytes(rows, columns)
    tiles = layouts.to_tiles(scales)
    flat, tiles_wide = tiles.flatten().tolist(), tiles.shape[1] // 4
    for row in range(rows):
        for column in range(columns):
            tile = row // 128 * tiles_wide + column // 4
            offset = row % 32 * 16 + row % 128 // 32 * 4 + column % 4
            assert flat[tile * 512 + offset] == scales[row, column]


@pytest.mark.parametrize("shape", [*SHAPES, (5, 3), (130, 37)])
def test_tiles_round_trip_and_pad_with_zeros(shape):
    scales = random_bytes(*shape) | 1
    tiles = layouts.to_tiles(scales)
    assert layouts.from_tiles(tiles.flatten(), *shape).equal(scales)
    assert int((tiles != 0).sum()) == scales.numel()


@pytest.mark.parametrize("shape", SHAPES)
def test_mn_major_follows_the_row_permutation(shape):
    scales = random_bytes(*shape)
    words, placed = layouts.to_words(scales), layouts.to_mn_major(scales)
    for row in range(shape[0]):
        position = row // 128 * 128 + row % 32 * 4 + row % 128 // 32
        assert placed[:, position].tolist() == words[row].tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_mn_major_round_trip(shape):
    scales = random_bytes(*shape)
    assert layouts.from_mn_major(layouts.to_mn_major(scales), shape[0]).equal(scales)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layouts.to_words(random_bytes(2, 6)), "words hold 4 blocks; got 6 blocks"),
        (lambda: layouts.from_tiles(random_bytes(12), 3, 4), "have 512 bytes; got 12"),
        (
            lambda: layouts.from_mn_major(torch.zeros(2, 100, dtype=torch.int32), 100),
            r"have shape \(W, 128\); got \(2, 100\)",
        ),
    ],
)
def test_sizes_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
