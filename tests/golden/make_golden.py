"""Writes the golden bytes: what every stageable recipe must give on the shipped activations.

They come from `tests/oracles.py`, which shares no code with the package, so a golden file is not
yesterday's output of the code under test. One file a set and recipe, keys `LABEL.codes` (uint8
[T, K / 2]), `LABEL.scales` (uint8 [T, K / 16]) and, with an outer scale, `LABEL.outer` ([T, 1]).

    python tests/golden/make_golden.py
"""

import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
import oracles

import nvfp4lab as nv

HERE = Path(__file__).parent
SETS = ("smollm2", "v4-mini")
RECIPES = ("nvfp4", "nvfp4-token", "seed")


def golden_path(name: str, recipe: str) -> Path:
    return HERE / f"{name}.{recipe}.safetensors"


def oracle_bytes(hidden: np.ndarray, recipe: str) -> dict[str, np.ndarray]:
    """float32 [T, K] -> the golden arrays of one site."""
    codes, scales, outer = oracles.quantize(recipe, hidden)
    parts = {"codes": codes[..., ::2] | codes[..., 1::2] << 4, "scales": scales}
    return parts if outer is None else parts | {"outer": outer}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def main() -> None:
    for name in SETS:
        for recipe in RECIPES:
            arrays = {
                f"{site.label}.{part}": np.ascontiguousarray(array)
                for site in nv.activations(name)
                for part, array in oracle_bytes(site.hidden.float().numpy(), recipe).items()
            }
            path = golden_path(name, recipe)
            if path.exists() and same(load_file(path), arrays):
                print(f"{path.name}: unchanged")
                continue
            save_file(arrays, path, metadata={"set": name, "recipe": recipe, "from": "oracles.py"})
            print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
