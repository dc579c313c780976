"""Capture inside SGLang's scheduler processes, by wrapping what calls MegaMoE. Untested on the
engine: it was written from the source of the released SGLang 0.5.23 and is tested against stand-ins
with its signatures.

`mega_moe.run_mega_routed_experts` gets what the staging kernel gets; ModelRunner.forward says where
a pass begins and ends. Both are wrapped while `wrap` lasts, and `scheduler_process` gives SGLang a
scheduler that runs inside it. SGLang is imported only then. When SGLang changes, change the names
at the top, what `_take` and `_open` read of it, and the stand-ins in tests/engine_stubs.py.
"""

from __future__ import annotations

import datetime
import functools
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from nvfp4lab.capture.folder import folder_of_rank
from nvfp4lab.capture.recorder import Recorder

MEGA_MOE = "sglang.srt.layers.moe.mega_moe"
MODEL_RUNNER = "sglang.srt.model_executor.model_runner"
SCHEDULER = "sglang.srt.managers.scheduler"
CONTEXT = "sglang.srt.runtime_context"
CUDA_GRAPHS = "sglang.srt.model_executor.cuda_graph_config"


def scheduler_process(
    out: str | Path, *, provenance: Mapping[str, Any] | None = None, **settings: Any
) -> Callable[..., None]:
    """SGLang's run_scheduler_process, recording into `out`. Untested on the engine.

        from sglang.srt.entrypoints.http_server import launch_server
        from sglang.srt.server_args import prepare_server_args

        arguments = "--model-path deepseek-ai/DeepSeek-V4-Flash --moe-a2a-backend megamoe"
        arguments += " --cuda-graph-backend-decode=disabled --cuda-graph-backend-prefill=disabled"
        arguments += " --disable-radix-cache --skip-server-warmup"
        launch_server(
            prepare_server_args(arguments.split()),
            run_scheduler_process_func=scheduler_process("v4", tokens=100_000),
        )

    A replayed CUDA graph calls no wrapper, a cached prefix is not run, and a warm-up is a request
    like any other: hence the flags. The shards are sealed when the token or byte budget is used
    up, or the server ends in order; of one that was killed, `nvfp4lab.capture.seal("v4")` makes
    readable what was recorded until then. out, settings: see `wrap`.
    """
    return functools.partial(_run_scheduler, out, dict(provenance or {}), settings)


