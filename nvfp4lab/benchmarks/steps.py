"""Step: one piece of a benchmark that is run on its own, and what it gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nvfp4lab.benchmarks.results import Sample


@dataclass(frozen=True)
class Measured:
    """samples, and sweep and left_out as `Result` has them."""

    samples: tuple[Sample, ...]
    sweep: tuple[dict[str, Any], ...] = ()
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """label: what the progress bar shows. run: does it; buffers live only while it runs."""

    label: str
    run: Callable[[], Measured]
