"""Capture inside SGLang's scheduler processes, by wrapping what calls MegaMoE. Untested on the
engine: it was written from the source of SGLang 0.5.23 and is tested against stand-ins with that
source's signatures.

`mega_moe.run_mega_routed_experts` gets what the staging kernel gets; ModelRunner.forward says where
a pass begins and ends. Both are wrapped while `wrap` lasts, and `scheduler_process` gives SGLang a
scheduler that runs inside it. SGLang is imported only then.
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


def scheduler_process(
    out: str | Path, *, provenance: Mapping[str, Any] | None = None, **settings: Any
) -> Callable[..., None]:
    """SGLang's run_scheduler_process, recording into `out`. Untested on the engine.

        from sglang.srt.entrypoints.http_server import launch_server
        from sglang.srt.server_args import prepare_server_args

        arguments = "--model-path deepseek-ai/DeepSeek-V4-Flash --moe-a2a-backend megamoe"
        arguments += " --disable-cuda-graph --disable-radix-cache --skip-server-warmup"
        launch_server(
            prepare_server_args(arguments.split()),
            run_scheduler_process_func=scheduler_process("v4", tokens=100_000),
        )

    A replayed CUDA graph calls no wrapper, a cached prefix is not run, and a warm-up is a request
    like any other: hence the flags. The shards are sealed when the token or byte budget is used
    up. SGLang kills its schedulers when it stops; `nvfp4lab.capture.seal("v4")` then makes what was
    recorded until there readable. With data parallelism the folders are v4/dp0, v4/dp1, ..., with
    pipeline parallelism .../pp0, ....

    out, settings: see `wrap`.
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

    server_args: SGLang's. provenance: added to what the engine says of itself. settings: layers,
    tokens, keep, seed, max_bytes, shard_bytes of Recorder. Weights are recorded in float32 with
    routed_scaling_factor in them, as DeepGEMM's staging gets them on SM100. Ids are those of the
    model, -1 where SGLang's router masked a row.

    Raises: ValueError if CUDA graphs are on. Inside the block, RuntimeError when the ids have been
    mapped to physical experts, ValueError when a rank gets only a part of the tokens.
    """
    if not server_args.disable_cuda_graph:
        raise ValueError("expected --disable-cuda-graph: replayed CUDA graphs call no wrapper")
    mega_moe: Any = importlib.import_module(MEGA_MOE)
    runner_class: Any = importlib.import_module(MODEL_RUNNER).ModelRunner
    experts, forward = mega_moe.run_mega_routed_experts, runner_class.forward
    about = describe_engine(server_args) | dict(provenance or {})
    capture = _Capture(Path(out), server_args, about, settings, mega_moe)
    mega_moe.run_mega_routed_experts = capture.around_experts(experts)
    runner_class.forward = capture.around_forward(forward)
    try:
        yield
    finally:
        mega_moe.run_mega_routed_experts, runner_class.forward = experts, forward
        capture.finish()


class _Capture:
    """The recorder of one process, opened by its first real pass."""

    def __init__(
        self,
        out: Path,
        server_args: Any,
        provenance: dict[str, Any],
        settings: dict[str, Any],
        mega_moe: Any,
    ):
        self._out, self._args, self._mega_moe = out, server_args, mega_moe
        self._provenance, self._settings = provenance, settings
        self._recorder: Recorder | None = None
        self._batch: Any = None  # of the real pass under way
        self._finished = False

    def around_forward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def recorded(runner: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
            if self._finished or not self._records(runner, forward_batch):
                return forward(runner, forward_batch, *args, **kwargs)
            if self._recorder is None:
                folder = self._folder(runner)
                self._recorder = Recorder(folder, self._provenance, **self._settings)
            self._batch = forward_batch
            try:
                output = forward(runner, forward_batch, *args, **kwargs)
                if self._recorder.recording:
                    self._recorder.end()
            finally:
                self._batch = None
                self._recorder.discard()  # of a pass that an error ended
            if self._recorder.full:
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
            if self._batch is not None and topk_ids is not None and topk_weights is not None:
                scale = kwargs.get("routed_scaling_factor", 1.0)
                self._take(experts.layer_id, hidden_states, topk_ids, topk_weights.float() * scale)
            return run(experts, hidden_states, topk_ids, topk_weights, **kwargs)

        return recorded

    def finish(self) -> None:
        if self._recorder is not None and not self._finished:
            self._recorder.finish()
        self._finished = True

    def _take(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> None:
        recorder, batch = self._recorder, self._batch
        assert recorder is not None
        if self._mega_moe.ExpertLocationDispatchInfo.init_new(layer_id=layer) is not None:
            raise RuntimeError(
                "expert ids are mapped to physical experts before they get here: capture without "
                "--enable-eplb, --init-expert-location and --ep-dispatch-algorithm"
            )
        positions = batch.positions  # as padded for this pass: only now is it known
        if len(hidden) != len(positions):
            raise ValueError(
                f"layer {layer}: expected a row for each of the {len(positions)} tokens, got "
                f"{len(hidden)}: this rank gets a part of them, capture with one attention rank "
                "for each data-parallel rank"
            )
        if not recorder.recording:
            real = batch.num_token_non_padded_cpu
            real = len(positions) if real is None else int(real)
            recorder.begin(positions, torch.arange(len(positions)) < real)
        recorder.take(layer, hidden, ids, weights)

    def _records(self, runner: Any, batch: Any) -> bool:
        """A pass of real tokens by the target model, on the rank that records them."""
        idle = batch.forward_mode.is_idle() or runner.is_draft_worker
        return not idle and runner.tp_rank % self._ranks_alike() == 0

    def _ranks_alike(self) -> int:
        """How many neighbouring tensor-parallel ranks attend to the same tokens."""
        copies = self._args.dp_size if self._args.enable_dp_attention else 1
        return self._args.tp_size // copies

    def _folder(self, runner: Any) -> Path:
        attention = self._args.enable_dp_attention
        dp = (
            runner.tp_rank // self._ranks_alike()
            if attention
            else getattr(runner, "dp_rank", None) or 0
        )
        return folder_of_rank(
            self._out, dp=(dp, self._args.dp_size), pp=(runner.pp_rank, self._args.pp_size)
        )


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
