"""`stage_mega_moe_inputs` on a GPU: every recipe with a staging kernel, the seed, the yardstick.

All of a case's rivals work on the same buffers in one race. What they wrote is held against
`quantize` afterwards: a kernel that is fast because it does something else is not measured. To race
another kernel, hand it in as a `Peer`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from nvfp4lab import catalogue, layouts
from nvfp4lab.benchmarks.inputs import Settings, StagingSet, staging_bytes, staging_sets
from nvfp4lab.benchmarks.results import Sample
from nvfp4lab.benchmarks.steps import CHECKED_ROWS, Measured, Step, for_every_case
from nvfp4lab.benchmarks.sweep import sweep
from nvfp4lab.benchmarks.timing import capture, time_graphs
from nvfp4lab.codec import quantize
from nvfp4lab.contract import STAGEABLE
from nvfp4lab.kernels import yardstick
from nvfp4lab.staging import stage_mega_moe_inputs

PART = "staging"
SEED = "seed"


def steps(settings: Settings) -> list[Step]:
    """One step for each width and number of tokens."""
    return for_every_case(PART, race, settings)


def stageable() -> dict[str, bool]:
    """The recipes that `stage` takes: name -> whether it has an outer scale for each token."""
    names = [name for name in catalogue.recipes() if name in STAGEABLE]
    return {name: catalogue.recipe(name).outer_per == "token" for name in names}


def stage_set(buffers: StagingSet, recipe: str, has_outer: bool) -> None:
    """One launch over one set."""
    stage_mega_moe_inputs(
        buffers.hidden_states,
        buffers.topk_weights,
        buffers.topk_ids,
        buffers.x_fp4,
        buffers.x_sf,
        buffers.topk_idx_out,
        buffers.topk_weights_out,
        x_scales=buffers.x_scales if has_outer else None,
        recipe=recipe,
    )


def check_written(buffers: StagingSet, recipe: str) -> None:
    """Raises: RuntimeError unless the first rows hold what `quantize` gives, top-k included."""
    first = {name: tensor[:CHECKED_ROWS].cpu() for name, tensor in vars(buffers).items()}
    q = quantize(first["hidden_states"], recipe)
    expected = {
        "x_fp4": q.codes,
        "x_sf": layouts.to_words(q.scales),
        "topk_idx_out": first["topk_ids"].long(),
        "topk_weights_out": first["topk_weights"],
    }
    if q.outer is not None:
        expected["x_scales"] = q.outer[:, 0]
    wrong = [name for name, tensor in expected.items() if not torch.equal(first[name], tensor)]
    if wrong:
        raise RuntimeError(f"{recipe} was timed, but wrote other {' and '.join(wrong)}")


@dataclass(frozen=True)
class Peer:
    """Another kernel that writes one of our recipes: `launch` stages one set."""

    recipe: str
    launch: Callable[[StagingSet], object]
    has_outer: bool


def race(
    tokens: int, width: int, settings: Settings, peers: Mapping[str, Peer] | None = None
) -> Measured:
    """Every recipe with a kernel, the yardstick, and other kernels by name, on the same buffers."""
    device = torch.device("cuda")
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    sets = staging_sets(tokens, width, settings, l2_bytes, device)
    words = [
        tuple(t.view(torch.int32).view(shape) for t, shape in zip(
            (s.hidden_states, s.x_fp4, s.x_sf), ((-1, 32), (-1, 8), (-1,)), strict=True))
        for s in sets
    ]  # fmt: skip
    swept = sweep(
        lambda shape: [functools.partial(yardstick.launch_down, *w, shape) for w in words],
        "2 bytes in, 9/16 out",
        tokens,
        width,
        settings,
    )
    rivals = {
        name: Peer(name, functools.partial(stage_set, recipe=name, has_outer=has_outer), has_outer)
        for name, has_outer in stageable().items()
    } | dict(peers or {})
    graphs = {
        name: capture([functools.partial(rival.launch, s) for s in sets])
        for name, rival in rivals.items()
    }
    times = time_graphs([*swept.graphs, *graphs.values()], settings.runs, settings.run_seconds)
    moved = staging_bytes(tokens, width)
    yard = swept.fastest(times[: len(swept.graphs)], PART, tokens, width, moved)
    samples = [yard]
    for (name, rival), runs in zip(rivals.items(), times[len(swept.graphs) :], strict=True):
        moved = staging_bytes(tokens, width, settings.top_k, rival.has_outer)
        role = "reference" if name == SEED else "measured"
        samples.append(Sample(PART, name, tokens, width, runs, moved, role))
        graphs[name].graph.replay()
        check_written(sets[-1], rival.recipe)
    return Measured(tuple(samples), swept.rows)
