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
def load(monkeypatch):
    """Puts the stand-in into sys.modules; gives its modules by the last part of their names."""

    def load(**how):
        modules = stubs.sglang_modules(**how)
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        return {name.rpartition(".")[2]: module for name, module in modules.items()}

    return load


@pytest.fixture
def sglang(load):
    return load()


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
    run(stubs.server_args(), None, 0, 0, 0, None, None)
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
    ("ranks", "folder"),
    [
        ({"attn_tp_rank": 0, "attn_tp_size": 4}, "v4/tp0"),
        ({"attn_tp_rank": 1, "attn_tp_size": 4}, None),
        ({"dp_rank": 1, "dp_size": 2}, "v4/dp1"),
        ({"attn_dp_rank": 1, "attn_dp_size": 2}, "v4/adp1"),
        ({"pp_rank": 1, "pp_size": 2, "attn_dp_rank": 1, "attn_dp_size": 2}, "v4/adp1/pp1"),
    ],
)
def test_each_rank_with_tokens_of_its_own_has_a_folder(tmp_path, load, ranks, folder):
    runner = load(**ranks)["model_runner"].ModelRunner()
    with wrap(tmp_path / "v4", stubs.server_args()):
        runner.forward(batch(5))
    if folder is None:
        assert not (tmp_path / "v4").exists()
    else:
        require_recorded(tmp_path / folder, runner, (5,))


@pytest.mark.parametrize(("rank", "first", "last"), [(0, 0, 4), (1, 4, 5)])
def test_each_attention_rank_records_its_shard(tmp_path, load, rank, first, last):
    """Five tokens padded to eight: four and one."""
    runner = load(attn_tp_rank=rank, attn_tp_size=2)["model_runner"].ModelRunner(sharded=True)
    with wrap(tmp_path / "v4", stubs.server_args()):
        runner.forward(batch(5))
    for site in nv.load_activations(tmp_path / "v4" / f"tp{rank}"):
        assert site.positions.tolist() == [100 + i for i in range(first, last)]
        assert site.hidden.equal(runner.experts[site.layer].got[0][0][: last - first])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"cuda_graphs": True}, "expected --cuda-graph-backend-decode=disabled"),
        ({"mapped": True}, "mapped to physical experts"),
        ({"in_buffer": True}, "capture with SGLANG_OPT_DEEPGEMM_MEGA_GATE=0"),
        ({"attn_cp_size": 2}, "expected no attention context parallelism"),
    ],
)
def test_what_cannot_be_recorded_rightly_is_refused(tmp_path, load, how, message):
    runner = load(**how)["model_runner"].ModelRunner()
    with (
        wrap(tmp_path / "v4", stubs.server_args()),
        pytest.raises((ValueError, RuntimeError), match=message),
    ):
        runner.forward(batch(5))
    assert not (tmp_path / "v4").exists()


def test_a_rank_with_a_part_of_the_tokens_is_refused(tmp_path, sglang, monkeypatch):
    runner = sglang["model_runner"].ModelRunner()
    whole = runner.run_layers
    monkeypatch.setattr(runner, "run_layers", lambda rows, tokens: whole(rows // 2, rows // 2))
    with (
        wrap(tmp_path / "v4", stubs.server_args()),
        pytest.raises(ValueError, match=r"each of the pass's 8 tokens, or a shard of 1/1 .* got 4"),
    ):
        runner.forward(batch(5))
