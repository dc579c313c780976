"""Where kernels run under test: compiled on a CUDA GPU, else on the CPU in Triton's interpreter.

Triton reads TRITON_INTERPRET when it decorates a kernel, so it is set here, before any test imports
triton. On a machine with a GPU the interpreter's tests are skipped; TRITON_INTERPRET=1 runs them
there, in place of the compiled ones. May be changed: fixtures may be added.
"""

import importlib.util
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")

# Triton is there on Linux only. test_staging.py runs without it, by the torch path.
NEED_TRITON = [
    "test_compiled.py",
    "test_counting.py",
    "test_dequantize.py",
    "test_kernels.py",
    "test_seed_faults.py",
    "test_steps.py",
]
collect_ignore = [] if importlib.util.find_spec("triton") else NEED_TRITON

INTERPRETER = pytest.param(
    "cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="kernels are compiled in this process")
)
COMPILED = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not HAS_GPU or INTERPRETED, reason="needs a GPU, and no interpreter"),
    ],
)


@pytest.fixture(params=[INTERPRETER, COMPILED])
def device(request) -> str:
    """The device of a kernel's tensors: "cpu" is the interpreter, "cuda" the compiled kernel."""
    return request.param


@pytest.fixture(params=[COMPILED])
def gpu(request) -> str:
    """The CUDA device, where a test is for the compiled kernel only."""
    return request.param


@pytest.fixture(params=[INTERPRETER])
def interpreter(request) -> str:
    """The CPU, where a test is for the interpreter only."""
    return request.param
