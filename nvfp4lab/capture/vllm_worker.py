"""Capture inside vLLM's workers, as a worker extension. Untested on the engine: it was written from
the source of the released vLLM 0.33.0 and is tested against stand-ins with its signatures.

vLLM gives its GPU worker the class below as a base, and `collective_rpc` calls its two methods in
every worker. Where the experts run as MegaMoE they are called with what the staging kernel gets,
and that is taken, by name: vLLM passes weights before ids. Elsewhere the routing happens inside the
experts, and is recomputed by `route`. vLLM is not imported; the worker brings it. When vLLM
changes, change MOE, what `_Capture` and `route` read of it, and the stand-ins in
tests/engine_stubs.py.
"""

from __future__ import annotations

import datetime
import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import softplus

from nvfp4lab.capture.folder import folder_of_rank
from nvfp4lab.capture.recorder import Recorder

MOE = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d+)\.ffn")


class CaptureExtension:
    """Adds start_capture and finish_capture to vLLM's GPU worker. Untested on the engine.

    CUDA graphs would replay without calling any hook, so the engine has to run eagerly:

        llm = LLM(
            "deepseek-ai/DeepSeek-V4-Flash",
            enforce_eager=True,
            enable_prefix_caching=False,  # else a prefix that is cached is not run, nor recorded
            worker_extension_cls="nvfp4lab.capture.vllm_worker.CaptureExtension",
        )
        llm.collective_rpc("start_capture", args=("v4",), kwargs={"tokens": 100_000})
        llm.generate(prompts, SamplingParams(max_tokens=1))
        llm.collective_rpc("finish_capture")
        sites = nv.load_activations("v4")

    Names of this class must not be names of vLLM's worker; it refuses to start if they are.
    """

    _nvfp4lab_capture: _Capture | None = None

    def start_capture(
        self, out: str, provenance: Mapping[str, Any] | None = None, **settings: Any
    ) -> str | None:
        """Begin to record every real forward pass. Returns the folder, None on a rank whose tokens
        another rank records (tensor parallelism).

        out: the capture folder. Ranks with tokens or layers of their own have folders in it: dp0,
        dp1, ... with data parallelism, pp0, ... with pipeline parallelism, tp0, ... where vLLM
        shards the tokens over tensor-parallel ranks, as it does for MegaMoE. provenance: added to
        what the engine says of itself; give the text's source and licence. settings: layers,
        tokens, keep, seed, max_bytes, shard_bytes of Recorder, for each folder. A folder of the
        same model and settings is appended to.

        Raises: ValueError for an engine that does not run eagerly or splits its passes, a model
        without a layer with an `ffn` or without one of `layers`, or routing that `route` cannot
        recompute; RuntimeError if a capture is under way; what Recorder raises.
        """
        if self._nvfp4lab_capture is not None:
            raise RuntimeError("start_capture: a capture is under way, finish_capture ends it")
        capture = _Capture(self, Path(out), dict(provenance or {}), settings)
        self._nvfp4lab_capture = capture
        return None if capture.recorder is None else str(capture.folder)

    def finish_capture(self) -> int:
        """Seal the shards and leave the model as it was. Returns the tokens in the folder."""
        capture = self._nvfp4lab_capture
        if capture is None:
            raise RuntimeError("finish_capture: no capture is under way")
        self._nvfp4lab_capture = None
        return capture.finish()

    def destroy_worker_extension(self) -> None:
        """Finish a capture that is under way; vLLM calls this when the worker shuts down."""
        if self._nvfp4lab_capture is not None:
            self.finish_capture()


