"""Medians of a call's time: replays of CUDA graphs, taken in turns; the wall clock.

A graph holds one launch a set of buffers, over and over until it holds LAUNCHES, so that two
launches in a row touch different memory and the pause between two replays does not count. Rivals
are replayed in turns, run by run, so that a drift of the clocks meets all of them. Knows nothing of
what it times. May be changed: LAUNCHES, if a graph's own start is to count less.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

LAUNCHES = 64  # of a graph, at the least
US = 1e6
SHORTEST = 1e-8  # seconds: less is the clock's grain
DIGITS = 4  # of microseconds, which is 0.1 ns

Call = Callable[[], object]


class CannotCapture(RuntimeError):
    """A call that waits for the device or copies from the host cannot stand in a CUDA graph."""


@dataclass(frozen=True, eq=False)
class Graph:
    """A captured run of launches. kept: what the calls returned, which the graph writes into."""

    graph: torch.cuda.CUDAGraph
    launches: int
    kept: Sequence[object]


def capture(calls: Sequence[Call]) -> Graph:
    """A graph that makes the calls in turn, all of them the same number of times.

    What the calls return is kept for one turn, so that what they allocate rotates as they do.

    Raises: CannotCapture.
    """
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    kept: deque[object] = deque(maxlen=len(calls))
    graph, turns = torch.cuda.CUDAGraph(), math.ceil(LAUNCHES / len(calls))
    with torch.cuda.stream(stream):
        calls[0]()  # compiles, fills caches: every set of buffers is aligned as the first
        stream.synchronize()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for call in itertools.chain.from_iterable([calls] * turns):
                kept.append(call())
        except Exception as error:
            with contextlib.suppress(RuntimeError):  # the same failure, told again
                graph.capture_end()
            if isinstance(error, RuntimeError):
                raise CannotCapture(str(error).splitlines()[0]) from error
            raise
        graph.capture_end()
    return Graph(graph, turns * len(calls), list(kept))


def time_graphs(graphs: Sequence[Graph], runs: int, run_seconds: float) -> list[tuple[float, ...]]:
    """Microseconds of one launch of each graph, a number a run; the graphs take turns."""
    replays = []
    for graph in graphs:
        graph.graph.replay()  # uploads it
        once = _replay(graph, 1) * graph.launches / US
        replays.append(max(1, math.ceil(run_seconds / max(once, SHORTEST))))
    taken = [[_replay(g, n) for g, n in zip(graphs, replays, strict=True)] for _ in range(runs)]
    return list(zip(*taken, strict=True))


def _replay(graph: Graph, replays: int) -> float:
    """Microseconds of a launch, over so many replays."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.graph.replay()
    end.record()
    end.synchronize()
    return round(start.elapsed_time(end) * 1e3 / (replays * graph.launches), DIGITS)


def time_calls(
    calls: Sequence[Call], runs: int, run_seconds: float, wait: Call = lambda: None
) -> list[tuple[float, ...]]:
    """Microseconds of each call by the wall clock, a number a run; the calls take turns.

    wait: called before the clock starts and before it stops, for work that goes on elsewhere.
    """
    repeats = []
    for call in calls:
        call()
        once = _wall(call, 1, wait) / US
        repeats.append(max(1, math.ceil(run_seconds / max(once, SHORTEST))))
    taken = [[_wall(c, n, wait) for c, n in zip(calls, repeats, strict=True)] for _ in range(runs)]
    return list(zip(*taken, strict=True))


def _wall(call: Call, repeats: int, wait: Call) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return round((time.perf_counter() - start) * US / repeats, DIGITS)


def time_issuing(calls: Sequence[Call], runs: int, count: int) -> list[tuple[float, ...]]:
    """Microseconds of the host for each call on a GPU, which is not waited for within a run.

    count: calls of a run, fewer than a stream takes in before it makes the host wait (1024).
    """
    for call in calls:
        call()

    def issue(call: Call) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            call()
        return round((time.perf_counter() - start) * US / count, DIGITS)

    taken = [[issue(call) for call in calls] for _ in range(runs)]
    torch.cuda.synchronize()
    return list(zip(*taken, strict=True))
