"""The properties of properties.py on as many blocks of any bits as are asked for, on a GPU.

    PYTHONPATH=. python tests/fuzz.py --blocks 1e9

prints, for each property, recipes, blocks that were looked at, and seconds; exits 1 with the first
blocks that break one. Not collected by pytest. May be changed: add a property to `PROPERTIES`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import properties
from kernel_runs import bit_patterns

import nvfp4lab as nv
from nvfp4lab.contract import STAGEABLE

WIDTH = 8192
BLOCKS = 1 << 21  # at a time
FINITE = 0x7F7F

Property = Callable[[nv.Recipe, int, int, str], int]


def on(holds: Callable[..., int], largest: int = FINITE) -> Property:
    def holds_of_rows(recipe: nv.Recipe, tokens: int, seed: int, device: str) -> int:
        return holds(recipe, bit_patterns(tokens, WIDTH, seed, largest, device))

    return holds_of_rows


def permuted(recipe: nv.Recipe, tokens: int, seed: int, device: str) -> int:
    x = bit_patterns(tokens, WIDTH, seed, FINITE, device)
    return properties.permuting_blocks_permutes_outputs(recipe, x, seed)


def scaled(recipe: nv.Recipe, tokens: int, seed: int, device: str) -> int:
    x = properties.moderate(tokens, WIDTH, seed, device)
    exponent = (-3, -2, -1, 1, 2, 3)[seed % 6]
    return properties.a_power_of_two_changes_only_scales(recipe, x, exponent)


PROPERTIES: dict[str, tuple[list[str], Property]] = {
    "the kernel gives the bytes of quantize": (
        list(STAGEABLE),
        on(properties.the_kernel_gives_the_bytes_of_quantize, 0x7FFF),
    ),
    "bytes are codes": (list(nv.recipes()), on(properties.bytes_are_codes)),
    "requantizing changes nothing": (
        [*properties.REQUANTIZED, *properties.REQUANTIZED_VALUES],
        on(properties.requantizing_changes_nothing),
    ),
    "permuting blocks permutes outputs": (properties.DRAWS_NOTHING, permuted),
    "a power of two changes only scales": (properties.DRAWS_NOTHING, scaled),
}
SLOW = {"nvfp4-search": 1 / 64}  # of the blocks that the others get


def main() -> int:
    parser = argparse.ArgumentParser(description="Properties of every recipe, on a GPU.")
    parser.add_argument("--blocks", type=float, default=1e9, help="for each property, all recipes")
    parser.add_argument("--only", nargs="+", help="words in the names of the properties")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    failed = 0
    for name, (recipes, holds) in PROPERTIES.items():
        if args.only and not any(word in name for word in args.only):
            continue
        started, looked_at = time.perf_counter(), 0
        for index, recipe in enumerate(map(nv.recipe, recipes)):
            share = args.blocks / len(recipes) * SLOW.get(recipe.name, 1)
            done, part = 0, 0
            while done < share:
                blocks = int(min(BLOCKS, max(4 * WIDTH, share - done)))
                tokens = -(-blocks * recipe.scale.block // WIDTH)
                done += tokens * WIDTH // recipe.scale.block
                try:
                    looked_at += holds(recipe, tokens, 100_000 * index + part, args.device)
                except AssertionError as error:
                    print(f"{name}: seed {100_000 * index + part}, {tokens} rows: {error}")
                    failed = 1
                    break
                part += 1
        seconds = time.perf_counter() - started
        print(f"{name}: {len(recipes)} recipes, {looked_at:,} blocks, {seconds:.0f} s", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
