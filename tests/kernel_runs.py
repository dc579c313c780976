"""The kernels as functions of one tensor, for tests: launched directly, without `stage`'s checks.

`run` is an implementation in the sense of `proofs.py`. May be changed: add a kernel to `run`.
"""

from typing import Any

import torch

PER_TOKEN = ("nvfp4-token", "vllm-megamoe")


def run(recipe: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Codes uint8 (T, K), one to a byte, scales uint8 (T, K / 16), outer float32 (T, 1) or None."""
    from nvfp4lab.kernels import seed, staging

    tokens, width = x.shape
    x_fp4 = torch.full((tokens, width // 2), 0xAA, dtype=torch.uint8, device=x.device)
    x_sf = torch.full((tokens, width // 64), -1, dtype=torch.int32, device=x.device)
    ids = torch.zeros(tokens, 1, dtype=torch.int64, device=x.device)
    weights = torch.zeros(tokens, 1, device=x.device)
    top_k = weights, ids, x_fp4, x_sf, ids.clone(), weights.clone()
    x_scales = torch.full((tokens,), -1.0, device=x.device) if recipe in PER_TOKEN else None
    if recipe == "seed":
        seed._stage_deepseek_v4_mega_moe_inputs(x, *top_k)
    else:
        arguments = x, *top_k, x_scales, None
        staging.prepare(*arguments, recipe=recipe)(*arguments)
    codes = torch.stack((x_fp4 & 15, x_fp4 >> 4), dim=-1).flatten(-2)
    return codes, x_sf.view(torch.uint8), None if x_scales is None else x_scales[:, None]


def bit_patterns(
    tokens: int, width: int, seed: int, largest: int = 0x7FFF, device: str = "cpu"
) -> torch.Tensor:
    """bfloat16 (tokens, width) of any sign, magnitude bits up to `largest`; 0x7FFF includes NaN.

    Half of the blocks hold any bits, half lie within a factor of 2^8 of each other.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator, device=device, dtype=torch.int32)

    blocks = draw(largest + 1, tokens, width // 16, 16)
    close = (draw(largest + 1, tokens, width // 16, 1) - draw(8 << 7, *blocks.shape)).clamp(min=0)
    magnitude = torch.where(draw(2, tokens, width // 16, 1) == 0, blocks, close)
    bits = magnitude | draw(2, *blocks.shape) << 15
    return bits.to(torch.int16).view(torch.bfloat16).reshape(tokens, width)
