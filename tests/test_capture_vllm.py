"""The vLLM worker extension against stand-ins with vLLM's signatures (engine_stubs.py).

What the stand-in's experts were called with is what must be in the folder, bit for bit.
"""

import subprocess
import sys
from typing import Any

import engine_stubs as stubs
import pytest
import torch
from test_capture import read

import nvfp4lab as nv
from nvfp4lab.capture import vllm_worker
from nvfp4lab.capture.vllm_worker import CaptureExtension

PASSES = (5, 8, 11)  # real tokens of each pass; the runner pads to multiples of 8


def serve(worker, passes=PASSES) -> None:
    for tokens in passes:
        worker.execute_model(stubs.SchedulerOutput(tokens))


def expected(worker, passes, first=0) -> dict[str, dict[str, torch.Tensor]]:
    """What the experts got in the real passes, which are `first` and on of those they were run in,
    without the padding."""
    sites = {}
    for layer, calls in enumerate(worker.get_model().got()):
        real = [
            [tensor[:n] for tensor in call] for call, n in zip(calls[first:], passes, strict=False)
        ]
        hidden, ids, weights = (torch.cat(parts) for parts in zip(*real, strict=True))
        sites[f"layer{layer:02d}.expert_input"] = {
            "hidden": hidden,
            "topk_ids": ids,
            "topk_weights": weights,
            "positions": torch.cat([torch.arange(n) + 5 for n in passes]),
        }
    return sites


def require_same(got, want) -> None:
    assert got.keys() == want.keys()
    for label, columns in want.items():
        for name, tensor in columns.items():
            assert got[label][name].equal(tensor), f"{label} {name}"


@pytest.mark.parametrize("runner", [stubs.GPUModelRunner, stubs.GPUModelRunnerV2])
@pytest.mark.parametrize("use_mega_moe", [True, False], ids=["MegaMoE", "FusedMoE"])
def test_what_the_experts_got_is_recorded(tmp_path, runner, use_mega_moe):
    worker = stubs.vllm_worker(CaptureExtension, use_mega_moe=use_mega_moe, runner=runner)
    folder = worker.start_capture(str(tmp_path / "v4"))
    serve(worker)
    assert worker.finish_capture() == sum(PASSES)
    assert folder == str(tmp_path / "v4")
    require_same(read(tmp_path / "v4"), expected(worker, PASSES))


@pytest.mark.parametrize("runner", [stubs.GPUModelRunner, stubs.GPUModelRunnerV2])
def test_profile_and_dummy_runs_are_dropped(tmp_path, runner):
    worker = stubs.vllm_worker(CaptureExtension, runner=runner)
    worker.start_capture(str(tmp_path / "v4"))
    worker.model_runner._dummy_run(16)
    serve(worker, (0,))
    dummies = len(worker.get_model().got()[0])
    serve(worker, (5,))
    worker.model_runner._dummy_run(16)
    assert dummies >= 1 and worker.finish_capture() == 5
    require_same(read(tmp_path / "v4"), expected(worker, (5,), first=dummies))


def test_the_model_is_left_as_it_was(tmp_path):
    worker = stubs.vllm_worker(CaptureExtension)
    worker.start_capture(str(tmp_path / "v4"))
    serve(worker)
    worker.finish_capture()
    assert "execute_model" not in vars(worker.model_runner)
    hooks = [m._forward_pre_hooks or m._forward_hooks for m in worker.get_model().modules()]
    assert not any(hooks)
    serve(worker, (5,))
    assert len(nv.load_activations(tmp_path / "v4")[0]) == sum(PASSES)


def test_a_second_capture_into_the_folder_goes_on(tmp_path):
    worker = stubs.vllm_worker(CaptureExtension)
    for tokens in PASSES:
        worker.start_capture(str(tmp_path / "v4"))
        serve(worker, (tokens,))
        worker.finish_capture()
    require_same(read(tmp_path / "v4"), expected(worker, PASSES))


def test_layers_and_tokens_are_chosen(tmp_path):
    worker = stubs.vllm_worker(CaptureExtension)
    worker.start_capture(str(tmp_path / "v4"), layers=[1], tokens=7)
    serve(worker)
    assert worker.finish_capture() == 7
    assert read(tmp_path / "v4").keys() == {"layer01.expert_input"}


