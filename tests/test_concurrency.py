"""The same bits whatever goes on around a call: threads, processes, torch's modes, streams, graphs.

`public_calls` has the calls. May be changed: a mode gets a row in MODES, an operation on a GPU one
in ON_GPU.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from public_calls import CALLS, HEAVY, bits, digest, digests, values
from sweep_runs import EXACT, alike, capture, swept

import nvfp4lab as nv
from nvfp4lab import cli
from nvfp4lab.capture.folder import CaptureFolder
from nvfp4lab.sweeps import state

TESTS = Path(__file__).parent
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def environment() -> dict[str, str]:
    """In which a new process finds the package and the tests."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    return os.environ | {"PYTHONPATH": path}


def run(code: str, **env: str) -> str:
    """The output of Python code in a new process."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment() | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


class _set:
    """how(on) within the block, how(off) after it."""

    def __init__(self, how: Callable, on: object, off: object):
        self.how, self.on, self.off = how, on, off

    def __enter__(self) -> None:
        self.how(self.on)

    def __exit__(self, *_: object) -> None:
        self.how(self.off)


# ---- Threads ----

LIGHT = [name for name in CALLS if name not in HEAVY]


@pytest.fixture(scope="module")
def alone() -> dict[str, str]:
    """The digest of each call on one thread with nothing beside it."""
    found = digests()
    assert not [text for text in found.values() if ":" in text]
    return found


COLD_THREADS = """
import json, sys, threading
from concurrent.futures import ThreadPoolExecutor
sys.setswitchinterval(1e-5)
import public_calls  # which has imported no module of nvfp4lab but what its table needs
together = threading.Barrier(8)
def work(thread):
    names = [*{light!r}[thread % 4 :: 4], *{heavy!r}[thread % 4 :: 4]]
    together.wait()
    return public_calls.digests(names)
with ThreadPoolExecutor(8) as pool:
    print(json.dumps(list(pool.map(work, range(8)))))
"""


def test_eight_threads_start_cold_on_every_public_function(alone):
    """Lazy imports, tables and caches are first touched by racing threads, two at each call."""
    code = COLD_THREADS.format(light=LIGHT, heavy=HEAVY)
    for found in json.loads(run(code)):
        differing = {name: found[name] for name in found if found[name] != alone[name]}
        assert not differing


COLD_INTERPRETER = """
import json, sys, threading
from concurrent.futures import ThreadPoolExecutor
sys.setswitchinterval(1e-6)
import public_calls
together = threading.Barrier(8)
def work(_):
    together.wait()
    return public_calls.digests({names!r})
with ThreadPoolExecutor(8) as pool:
    print(json.dumps(list(pool.map(work, range(8)))))
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")
def test_eight_threads_launch_kernels_in_the_interpreter(alone):
    names = ["stage nvfp4", "stage nvfp4-token", "stage seed"]
    code = COLD_INTERPRETER.format(names=names)
    found = json.loads(run(code, TRITON_INTERPRET="1"))
    assert found == [{name: alone[name] for name in names}] * 8


def test_asyncio_may_call_from_threads(alone):
    async def every() -> list[dict[str, str]]:
        return await asyncio.gather(*(asyncio.to_thread(digests, LIGHT[i::4]) for i in range(4)))

    together = {name: text for found in asyncio.run(every()) for name, text in found.items()}
    assert together == {name: alone[name] for name in LIGHT}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_get_the_same(method, alone):
    """Forked after all of it was used, with one thread of torch: more may hang, as torch's do."""
    names = ["quantize nvfp4", "quantize_by_a_table", "measure nvfp4-token", "stage nvfp4"]
    code = (
        "import json, multiprocessing, public_calls\n"
        "if __name__ == '__main__':\n"
        f"    public_calls.digests({names!r})\n"
        f"    with multiprocessing.get_context({method!r}).Pool(2) as pool:\n"
        f"        print(json.dumps(pool.map(public_calls.digests, [{names!r}] * 2)))\n"
    )
    found = json.loads(run(code, OMP_NUM_THREADS="1"))
    assert found == [{name: alone[name] for name in names}] * 2


