"""run: the parts of the benchmark that were asked for, one step after the other, in one Result.

A part is a module with `steps(settings)`; to add one, name it in PARTS (and in `cli.bench`, which
does not import this to be quick).
"""

from __future__ import annotations

import gc
import importlib
from collections.abc import Sequence
from dataclasses import asdict

import torch
from tqdm import tqdm

from nvfp4lab.benchmarks.inputs import INPUTS, PAST_L2, Settings
from nvfp4lab.benchmarks.machine import describe
from nvfp4lab.benchmarks.results import Result
from nvfp4lab.benchmarks.steps import Step

PARTS = ("staging", "dequantize", "measure", "host", "cpu")  # a module each
ON_CPU = ("cpu",)


def run(
    only: Sequence[str] = PARTS, settings: Settings | None = None, progress: bool = True
) -> Result:
    """Run the parts. Without a CUDA device those that need one are left out, by name.

    A step that fails is named in `Result.failed`, and the others go on.

    Raises: ValueError for an unknown part.
    """
    if unknown := sorted(set(only) - set(PARTS)):
        raise ValueError(f"unknown parts {unknown}; there are {', '.join(PARTS)}")
    settings = settings or Settings()
    left_out: list[str] = []
    steps: list[Step] = []
    for part in PARTS:
        if part not in only:
            continue
        if part not in ON_CPU and not torch.cuda.is_available():
            left_out.append(f"{part}: no CUDA device")
        else:
            steps += importlib.import_module(f"nvfp4lab.benchmarks.{part}").steps(settings)
    return run_steps(steps, settings, only, left_out, progress)


def run_steps(
    steps: Sequence[Step],
    settings: Settings,
    only: Sequence[str],
    left_out: Sequence[str] = (),
    progress: bool = True,
) -> Result:
    """The steps one after the other; only, left_out: the parts that they are of, and are not."""
    left_out, failed, samples, swept = list(left_out), [], [], []
    machine = describe()
    bar = tqdm(steps, disable=not progress, unit="step", dynamic_ncols=True)
    for step in bar:
        bar.set_description(step.label)
        try:
            measured = step.run()
        except (RuntimeError, ValueError, TypeError) as error:
            failed.append(f"{step.label}: {type(error).__name__}: {error}")
            continue
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        samples += measured.samples
        swept += measured.sweep
        left_out += measured.left_out
    described = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()}
    described |= {"only": list(only), "inputs": INPUTS, "past_l2": PAST_L2}
    return Result(machine, described, tuple(samples), tuple(swept), tuple(left_out), tuple(failed))
