"""What statistics and sweeps are tested with: how alike two are, small captures, and functions that
other processes import."""

from __future__ import annotations

import os
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

import nvfp4lab as nv
from nvfp4lab import records, sweeps
from nvfp4lab.statistics import Statistics
from nvfp4lab.sweeps import tasks

WIDTH = 64
QUIET: dict[str, Any] = {"progress": False}
RECIPES = ["nvfp4", "nvfp4-tensor", "nvfp4-token", "nvfp4-stochastic", "transformer-engine"]
EXACT = [f.name for f in fields(Statistics) if not f.name.startswith(("sum_", "channel_"))]
EXACT = [n for n in EXACT if n not in ("amax_xx", "amax_ee", "quotient_e", "quotient_ee", "worst")]
SIZES = {  # the sum of magnitudes that each sum is held against
    "sum_xq": "sum_xx",
    "sum_e": "sum_abs_e",
    "quotient_e": "quotient_elements",
    "channel_xq": "channel_xx",
}


def same(a: Statistics, b: Statistics) -> bool:
    """Counts, histograms, largest values and worst blocks to the bit; sums to 1e-12."""
    exact = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in EXACT)
    worst = all(a.worst[n].tobytes() == b.worst[n].tobytes() for n in a.worst)
    sums = [f.name for f in fields(a) if f.name not in EXACT and f.name != "worst"]
    sizes = {name: np.abs(getattr(b, SIZES.get(name, name))) for name in sums}
    largest = np.sqrt(b.quotient_elements * b.quotient_ee)  # in an open bin more than 1 each
    sizes["quotient_e"] = np.maximum(sizes["quotient_e"], largest)
    close = all(
        (np.abs(getattr(a, name) - getattr(b, name)) <= 1e-12 * sizes[name]).all() for name in sums
    )
    return exact and worst and close


def alike(a: sweeps.Swept, b: sweeps.Swept) -> bool:
    """All statistics to the bit; on a GPU, which adds in no fixed order, as `same`."""
    if not torch.cuda.is_available():
        return a.statistics == b.statistics
    pairs = [(a.statistics[key], b.statistics[key]) for key in a.statistics]
    return a.statistics.keys() == b.statistics.keys() and all(same(x, y) for x, y in pairs)


def swept(*arguments, **options) -> sweeps.Swept:
    """sweep_statistics without a bar."""
    return nv.sweep_statistics(*arguments, **(QUIET | options))


def fail_on_rows(monkeypatch, start: int) -> None:
    """The rows of layer00.a that begin there cannot be read."""
    rows_of = tasks._rows

    def failing(task: tasks.Task) -> torch.Tensor:
        if task.path.endswith("layer00.a.safetensors") and task.start == start:
            raise MemoryError("none left")
        return rows_of(task)

    monkeypatch.setattr(tasks, "_rows", failing)


def hidden(rows: int, seed: int, scale: float = 1.0, width: int = WIDTH) -> torch.Tensor:
    """Gaussian rows over many binades."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator) * scale
    x *= 2.0 ** torch.randint(-12, 8, (rows, 1), generator=generator)
    return x.bfloat16()


def save(path: Path, x: torch.Tensor, layer: int = 0, site: str = "mlp_input") -> Path:
    record = records.Activations(x, torch.arange(len(x)), layer, site, {"is": "a test"})
    records.save_activations(path, record)
    return path


def capture(folder: Path) -> Path:
    """Two layers, the first of two shards, the second with a NaN and an Inf; no capture.json."""
    folder.mkdir()
    poisoned = hidden(520, 2)
    poisoned[100, 5], poisoned[300, 20] = float("nan"), float("inf")
    save(folder / "layer00.a.safetensors", hidden(700, 0, scale=4.0))
    save(folder / "layer00.b.safetensors", hidden(300, 1))
    save(folder / "layer01.a.safetensors", poisoned, layer=1)
    return folder


def double(number: int) -> int:
    return 2 * number


def fragile(number: int) -> int:
    """Twice the number, but -1 is an error, -2 kills its process, and -3 does after a while."""
    if number == -1:
        raise ValueError("minus one")
    if number in (-2, -3):
        time.sleep(0.2 * (number == -3))
        os._exit(1)
    return 2 * number


def die_on_layer01() -> None:
    """Makes this process one that dies over layer 1."""
    rows_of = tasks._rows

    def deadly(task: tasks.Task) -> torch.Tensor:
        if task.label.startswith("layer01"):
            os._exit(1)
        return rows_of(task)

    tasks._rows = deadly
