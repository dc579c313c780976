"""The kernels that are compiled without a GPU, each by a call of its own launcher.

A row's `launch` calls the launcher as it would be called on a GPU, with tensors that lie on the CPU
and are never touched; signature, constants, alignment, warps and grid are then the launcher's. To
count another kernel, add a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

TOKENS, WIDTH, TOP_K = 8192, 7168, 6


@dataclass(frozen=True)
class Kernel:
    """module: that holds the launcher. launch: calls it. elements: of the tensor that the call
    works on. trips: of every loop that is left in the compiled code, 0 where there is none."""

    module: str
    launch: Callable[[ModuleType], Any]
    elements: int = TOKENS * WIDTH
    trips: int = 0


def _stage(module: ModuleType, has_outer: bool = False) -> None:
    x_scales = torch.empty(TOKENS) if has_outer else None
    module.launch(*_staging_buffers(), x_scales, None)


def _seed(module: ModuleType) -> None:
    module._stage_deepseek_v4_mega_moe_inputs(*_staging_buffers())


def _yardstick(module: ModuleType, up: bool) -> None:
    groups = TOKENS * WIDTH // 64
    x, codes, scales = (
        torch.empty(shape, dtype=torch.int32) for shape in ((groups, 32), (groups, 8), (groups,))
    )
    shape = module.Shape(vector=4, warps=4, times=2)
    if up:
        module.launch_up(codes, scales, x, shape)
    else:
        module.launch_down(x, codes, scales, shape)


def _empty(module: ModuleType) -> None:
    module.launch_empty(*_staging_buffers())


def _staging_buffers() -> tuple[torch.Tensor, ...]:
    """As `stage_mega_moe_inputs` takes them, contiguous, int32 ids and float32 weights."""
    return (
        torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16),
        torch.empty(TOKENS, TOP_K),
        torch.empty(TOKENS, TOP_K, dtype=torch.int32),
        torch.empty(TOKENS, WIDTH // 2, dtype=torch.uint8),
        torch.empty(TOKENS, WIDTH // 64, dtype=torch.int32),
        torch.empty(TOKENS, TOP_K, dtype=torch.int64),
        torch.empty(TOKENS, TOP_K),
    )


KERNELS = {
    "nvfp4": Kernel("nvfp4lab.kernels.staging", _stage),
    "nvfp4-token": Kernel(
        "nvfp4lab.kernels.staging", functools.partial(_stage, has_outer=True), trips=4
    ),
    "seed": Kernel("nvfp4lab.kernels.seed", _seed),
    "yardstick-down": Kernel("nvfp4lab.kernels.yardstick", functools.partial(_yardstick, up=False)),
    "empty": Kernel("nvfp4lab.kernels.yardstick", _empty, elements=128),
    "yardstick-up": Kernel("nvfp4lab.kernels.yardstick", functools.partial(_yardstick, up=True)),
}
