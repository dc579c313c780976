"""`quantize` on the CPU, beside a plain BF16 copy and the quantizers of the installed packages.

All in one process and in turns, with torch's own number of threads. Each package's entry point is
the one whose bytes `make conformance` holds against our recipe of its name; what is not installed
is left out by name. To time another package, add its function to PEERS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from nvfp4lab.benchmarks.inputs import Settings, random_activations, staging_bytes
from nvfp4lab.benchmarks.results import Sample
from nvfp4lab.benchmarks.steps import Measured, Step
from nvfp4lab.benchmarks.timing import time_calls
from nvfp4lab.codec import quantize

PART = "cpu"
OURS, COPY = "nvfp4", "BF16 copy"


def steps(settings: Settings) -> list[Step]:
    """One step: everything in turns."""
    return [Step("quantize on the CPU", functools.partial(_race, settings))]


def _race(settings: Settings) -> Measured:
    tokens, width = settings.on_cpu
    x = random_activations(tokens, width, settings.seed, "cpu")
    calls: dict[str, Callable[[], object]] = {OURS: functools.partial(quantize, x, OURS)}
    left_out = []
    for name, adapter in PEERS.items():
        try:
            calls[name] = functools.partial(adapter(), x)
        except ImportError as error:
            left_out.append(f"cpu {name}: {error}")
    target = torch.empty_like(x)
    calls[COPY] = functools.partial(target.copy_, x)
    taken = time_calls(list(calls.values()), settings.runs, settings.run_seconds)
    samples = []
    for name, runs in zip(calls, taken, strict=True):
        role, moved = "reference", staging_bytes(tokens, width)
        if name == OURS:
            role = "measured"
        elif name == COPY:
            role, moved = "yardstick", 2 * x.nbytes
        note = f"{torch.get_num_threads()} threads"
        samples.append(Sample(PART, name, tokens, width, runs, moved, role, note))
    return Measured(tuple(samples), left_out=tuple(left_out))


# ---- The packages: each function imports and returns what takes x. ----


def _torchao() -> Callable[[torch.Tensor], object]:
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale

    def run(x: torch.Tensor) -> object:
        return nvfp4_quantize(x, 16, per_tensor_scale=per_tensor_amax_to_scale(x.abs().amax()))

    return run


def _modelopt() -> Callable[[torch.Tensor], object]:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    def run(x: torch.Tensor) -> object:
        return NVFP4QTensor.quantize(x.clone(), 16)  # it takes the magnitudes in place

    return run


def _compressed_tensors() -> Callable[[torch.Tensor], object]:
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

    def run(x: torch.Tensor) -> object:
        blocks = x.unflatten(-1, (-1, 16))
        encode = generate_gparam(x.amin(), x.amax())
        scales, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale=encode)
        return quantize_and_pack_fp4(x, scales, encode)

    return run


PEERS = {
    "torchao": _torchao,
    "modelopt": _modelopt,
    "compressed-tensors": _compressed_tensors,
}
