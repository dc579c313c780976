"""What a call of `stage_mega_moe_inputs` costs the host, beside an empty launch of Triton.

The calls are issued one after the other without waiting for the device. The empty kernel takes as
many arguments as the staging kernel, of the same types, as anyone launches a kernel of Triton. A
staging call may cost less: tensors like those of an earlier call go straight to what was compiled.
May be changed: the shape that is staged, which should keep the GPU less busy than the host.
"""

from __future__ import annotations

import functools

import torch

from nvfp4lab.benchmarks.inputs import Settings, staging_sets
from nvfp4lab.benchmarks.results import Sample
from nvfp4lab.benchmarks.staging import stage_set, stageable
from nvfp4lab.benchmarks.steps import Measured, Step
from nvfp4lab.benchmarks.timing import time_issuing
from nvfp4lab.kernels import yardstick

PART = "host"
TOKENS, WIDTH = 1, 7168
CALLS = 500  # in flight at once; a stream takes 1024


def steps(settings: Settings) -> list[Step]:
    """One step: every recipe and the empty launch in turns."""
    return [Step("host overhead", functools.partial(_issue, settings))]


def _issue(settings: Settings) -> Measured:
    buffers = staging_sets(TOKENS, WIDTH, settings, l2_bytes=1, device="cuda")[0]
    recipes = stageable()
    calls = [functools.partial(yardstick.launch_empty, *vars(buffers).values())]
    calls += [functools.partial(stage_set, buffers, *recipe) for recipe in recipes.items()]
    taken = time_issuing(calls, max(settings.runs, 5), CALLS)
    empty = Sample(PART, "empty launch", TOKENS, WIDTH, taken[0], role="yardstick")
    staged = (
        Sample(PART, name, TOKENS, WIDTH, runs)
        for name, runs in zip(recipes, taken[1:], strict=True)
    )
    torch.cuda.synchronize()
    return Measured((empty, *staged))
