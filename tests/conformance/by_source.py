"""Recipes whose peer cannot be installed here, beside the peer's own files: loaded alone, their
imports replaced by stand-ins, their arithmetic untouched.

    unzip vllm-0.33.0-*.whl 'vllm/model_executor/layers/fused_moe/prepare_megamoe.py' \\
        'vllm/models/muse_spark/nvidia/ops/prepare_megamoe_nvfp4.py' \\
        'vllm/model_executor/layers/quantization/utils/nvfp4_emulation_utils.py' -d FOLDER
    unzip transformer_engine-2.20.2-*.whl '*/reference_nvfp4.py' -d FOLDER
    unzip fp_quant-0.3.2-*.whl '*/nvfp4.py' -d FOLDER
    PYTHONPATH=. python tests/conformance/by_source.py FOLDER

The torch references run anywhere; vLLM's and fp-quant's Triton kernels are compiled, on a CUDA GPU
(the interpreter casts to E4M3 wrongly, triton#8322). Prints a line a recipe and case, and writes
data/by_source.json: what one device gave replaces what it gave before. May be changed: cases, and
the stand-ins when a peer's imports move.
"""

import importlib.util
import json
import platform
import sys
import types
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path

import torch
from cases import CASES

import nvfp4lab as nv

TARGET = Path(__file__).parents[2] / "data" / "by_source.json"
BF16 = torch.bfloat16
WIDTH = 128  # the kernels take multiples of it
VLLM = "vllm/model_executor/layers"


def inputs(dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The cases of `make conformance` in rows of 128, and larger ones: (name, (T, 128))."""
    for name, case in CASES.items():
        x = case(dtype).flatten()
        yield name, x[: len(x) // WIDTH * WIDTH].view(-1, WIDTH)
    generator = torch.Generator().manual_seed(11)
    bits = torch.randint(-(2**15), 2**15, (8192, WIDTH), generator=generator)
    yield "random bits, NaN and Inf too", bits.to(torch.int16).view(BF16).to(dtype)
    power = torch.randint(-12, 12, (4096, 1), generator=generator).float()
    yield "gaussian rows", (torch.randn(4096, WIDTH, generator=generator) * 2**power).to(dtype)
    amax = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(BF16)
    rows = torch.zeros(len(amax), WIDTH, dtype=BF16)
    rows[:, 0], rows[:, 16], rows[:, 32], rows[:, 33] = amax, 2688.0, amax / 2, -amax / 64
    yield "every finite BF16 amax", rows.to(dtype)


def stand_in(name: str, **members) -> None:
    """A module of that name, and its packages, holding just these members."""
    parts = name.split(".")
    for i in range(1, len(parts)):
        sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module


def load(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Counts:
    """Mismatches by recipe and case."""

    def __init__(self, device: str) -> None:
        self.device, self.table = device, {}

    def add(self, recipe: str, case: str, ours: tuple, theirs: tuple) -> None:
        """Of codes, scales and an outer scale if there is one; NaN equals NaN."""
        names = ("codes", "scales", "outer")
        differs = [int((_bits(a) != _bits(b)).sum()) for a, b in zip(ours, theirs, strict=True)]
        row = {"blocks": ours[1].numel(), **dict(zip(names, differs, strict=False))}
        print(f"{recipe:20} {case:40} {row}", flush=True)
        self.table.setdefault(recipe, {})[case] = row


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.float().nan_to_num(-1.0).view(torch.int32)
    return tensor


def transformer_engine(folder: Path, counts: Counts) -> None:
    recipes = "transformer_engine.pytorch.custom_recipes"
    anything = type("Anything", (), {})
    gemm = types.SimpleNamespace(GEMMType=types.SimpleNamespace(FPROP=0), MMParams=anything)
    formats = types.SimpleNamespace(Fp4Formats=Enum("Fp4Formats", "E2M1"))
    stand_in(recipes, gemm=gemm, reference_utils=formats)
    stand_in(
        "transformer_engine.pytorch.quantized_tensor",
        QuantizedTensorStorage=anything,
        Quantizer=type("Quantizer", (), {}),
    )
    reference = load(folder / recipes.replace(".", "/") / "reference_nvfp4.py").NVFP4QuantizerRef
    for dtype in (BF16, torch.float16, torch.float32):
        for case, x in inputs(dtype):
            q = nv.quantize(x, "transformer-engine")
            codes, scales = reference._quantize_blockwise_reference(
                x.clone(), x.abs().amax().float(), 16, 1, pow_2_scales=False, eps=0.0
            )
            nan = nv.formats.E4M3.decode  # the sign of a NaN scale is 0xFF in vector lanes
            ours, theirs = nan(q.scales), nan(scales.view(torch.uint8))
            counts.add(q.recipe.name, f"{case}, {dtype}", (q.codes, ours), (codes, theirs))


def vllm_reference(folder: Path, counts: Counts) -> None:
    e2m1 = types.SimpleNamespace(max=lambda: 6.0)
    stand_in("vllm.scalar_type", scalar_types=types.SimpleNamespace(float4_e2m1f=e2m1))
    stand_in("vllm.utils.torch_utils", direct_register_custom_op=lambda **_: None)
    reference = load(folder / VLLM / "quantization/utils/nvfp4_emulation_utils.py")
    for dtype in (BF16, torch.float16, torch.float32):
        for case, x in inputs(dtype):
            q = nv.quantize(x, "vllm-reference")
            encode = torch.tensor(2688.0) / x.abs().amax().float()
            values, scales = reference.ref_nvfp4_quant(x.clone(), encode, 16)
            ours = nv.formats.E2M1.decode(q.element_codes())
            nan = values.isnan()  # it gives values; a NaN has no code
            counts.add(
                q.recipe.name,
                f"{case}, {dtype}",
                (ours.where(~nan, 0.0), q.decoded_scales()),
                (values.where(~nan, 0.0), scales),
            )


def load_vllm_kernels(folder: Path) -> tuple[types.ModuleType, types.ModuleType]:
    """vLLM's staging modules: of the megamoe and of muse_spark."""
    import triton
    import triton.language as tl

    fp8 = torch.float8_e4m3fn
    group = types.SimpleNamespace(is_per_group=lambda: True, col=32)
    scale = types.SimpleNamespace(group_shape=group, static=False, dtype=torch.uint8)
    key = types.SimpleNamespace(dtype=fp8, symmetric=True, scale2=None, scale=scale)
    stand_in("vllm.triton_utils", tl=tl, triton=triton)
    stand_in("vllm.platforms", current_platform=platform_of(cuda=torch.cuda.is_available()))
    stand_in(
        "vllm.model_executor.layers.quantization.utils.quant_utils",
        FP8_DTYPE=fp8,
        QuantKey=object,
        kMxfp8Dynamic=key,
    )
    megamoe = load(folder / VLLM / "fused_moe/prepare_megamoe.py")
    return megamoe, load(folder / "vllm/models/muse_spark/nvidia/ops/prepare_megamoe_nvfp4.py")


def platform_of(cuda: bool) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        is_cuda_alike=lambda: False, is_cuda=lambda: cuda, is_arch_support_pdl=lambda: False
    )


