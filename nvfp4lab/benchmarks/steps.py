"""Step: one piece of a benchmark that is run on its own, and what it gives.

What every part's module gives `running`. May be changed: the cases that `for_every_case` makes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nvfp4lab.benchmarks.inputs import Settings
from nvfp4lab.benchmarks.results import Sample

CHECKED_ROWS = 32  # of what was timed, held against the CPU


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


def for_every_case(
    part: str, race: Callable[[int, int, Settings], Measured], settings: Settings
) -> list[Step]:
    """One step, race(tokens, width, settings), for each width and number of tokens."""
    return [
        Step(f"{part} {tokens} x {width}", functools.partial(race, tokens, width, settings))
        for width in settings.widths
        for tokens in settings.tokens
    ]
