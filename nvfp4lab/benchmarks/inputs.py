"""Random inputs, the sets of buffers that one case rotates over, and the bytes that it moves.

Nothing here is an activation of a model: each token is Gaussian numbers times a lognormal scale of
its own, so that block scales of every size occur. May be changed: the cases of `Settings`; other
numbers or buffers make results that are not to be compared with those in data/benchmarks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

INPUTS = "random numbers: N(0, 1) times exp(N(0, 1)) for each token, BF16"
EXPERTS = 256
PAST_L2 = 3  # all sets of a case together hold this many times the L2
APART = 256  # bytes: every buffer of every set starts on a multiple, as an allocation would
ROWS_AT_ONCE = 1 << 14


@dataclass(frozen=True)
class Settings:
    """Of one run. tokens, widths, top_k: of the cases. runs: of which the median counts.

    sweep_runs: of each shape of the yardstick. run_seconds: the least that one run of a case takes.
    seed: of the random numbers. measured, on_cpu: tokens and width that `measure` gets on a GPU and
    `quantize` on the CPU.
    """

    tokens: tuple[int, ...] = (1, 4, 16, 128, 1024, 8192, 32768)
    widths: tuple[int, ...] = (4096, 7168)
    top_k: int = 6
    runs: int = 5
    sweep_runs: int = 3
    run_seconds: float = 0.01
    seed: int = 7168
    measured: tuple[int, int] = (8192, 7168)
    on_cpu: tuple[int, int] = (2048, 7168)


QUICK = Settings(tokens=(1, 1024, 8192), widths=(7168,), runs=3, run_seconds=0.003)


def staging_bytes(tokens: int, width: int, top_k: int = 0, has_outer: bool = False) -> int:
    """Read and written by staging: 2 + 9/16 an element, 20 a routed expert, 4 an outer scale.

    An expert is int32 id and float32 weight in, int64 id and float32 weight out. Dequantizing to
    BF16 moves the same the other way, with top_k 0.
    """
    per_token = width * 2 + width // 2 + width // 16 + top_k * (4 + 4 + 8 + 4) + 4 * has_outer
    return tokens * per_token


def sets_past_l2(bytes_of_a_set: int, l2_bytes: int) -> int:
    """How many sets hold PAST_L2 times the L2; at least 2, so that no launch repeats the last."""
    return max(2, math.ceil(PAST_L2 * l2_bytes / bytes_of_a_set))


def rotating(
    count: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(all, each): `count` contiguous tensors of a shape, APART, and the memory of all of them."""
    size, step = math.prod(shape), APART // dtype.itemsize
    whole = torch.empty(count, math.ceil(size / step) * step, dtype=dtype, device=device)
    return whole, [piece[:size].view(shape) for piece in whole]


def fill_with_activations(x: torch.Tensor, seed: int) -> None:
    """Random numbers as INPUTS says into bfloat16 (tokens, width)."""
    generator = torch.Generator(x.device).manual_seed(seed)
    for rows in x.split(ROWS_AT_ONCE):
        scale = torch.randn(len(rows), 1, generator=generator, device=x.device).exp_()
        rows.copy_(torch.randn(rows.shape, generator=generator, device=x.device).mul_(scale))


def random_activations(
    tokens: int, width: int, seed: int, device: torch.device | str
) -> torch.Tensor:
    """bfloat16 (tokens, width) as INPUTS says."""
    x = torch.empty(tokens, width, dtype=torch.bfloat16, device=device)
    fill_with_activations(x, seed)
    return x


@dataclass(frozen=True, eq=False)
class StagingSet:
    """What one staging launch reads and writes, as `stage_mega_moe_inputs` names it."""

    hidden_states: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    x_fp4: torch.Tensor
    x_sf: torch.Tensor
    topk_idx_out: torch.Tensor
    topk_weights_out: torch.Tensor
    x_scales: torch.Tensor


def staging_sets(
    tokens: int, width: int, settings: Settings, l2_bytes: int, device: torch.device | str
) -> list[StagingSet]:
    """Enough sets to rotate past the L2, with inputs; no two share memory."""
    top_k = settings.top_k
    count = sets_past_l2(staging_bytes(tokens, width), l2_bytes)
    generator = torch.Generator(device).manual_seed(settings.seed)
    whole, hidden = rotating(count, (tokens, width), torch.bfloat16, device)
    fill_with_activations(whole.view(-1, width), settings.seed)
    whole, weights = rotating(count, (tokens, top_k), torch.float32, device)
    whole.uniform_(generator=generator)
    whole, ids = rotating(count, (tokens, top_k), torch.int32, device)
    whole.random_(0, EXPERTS, generator=generator)
    outputs = (
        rotating(count, shape, dtype, device)[1]
        for shape, dtype in (
            ((tokens, width // 2), torch.uint8),
            ((tokens, width // 64), torch.int32),
            ((tokens, top_k), torch.int64),
            ((tokens, top_k), torch.float32),
            ((tokens,), torch.float32),
        )
    )
    return [StagingSet(*one) for one in zip(hidden, weights, ids, *outputs, strict=True)]
