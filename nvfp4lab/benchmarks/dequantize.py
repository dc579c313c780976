"""`Quantized.dequantize` to BF16 on a GPU, beside a yardstick that moves the same bytes.

Codes and scales are random bytes, scales positive normal E4M3 numbers; what is decoded is held
against the CPU. A path that cannot stand in a CUDA graph is timed by the wall clock, and says so.
May be changed: RECIPES, of which one has an outer scale and one has none.
"""

from __future__ import annotations

import functools

import torch

from nvfp4lab import catalogue
from nvfp4lab.benchmarks.inputs import Settings, rotating, sets_past_l2, staging_bytes
from nvfp4lab.benchmarks.results import Sample
from nvfp4lab.benchmarks.steps import CHECKED_ROWS, Measured, Step, for_every_case
from nvfp4lab.benchmarks.sweep import sweep
from nvfp4lab.benchmarks.timing import CannotCapture, capture, time_calls, time_graphs
from nvfp4lab.kernels import yardstick
from nvfp4lab.quantized import Quantized

PART = "dequantize"
RECIPES = ("nvfp4", "nvfp4-token")


def steps(settings: Settings) -> list[Step]:
    """One step for each width and number of tokens."""
    return for_every_case(PART, _race, settings)


def random_sets(
    count: int, tokens: int, width: int, recipe: str, seed: int, device: torch.device | str
) -> list[Quantized]:
    """Sets of random codes, normal scales and, where the recipe has one, outer scales below 1."""
    generator = torch.Generator(device).manual_seed(seed)
    rule = catalogue.recipe(recipe)
    whole, codes = rotating(count, (tokens, width // 2), torch.uint8, device)
    whole.random_(0, 0x100, generator=generator)
    whole, scales = rotating(count, (tokens, width // 16), torch.uint8, device)
    whole.random_(0x08, 0x7F, generator=generator)
    outers: list[torch.Tensor | None] = [None] * count
    if rule.outer is not None:
        whole, outers[:] = rotating(count, (tokens, 1), torch.float32, device)
        whole.random_(-8, 0, generator=generator).exp2_()
    return [Quantized(*one, rule) for one in zip(codes, scales, outers, strict=True)]


def check_decoded(q: Quantized, decoded: torch.Tensor) -> None:
    """Raises: RuntimeError unless the first rows are what the CPU decodes."""
    rows = slice(0, CHECKED_ROWS)
    outer = None if q.outer is None else q.outer[rows].cpu()
    on_cpu = Quantized(q.codes[rows].cpu(), q.scales[rows].cpu(), outer, q.recipe)
    if not torch.equal(decoded[rows].cpu(), on_cpu.dequantize(torch.bfloat16)):
        raise RuntimeError(f"{q.recipe.name} was timed, but decoded other numbers than the CPU")


def _race(tokens: int, width: int, settings: Settings) -> Measured:
    device = torch.device("cuda")
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    count = sets_past_l2(staging_bytes(tokens, width), l2_bytes)
    sets = {
        name: random_sets(count, tokens, width, name, settings.seed, device) for name in RECIPES
    }
    _, out = rotating(count, (tokens * width // 64, 32), torch.int32, device)
    words = [
        (q.codes.view(torch.int32).view(-1, 8), q.scales.view(torch.int32).view(-1), y)
        for q, y in zip(sets[RECIPES[0]], out, strict=True)
    ]
    swept = sweep(
        lambda shape: [functools.partial(yardstick.launch_up, *w, shape) for w in words],
        "9/16 bytes in, 2 out",
        tokens,
        width,
        settings,
    )
    graphs, by_clock = {}, {}
    for name, quantized in sets.items():
        calls = [functools.partial(q.dequantize, torch.bfloat16) for q in quantized]
        try:
            graphs[name] = capture(calls)
        except CannotCapture as error:
            runs = time_calls(
                calls[:1], settings.runs, settings.run_seconds, torch.cuda.synchronize
            )
            by_clock[name] = runs[0], f"by the wall clock, it stands in no CUDA graph: {error}"
    times = time_graphs([*swept.graphs, *graphs.values()], settings.runs, settings.run_seconds)
    finalists = len(swept.graphs)
    moved = staging_bytes(tokens, width)
    samples = [swept.fastest(times[:finalists], PART, tokens, width, moved)]
    raced = {
        name: (runs, "") for name, runs in zip(graphs, times[finalists:], strict=True)
    } | by_clock
    for name, (runs, note) in raced.items():
        q = sets[name][-1]
        moved = staging_bytes(tokens, width, has_outer=q.outer is not None)
        samples.append(Sample(PART, name, tokens, width, runs, moved, note=note))
        if name in graphs:
            graphs[name].graph.replay()
            decoded = graphs[name].kept[-1]
        else:
            decoded = q.dequantize(torch.bfloat16)
        assert isinstance(decoded, torch.Tensor)
        check_decoded(q, decoded)
    return Measured(tuple(samples), swept.rows)
