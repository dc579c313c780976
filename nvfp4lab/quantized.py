"""Quantized: codes, scales and outer scale with the recipe that made them, and how to decode them.

The bytes are ours (`codec.quantize`, `staging.stage`) or another kernel's
(`Quantized.from_buffers`); decoding does not ask which. `decode` says what a value is; on a CUDA
device a kernel gives the same bits. To read one more layout of scales, add it to `SCALE_LAYOUTS`.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from nvfp4lab import catalogue, layouts
from nvfp4lab.checks import require_tensor, unknown
from nvfp4lab.formats import E2M1, E4M3, E8M0, UE5M3
from nvfp4lab.rules import Recipe

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_FLOAT32 = torch.finfo(torch.float32).max
CHUNK = 1 << 18  # elements worked on at a time: about 8 MB of temporaries
CHUNK_ON_GPU = 1 << 22  # where each operation on a chunk costs a launch


@dataclass(frozen=True)
class Quantized:
    """A tensor (..., K) as codes and scales, in the plain row-major layout, with its recipe.

    codes: uint8 (..., K // 2), the even element in the low nibble; (..., K) for 8-bit elements.
    scales: uint8 (..., K // block), the scale format's own bytes; float32 where it has no format.
    outer: float32, what a decoded value is multiplied by: None, () or (..., 1).

    >>> one = torch.tensor([[0x38]], dtype=torch.uint8)  # the scale 1 in E4M3
    >>> codes = torch.tensor([[0x27] + 7 * [0]], dtype=torch.uint8)
    >>> Quantized.from_buffers(codes, one, recipe="nvfp4").dequantize()[0, :3].tolist()
    [6.0, 1.0, 0.0]
    """

    codes: torch.Tensor
    scales: torch.Tensor
    outer: torch.Tensor | None
    recipe: Recipe

    def __post_init__(self) -> None:
        for name in ("codes", "scales"):  # decoding walks over them as flat runs of blocks
            object.__setattr__(self, name, getattr(self, name).contiguous())

    @property
    def shape(self) -> torch.Size:
        """The shape (..., K) of the tensor that was quantized."""
        return torch.Size(
            (*self.scales.shape[:-1], self.scales.shape[-1] * self.recipe.scale.block)
        )

    def element_codes(self) -> torch.Tensor:
        """One code to a byte: uint8 (..., K)."""
        return (
            self.codes
            if self.recipe.elements.format.bits == 8
            else layouts.unpack_nibbles(self.codes)
        )

    def decoded_scales(self) -> torch.Tensor:
        """The value of each block scale, outer scale not included: float32 (..., K // block)."""
        return self.recipe.scale.decode(self.scales)

    def without_padding(self, width: int) -> Quantized:
        """Its rows cut to their first `width` elements, where they were padded to be staged.

        Raises: ValueError if width is not a multiple of the block, or more than there is.
        """
        block, bits = self.recipe.scale.block, self.recipe.elements.format.bits
        if width % block or not 0 <= width <= self.shape[-1]:
            raise ValueError(
                f"width is a multiple of the block of {block} up to {self.shape[-1]}, got {width}"
            )
        codes, scales = self.codes[..., : width * bits // 8], self.scales[..., : width // block]
        return Quantized(codes, scales, self.outer, self.recipe)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """value(code) * s, then * g: dtype (..., K), each product one float32 rounding.

        A NaN scale gives NaN, an Inf scale Inf (or NaN at code 0). A product of finite factors
        beyond the dtype's largest finite value becomes that value.

        Raises: TypeError for a dtype other than float32, bfloat16 and float16.
        """
        if dtype not in DTYPES:
            raise TypeError(f"dequantizes to one of {DTYPES}, got {dtype}")
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        if _has_kernel(self.recipe) and runs_kernels(out.device.type):
            self._launch_kernel(out)
            return out
        flat = out.view(-1, self.recipe.scale.block)
        for start, stop in spans(flat.shape[0], flat.shape[1]):
            flat[start:stop] = self.decode_blocks(start, stop, torch.finfo(dtype).max)
        return out

    def _launch_kernel(self, out: torch.Tensor) -> None:
        """What `decode_blocks` gives, bit for bit, in one launch and without temporaries."""
        from nvfp4lab.kernels import dequantize

        scale, largest = self.recipe.scale, torch.finfo(out.dtype).max
        outer = None if self.outer is None else self.outer.to(out.device).contiguous()
        fits = self.outer is None and scale.format and scale.format.max * E2M1.max <= largest
        with torch.cuda.device_of(out):
            dequantize.launch(
                self.codes,
                self.scales,
                outer,
                out,
                block=scale.block,
                scale_format=scale.format.name if scale.format else None,
                largest=None if fits else largest,
            )

    def decode_blocks(
        self, start: int, stop: int, largest: float = LARGEST_FLOAT32
    ) -> torch.Tensor:
        """Blocks start to stop, counted row-major over the whole tensor: float32 [n, block].

        largest: what a product of finite factors is clamped to.
        """
        return decode(*self.blocks(start, stop), self.recipe, largest)

    def blocks(
        self, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes [n, block], one to a byte, stored scales [n] and outer scale (None, () or [n, 1])
        of the blocks start to stop, counted row-major over the whole tensor."""
        fmt, block = self.recipe.elements.format, self.recipe.scale.block
        packed = self.codes.view(-1, block * fmt.bits // 8)[start:stop]
        codes = packed if fmt.bits == 8 else layouts.unpack_nibbles(packed)
        g = self.outer
        g = None if g is None else outer_of_blocks(g, self.scales.shape[-1], start, stop)
        return codes, self.scales.view(-1)[start:stop], g

    @classmethod
    def from_buffers(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        outer: torch.Tensor | None = None,
        *,
        recipe: str | Recipe,
        layout: str = "mega_moe",
        outer_is: str = "decode",
    ) -> Quantized:
        """Bytes that a kernel wrote, brought into the plain layout; nothing is re-quantized.

        codes: (..., K // 2) uint8, int8 or float4_e2m1fn_x2.
        scales, by `layout`: "mega_moe", row-major int32 (..., K // 64) or bytes (..., K // 16);
        "linear", row-major bytes; "128x4", tiles of bytes, padded; "mn_major", int32 (K // 64, T').
        Bytes are uint8, int8 or an 8-bit float. outer: (), (1,), (T,) or (T, 1); `outer_is`
        "encode" for the reciprocal convention.

        Raises: TypeError for a dtype, ValueError for a shape, layout or convention that is off.
        """
        recipe = catalogue.recipe(recipe)
        if layout not in SCALE_LAYOUTS:
            raise ValueError(unknown("scale layout", layout, SCALE_LAYOUTS))
        if outer_is not in ("decode", "encode"):
            raise ValueError(f"outer_is is 'decode' or 'encode', got {outer_is!r}")
        require_tensor("codes", codes, least_ndim=1)
        require_tensor("scales", scales)
        codes = _as_bytes(codes, "codes")
        width = codes.shape[-1] * 8 // recipe.elements.format.bits
        if width % recipe.scale.block:
            raise ValueError(
                f"codes {tuple(codes.shape)} stand for rows of {width} elements, "
                f"not a multiple of the block of {recipe.scale.block}"
            )
        expected = (*codes.shape[:-1], width // recipe.scale.block)
        if recipe.scale.format is not None:
            rows = math.prod(expected[:-1])
            scales = SCALE_LAYOUTS[layout](scales, rows, expected[-1])
        elif scales.dtype != torch.float32:
            raise TypeError(f"{recipe.name} has float32 scales, got {scales.dtype}")
        if scales.numel() != math.prod(expected):
            raise ValueError(
                f"codes {tuple(codes.shape)} need {math.prod(expected)} scales of shape {expected} "
                f"in layout {layout!r}; got {tuple(scales.shape)} of them"
            )
        if codes.device != scales.device:
            raise ValueError(f"codes are on {codes.device}, scales on {scales.device}")
        outer = _check_outer_buffer(outer, expected, recipe)
        if outer is not None and outer_is == "encode":
            outer = torch.ones_like(outer) / outer
        return cls(codes, scales.reshape(expected), outer, recipe)


def _has_kernel(recipe: Recipe) -> bool:
    """Whether kernels/dequantize.py knows its elements, scales and block."""
    scale = recipe.scale
    known = scale.format in (E4M3, UE5M3, E8M0, None) and scale.block in (16, 32)
    return known and recipe.elements.format == E2M1


@functools.cache
def runs_kernels(device_type: str) -> bool:
    """On CUDA, where Triton is installed. Tests choose the interpreter: it is slow on the CPU."""
    return device_type == "cuda" and importlib.util.find_spec("triton") is not None


def refuse_capture(device: torch.device) -> None:
    """Raises: RuntimeError while a CUDA graph is captured, for what copies between CPU and GPU."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "quantize and measure wait for the GPU, which a CUDA graph cannot hold; capture "
            "nvfp4lab.stage, nvfp4lab.stage_mega_moe_inputs or Quantized.dequantize"
        )


def decode(
    codes: torch.Tensor,
    stored: torch.Tensor,
    g: torch.Tensor | None,
    recipe: Recipe,
    largest: float = LARGEST_FLOAT32,
) -> torch.Tensor:
    """value(code) * s, then * g: codes [n, block], stored scales [n], g () or [n, 1] -> float32.

    largest: what a product of finite factors is clamped to.
    """
    s = recipe.scale.decode(stored[:, None])
    value = recipe.elements.format.decode(codes) * s
    if g is not None:
        value *= g
    clamped = value.clamp(-largest, largest)
    return clamped if recipe.scale.format is not None else clamped.where(~s.isinf(), value)


def spans(count: int, block: int, chunk: int | None = None) -> Iterator[tuple[int, int]]:
    """Consecutive (start, stop) over `count` blocks, a chunk of elements at a time."""
    step = max(1, (CHUNK if chunk is None else chunk) // block)
    return ((start, min(start + step, count)) for start in range(0, count, step))


def chunk_on(device: torch.device) -> int:
    """How many elements are worked on at a time there."""
    return CHUNK if device.type == "cpu" else CHUNK_ON_GPU


def outer_of_blocks(g: torch.Tensor, blocks_in_row: int, start: int, stop: int) -> torch.Tensor:
    """The outer scale of each of the blocks start to stop: () or [stop - start, 1]."""
    if g.ndim == 0:
        return g
    return g.reshape(-1, 1)[torch.arange(start, stop, device=g.device) // blocks_in_row]


def _check_outer_buffer(outer, expected: tuple[int, ...], recipe: Recipe) -> torch.Tensor | None:
    """A kernel's outer scale as float32 () or (..., 1), as the recipe has it."""
    if (outer is None) != (recipe.outer is None):
        given = "none was given" if outer is None else "one was given"
        raise ValueError(
            f"{recipe.name} has {'no' if recipe.outer is None else 'an'} outer scale; {given}"
        )
    if outer is None or recipe.outer is None:
        return None
    require_tensor("the outer scale", outer, (torch.float32,))
    shape = () if recipe.outer.per == "tensor" else (*expected[:-1], 1)
    if outer.numel() != math.prod(shape):
        raise ValueError(
            f"{recipe.name} has an outer scale of shape {shape}, got {tuple(outer.shape)}"
        )
    return outer.reshape(shape)


def _as_bytes(tensor: torch.Tensor, what: str) -> torch.Tensor:
    if tensor.element_size() != 1 or tensor.dtype == torch.bool:
        raise TypeError(f"{what} are bytes (uint8, int8 or an 8-bit float), got {tensor.dtype}")
    return tensor.view(torch.uint8)


def _linear(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return _as_bytes(scales, "scales")


def _mega_moe(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    if scales.dtype == torch.int32:
        return layouts.from_words(scales)
    return _as_bytes(scales, "scales")


def _tiled(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    return layouts.from_tiles(_as_bytes(scales, "scales"), rows, columns)


def _mn_major(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    if scales.dtype != torch.int32:
        raise TypeError(f"MN-major scale words are int32, got {scales.dtype}")
    return layouts.from_mn_major(scales, rows)


SCALE_LAYOUTS = {"mega_moe": _mega_moe, "linear": _linear, "128x4": _tiled, "mn_major": _mn_major}
