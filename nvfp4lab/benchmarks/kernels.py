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


def _stage(module: ModuleType, recipe: str, has_outer: bool = False, aligned: bool = True) -> None:
    hidden, *others = _staging_buffers()
    if not aligned:
        hidden = torch.empty(TOKENS * WIDTH + 1, dtype=torch.bfloat16)[1:].view(TOKENS, WIDTH)
    x_scales = torch.empty(TOKENS) if has_outer else None
    arguments = hidden, *others, x_scales, None
    module.prepare(*arguments, recipe=recipe)(*arguments)


def _seed(module: ModuleType) -> None:
    module._stage_deepseek_v4_mega_moe_inputs(*_staging_buffers())


def _dequantize(module: ModuleType, has_outer: bool) -> None:
    codes = torch.empty(TOKENS, WIDTH // 2, dtype=torch.uint8)
    scales = torch.empty(TOKENS, WIDTH // 16, dtype=torch.uint8)
    outer = torch.empty(TOKENS, 1) if has_outer else None
    out = torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16)
    module.launch(codes, scales, outer, out, block=16, scale_format="E4M3", largest=None)


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


_STAGING = functools.partial(Kernel, "nvfp4lab.kernels.staging")
_DEQUANTIZE = functools.partial(Kernel, "nvfp4lab.kernels.dequantize")
_YARDSTICK = functools.partial(Kernel, "nvfp4lab.kernels.yardstick")

KERNELS = {
    "nvfp4": _STAGING(functools.partial(_stage, recipe="nvfp4")),
    "nvfp4, not aligned": _STAGING(functools.partial(_stage, recipe="nvfp4", aligned=False)),
    "nvfp4-token": _STAGING(functools.partial(_stage, recipe="nvfp4-token", has_outer=True)),
    "vllm-megamoe": _STAGING(functools.partial(_stage, recipe="vllm-megamoe", has_outer=True)),
    "vllm-muse": _STAGING(functools.partial(_stage, recipe="vllm-muse")),
    "dequantize": _DEQUANTIZE(functools.partial(_dequantize, has_outer=False)),
    "dequantize, with an outer scale": _DEQUANTIZE(functools.partial(_dequantize, has_outer=True)),
    "seed": Kernel("nvfp4lab.kernels.seed", _seed),
    "yardstick-down": _YARDSTICK(functools.partial(_yardstick, up=False)),
    "yardstick-up": _YARDSTICK(functools.partial(_yardstick, up=True)),
    "empty": _YARDSTICK(_empty, elements=64),
}