@contextmanager
def wrap(
    out: str | Path,
    server_args: Any,
    *,
    provenance: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Iterator[None]:
    """Record every real forward pass of this process's model while the block runs.

    out: the capture folder. Ranks with tokens or layers of their own have folders in it: dp0, ...
    for data-parallel replicas, adp0, ... with attention data parallelism, pp0, ... with pipeline
    parallelism, and tp0, ... with attention tensor parallelism, where SGLang may shard the tokens;
    what is not sharded is in tp0. server_args: SGLang's. provenance: added to what the engine says
    of itself. settings: layers, tokens, keep, seed, max_bytes, shard_bytes of Recorder, for each
    folder. Weights are recorded in float32 with routed_scaling_factor in them, as DeepGEMM's
    staging gets them on SM100. Ids are those of the model.

    Raises, in the first pass: ValueError if CUDA graphs or attention context parallelism are on, or
    a rank gets rows that are neither the pass nor its shard; RuntimeError if the routing is out of
    sight or its ids are mapped to physical experts.
    """
    mega_moe: Any = importlib.import_module(MEGA_MOE)
    runner_class: Any = importlib.import_module(MODEL_RUNNER).ModelRunner
    experts, forward = mega_moe.run_mega_routed_experts, runner_class.forward
    about = describe_engine(server_args) | dict(provenance or {})
    capture = _Capture(Path(out), about, settings)
    mega_moe.run_mega_routed_experts = capture.around_experts(experts)
    runner_class.forward = capture.around_forward(forward)
    try:
        yield
    finally:
        mega_moe.run_mega_routed_experts, runner_class.forward = experts, forward
        capture.finish()


class _Capture:
    """The recorder of one process, opened by its first real pass."""

    def __init__(self, out: Path, provenance: dict[str, Any], settings: dict[str, Any]):
        self._out, self._provenance, self._settings = out, provenance, settings
        self._recorder: Recorder | None = None
        self._batch: Any = None  # of the real pass under way
        self._real = 0  # its tokens without padding
        self._finished = False

    def around_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def recorded(runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
            idle = forward_batch.forward_mode.is_idle() or runner.is_draft_worker
            if idle or self._finished:
                return forward(runner, forward_batch, *args, **kwargs)
            self._batch = forward_batch
            self._real = len(forward_batch.positions)  # SGLang pads them inside
            try:
                output = forward(runner, forward_batch, *args, **kwargs)
                if self._recorder is not None and self._recorder.recording:
                    self._recorder.end()
            finally:
                self._batch = None
                if self._recorder is not None:
                    self._recorder.discard()  # of a pass that an error ended
            if self._recorder is not None and self._recorder.full:
                self.finish()
            return output

        return recorded

    def around_experts(self, run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def recorded(
            experts: Any,
            hidden_states: torch.Tensor,
            topk_ids: torch.Tensor | None,
            topk_weights: torch.Tensor | None,
            **kwargs: Any,
        ) -> Any:
            if self._batch is not None and len(hidden_states):
                if topk_ids is None or topk_weights is None:
                    raise RuntimeError(
                        "the routing was written into DeepGEMM's buffer, where it is not seen: "
                        "capture with SGLANG_OPT_DEEPGEMM_MEGA_GATE=0"
                    )
                weights = topk_weights.float() * kwargs.get("routed_scaling_factor", 1.0)
                self._take(experts.layer_id, hidden_states, topk_ids, weights)
            return run(experts, hidden_states, topk_ids, topk_weights, **kwargs)

        return recorded

    def finish(self) -> None:
        if self._recorder is not None and not self._finished:
            self._recorder.finish()
        self._finished = True

    def _take(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> None:
        parallel = importlib.import_module(CONTEXT).get_parallel()
        positions = self._batch.positions  # as padded for this pass
        rank, size = parallel.attn_tp_rank, parallel.attn_tp_size
        if len(hidden) == len(positions):
            if rank:
                return  # rank 0 has the same rows
            first = 0
        elif len(hidden) * size == len(positions):
            first = rank * len(hidden)
        else:
            raise ValueError(
                f"layer {layer}: expected a row for each of the pass's {len(positions)} tokens, or "
                f"a shard of 1/{size} of them, got {len(hidden)}: capture without two-batch overlap"
            )
        if self._recorder is None:
            self._recorder = self._open(parallel)
        if not self._recorder.recording:
            valid = torch.arange(len(positions)) < self._real
            mine = slice(first, first + len(hidden))
            self._recorder.begin(positions[mine], valid[mine])
        self._recorder.take(layer, hidden, ids, weights)

    def _open(self, parallel: Any) -> Recorder:
        if not importlib.import_module(CUDA_GRAPHS).cuda_graph_fully_disabled():
            raise ValueError(
                "expected --cuda-graph-backend-decode=disabled and "
                "--cuda-graph-backend-prefill=disabled: replayed CUDA graphs call no wrapper"
            )
        if parallel.attn_cp_size > 1:
            raise ValueError("expected no attention context parallelism: it reorders the tokens")
        if importlib.import_module(CONTEXT).get_exec().moe.ep_dispatch_algorithm is not None:
            raise RuntimeError(
                "expert ids are mapped to physical experts before they get here: capture without "
                "--ep-dispatch-algorithm, --enable-eplb and --init-expert-location"
            )
        folder = folder_of_rank(
            self._out,
            dp=(parallel.dp_rank or 0, parallel.dp_size),
            adp=(parallel.attn_dp_rank, parallel.attn_dp_size),
            pp=(parallel.pp_rank, parallel.pp_size),
            tp=(parallel.attn_tp_rank, parallel.attn_tp_size),
        )
        return Recorder(folder, self._provenance, **self._settings)


def describe_engine(server_args: Any) -> dict[str, Any]:
    """The provenance that SGLang's arguments tell by themselves."""
    version = getattr(importlib.import_module("sglang"), "__version__", "of no version")
    return {
        "is": f"what enters the experts of {server_args.model_path}, served by SGLang",
        "captured_or_synthetic": "captured",
        "model": server_args.model_path,
        "model_revision": server_args.revision,
        "weight_quantization": server_args.quantization or "as in the checkpoint",
        "dtype": str(server_args.dtype),
        "engine": f"sglang {version}, torch {torch.__version__}",
        "routing": "as MegaMoE was called with it, times routed_scaling_factor",
        "date": datetime.date.today().isoformat(),
    }


def _run_scheduler(
    out: str | Path,
    provenance: dict[str, Any],
    settings: dict[str, Any],
    server_args: Any,
    *args: Any,
    **kwargs: Any,
) -> None:
    with wrap(out, server_args, provenance=provenance, **settings):
        importlib.import_module(SCHEDULER).run_scheduler_process(server_args, *args, **kwargs)
