"""The peers' own quantizers behind one call: input -> codes, scales, outer, as `quantize` gives.

Each adapter runs what the installed package runs and only moves bytes: unpacks, undoes padding and
tiles. May be changed: an adapter, when its peer's entry point moves (raise the pin in
requirements-peers.txt with it). May not: arithmetic on the results, or a case left out here; what
cannot be compared is listed in run.py with its count.
"""

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from nvfp4lab import layouts


@dataclass(frozen=True)
class Peer:
    """recipe: the name in the catalogue; quantize: (T, K) -> codes (T, K), scales, outer."""

    recipe: str
    package: str
    quantize: Callable
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float16, torch.float32)


def torchao(x):
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    g = per_tensor_amax_to_scale(x.abs().amax())
    scales, codes = nvfp4_quantize(x, 16, per_tensor_scale=g)
    return layouts.unpack_nibbles(codes), scales.view(torch.uint8), g


def torchao_mx(mode):
    def quantize(x):
        from torchao.prototype.mx_formats.config import ScaleCalculationMode
        from torchao.prototype.mx_formats.mx_tensor import to_mx

        mode_ = getattr(ScaleCalculationMode, mode)
        scales, codes = to_mx(x.contiguous(), torch.float4_e2m1fn_x2, 32, mode_)
        codes = layouts.unpack_nibbles(codes.view(torch.uint8)).view(x.shape)
        return codes, scales.view(torch.uint8).view(len(x), -1), None

    return quantize


def modelopt(x):
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    q, scales, g = NVFP4QTensor.quantize(x.clone(), 16)  # it takes the magnitudes in place
    return layouts.unpack_nibbles(q._quantized_data), scales.view(torch.uint8), g.reshape(())


def compressed_tensors(x):
    from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    args = QuantizationArgs(
        num_bits=4,
        type="float",
        symmetric=True,
        strategy="tensor_group",
        group_size=16,
        scale_dtype=torch.float8_e4m3fn,
        zp_dtype=torch.float8_e4m3fn,
    )
    blocks = x.unflatten(-1, (-1, 16))
    encode = generate_gparam(x.amin(), x.amax())
    scales, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=encode)
    codes = quantize_and_pack_fp4(x, scales, encode)
    scale_bytes = scales.to(torch.float8_e4m3fn).view(torch.uint8)
    return layouts.unpack_nibbles(codes), scale_bytes, encode.reshape(())


def fouroversix(rule):
    def quantize(x):
        from fouroversix import QuantizationConfig, quantize_to_fp4

        q = quantize_to_fp4(x, QuantizationConfig(scale_rule=rule, backend="pytorch"))
        rows, width = x.shape
        codes = layouts.unpack_nibbles(q.values)[:rows, :width]
        scales = layouts.from_tiles(q.scale_factors.view(torch.uint8), rows, width // 16)
        return codes, scales, q.amax.reshape(())

    return quantize


def mlx(x):
    import mlx.core as mx

    dtype = {torch.bfloat16: mx.bfloat16, torch.float32: mx.float32, torch.float16: mx.float16}
    a = mx.array(x.float().numpy()).astype(dtype[x.dtype])
    amax = x.float().abs().amax()  # MLX's global scale is the tensor's largest magnitude
    packed, scales = mx.quantize(
        a, group_size=16, bits=4, mode="nvfp4", global_scale=mx.array(amax.numpy())
    )
    codes = torch.from_numpy(np.array(packed).view(np.uint8))
    return layouts.unpack_nibbles(codes), torch.from_numpy(np.array(scales)), amax


def ggml(x):
    """The reference quantizer of ggml-quants.c, compiled by `make conformance`; float32 rows."""
    library = ctypes.CDLL(os.environ["NVFP4LAB_GGML"], mode=os.RTLD_LAZY)
    rows = np.ascontiguousarray(x.float().numpy())
    out = np.zeros(rows.size // 64 * 36, np.uint8)
    library.quantize_row_nvfp4_ref(
        rows.ctypes.data_as(ctypes.c_void_p),
        out.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(rows.size),
    )
    codes, scales = layouts.from_gguf(torch.from_numpy(out), *x.shape)
    return layouts.unpack_nibbles(codes), scales, None


def gguf_scales(amax):
    """gguf's Python codec of the scale alone: float32 -> bytes."""
    from gguf.quants import NVFP4

    return torch.from_numpy(NVFP4.fp32_to_ue4m3((amax / torch.full_like(amax, 6.0)).numpy()))


def gguf_decode(superblocks):
    """gguf's decoding of superblocks (T, bytes): float32 (T, K)."""
    from gguf.quants import NVFP4

    flat = NVFP4.dequantize_blocks(superblocks.numpy().reshape(-1, 36))
    return torch.from_numpy(flat).reshape(len(superblocks), -1)


BF16, FP32 = torch.bfloat16, torch.float32
PEERS = (
    Peer("torchao", "torchao", torchao, (BF16, FP32)),
    Peer("mxfp4-floor", "torchao", torchao_mx("FLOOR"), (BF16, FP32)),
    Peer("mxfp4-ceil", "torchao", torchao_mx("RCEIL"), (BF16, FP32)),
    Peer("mxfp4-even", "torchao", torchao_mx("EVEN"), (BF16, FP32)),
    Peer("modelopt", "nvidia-modelopt", modelopt),
    Peer("compressed-tensors", "compressed-tensors", compressed_tensors),
    Peer("fouroversix", "fouroversix", fouroversix("mse")),
    Peer("fouroversix-mae", "fouroversix", fouroversix("mae")),
    Peer("fouroversix-max", "fouroversix", fouroversix("abs_max")),
    Peer("fouroversix-static6", "fouroversix", fouroversix("static_6")),
    Peer("mlx", "mlx", mlx),
    Peer("llama.cpp", "ggml", ggml, (FP32,)),
)
