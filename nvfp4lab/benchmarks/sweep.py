"""The yardstick's own best shape for a case: shapes are tried, the best few go on to the race.

The few are timed again beside what they are a yardstick for, and the fastest of them counts, so
that it is neither the luck of one measurement nor a shape that was good in other company. To try
another shape, widen SHAPES.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from nvfp4lab.benchmarks.inputs import Settings
from nvfp4lab.benchmarks.results import Sample
from nvfp4lab.benchmarks.timing import Call, Graph, capture, time_graphs
from nvfp4lab.kernels.yardstick import Shape

SHAPES = tuple(
    Shape(vector, warps, times, streaming)
    for vector in (1, 2, 4)
    for warps in (1, 2, 4, 8)
    for times in (1, 2, 4)
    for streaming in (False, True)[: 1 + (vector == 4)]
)
SMALL = 2048  # elements of a program that is no hindrance to any case
FINALISTS = 3


def worth_trying(elements: int, multiprocessors: int) -> list[Shape]:
    """The shapes that keep a GPU busy: programs that are small, or as many as multiprocessors;
    and that are not so small that more than 64 waves of them pass."""
    share = elements // multiprocessors
    return [s for s in SHAPES if min(SMALL, share // 64) <= s.elements <= max(SMALL, share)]


@dataclass(frozen=True, eq=False)
class Swept:
    """rows: of the sweep, as `Result` has them. shapes, graphs: the finalists, fastest first."""

    rows: tuple[dict[str, Any], ...]
    shapes: tuple[Shape, ...]
    graphs: tuple[Graph, ...]

    def fastest(
        self, times: Sequence[tuple[float, ...]], part: str, tokens: int, width: int, moved: int
    ) -> Sample:
        """The finalist with the smallest median among `times`, the finalists' runs in the race."""
        at = min(range(len(times)), key=lambda i: statistics.median(times[i]))
        shape = self.shapes[at]
        note = f"{shape.elements} elements a program, " + ", ".join(
            f"{name} {value}" for name, value in asdict(shape).items()
        )
        return Sample(part, "yardstick", tokens, width, times[at], moved, "yardstick", note)


def sweep(
    calls_of: Callable[[Shape], Sequence[Call]],
    direction: str,
    tokens: int,
    width: int,
    settings: Settings,
) -> Swept:
    """Time the shapes; calls_of gives a shape's launches, one for each set of buffers."""
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    shapes = worth_trying(tokens * width, multiprocessors)
    graphs = [capture(calls_of(shape)) for shape in shapes]
    times = time_graphs(graphs, settings.sweep_runs, settings.run_seconds / 2)
    medians = [statistics.median(runs) for runs in times]
    case = {"direction": direction, "tokens": tokens, "width": width}
    rows = tuple(
        case | asdict(shape) | {"elements": shape.elements, "us": us}
        for shape, us in zip(shapes, medians, strict=True)
    )
    order = sorted(range(len(shapes)), key=medians.__getitem__)[:FINALISTS]
    return Swept(rows, tuple(shapes[i] for i in order), tuple(graphs[i] for i in order))
