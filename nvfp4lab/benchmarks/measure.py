"""`measure` of a recipe on a GPU, beside the same counted in torch eager.

By the wall clock, the device waited for: what a caller waits until the statistics are there. May be
changed: RECIPES.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch

from nvfp4lab.benchmarks.inputs import Settings, random_activations
from nvfp4lab.benchmarks.results import Sample
from nvfp4lab.benchmarks.steps import Measured, Step
from nvfp4lab.benchmarks.timing import time_calls
from nvfp4lab.errors import measure
from nvfp4lab.statistics import Statistics

PART = "measure"
RECIPES = ("nvfp4", "nvfp4-token", "vllm-megamoe", "seed")
KERNEL = "nvfp4lab.statistics.in_triton"  # which says what it takes; torch counts the rest


def steps(settings: Settings) -> list[Step]:
    """One step a recipe."""
    return [Step(f"measure {name}", functools.partial(_time, name, settings)) for name in RECIPES]


@contextlib.contextmanager
def without_kernel() -> Iterator[None]:
    """Inside, `measure` counts in torch, as it does where the kernel takes nothing."""
    kernel: Any = importlib.import_module(KERNEL)
    takes = kernel.takes
    kernel.takes = lambda recipe, device: False
    try:
        yield
    finally:
        kernel.takes = takes


def measure_in_torch(x: torch.Tensor, recipe: str) -> Statistics:
    """`measure` in torch eager, on the device of x."""
    with without_kernel():
        return measure(x, recipe)


def _time(name: str, settings: Settings) -> Measured:
    tokens, width = settings.measured
    x = random_activations(tokens, width, settings.seed, "cuda")
    calls = [functools.partial(measure, x, name)]
    if importlib.util.find_spec(KERNEL):
        calls.append(functools.partial(measure_in_torch, x, name))
    taken = time_calls(calls, settings.runs, settings.run_seconds, torch.cuda.synchronize)
    samples = [Sample(PART, name, tokens, width, taken[0], x.nbytes, group=name)]
    for runs in taken[1:]:
        eager = f"{name} in torch eager"
        samples.append(Sample(PART, eager, tokens, width, runs, x.nbytes, "reference", group=name))
    return Measured(tuple(samples))
