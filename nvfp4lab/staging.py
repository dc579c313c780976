"""stage, stage_mega_moe_inputs: an MoE layer's inputs, quantized into the buffers that it reads.

`contract` holds a call to what is said here before anything is written. Tensors on a CUDA device go
through a Triton kernel; tensors on the CPU through `quantize`, with the same bits, or through the
same kernel in Triton's interpreter. A call is checked and planned once for its tensors' dtypes,
shapes, strides and devices; the next with the same goes straight to the launch. May be changed: by
what a kind of tensors is staged (`_prepare`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch

from nvfp4lab import layouts
from nvfp4lab.checks import require_matrix
from nvfp4lab.codec import quantize
from nvfp4lab.contract import Buffers, check_buffers, stageable
from nvfp4lab.quantized import Quantized
from nvfp4lab.rules import Recipe

_PREPARED: dict[Hashable, Callable[[Buffers], None]] = {}
MOST_PREPARED = 4096
LARGEST_32_BIT_OFFSET = 2**31 - 1
PADDING_ID, PADDING_WEIGHT = -1, 0.0


@dataclass(frozen=True, eq=False)
class Staged:
    """The buffers of T staged tokens of width K and how they were quantized.

    x_fp4: uint8 (T, K // 2), the even element in the low nibble.
    x_sf: int32 (T, K // 64), the scale of block k at bits 8 * (k % 4) of word k // 4.
    x_scales: float32 (T,), what a decoded row is multiplied by, or None.
    topk_idx, topk_weights: int64 and float32 (T, top_k).
    """

    x_fp4: torch.Tensor
    x_sf: torch.Tensor
    x_scales: torch.Tensor | None
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    recipe: Recipe

    @property
    def quantized(self) -> Quantized:
        """The same codes and scales in the plain layout, ready to dequantize."""
        return Quantized.from_buffers(self.x_fp4, self.x_sf, self.x_scales, recipe=self.recipe)


def stage(
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    recipe: str | Recipe = "nvfp4",
    is_padding: torch.Tensor | None = None,
) -> Staged:
    """`stage_mega_moe_inputs` into new buffers, on the device of the hidden states.

    hidden_states: bfloat16 (T, K), K a positive multiple of 128; topk_weights, topk_ids:
    (T, top_k); is_padding: bool (T,).

    Raises: as `stage_mega_moe_inputs`, and for a recipe that is unknown or not stageable also when
    there are no tokens.

    >>> hidden = torch.ones(2, 128, dtype=torch.bfloat16)
    >>> staged = stage(hidden, torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int32))
    >>> staged.x_sf.shape, staged.topk_idx.dtype
    (torch.Size([2, 2]), torch.int64)
    """
    recipe = stageable(recipe)
    require_matrix("hidden_states", hidden_states)
    require_matrix("topk_ids", topk_ids)
    (tokens, width), top_k = hidden_states.shape, topk_ids.shape[1]
    new = functools.partial(torch.empty, device=hidden_states.device)
    staged = Staged(
        new(tokens, width // 2, dtype=torch.uint8),
        new(tokens, width // 64, dtype=torch.int32),
        new(tokens, dtype=torch.float32) if recipe.outer_per == "token" else None,
        new(tokens, top_k, dtype=torch.int64),
        new(tokens, top_k, dtype=torch.float32),
        recipe,
    )
    stage_mega_moe_inputs(
        hidden_states,
        topk_weights,
        topk_ids,
        staged.x_fp4,
        staged.x_sf,
        staged.topk_idx,
        staged.topk_weights,
        x_scales=staged.x_scales,
        is_padding=is_padding,
        recipe=recipe.name,
    )
    return staged


def stage_mega_moe_inputs(
    hidden_states: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    x_fp4: torch.Tensor,
    x_sf: torch.Tensor,
    topk_idx_out: torch.Tensor,
    topk_weights_out: torch.Tensor,
    *,
    x_scales: torch.Tensor | None = None,
    is_padding: torch.Tensor | None = None,
    recipe: str | Recipe = "nvfp4",
) -> None:
    """Quantize T tokens of width K and copy their top-k beside them, in place and in one launch.

    hidden_states: bfloat16 (T, K), K a positive multiple of 128. topk_weights: float32, bfloat16 or
    float16 (T, top_k), topk_ids: int32 or int64 (T, top_k); top_k may be 0. is_padding: bool (T,).
    Written: x_fp4 uint8 (T, K // 2), x_sf int32 (T, K // 64), topk_idx_out int64 and
    topk_weights_out float32 (T, top_k), and x_scales float32 (T,), which is required by a recipe
    with an outer scale per token and refused by the others. All on one device, which need not be
    the current one. Rows of hidden_states, x_fp4 and x_sf may lie anywhere but have last stride 1,
    x_scales and is_padding have stride 1; top-k tensors have any strides. No two entries of a
    written tensor share memory; that no two tensors do is not checked, and what is written where a
    written one overlaps another is undefined.

    A padding token is quantized like any other and gets id -1 and weight 0, under `seed` by
    operations after the launch. No tokens: nothing is checked or done. Nothing is allocated and
    nothing waited for on a CUDA device, except that `seed` with top_k 0 allocates T numbers.

    Raises: TypeError for a dtype, ValueError for a shape, device or stride, for a recipe that is
    unknown or has no staging kernel, and, with `seed`, for tensors past its 32-bit offsets; always
    before anything is written. The first call with tensors of new shapes may compile.

    >>> hidden, ids = torch.ones(1, 128, dtype=torch.bfloat16), torch.tensor([[7]])
    >>> x_fp4, x_sf = torch.empty(1, 64, dtype=torch.uint8), torch.empty(1, 2, dtype=torch.int32)
    >>> topk_idx, topk_weights = torch.empty(1, 1, dtype=torch.int64), torch.empty(1, 1)
    >>> stage_mega_moe_inputs(hidden, torch.ones(1, 1), ids, x_fp4, x_sf, topk_idx, topk_weights)
    >>> hex(x_fp4[0, 0]), hex(x_sf[0, 0]), topk_idx.item()  # 1 is 6 / 6 under the scale 0.171875
    ('0x77', '0x23232323', 7)
    """
    buffers = Buffers(
        hidden_states,
        topk_weights,
        topk_ids,
        x_fp4,
        x_sf,
        topk_idx_out,
        topk_weights_out,
        x_scales,
        is_padding,
    )
    alike = (
        recipe if isinstance(recipe, (str, Recipe)) else type(recipe),
        *(
            (t.dtype, t.shape, t.stride(), t.device)
            if isinstance(t, torch.Tensor) and t.layout is torch.strided
            else type(t)
            for t in buffers
        ),
    )
    prepared = _PREPARED.get(alike)
    if prepared is None:
        if isinstance(hidden_states, torch.Tensor) and hidden_states.shape[:1] == (0,):
            return
        prepared = _prepare(buffers, stageable(recipe))
        if len(_PREPARED) >= MOST_PREPARED:
            _PREPARED.clear()
        _PREPARED[alike] = prepared
    prepared(buffers)


def _prepare(buffers: Buffers, recipe: Recipe) -> Callable[[Buffers], None]:
    """Check the buffers; then what stages these and any that are alike."""
    check_buffers(buffers, recipe)
    device = buffers.hidden_states.device
    if not _runs_kernel(device):
        return functools.partial(_stage_in_torch, recipe=recipe)
    if recipe.name == "seed":
        return functools.partial(_on_device, device, _launch_seed)
    from nvfp4lab.kernels import staging

    launch = staging.prepare(*buffers, recipe=recipe.name)
    return functools.partial(_on_device, device, lambda buffers: launch(*buffers))


def _on_device(device: torch.device, launch: Callable[[Buffers], None], buffers: Buffers) -> None:
    """Launch with the tensors' device as the current one."""
    if device.type == "cpu" or device.index == torch.cuda.current_device():
        launch(buffers)
    else:
        with torch.cuda.device(device):
            launch(buffers)


def _launch_seed(buffers: Buffers) -> None:
    """The user's own launcher, with what it lacks done around it."""
    from nvfp4lab.kernels import LAUNCHING, seed

    top_k = [
        buffers.topk_weights, buffers.topk_ids, buffers.topk_idx_out, buffers.topk_weights_out
    ]  # fmt: skip
    if buffers.topk_ids.shape[1] == 0:  # which it cannot launch: one column, copied onto itself
        top_k = [buffers.x_sf.new_zeros(len(buffers.x_sf), 1)] * 4
    weights, ids, idx_out, weights_out = top_k
    _refuse_offsets_past_32_bits(
        buffers.hidden_states, buffers.x_fp4, buffers.x_sf, weights, ids, idx_out, weights_out
    )
    with LAUNCHING:
        seed._stage_deepseek_v4_mega_moe_inputs(
            buffers.hidden_states, weights, ids, buffers.x_fp4, buffers.x_sf, idx_out, weights_out
        )
    _mark_padding(buffers)


@torch.inference_mode()  # in which buffers that were made in it may be written, and others too
def _stage_in_torch(buffers: Buffers, recipe: Recipe) -> None:
    """What the kernels write, bit for bit, by `quantize` and copies."""
    q = quantize(buffers.hidden_states, recipe)
    buffers.x_fp4.copy_(q.codes)
    buffers.x_sf.copy_(layouts.to_words(q.scales))
    if buffers.x_scales is not None and q.outer is not None:
        buffers.x_scales.copy_(q.outer[:, 0])
    buffers.topk_idx_out.copy_(buffers.topk_ids)
    buffers.topk_weights_out.copy_(buffers.topk_weights)
    _mark_padding(buffers)


@torch.inference_mode()
def _mark_padding(buffers: Buffers) -> None:
    if buffers.is_padding is not None:
        padding = buffers.is_padding[:, None]
        buffers.topk_idx_out.masked_fill_(padding, PADDING_ID)
        buffers.topk_weights_out.masked_fill_(padding, PADDING_WEIGHT)


@functools.cache
def _runs_kernel(device: torch.device) -> bool:
    """On CUDA; on the CPU in Triton's interpreter, which a process chooses before it uses Triton.

    Where Triton is not installed, `quantize` does the work on every device.
    """
    try:
        from triton import knobs
    except ImportError:
        return False
    return device.type == "cuda" or knobs.runtime.interpret


def _refuse_offsets_past_32_bits(*tensors: torch.Tensor) -> None:
    """The seed's `token_id * stride` is an int32; past it, it would read and write elsewhere."""
    for tensor in tensors:
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        if last > LARGEST_32_BIT_OFFSET:
            raise ValueError(
                f"the seed's offsets end at 2**31 - 1; a tensor of shape {tuple(tensor.shape)} and "
                f"strides {tensor.stride()} needs {last}: stage fewer tokens at a time"
            )
