"""`measure` of a recipe on a GPU, beside the same in torch eager.

By the wall clock, the device waited for: what a caller waits until the statistics are there.
"""

from __future__ import annotations

import functools

import torch

from nvfp4lab.benchmarks.inputs import Settings, random_activations
from nvfp4lab.benchmarks.results import Sample
from nvfp4lab.benchmarks.steps import Measured, Step
from nvfp4lab.benchmarks.timing import time_calls
from nvfp4lab.errors import measure

PART = "measure"
RECIPES = ("nvfp4", "nvfp4-token", "vllm-megamoe", "seed")


def steps(settings: Settings) -> list[Step]:
    """One step a recipe."""
    return [Step(f"measure {name}", functools.partial(_time, name, settings)) for name in RECIPES]


def _time(name: str, settings: Settings) -> Measured:
    tokens, width = settings.measured
    x = random_activations(tokens, width, settings.seed, "cuda")
    (runs,) = time_calls(
        [functools.partial(measure, x, name)],
        settings.runs,
        settings.run_seconds,
        torch.cuda.synchronize,
    )
    return Measured((Sample(PART, name, tokens, width, runs, x.nbytes),))