# ---- Modes of torch ----

MODES: dict[str, Callable[[], Any]] = {
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64 by default": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16 by default": lambda: _set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "a default device": lambda: torch.device("meta"),
    "deterministic algorithms": lambda: _set(torch.use_deterministic_algorithms, True, False),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_of_torch_changes_no_bit(mode, alone):
    slow = "identify_a_rule_without_a_name"
    names = [n for n in CALLS if n != slow] if "default" in mode else LIGHT
    with MODES[mode]():
        found = digests(names)
    assert {n: found[n] for n in names if found[n] != alone[n]} == {}


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_torchs_number_of_threads_changes_no_bit(threads, alone):
    """But of sums over much, and of products of matrices: `sweeps` says so of sums."""
    names = [name for name in LIGHT if name != "through_experts"]
    with _set(torch.set_num_threads, threads, torch.get_num_threads()):
        found = digests(names)
    assert {n: found[n] for n in names if found[n] != alone[n]} == {}


# ---- Processes in one place ----


def test_a_state_in_use_can_be_read_where_nothing_is_left_to_count(tmp_path):
    """As the page of a report is made while another sweep of the same state goes on."""
    folder, kept = capture(tmp_path / "a folder"), tmp_path / "state"
    recipes = ["nvfp4", "nvfp4-tensor"]
    whole = swept(folder, recipes, state=kept)
    with state.State(kept, []):
        assert alike(swept(folder, recipes, state=kept), whole)
        with pytest.raises(RuntimeError, match="is in use by another sweep"):
            swept(folder, [*recipes, "seed"], state=kept)
    assert alike(swept(folder, recipes, state=kept), whole)


def test_sweeps_started_together_give_what_one_gives_or_are_refused(tmp_path):
    folder = capture(tmp_path / "a folder")
    sweep = ["sweep", str(folder), "--recipes", "nvfp4", "nvfp4-tensor", "--out"]
    assert cli.main([*sweep, str(tmp_path / "one.csv")]) == 0
    together = [
        subprocess.Popen(
            [sys.executable, "-m", "nvfp4lab.cli", *sweep, "o.csv"],
            cwd=tmp_path,
            env=environment(),
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    errors = [process.communicate()[1] for process in together]
    codes = [process.returncode for process in together]
    assert 0 in codes
    for code, said in zip(codes, errors, strict=True):
        assert code == 0 or (code == 2 and "in use by another sweep" in said), said
        assert "Traceback" not in said
    assert (tmp_path / "o.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()


def _captured(path: Path) -> CaptureFolder:
    return CaptureFolder(path, {"is": "a test"}, {}, shard_bytes=1 << 20)


def _commit(folder: CaptureFolder, rows: int) -> None:
    columns = {"hidden": values(rows, 64), "positions": torch.arange(rows)}
    folder.commit({(0, "mlp_input"): columns}, tokens_seen=rows)


def test_a_capture_that_ends_while_another_goes_on_with_it_loses_nothing(tmp_path, monkeypatch):
    """The other has read capture.json and waits for its turn when the first ends."""
    first = _captured(tmp_path / "c")
    _commit(first, 5)
    locked = CaptureFolder._locked

    def first_ends_then_locked(self: CaptureFolder) -> Any:
        first.finish()
        return locked(self)

    monkeypatch.setattr(CaptureFolder, "_locked", first_ends_then_locked)
    second = _captured(tmp_path / "c")
    _commit(second, 3)
    second.finish()
    assert [len(record) for record in nv.load_activations(tmp_path / "c")] == [5, 3]


def test_a_capture_that_goes_on_is_not_read(tmp_path):
    folder = _captured(tmp_path / "c")
    _commit(folder, 5)
    with pytest.raises(ValueError, match="interrupted"):
        nv.load_activations(tmp_path / "c")
    with pytest.raises(RuntimeError, match="is being written by another process"):
        _captured(tmp_path / "c")
    folder.finish()
    assert [len(record) for record in nv.load_activations(tmp_path / "c")] == [5]


# ---- On a GPU ----


def _staged(x: torch.Tensor, recipe: str) -> list[torch.Tensor | None]:
    ids = torch.arange(2 * len(x), dtype=torch.int32, device=x.device).view(-1, 2)
    staged = nv.stage(x, ids.float(), ids, recipe, is_padding=ids[:, 0] % 3 == 0)
    return [staged.x_fp4, staged.x_sf, staged.x_scales, staged.topk_idx, staged.topk_weights]


def _counted(statistics: nv.Statistics) -> list:
    return [getattr(statistics, name) for name in EXACT]


# What is the same on a CPU and a GPU to the bit.
ON_GPU: dict[str, Callable[[torch.Tensor], list]] = {
    **{
        f"quantize {name}": lambda x, name=name: [nv.quantize(x, name)]
        for name in ("nvfp4", "nvfp4-token", "nvfp4-tensor", "vllm-reference", "fouroversix")
    },
    **{
        f"stage {name}": lambda x, name=name: _staged(x, name)
        for name in ("nvfp4", "nvfp4-token", "vllm-megamoe", "vllm-muse", "seed")
    },
    **{
        f"dequantize {name}": lambda x, name=name: [nv.quantize(x, name).dequantize(torch.float16)]
        for name in ("nvfp4", "nvfp4-token", "mxfp4-floor", "nvint4")
    },
    "measure": lambda x: _counted(nv.measure(x, "nvfp4")),
    "measure an outer scale": lambda x: _counted(nv.measure(x, "nvfp4-tensor")),
    "measure a pair": lambda x: _counted(nv.measure(x, nv.quantize(x, "nvfp4-token"))),
    "element_errors": lambda x: [nv.errors.element_errors(x[:4], "nvfp4")],
    "scale_histogram": lambda x: [nv.errors.scale_histogram(nv.quantize(x))],
    "explain_block": lambda x: [nv.explain_block(x[0, :16], "nvfp4").elements],
    "compare": lambda x: [repr(nv.compare(nv.quantize(x), nv.quantize(x, "cublas"), x))],
}
on_gpu = pytest.mark.parametrize("name", ON_GPU)


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """Of each operation on the CPU."""
    return {name: digest(operation(values(64, 512))) for name, operation in ON_GPU.items()}


@on_gpu
def test_work_is_ordered_on_the_current_stream(name, gpu, expected):
    """What it reads is written behind a long kernel on that stream: too early, it reads zeros."""
    given, x = values(64, 512).to(gpu), torch.zeros(64, 512, dtype=torch.bfloat16, device=gpu)
    ON_GPU[name](x)  # compiles
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        x.copy_(given)
        got = ON_GPU[name](x)
    stream.synchronize()
    assert digest(got) == expected[name]


@pytest.mark.parametrize("name", ["quantize nvfp4", "stage nvfp4-token", "measure"])
def test_work_on_a_stream_does_not_wait_for_the_default_one(name, gpu):
    x, stream = values(64, 512).to(gpu), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        ON_GPU[name](x)  # compiles and allocates
    stream.synchronize()
    torch.cuda._sleep(4_000_000_000)  # two seconds
    ended = torch.cuda.Event()
    ended.record()
    with torch.cuda.stream(stream):
        ON_GPU[name](x)
    stream.synchronize()
    assert not ended.query()
    torch.cuda.synchronize()


COLD_THREADS_ON_A_GPU = """
import threading, torch
from concurrent.futures import ThreadPoolExecutor
from public_calls import digest, values
import test_concurrency
name = {name!r}
together = threading.Barrier(8)
given = [values(64, 512).cuda() for _ in range(8)]
torch.cuda.synchronize()
def work(x):
    with torch.cuda.stream(torch.cuda.Stream()):
        together.wait()
        return digest(test_concurrency.ON_GPU[name](x))
with ThreadPoolExecutor(8) as pool:
    print(*pool.map(work, given))
"""


@pytest.mark.parametrize(
    "name", ["stage nvfp4-token", "stage seed", "dequantize nvfp4", "quantize nvfp4", "measure"]
)
def test_eight_threads_with_streams_of_their_own_start_cold(name, gpu, expected, tmp_path):
    """Nothing compiled, in a new process: the first launch of a kernel is a race of eight."""
    found = run(COLD_THREADS_ON_A_GPU.format(name=name), TRITON_CACHE_DIR=str(tmp_path))
    assert found.split() == [expected[name]] * 8


def _buffers(x: torch.Tensor, recipe: str) -> dict[str, Any]:
    tokens, width = x.shape
    like: dict[str, Any] = {"device": x.device}
    buffers: dict[str, Any] = {
        "hidden_states": x,
        "topk_weights": torch.rand(tokens, 2, **like),
        "topk_ids": torch.zeros(tokens, 2, dtype=torch.int32, **like),
        "x_fp4": torch.zeros(tokens, width // 2, dtype=torch.uint8, **like),
        "x_sf": torch.zeros(tokens, width // 64, dtype=torch.int32, **like),
        "topk_idx_out": torch.zeros(tokens, 2, dtype=torch.int64, **like),
        "topk_weights_out": torch.zeros(tokens, 2, **like),
    }
    if recipe in ("nvfp4-token", "vllm-megamoe"):
        buffers["x_scales"] = torch.zeros(tokens, **like)
    return buffers


def captured_staging(recipe: str, warm: bool) -> bool:
    """Whether a graph of a staging, replayed after its inputs have changed, writes their bytes."""
    x = torch.zeros(64, 512, dtype=torch.bfloat16, device="cuda")
    buffers = _buffers(x, recipe)
    if warm:
        nv.stage_mega_moe_inputs(**buffers, recipe=recipe)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        nv.stage_mega_moe_inputs(**buffers, recipe=recipe)
    for given in (values(64, 512), bits(64, 512).nan_to_num_()):
        x.copy_(given)
        buffers["topk_ids"].add_(3)
        graph.replay()
        right = torch.equal(buffers["x_fp4"].cpu(), nv.quantize(given, recipe).codes)
        if not right or not torch.equal(buffers["topk_idx_out"], buffers["topk_ids"].long()):
            return False
    return True


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token", "vllm-megamoe", "vllm-muse", "seed"])
def test_a_cuda_graph_of_staging_replays_with_other_inputs(recipe, gpu):
    assert captured_staging(recipe, warm=True)


@pytest.mark.parametrize("recipe", ["nvfp4", "seed"])
def test_staging_may_compile_while_a_graph_is_captured(recipe, gpu, tmp_path):
    code = f"import test_concurrency as t; print(t.captured_staging({recipe!r}, warm=False))"
    assert run(code, TRITON_CACHE_DIR=str(tmp_path)) == "True"


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token"])
def test_a_cuda_graph_of_dequantize_replays_with_other_codes(recipe, gpu):
    q, other = (nv.quantize(x.to(gpu), recipe) for x in (values(64, 512), bits(64, 512)))
    q.dequantize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = q.dequantize()
    for own, new in ((q.codes, other.codes), (q.scales, other.scales), (q.outer, other.outer)):
        if own is not None and new is not None:
            own.copy_(new)
    graph.replay()
    torch.testing.assert_close(out, other.dequantize(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["quantize nvfp4", "measure", "measure a pair"])
def test_what_a_cuda_graph_cannot_hold_is_refused_and_leaves_the_graph_whole(name, gpu, expected):
    x, buffers = values(64, 512).to(gpu), _buffers(values(64, 512).to(gpu), "nvfp4")
    nv.stage_mega_moe_inputs(**buffers)
    q = nv.quantize(x)
    refused = {
        "quantize nvfp4": lambda: nv.quantize(x),
        "measure": lambda: nv.measure(x, "nvfp4"),
        "measure a pair": lambda: nv.measure(x, q),
    }
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="CUDA graph"):
            refused[name]()
        nv.stage_mega_moe_inputs(**buffers)
    graph.replay()
    assert torch.equal(buffers["x_fp4"].cpu(), q.codes.cpu())


@two_gpus
@on_gpu
def test_every_operation_runs_on_its_tensors_device(name, gpu, expected):
    """On the one that is not current, on both in turns; which is current does not change."""
    for current in (0, 1):
        with torch.cuda.device(current):
            for index in (1, 0, 1, 1 - current):
                x = values(64, 512).to(f"cuda:{index}")
                got = ON_GPU[name](x)
                devices = {t.device for t in got if isinstance(t, torch.Tensor)}
                assert devices <= {x.device}
                torch.cuda.synchronize(index)
                assert digest(got) == expected[name], f"on {index} while {current} was current"
                assert torch.cuda.current_device() == current


@two_gpus
@on_gpu
def test_an_operation_on_the_second_gpu_is_ordered_on_its_stream(name, gpu, expected):
    device = torch.device("cuda:1")
    x = torch.zeros(64, 512, dtype=torch.bfloat16, device=device)
    given = values(64, 512).to(device)
    with torch.cuda.device(0):
        ON_GPU[name](x)
        torch.cuda.synchronize(device)
        with torch.cuda.device(device):
            torch.cuda._sleep(200_000_000)
        x.copy_(given)
        got = ON_GPU[name](x)
    torch.cuda.synchronize(device)
    assert digest(got) == expected[name]


@two_gpus
def test_tensors_on_two_devices_are_refused(gpu):
    x = values(64, 512).to("cuda:0")
    elsewhere = nv.quantize(x.to("cuda:1"))
    buffers = _buffers(x, "nvfp4")
    for other in ("topk_ids", "topk_weights", "x_fp4", "x_sf", "topk_idx_out", "topk_weights_out"):
        with pytest.raises(ValueError, match=f"{other} is on cuda:0.*got cuda:1"):
            nv.stage_mega_moe_inputs(**buffers | {other: buffers[other].to("cuda:1")})
    with pytest.raises(ValueError, match=r"cuda:0.*cuda:1"):
        nv.measure(x, elsewhere)
    with pytest.raises(ValueError, match=r"cuda:1.*cuda:0"):
        nv.Quantized.from_buffers(elsewhere.codes, nv.quantize(x).scales, recipe="nvfp4")
    with pytest.raises(ValueError, match="cuda"):
        nv.compare(nv.quantize(x), elsewhere, x)


ON_GPU_MODES = {
    "deterministic algorithms": lambda: _set(torch.use_deterministic_algorithms, True, False),
    "autocast": lambda: torch.autocast("cuda", torch.bfloat16),
    "float64 by default": lambda: _set(torch.set_default_dtype, torch.float64, torch.float32),
    "bfloat16 by default": lambda: _set(torch.set_default_dtype, torch.bfloat16, torch.float32),
    "a default device": lambda: torch.device("cuda"),
    "inference mode": torch.inference_mode,
}


@pytest.mark.parametrize("mode", ON_GPU_MODES)
@on_gpu
def test_a_mode_of_torch_changes_no_bit_on_a_gpu(name, mode, gpu, expected):
    x = values(64, 512).to(gpu)
    with ON_GPU_MODES[mode]():
        got = ON_GPU[name](x)
    assert digest(got) == expected[name]
