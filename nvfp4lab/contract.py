"""The staging contract: which recipes are staged, and what each tensor of a call has to be.

Its words are the docstring of `staging.stage_mega_moe_inputs`; `check_buffers` holds a call to them
before anything is written. To make another recipe stageable, name it in STAGEABLE and give its
decisions to `kernels.staging.DECISIONS`. A rule about one tensor is changed in its row of
`_CONTRACT`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from nvfp4lab import catalogue
from nvfp4lab.checks import require_matrix, require_tensor
from nvfp4lab.rules import Recipe

STAGEABLE = ("nvfp4", "nvfp4-token", "vllm-megamoe", "vllm-muse", "seed")


class Buffers(NamedTuple):
    """What one staging reads and writes, in the order of `stage_mega_moe_inputs`."""

    hidden_states: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    x_fp4: torch.Tensor
    x_sf: torch.Tensor
    topk_idx_out: torch.Tensor
    topk_weights_out: torch.Tensor
    x_scales: torch.Tensor | None
    is_padding: torch.Tensor | None


@dataclass(frozen=True)
class _Rule:
    """What the contract says of one tensor."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[str, ...]
    last_stride_1: bool = False
    written: bool = False


_CONTRACT = {
    "hidden_states": _Rule((torch.bfloat16,), ("T", "K"), last_stride_1=True),
    "topk_weights": _Rule((torch.float32, torch.bfloat16, torch.float16), ("T", "top_k")),
    "topk_ids": _Rule((torch.int32, torch.int64), ("T", "top_k")),
    "x_fp4": _Rule((torch.uint8,), ("T", "K // 2"), last_stride_1=True, written=True),
    "x_sf": _Rule((torch.int32,), ("T", "K // 64"), last_stride_1=True, written=True),
    "topk_idx_out": _Rule((torch.int64,), ("T", "top_k"), written=True),
    "topk_weights_out": _Rule((torch.float32,), ("T", "top_k"), written=True),
    "x_scales": _Rule((torch.float32,), ("T",), last_stride_1=True, written=True),
    "is_padding": _Rule((torch.bool,), ("T",), last_stride_1=True),
}
_OPTIONAL = ("x_scales", "is_padding")


def stageable(recipe: str | Recipe) -> Recipe:
    """The recipe of that name. Raises: ValueError if it has no staging kernel."""
    recipe = catalogue.recipe(recipe)
    if recipe.name not in STAGEABLE or recipe != catalogue.recipe(recipe.name):
        raise ValueError(
            f"recipe {recipe.name!r} has no staging kernel; stageable: {', '.join(STAGEABLE)}. "
            "nvfp4lab.quantize takes any recipe"
        )
    return recipe


def check_buffers(buffers: Buffers, recipe: Recipe) -> None:
    """Hold the tensors to the contract: the seed's two conditions, then `_CONTRACT`."""
    for name in ("hidden_states", "topk_ids", "topk_weights"):
        require_matrix(name, getattr(buffers, name))
    (tokens, width), top_k = buffers.hidden_states.shape, buffers.topk_ids.shape[1]
    if width % 128 or not width:
        raise ValueError(
            "DeepSeek V4 MegaMoE input staging requires hidden_size to be a multiple of 128. "
            f"Got hidden_states of shape {(tokens, width)}."
        )
    if buffers.topk_weights.shape != buffers.topk_ids.shape:
        raise ValueError(
            "DeepSeek V4 MegaMoE input staging requires topk_weights and topk_ids to have the same "
            f"shape. Got {tuple(buffers.topk_weights.shape)} and {tuple(buffers.topk_ids.shape)}."
        )
    needs_x_scales = recipe.outer_per == "token"
    if needs_x_scales != (buffers.x_scales is not None):
        wants = "needs x_scales, float32 (T,)" if needs_x_scales else "takes no x_scales"
        given = "none" if buffers.x_scales is None else "one"
        raise ValueError(f"recipe {recipe.name!r} {wants}; {given} was given")
    device = buffers.hidden_states.device
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"hidden_states is on the CPU or a CUDA device, got {device}")
    sizes = {"T": tokens, "K": width, "K // 2": width // 2, "K // 64": width // 64, "top_k": top_k}
    for name, rule in _CONTRACT.items():
        tensor = getattr(buffers, name)
        if tensor is not None or name not in _OPTIONAL:
            _check_tensor(name, tensor, rule, sizes, device)


def _check_tensor(
    name: str, tensor: Any, rule: _Rule, sizes: dict[str, int], device: torch.device
) -> None:
    require_tensor(name, tensor, rule.dtypes)
    shape, strides = tuple(tensor.shape), tensor.stride()
    expected = tuple(sizes[size] for size in rule.shape)
    if shape != expected:
        raise ValueError(f"{name} is ({', '.join(rule.shape)}), here {expected}; got {shape}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {device}, as hidden_states is; got {tensor.device}")
    if rule.last_stride_1 and shape[-1] > 1 and strides[-1] != 1:
        raise ValueError(f"{name} has a last stride of 1, got strides {strides}")
    if rule.written and _overlaps(shape, strides):
        raise ValueError(
            f"{name} is written, so no two entries share memory; got shape {shape} and strides "
            f"{strides}"
        )


def _overlaps(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether two entries of a tensor of one or two dimensions lie in the same place.

    Entries (i, j) and (i + di, j - dj) do where di a = dj b, and b / g, a / g is the nearest such
    pair, with strides a and b and g their greatest common divisor.
    """
    (rows, columns), (a, b) = (*shape, 1)[:2], (*strides, 0)[:2]
    if not (g := math.gcd(a, b)):
        return rows * columns > 1
    return b // g < rows and a // g < columns