def test_each_data_and_pipeline_rank_has_a_folder(tmp_path):
    worker = stubs.vllm_worker(
        CaptureExtension,
        rank=2,
        tensor_parallel_size=2,
        pipeline_parallel_size=2,
        data_parallel_rank=3,
        data_parallel_size=4,
    )
    folder = worker.start_capture(str(tmp_path / "v4"))
    serve(worker)
    worker.finish_capture()
    assert folder == str(tmp_path / "v4" / "dp3" / "pp1")
    assert len(nv.load_activations(folder)) == stubs.LAYERS


def test_the_other_tensor_parallel_ranks_write_nothing(tmp_path):
    worker = stubs.vllm_worker(CaptureExtension, rank=1, tensor_parallel_size=2)
    assert worker.start_capture(str(tmp_path / "v4")) is None
    serve(worker)
    assert worker.finish_capture() == 0
    assert not (tmp_path / "v4").exists()


def test_a_pass_that_fails_is_not_recorded(tmp_path, monkeypatch):
    worker = stubs.vllm_worker(CaptureExtension)
    worker.start_capture(str(tmp_path / "v4"))
    serve(worker, (5,))
    last = worker.get_model().model.layers[-1]
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(last, "forward", lambda *_: (_ for _ in ()).throw(MemoryError()))
        serve(worker, (8,))
    serve(worker, (11,))
    assert worker.finish_capture() == 16


def test_the_provenance_says_what_it_is(tmp_path):
    about = {}
    for use_mega_moe in (True, False):
        worker = stubs.vllm_worker(CaptureExtension, use_mega_moe=use_mega_moe)
        folder = worker.start_capture(str(tmp_path / str(use_mega_moe)), {"text": "mine"})
        serve(worker, (5,))
        worker.finish_capture()
        about[use_mega_moe] = nv.load_activations(folder)[0].provenance
    assert about[True]["model"] == "toy-v4" and about[True]["text"] == "mine"
    assert about[True]["weight_quantization"] == "fp8" and about[True]["dtype"] == "bfloat16"
    assert about[True]["routing"] == "as the experts were called with it"
    assert "recomputed" in about[False]["routing"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"enforce_eager": False}, "enforce_eager=True"),
        ({"use_ubatching": True}, "no dual batch overlap"),
        ({"prefill_context_parallel_size": 2}, "no prefill context parallelism"),
    ],
)
def test_an_engine_whose_passes_no_hook_sees_is_refused(tmp_path, changed, message):
    worker = stubs.vllm_worker(CaptureExtension, **changed)
    with pytest.raises(ValueError, match=message):
        worker.start_capture(str(tmp_path / "v4"))
    assert not (tmp_path / "v4").exists()


def test_another_model_is_refused(tmp_path, monkeypatch):
    worker = stubs.vllm_worker(CaptureExtension)
    monkeypatch.setattr(worker.model_runner, "model", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"layers with .ffn in Linear, found none"):
        worker.start_capture(str(tmp_path / "v4"))


def test_layers_that_the_model_lacks_are_refused(tmp_path):
    worker = stubs.vllm_worker(CaptureExtension)
    with pytest.raises(ValueError, match=r"no layer \[99\], expected some of \[0, 1, 2\]"):
        worker.start_capture(str(tmp_path / "v4"), layers=[1, 99])


def test_start_and_finish_come_in_turns(tmp_path):
    worker = stubs.vllm_worker(CaptureExtension)
    with pytest.raises(RuntimeError, match="no capture is under way"):
        worker.finish_capture()
    worker.start_capture(str(tmp_path / "v4"))
    with pytest.raises(RuntimeError, match="a capture is under way"):
        worker.start_capture(str(tmp_path / "other"))
    worker.finish_capture()


