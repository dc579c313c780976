"""What a benchmark's numbers hold for: the device, the versions and the commit.

Part of every `Result`. May be changed: more may be said of a machine; what is there keeps its name,
for data/benchmarks holds it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import nvfp4lab

CHECKOUT = Path(nvfp4lab.__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "numpy")


def describe() -> dict[str, Any]:
    """Date (UTC), commit and whether the checkout differs from it, versions, CPU and GPU."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **_commit(),
        "versions": {
            "nvfp4lab": nvfp4lab.__version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
            "cuda": torch.version.cuda,
        },
        "cpu": {"name": _cpu_name(), "threads": torch.get_num_threads()},
        "gpu": _gpu() if torch.cuda.is_available() else None,
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def _commit() -> dict[str, Any]:
    """Of the checkout that the package was imported from; None where it is none, or no git is."""
    top = _first_line("git", "-C", str(CHECKOUT), "rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != CHECKOUT:
        return {"commit": None, "dirty": None}
    return {
        "commit": _first_line("git", "-C", str(CHECKOUT), "rev-parse", "HEAD"),
        "dirty": bool(_first_line("git", "-C", str(CHECKOUT), "status", "--porcelain")),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _first_line(*command: str) -> str | None:
    """Of what the command prints; None if it fails, is not there, or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None
