"""What a worker does: some rows of one file, under one recipe, to `Statistics`.

A task is a path, rows and a recipe, never an array; the worker opens the file, reads just these
rows, and drops the file again, so that memory stays small however large the shards are. GRID may
not be changed: results of stochastic rounding hang on it.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from nvfp4lab.codec import find_outer
from nvfp4lab.errors import measure_rows
from nvfp4lab.outer import OuterScale
from nvfp4lab.records import load_activations
from nvfp4lab.rules import Recipe
from nvfp4lab.statistics import Statistics
from nvfp4lab.sweeps.workers import worker_device

GRID = 256  # rows that share a seed of stochastic rounding; tasks are cut at its multiples only


class Largest(NamedTuple):
    """The largest finite magnitude of a site, and what else an outer scale for it must know."""

    amax: float
    has_nan: bool
    has_inf: bool

    def joined(self, other: Largest) -> Largest:
        """Of both."""
        nan, inf = self.has_nan or other.has_nan, self.has_inf or other.has_inf
        return Largest(max(self.amax, other.amax), nan, inf)

    def outer(self, recipe: Recipe) -> OuterScale:
        """The scale that the recipe finds for a BF16 tensor in which this is the largest."""
        stand_in = torch.zeros(3, recipe.scale.block, dtype=torch.bfloat16, device="cpu")
        stand_in[0, 0] = self.amax
        stand_in[1, 0] = math.nan if self.has_nan else 0.0
        stand_in[2, 0] = math.inf if self.has_inf else 0.0
        return find_outer(stand_in, recipe)


@dataclass(frozen=True)
class Task:
    """Rows start to stop of `hidden` in one file.

    recipe: None only to find the largest magnitude. largest: of the whole site, where the recipe
    has an outer scale for the tensor.
    """

    path: str
    label: str
    start: int
    stop: int
    width: int
    recipe: Recipe | None = None
    largest: Largest | None = None

    @property
    def elements(self) -> int:
        """How many elements the task measures."""
        return (self.stop - self.start) * self.width


def find_largest(task: Task) -> Largest:
    """Of the task's rows."""
    x = _rows(task)
    if not x.numel():
        return Largest(0.0, False, False)
    low, high = x.aminmax()  # NaN if one is there
    amax = max(-low.item(), high.item())
    if math.isfinite(amax):
        return Largest(abs(amax), False, False)
    amax = x.abs().where(x.isfinite(), 0.0).amax().item()
    return Largest(amax, bool(x.isnan().any()), bool(x.isinf().any()))


def measured(task: Task) -> Statistics:
    """The task's rows under its recipe, on the worker's own GPU if there is one.

    Stochastic rounding is seeded by the site, the name of the file and the place of the row in it,
    so what it gives depends neither on the executor nor on the order of tasks (but on the kind of
    device: CPUs and GPUs draw other numbers).
    """
    recipe, device = task.recipe, worker_device()
    assert recipe is not None
    x = _rows(task).to(device)
    outer = None
    if task.largest is not None:
        on_cpu = task.largest.outer(recipe)
        outer = OuterScale(*(p.to(device) for p in (on_cpu.decode, on_cpu.encode, on_cpu.amax)))
    if recipe.elements.rounding != "stochastic":
        return measure_rows(x, recipe, outer, None, task.path, task.start)
    total = Statistics.empty(recipe, task.width)
    for start in range(task.start, task.stop, GRID):
        generator = torch.Generator(device).manual_seed(_seed(task, start))
        rows = x[start - task.start : start - task.start + GRID]
        total += measure_rows(rows, recipe, outer, generator, task.path, start)
    return total


def _rows(task: Task) -> torch.Tensor:
    (record,) = load_activations(task.path)
    if record.hidden.shape[1] != task.width or len(record) < task.stop:
        raise ValueError(
            f"hidden is {tuple(record.hidden.shape)}, expected {task.stop} rows or more of "
            f"{task.width} elements: the file has changed since the sweep began"
        )
    return record.hidden[task.start : task.stop]


def _seed(task: Task, row: int) -> int:
    text = f"{task.label}/{Path(task.path).name}/{row}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
