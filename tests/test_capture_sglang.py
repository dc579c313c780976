"""The SGLang wrapper against stand-ins with SGLang's signatures (engine_stubs.py)."""

import pickle
import signal
import subprocess
import sys
from pathlib import Path

import engine_stubs as stubs
import pytest
import torch
from test_capture import read

import nvfp4lab as nv
from nvfp4lab.capture import seal
from nvfp4lab.capture.sglang_wrapper import scheduler_process, wrap


@pytest.fixture
def sglang(monkeypatch):
    """The stand-in's modules by the last part of their names."""
    modules = stubs.sglang_modules()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return {name.rpartition(".")[2]: module for name, module in modules.items()}


def batch(tokens: int, idle: bool = False) -> stubs.ForwardBatch:
    positions = torch.arange(tokens) + 100
    return stubs.ForwardBatch(torch.arange(tokens), positions, stubs.ForwardMode(idle))


def require_recorded(path, runner, passes, calls=None) -> None:
    """That path holds what the runner's experts got in `passes`, of the calls of those numbers."""
    got = read(path)
    assert got.keys() == {f"layer{i:02d}.expert_input" for i in range(stubs.LAYERS)}
    for experts in runner.experts:
        chosen = [experts.got[i] for i in (range(len(passes)) if calls is None else calls)]
        real = [[tensor[:n] for tensor in call] for call, n in zip(chosen, passes, strict=True)]
        hidden, ids, weights = (torch.cat(parts) for parts in zip(*real, strict=True))
        site = got[f"layer{experts.layer_id:02d}.expert_input"]
        assert site["hidden"].equal(hidden) and site["topk_ids"].equal(ids)
        assert site["topk_weights"].equal(weights) and weights.dtype == torch.float32
        assert site["positions"].equal(torch.cat([torch.arange(n) + 100 for n in passes]))


def test_what_megamoe_was_called_with_is_recorded(tmp_path, sglang):
    runner = sglang["model_runner"].ModelRunner()
    with wrap(tmp_path / "v4", stubs.server_args()):
        for tokens in (5, 8, 11):
            runner.forward(batch(tokens))
    require_recorded(tmp_path / "v4", runner, (5, 8, 11))
    assert (nv.load_activations(tmp_path / "v4")[0].topk_ids >= 0).all()  # pyright: ignore


def test_dummy_idle_and_draft_passes_are_dropped(tmp_path, sglang):
    runner = sglang["model_runner"].ModelRunner()
    with wrap(tmp_path / "v4", stubs.server_args()):
        runner.run_layers(16, 16)  # as a dummy run or the recording of a CUDA graph does
        runner.forward(batch(5))
        runner.forward(batch(0, idle=True))
        runner.is_draft_worker = True
        runner.forward(batch(4))
    require_recorded(tmp_path / "v4", runner, (5,), calls=(1,))


def test_the_engine_is_left_as_it_was(tmp_path, sglang):
    before = sglang["mega_moe"].run_mega_routed_experts, sglang["model_runner"].ModelRunner.forward
    with wrap(tmp_path / "v4", stubs.server_args()):
        assert sglang["mega_moe"].run_mega_routed_experts is not before[0]
    after = sglang["mega_moe"].run_mega_routed_experts, sglang["model_runner"].ModelRunner.forward
    assert after == before


def test_the_scheduler_process_records_and_can_be_sent_to_another_process(tmp_path, sglang):
    run = pickle.loads(pickle.dumps(scheduler_process(tmp_path / "v4", provenance={"text": "x"})))
    run(stubs.server_args(), None, 0, 0)
    for site in nv.load_activations(tmp_path / "v4", sha256=True):
        assert len(site) == 16 and site.provenance["text"] == "x"
        assert site.provenance["engine"].startswith("sglang 0.5.23")


def test_shards_are_sealed_when_the_budget_is_used_up(tmp_path, sglang):
    runner = sglang["model_runner"].ModelRunner()
    with wrap(tmp_path / "v4", stubs.server_args(), tokens=7):
        runner.forward(batch(5))
        runner.forward(batch(8))
        assert len(nv.load_activations(tmp_path / "v4")[0]) == 7
        runner.forward(batch(8))
    assert len(nv.load_activations(tmp_path / "v4")[0]) == 7


KILLED = """
import os, signal, sys
import engine_stubs as stubs
sys.modules.update(stubs.sglang_modules())
from nvfp4lab.capture.sglang_wrapper import wrap
from test_capture_sglang import batch
runner = sys.modules["sglang.srt.model_executor.model_runner"].ModelRunner()
with wrap(sys.argv[1], stubs.server_args()):
    runner.forward(batch(5))
    runner.forward(batch(11))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_scheduler_recorded_can_be_sealed(tmp_path):
    """SGLang kills its schedulers when it stops."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path / "v4"], cwd=Path(__file__).parent
    )
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match="interrupted: 16 rows are in no shard"):
        nv.load_activations(tmp_path / "v4")
    seal(tmp_path / "v4")
    for site in nv.load_activations(tmp_path / "v4", sha256=True):
        assert site.positions.tolist() == [*range(100, 105), *range(100, 111)]


@pytest.mark.parametrize(
    ("tp_rank", "dp_rank", "args", "folder"),
    [
        (0, None, {}, "v4"),
        (1, None, {"tp_size": 4}, None),
        (2, None, {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True}, "v4/dp1"),
        (3, None, {"tp_size": 4, "dp_size": 2, "enable_dp_attention": True}, None),
        (0, 1, {"dp_size": 2}, "v4/dp1"),
        (0, None, {"pp_size": 2}, "v4/pp1"),
    ],
)
def test_each_rank_with_tokens_of_its_own_has_a_folder(
    tmp_path, sglang, tp_rank, dp_rank, args, folder
):
    runner = sglang["model_runner"].ModelRunner(tp_rank, 1 if "pp_size" in args else 0, dp_rank)
    with wrap(tmp_path / "v4", stubs.server_args(**args)):
        runner.forward(batch(5))
    if folder is None:
        assert not (tmp_path / "v4").exists()
    else:
        require_recorded(tmp_path / folder, runner, (5,))


def test_cuda_graphs_are_refused(tmp_path, sglang):
    capture = wrap(tmp_path / "v4", stubs.server_args(disable_cuda_graph=False))
    with pytest.raises(ValueError, match="expected --disable-cuda-graph"):
        capture.__enter__()


def test_ids_of_physical_experts_are_refused(tmp_path, sglang):
    sglang["mega_moe"].ExpertLocationDispatchInfo.mapped = True
    runner = sglang["model_runner"].ModelRunner()
    with (
        wrap(tmp_path / "v4", stubs.server_args()),
        pytest.raises(RuntimeError, match="mapped to physical experts"),
    ):
        runner.forward(batch(5))


def test_a_rank_with_a_part_of_the_tokens_is_refused(tmp_path, sglang, monkeypatch):
    runner = sglang["model_runner"].ModelRunner()
    whole = runner.run_layers
    monkeypatch.setattr(runner, "run_layers", lambda rows, tokens: whole(rows // 2, rows // 2))
    with (
        wrap(tmp_path / "v4", stubs.server_args()),
        pytest.raises(ValueError, match="a row for each of the 8 tokens, got 4: this rank gets"),
    ):
        runner.forward(batch(5))