def vllm_kernels(folder: Path, counts: Counts) -> None:
    megamoe, muse = load_vllm_kernels(folder)
    fp8 = torch.float8_e4m3fn
    for case, on_cpu in inputs(BF16):
        x = on_cpu.contiguous().cuda()
        rows = len(x)

        def empty(*shape, dtype, rows=rows):
            return torch.zeros(rows, *shape, dtype=dtype, device="cuda")

        ids, weights = empty(2, dtype=torch.int32), empty(2, dtype=torch.float32)
        routing = empty(2, dtype=torch.int64), empty(2, dtype=torch.float32)

        codes = empty(WIDTH // 2, dtype=torch.uint8)
        words, outer = empty(WIDTH // 64, dtype=torch.int32), empty(dtype=torch.float32)
        megamoe.prepare_megamoe_nvfp4_inputs(x, weights, ids, codes, words, outer, *routing)
        q = nv.quantize(x, "vllm-megamoe")
        assert q.outer is not None
        scales = nv.layouts.from_words(words)
        ours = (q.codes, q.scales, q.outer[:, 0])
        counts.add("vllm-megamoe", case, ours, (codes, scales, outer))

        codes, scales = torch.zeros_like(codes), empty(WIDTH // 16, dtype=torch.uint8)
        muse.prepare_megamoe_nvfp4_inputs(x, weights, ids, codes, scales, *routing)
        q = nv.quantize(x, "vllm-muse")
        counts.add("vllm-muse", case, (q.codes, q.scales), (codes, scales))

        elements, words = empty(WIDTH, dtype=fp8), empty(WIDTH // 128, dtype=torch.int32)
        megamoe.prepare_megamoe_inputs(x, weights, ids, elements, words, *routing)
        q = nv.quantize(x, "mxfp8-deepseek-v4")
        theirs = elements.view(torch.uint8), nv.layouts.from_words(words)
        counts.add("mxfp8-deepseek-v4", case, (q.codes, q.scales), theirs)


def fp_quant(folder: Path, counts: Counts) -> None:
    """It gives BF16 values alone: an element counts where it is more than one BF16 ulp off."""
    kernel = load(folder / "fp_quant/module/triton/nvfp4.py")
    eye = torch.eye(32, dtype=BF16, device="cuda")  # its Hadamard transform, switched off
    piece = 16384  # of its largest block of elements
    for case, on_cpu in inputs(BF16):
        x = on_cpu.flatten()[: on_cpu.numel() // piece * piece].view(-1, WIDTH).cuda()
        encode = 2688.0 / x.abs().amax().float() if x.numel() else torch.tensor(torch.inf)
        if not 0 < encode.item() < torch.inf:
            continue  # small cases, zero tensors, NaN and Inf: no number to give as its scale
        values = kernel.nvfp4_forward_kernel_wrapper(x, eye, encode.reshape(1)).float()
        q = nv.quantize(x, "fp-quant", outer=1 / encode)
        ours = q.dequantize()
        near = (values - ours).abs() <= ours.abs() * 2.0**-7
        counts.add("fp-quant", case, (near, q.scales), (torch.ones_like(near), q.scales))


def main(folder: Path) -> int:
    gpu = torch.cuda.is_available()
    counts = Counts(torch.cuda.get_device_name() if gpu else "CPU")
    import triton
    import triton.language as tl

    stand_in("vllm.triton_utils", tl=tl, triton=triton)
    stand_in("vllm.platforms", current_platform=platform_of(cuda=gpu))
    peers: tuple[Callable, ...] = (
        (vllm_kernels, fp_quant) if gpu else (vllm_reference, transformer_engine)
    )
    for peer in peers:
        peer(folder, counts)
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    entry = {"environment": {**versions, "triton": triton.__version__}, "recipes": counts.table}
    known = json.loads(TARGET.read_text(encoding="utf-8")) if TARGET.exists() else {}
    known[counts.device] = entry
    TARGET.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