class _Capture:
    """The hooks of one worker, from start to finish."""

    def __init__(
        self, worker: Any, out: Path, provenance: dict[str, Any], settings: dict[str, Any]
    ):
        _require_plain_passes(worker.vllm_config)
        parallel = worker.vllm_config.parallel_config
        model: nn.Module = worker.get_model()
        moes = {
            int(match["layer"]): module
            for name, module in model.named_modules()
            if (match := MOE.fullmatch(name))
        }
        if not moes:
            raise ValueError(f"expected layers with .ffn in {type(model).__name__}, found none")
        staged = all(is_staged(moe) for moe in moes.values())
        for moe in moes.values():
            if not is_staged(moe):
                _require_routable(moe)
        sharded = any(getattr(moe, "use_sequence_parallel", False) for moe in moes.values())
        pp_rank, tp_rank = divmod(worker.rank, parallel.tensor_parallel_size)
        pp_size = parallel.pipeline_parallel_size
        unknown = sorted(set(settings.get("layers") or ()) - moes.keys())
        if unknown and pp_size == 1:  # else another rank may have them
            raise ValueError(f"the model has no layer {unknown}, expected some of {sorted(moes)}")
        self._shard = (tp_rank, parallel.tensor_parallel_size) if sharded else (0, 1)
        self.folder = folder_of_rank(
            out,
            dp=(parallel.data_parallel_rank, parallel.data_parallel_size),
            pp=(pp_rank % pp_size, pp_size),
            tp=self._shard,
        )
        self.recorder: Recorder | None = None
        self._runner = worker.model_runner
        self._scheduled = 0  # tokens of the real pass under way; 0 in a profile or dummy run
        self._hooks: list[Any] = []
        if tp_rank and not sharded:
            return
        about = describe_engine(worker.vllm_config, staged) | provenance
        self.recorder = Recorder(self.folder, about, **settings)
        self._hooks = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end),
        ]
        for layer, moe in moes.items():
            module: Any = moe.experts if is_staged(moe) else moe
            hook = self._take_experts(layer) if is_staged(moe) else self._take_moe(layer)
            self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        self._runner.execute_model = self._execute_model(self._runner.execute_model)

    def finish(self) -> int:
        if self.recorder is None:
            return 0
        del self._runner.execute_model  # the instance's; the class's is under it
        for hook in self._hooks:
            hook.remove()
        self.recorder.finish()
        return self.recorder.rows

    def _execute_model(self, execute: Any):
        """vLLM schedules real tokens through execute_model; dummy_run is how its second model
        runner marks the others, which the first sends past it."""

        def execute_model(scheduler_output: Any, *args: Any, **kwargs: Any):
            given = inspect.signature(execute).bind(scheduler_output, *args, **kwargs).arguments
            real = not given.get("dummy_run", False)
            self._scheduled = scheduler_output.total_num_scheduled_tokens if real else 0
            try:
                return execute(scheduler_output, *args, **kwargs)
            finally:
                self._scheduled = 0
                self._recorder.discard()  # of a pass that an error ended

        return execute_model

    @property
    def _recorder(self) -> Recorder:
        assert self.recorder is not None
        return self.recorder

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._scheduled:
            return
        given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
        positions = given["positions"]
        valid = torch.arange(len(positions)) < self._scheduled
        self._recorder.begin(_shard(positions, *self._shard), _shard(valid, *self._shard))

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        if self._recorder.recording:
            self._recorder.end()

    def _take_experts(self, layer: int):
        def take(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._recorder.recording:
                given = inspect.signature(experts.forward).bind(*args, **kwargs).arguments
                self._recorder.take(
                    layer, given["hidden_states"], given["topk_ids"], given["topk_weights"]
                )

        return take

    def _take_moe(self, layer: int):
        def take(moe: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._recorder.recording:
                given = inspect.signature(moe.forward).bind(*args, **kwargs).arguments
                hidden = given["hidden_states"]
                self._recorder.take(layer, hidden, *route(moe, hidden, given.get("input_ids")))

        return take


def is_staged(moe: Any) -> bool:
    """Whether the experts are called with ids and weights, as MegaMoE's are, or route inside."""
    return "topk_ids" in inspect.signature(moe.experts.forward).parameters


@torch.no_grad()
def route(
    moe: Any, hidden: torch.Tensor, input_ids: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [T, k] and weights float32 [T, k] of vLLM's DeepseekV4MoE for hidden [T, D].

    In float32 throughout. Where two experts score within the rounding of the engine's own gate,
    the engine may have chosen the other.

    Raises: ValueError for a hash-routed layer without its token ids.
    """
    gate = moe.gate
    scores = softplus(hidden.float() @ gate.weight.float().T).sqrt()
    if gate.tid2eid is not None:
        if input_ids is None:
            raise ValueError("a hash-routed layer was called without its token ids")
        ids = gate.tid2eid[input_ids.long()].long()
    else:
        bias = gate.e_score_correction_bias
        choice = scores if bias is None else scores + bias.float()
        ids = choice.topk(moe.n_activated_experts, dim=-1).indices
    weights = scores.gather(-1, ids)
    if moe.renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)
    return ids, weights * moe.routed_scaling_factor


def _require_routable(moe: Any) -> None:
    if moe.scoring_func != "sqrtsoftplus":
        raise ValueError(f"expected sqrtsoftplus routing, got {moe.scoring_func!r}")
    if getattr(moe.gate, "bias_vl", None) is not None:
        raise ValueError("expected a text model: the routing of image tokens is not recomputed")


def _shard(rows: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's rows when vLLM shards a pass: padded by zeros to equal parts, in order."""
    each = -(-len(rows) // size)
    return nn.functional.pad(rows, (0, each * size - len(rows)))[rank * each : (rank + 1) * each]


def describe_engine(config: Any, staged: bool) -> dict[str, Any]:
    """The provenance that vLLM's configuration tells by itself."""
    model = config.model_config
    version = getattr(sys.modules.get("vllm"), "__version__", "of no version")
    exact = "as the experts were called with it"
    recomputed = "recomputed in float32 from the gate; a near tie may have gone the other way"
    return {
        "is": f"what enters the experts of {model.model}, served by vLLM",
        "captured_or_synthetic": "captured",
        "model": model.model,
        "model_revision": model.revision,
        "weight_quantization": model.quantization or "none",
        "dtype": str(model.dtype).removeprefix("torch."),
        "engine": f"vllm {version}, torch {torch.__version__}",
        "routing": exact if staged else recomputed,
        "date": datetime.date.today().isoformat(),
    }


def _require_plain_passes(config: Any) -> None:
    parallel = config.parallel_config
    if not config.model_config.enforce_eager:
        raise ValueError("expected enforce_eager=True: replayed CUDA graphs call no hook")
    if parallel.use_ubatching:
        raise ValueError("expected no dual batch overlap: a batch that is split is no pass")
    if parallel.prefill_context_parallel_size > 1:
        raise ValueError("expected no prefill context parallelism: it reorders the tokens")
