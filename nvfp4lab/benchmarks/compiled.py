"""What the kernels compile to, without a GPU: registers, spills, instructions an element.

`python -m nvfp4lab.benchmarks.compiled` compiles the table of `kernels` for each of TARGETS and
prints it; `--write` keeps it in data/benchmarks/compiled.json under the version of Triton, against
which a test holds every later change, so that a slower kernel is seen without a GPU. It has to run
in a process without Triton's interpreter; `in_processes` starts such ones.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from unittest import mock

from nvfp4lab.benchmarks import sass
from nvfp4lab.benchmarks.kernels import KERNELS
from nvfp4lab.benchmarks.machine import CHECKOUT
from nvfp4lab.benchmarks.results import aligned

TARGETS = (80, 90, 100, 120)
COMMITTED = CHECKOUT / "data" / "benchmarks" / "compiled.json"

SHOWN = ("registers", "spills", "shared_bytes", "warps", "programs", "straight", "loops",
         "instructions", "per_element")  # fmt: skip

Figures = dict[str, Any]


def figures(name: str, target: int, file: Path | None = None) -> Figures:
    """Compile one kernel for one compute capability, as its launcher would launch it.

    registers a thread; spills: loads and stores of local memory; shared_bytes and warps a program;
    programs; arguments: type -> how many are passed at a launch; straight, loops, pipes: as
    `sass.Counts`; instructions: that a thread executes, every branch taken; per_element: that over
    the elements that a thread has, lanes past the end of a row included. file: a source in place of
    the kernel's own module. Triton's driver stays replaced.

    Raises: whatever Triton does where the kernel does not compile, ValueError if the table says
    that a kernel has loops and it has none, or the reverse.
    """
    from triton import knobs

    kernel = KERNELS[name]
    compiled, grid = _compile(lambda: kernel.launch(_fresh(kernel.module, file)), target)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        tool = knobs.nvidia.cuobjdump.path
        counts = sass.count(_output(tool, "-sass", str(cubin)))
        used = dict(re.findall(r"([A-Z]+):(\d+)", _output(tool, "-res-usage", str(cubin))))
    _check_loops(name, target, counts.loops)
    taken = [kind for kind in compiled.src.signature.values() if kind != "constexpr"]
    executed = counts.executed(kernel.trips)
    warps, programs = compiled.metadata.num_warps, math.prod(grid)
    threads = programs * warps * 32
    return {
        "registers": int(used["REG"]),
        "spills": counts.spills,
        "shared_bytes": compiled.metadata.shared,
        "warps": warps,
        "programs": programs,
        "arguments": dict(sorted(Counter(taken).items())),
        "straight": counts.straight,
        "loops": list(counts.loops),
        "pipes": counts.pipes,
        "instructions": executed,
        "per_element": round(executed * threads / kernel.elements, 2),
    }


def _check_loops(name: str, target: int, loops: tuple[int, ...]) -> None:
    trips = KERNELS[name].trips
    if bool(loops) != bool(trips):
        raise ValueError(f"{name} for sm_{target} has loops {loops}, trips {trips}")


class _Driver:
    """What Triton asks of a driver in order to compile: a target, and a device to cache for."""

    def __init__(self, target: int) -> None:
        self.target = target

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.target, 32)

    def get_current_device(self) -> int:
        return self.target

    def get_current_stream(self, device: int) -> int:
        return 0


class _Launched(BaseException):
    """Ends a launcher where it would have launched."""


def _compile(launch: Callable[[], Any], target: int) -> tuple[Any, tuple[int, ...]]:
    """The first kernel that `launch` launches, compiled for the target, and its grid.

    A launcher that asks torch for the device's compute capability gets the target's.
    """
    import torch
    import triton

    run, caught = triton.JITFunction.run, []

    def compile_only(self, *args, grid, warmup, **kwargs):
        caught.append((run(self, *args, grid=grid, warmup=True, **kwargs), tuple(grid)))
        raise _Launched

    triton.runtime.driver.set_active(cast(Any, _Driver(target)))
    with (
        mock.patch.object(triton.JITFunction, "run", compile_only),
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: divmod(target, 10)),
        mock.patch.object(torch.version, "cuda", torch.version.cuda or "of the target"),
        contextlib.suppress(_Launched),
    ):
        launch()
    if not caught:
        raise RuntimeError("the launcher launched nothing")
    return caught[0]


def _fresh(name: str, file: Path | None) -> ModuleType:
    """The module, or the one that `file` would be in its place, with nothing cached from before."""
    sys.modules.pop(name, None)
    if file is None:
        return importlib.import_module(name)
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


# ---- All of them ----


def in_processes(
    names: Sequence[str] = tuple(KERNELS), targets: Sequence[int] = TARGETS, processes: int = 2
) -> dict[str, dict[str, Figures]]:
    """name -> target -> figures, compiled in so many processes that have no interpreter.

    Raises: RuntimeError with what a process wrote, if one failed.
    """
    pairs = [f"{name}:{target}" for name in names for target in targets]
    with tempfile.TemporaryDirectory() as cache:
        running = [_start(pairs[i::processes], Path(cache)) for i in range(processes)]
        done = [(process.communicate(), process.returncode) for process in running]
    found: dict[str, dict[str, Figures]] = {name: {} for name in names}
    for (out, errors), code in done:
        if code:
            raise RuntimeError(f"a kernel did not compile:\n{errors}")
        for pair, figures_ in json.loads(out).items():
            name, _, target = pair.rpartition(":")
            found[name][target] = figures_
    return {name: {str(t): found[name][str(t)] for t in targets} for name in names}


def _start(pairs: Sequence[str], cache: Path, file: Path | None = None) -> subprocess.Popen:
    """A process that prints the figures of `name:target` pairs as JSON."""
    environment = {key: v for key, v in os.environ.items() if key != "TRITON_INTERPRET"}
    search = [str(CHECKOUT), os.environ.get("PYTHONPATH", "")]
    environment |= {
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(filter(None, search)),
    }
    command = [sys.executable, "-m", "nvfp4lab.benchmarks.compiled", "--json", *pairs]
    command += ["--file", str(file)] if file else []
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def compile_file(name: str, target: int, file: Path, cache: Path) -> tuple[int, str]:
    """(exit code, what was written) of compiling a kernel from another source, on its own."""
    process = _start([f"{name}:{target}"], cache, file)
    out, errors = process.communicate()
    return process.returncode, out + errors


def table(found: dict[str, dict[str, Figures]]) -> str:
    """The figures as text, a row a kernel and target, the pipes as columns."""
    pipes = sorted({pipe for targets in found.values() for one in targets.values()
                    for pipe in one["pipes"]})  # fmt: skip
    rows = [["kernel", "sm", *SHOWN, *pipes]]
    for name, targets in found.items():
        for target, one in targets.items():
            counted = [one["pipes"].get(pipe, 0) for pipe in pipes]
            rows.append([name, target, *(str(one[key]) for key in SHOWN), *map(str, counted)])
    return aligned(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Compile and print; 0."""
    parser = argparse.ArgumentParser(description="Registers and instructions of the kernels.")
    parser.add_argument("names", nargs="*", metavar="KERNEL", help="(default: all)")
    parser.add_argument("--write", action="store_true", help=f"keep them in {COMMITTED.name}")
    parser.add_argument("--json", action="store_true", help="KERNEL:SM each, compiled here")
    parser.add_argument("--file", type=Path, help="compile this source in place of the module's")
    args = parser.parse_args(argv)
    kernels = [name.rpartition(":")[0] if args.json else name for name in args.names]
    if unknown := [name for name in kernels if name not in KERNELS]:
        parser.error(f"no kernel {', '.join(unknown)}; there are {', '.join(KERNELS)}")
    if args.write and args.names:
        parser.error("--write renews all kernels; name none")
    if args.file and not args.json:
        parser.error("--file goes with --json")
    if args.json:
        pairs = {pair: pair.rpartition(":") for pair in args.names}
        print(json.dumps({p: figures(n, int(t), args.file) for p, (n, _, t) in pairs.items()}))
        return 0
    import triton

    found = in_processes(tuple(args.names or KERNELS))
    print(f"Triton {triton.__version__}\n{table(found)}")
    if args.write:
        kept = json.loads(COMMITTED.read_text(encoding="utf-8")) if COMMITTED.exists() else {}
        kept[triton.__version__] = found
        COMMITTED.write_text(_as_json(kept), encoding="utf-8")
    return 0


def _as_json(kept: dict[str, dict[str, dict[str, Figures]]]) -> str:
    """A line a kernel and target."""
    versions = []
    for version, kernels in sorted(kept.items()):
        lines = [
            f"{json.dumps(name)}: {{\n"
            + ",\n".join(f"{json.dumps(t)}: {json.dumps(one)}" for t, one in targets.items())
            + "\n}"
            for name, targets in kernels.items()
        ]
        versions.append(f"{json.dumps(version)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(versions) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
