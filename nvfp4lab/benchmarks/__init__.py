"""How fast: the staging kernel and its neighbours, each beside what does next to nothing else.

results.py    Sample and Result: what was measured, as a table and as JSON
machine.py    the device, versions and commit that a result holds for
inputs.py     random inputs, buffers that rotate past the L2, the bytes that a case moves
timing.py     medians: CUDA-graph replays, interleaved; the wall clock
staging.py    `stage_mega_moe_inputs`, the user's kernel and the yardstick on a GPU
dequantize.py `Quantized.dequantize` and a yardstick of its own bytes
sweep.py      the yardstick's own best shape
measure.py    `measure` on a GPU; host.py: what a launch costs the host
cpu.py        `quantize` on the CPU beside a copy and the packages that are installed
running.py    `run`: the parts that were asked for, step by step (steps.py), in one Result
compiled.py   registers and instructions of the compiled kernels, without a GPU; kernels.py: which

To time something else, write a module with `steps(settings)` like these and name it in
running.PARTS.
"""

from nvfp4lab.benchmarks.inputs import QUICK, Settings
from nvfp4lab.benchmarks.results import Result, Sample
from nvfp4lab.benchmarks.running import PARTS, run

__all__ = ["PARTS", "QUICK", "Result", "Sample", "Settings", "run"]
