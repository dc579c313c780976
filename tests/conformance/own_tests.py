"""The tests that peers ship of their own, run with our recipe in the peer's place.

compressed-tensors: its tests of packing; our tables and nibbles stand for its helpers. fouroversix:
its tests that two backends agree, which name the device "cuda"; here that is the CPU and we are one
of the backends. llama.cpp: the bound on the total error of NVFP4 in its test-quantize-fns.cpp. The
wheels and source archives of torchao, ModelOpt, MLX and gguf hold no NVFP4 test that a CPU runs.

May be changed: what stands in for what, when a peer moves its functions. May not: a test of theirs
left out that our recipe could be run through; `select` says which those are.
"""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import nvfp4lab as nv
from nvfp4lab import layouts
from nvfp4lab.formats import E2M1


class CompressedTensors:
    """Packing of values that are on the E2M1 grid."""

    source = "compressed_tensors-0.20.0"
    tests = ("test_fp4_quant.py", "test_fp4_optimizations.py")
    folder = "tests/test_compressors"

    def select(self, item) -> bool:
        return "pack" in item.name and "cuda" not in item.name

    def stand_in(self, patch: pytest.MonkeyPatch) -> None:
        from compressed_tensors.compressors.nvfp4 import helpers

        def pack(x):
            if x.shape[-1] % 2:
                raise ValueError(f"an even number of columns, got {tuple(x.shape)}")
            return layouts.pack_nibbles(E2M1.encode(x.float()))

        def unpack(packed, rows, columns, dtype=torch.bfloat16):
            return E2M1.decode(layouts.unpack_nibbles(packed)).reshape(rows, columns).to(dtype)

        patch.setattr(helpers, "pack_fp4_to_uint8", pack)
        patch.setattr(helpers, "unpack_fp4_from_uint8", unpack)


class FourOverSix:
    """Its PyTorch backend against ours, under each of its rules that has a recipe."""

    source = "fouroversix-1.0.5"
    tests = ("test_quantize.py",)
    folder = "tests"
    recipes = {  # noqa: RUF012
        "mse": "fouroversix",
        "mae": "fouroversix-mae",
        "abs_max": "fouroversix-max",
        "static_6": "fouroversix-static6",
    }

    def select(self, item) -> bool:
        of = getattr(item, "callspec", None)
        if of is None or item.originalname != "test_backend_outputs_are_consistent":
            return False
        p = of.params
        return (
            {p["backend_a"].value, p["backend_b"].value} == {"triton", "pytorch"}
            and p["dtype"].value == "nvfp4"
            and p["scale_rule"].value in self.recipes
            and (p["block_scale_2d"], p["rht"]) == ("no_block_scale_2d", "no_rht")
        )

    def stand_in(self, patch: pytest.MonkeyPatch) -> None:
        from fouroversix import QuantizeBackend
        from fouroversix.quantize.frontend import AVAILABLE_BACKENDS
        from fouroversix.quantize.quantized_tensor import QuantizedTensor

        recipes = self.recipes

        class Ours:
            @staticmethod
            def is_available() -> bool:
                return True

            @staticmethod
            def can_quantize(x, config) -> bool:
                return True

            @staticmethod
            def quantize_to_fp4(x, config):
                x = x.T if config.transpose else x
                q = nv.quantize(x, recipes[config.scale_rule.value])
                amax = nv.codec.find_outer(x, q.recipe).amax
                scales = layouts.to_tiles(q.scales).flatten().view(torch.float8_e4m3fn)
                return QuantizedTensor(
                    q.codes, scales, amax, config.dtype, tuple(x.shape), config.scale_rule
                )

        patch.setitem(AVAILABLE_BACKENDS, QuantizeBackend.triton, Ours)
        for name in ("zeros", "ones", "randint", "randn"):
            real = getattr(torch, name)
            patch.setattr(torch, name, lambda *a, device, real=real, **k: real(*a, **k))


class Outcomes:
    """Counts what pytest reports; keeps the chosen tests alone."""

    def __init__(self, select) -> None:
        self.select, self.counts = select, Counter()

    def pytest_collection_modifyitems(self, items) -> None:
        self.counts["theirs"] = len(items)
        items[:] = [item for item in items if self.select(item)]
        self.counts["run"] = len(items)

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1


def run_tests(peer, sources: Path) -> dict[str, int]:
    """theirs: how many tests the files hold; run: those that our recipe can stand in for, by what
    became of them: passed, skipped (by themselves, for want of a GPU), failed."""
    folder = sources / peer.source / peer.folder
    outcomes = Outcomes(peer.select)
    paths = [str(folder / name) for name in peer.tests]
    with pytest.MonkeyPatch.context() as patch:
        peer.stand_in(patch)
        pytest.main([*paths, "-q", "--no-header", "-p", "no:cacheprovider"], [outcomes])
    return dict(outcomes.counts)


def ggml_total_error(sources: Path) -> dict[str, float]:
    """Root of the summed squares over n, of 0.1 + 2 cos(i), as test-quantize-fns.cpp has it."""
    path = sources / "llama_cpp_python-0.3.36/vendor/llama.cpp/tests/test-quantize-fns.cpp"
    bound = re.search(r"MAX_QUANTIZATION_TOTAL_ERROR_FP4 = ([\d.]+)f", path.read_text())
    assert bound is not None
    x = (0.1 + 2 * torch.arange(32 * 128, dtype=torch.float32).cos()).view(1, -1)
    off = (nv.quantize(x, "llama.cpp").dequantize() - x).double()
    return {"total_error": float(off.square().sum().sqrt() / x.numel()), "below": float(bound[1])}


def run(sources: Path) -> dict[str, dict]:
    """Recipe -> what its peer's own tests gave."""
    return {
        "compressed-tensors": run_tests(CompressedTensors(), sources),
        "fouroversix": run_tests(FourOverSix(), sources),
        "llama.cpp": ggml_total_error(sources),
    }


def failed(outcome: dict) -> bool:
    """Whether a test of theirs did not pass; those that want a GPU skip themselves."""
    if "below" in outcome:
        return outcome["total_error"] >= outcome["below"]
    passed, skipped = outcome.get("passed", 0), outcome.get("skipped", 0)
    return not passed or passed + skipped != outcome["run"]