@pytest.mark.parametrize(
    ("owner", "name", "value", "message"),
    [
        ("ffn", "scoring_func", "softmax", "expected sqrtsoftplus routing, got 'softmax'"),
        ("gate", "bias_vl", torch.zeros(stubs.EXPERTS), "expected a text model"),
    ],
)
def test_routing_that_cannot_be_recomputed_is_refused_at_the_start(
    tmp_path, owner, name, value, message
):
    worker = stubs.vllm_worker(CaptureExtension, use_mega_moe=False)
    ffn = worker.get_model().model.layers[1].ffn
    setattr(ffn if owner == "ffn" else ffn.gate, name, value)
    with pytest.raises(ValueError, match=message):
        worker.start_capture(str(tmp_path / "v4"))
    assert not (tmp_path / "v4").exists()


@pytest.mark.parametrize("use_mega_moe", [True, False], ids=["MegaMoE", "FusedMoE"])
def test_each_rank_of_sequence_parallelism_records_its_shard(tmp_path, use_mega_moe):
    """Three ranks share passes that are padded to eight rows, then to nine."""
    found = []
    for rank in range(3):
        worker = stubs.vllm_worker(
            CaptureExtension,
            use_mega_moe=use_mega_moe,
            shard=(rank, 3),
            rank=rank,
            tensor_parallel_size=3,
        )
        folder = worker.start_capture(str(tmp_path / "v4"))
        assert folder == str(tmp_path / "v4" / f"tp{rank}")
        serve(worker, (5, 8))
        worker.finish_capture()
        real = [range(3 * rank, 3 * rank + 3), range(3 * rank, min(3 * rank + 3, 8))]
        real[0] = range(3 * rank, max(3 * rank, min(3 * rank + 3, 5)))
        for layer, site in enumerate(nv.load_activations(folder)):
            calls = worker.get_model().got()[layer]
            hidden = torch.cat([c[0][: len(r)] for c, r in zip(calls, real, strict=True)])
            assert site.hidden.equal(hidden) and site.layer == layer
            assert site.positions.tolist() == [5 + i for part in real for i in part]
        found += site.positions.tolist()
    assert sorted(found) == sorted([*range(5, 10), *range(5, 13)])


def test_a_worker_that_shuts_down_finishes_its_capture(tmp_path):
    worker = stubs.vllm_worker(CaptureExtension)
    worker.destroy_worker_extension()
    worker.start_capture(str(tmp_path / "v4"))
    serve(worker, (5,))
    worker.destroy_worker_extension()
    assert len(nv.load_activations(tmp_path / "v4")[0]) == 5


def test_a_hash_layer_needs_its_token_ids():
    moe = stubs.DeepseekV4MoE(0, use_mega_moe=False)
    with pytest.raises(ValueError, match="without its token ids"):
        vllm_worker.route(moe, torch.zeros(2, stubs.WIDTH), None)


def test_routing_is_that_of_transformers_own_router():
    """The hash layer and the learned router of a tiny DeepSeek V4, which share nothing with us."""
    import transformers
    from test_capture_huggingface import DEEPSEEK_V4, fill_hash_tables

    torch.manual_seed(0)
    config = transformers.DeepseekV4Config(**DEEPSEEK_V4)
    model: Any = transformers.DeepseekV4ForCausalLM(config).eval()
    fill_hash_tables(model)
    for layer in (0, 2):
        gate = model.model.layers[layer].mlp.gate
        moe = stubs.DeepseekV4MoE(1, use_mega_moe=False)
        moe.n_activated_experts = config.num_experts_per_tok
        moe.routed_scaling_factor = config.routed_scaling_factor
        moe.gate = gate
        for name in ("e_score_correction_bias", "tid2eid"):
            if not hasattr(gate, name):
                setattr(gate, name, None)
        hidden = torch.randn(40, config.hidden_size)
        tokens = torch.randint(0, config.vocab_size, (40,))
        ids, weights = vllm_worker.route(moe, hidden, tokens)
        arguments = (hidden[None], tokens[None]) if gate.tid2eid is not None else (hidden[None],)
        with torch.no_grad():
            _, want_weights, want_ids = gate(*arguments)
        assert ids.equal(want_ids.view(ids.shape))
        torch.testing.assert_close(weights, want_weights.view(ids.shape), rtol=1e-6, atol=0)


def test_neither_engine_is_imported():
    code = (
        "import sys, nvfp4lab.capture.vllm_worker, nvfp4lab.capture.sglang_wrapper\n"
        "assert not {'vllm', 'sglang', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
