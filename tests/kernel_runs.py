"""The kernels as functions of one tensor, for tests: launched directly, without `stage`'s checks.

`run` is an implementation in the sense of `proofs.py`. Run as a script it compiles a kernel for
sm_90 without a GPU, which Triton does only in a process that has no interpreter.
May be changed: add a kernel to `run` and to SIGNATURES.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGE = Path(__file__).resolve().parent.parent / "nvfp4lab"


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


def bit_patterns(tokens: int, width: int, seed: int, largest: int = 0x7FFF) -> torch.Tensor:
    """bfloat16 (tokens, width) of any sign, magnitude bits up to `largest`; 0x7FFF includes NaN.

    Half of the blocks hold any bits, half lie within a factor of 2^8 of each other.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    blocks = draw(largest + 1, tokens, width // 16, 16)
    close = (draw(largest + 1, tokens, width // 16, 1) - draw(8 << 7, *blocks.shape)).clamp(min=0)
    magnitude = torch.where(draw(2, tokens, width // 16, 1) == 0, blocks, close)
    bits = magnitude | draw(2, *blocks.shape) << 15
    return bits.to(torch.int16).view(torch.bfloat16).reshape(tokens, width)


# ---- Compiling without a GPU ----

POINTERS = {
    "hidden": "*bf16", "hidden_states": "*bf16", "x_fp4": "*u8", "x_sf": "*i32",
    "x_scales": "*fp32", "is_padding": "*i1",
    "ids": "*i32", "weights": "*bf16", "idx_out": "*i64", "weights_out": "*fp32",
    "topk_ids": "*i64", "topk_weights": "*fp32",
    "topk_idx_out": "*i64", "topk_weights_out": "*fp32",
    "codes": "*u8", "scales": "*u8", "outer": "*fp32", "out": "*bf16",
}  # fmt: skip
KERNELS = {  # name: file, function, constants
    "nvfp4": (
        "staging.py", "_stage",
        {"x_scales": None, "WIDTH": 7168, "TOP_K": 6, "BLOCKS": 128, "BLOCK_TOPK": 8},
    ),
    "nvfp4-token": (
        "staging.py", "_stage",
        {"is_padding": None, "WIDTH": 384, "TOP_K": 0, "BLOCKS": 32, "BLOCK_TOPK": 1},
    ),
    "seed": (
        "seed.py", "_deepseek_v4_stage_mega_moe_inputs_kernel",
        {"hidden_size": 7168, "top_k": 6, "BLOCK_K": 128, "GROUP_K": 16, "BLOCK_TOPK": 8},
    ),
    "dequantize": (
        "dequantize.py", "_dequantize",
        {"BLOCK": 16, "FORMAT": "E4M3", "ROWS": True, "LARGEST": 65504.0, "BYTES": 4,
         "ALIGNED": True, "RUN": 512, "INTERPRETED": False},
    ),
}  # fmt: skip


def compile_elsewhere(name: str, cache: Path, file: Path | None = None):
    """Compile a kernel for sm_90 in a process of its own; from `file`, if given, for its source."""
    file = file or PACKAGE / "kernels" / KERNELS[name][0]
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(PACKAGE.parent)}
    command = [sys.executable, __file__, name, str(file)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def compile_here(name: str, file: str) -> int:
    """The size of the sm_90 binary."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    spec = importlib.util.spec_from_file_location("kernels_to_compile", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kernel = getattr(module, KERNELS[name][1])
    constants = {n: 1 for n in kernel.arg_names if "_stride_" in n} | KERNELS[name][2]
    signature = {
        n: "constexpr" if n in constants else POINTERS.get(n, "i64") for n in kernel.arg_names
    }
    new = [i for i, n in enumerate(kernel.arg_names) if n == "out"]  # so its address is aligned
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in new})
    return len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"])


if __name__ == "__main__":
    print(f"{compile_here(*sys.argv[1:])} bytes")
