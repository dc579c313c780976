"""Stand-ins for vLLM 0.33.0 and SGLang 0.5.23: the modules, attributes and call orders that capture
relies on, with the engines' own signatures, around a toy model.

Written from the sources in the released wheels. When an engine changes a signature, change it here
first and see which test fails. The toy's experts note what they were called with, which is what
must be recorded.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from types import SimpleNamespace as Namespace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import softplus

WIDTH, EXPERTS, TOP_K, VOCABULARY, HASHED, LAYERS = 32, 8, 2, 64, 1, 3
SCALING = 1.5


# vLLM -------------------------------------------------------------------------------------------


class GateLinear(nn.Module):
    """vllm.model_executor.layers.fused_moe.router.gate_linear.GateLinear: float32 logits."""

    def __init__(self, hashed: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH).bfloat16(), requires_grad=False)
        self.e_score_correction_bias: Any = None
        self.tid2eid: Any = None
        self.bias_vl: Any = None
        if hashed:
            table = torch.rand(VOCABULARY, EXPERTS).topk(TOP_K).indices
            self.tid2eid = nn.Parameter(table, requires_grad=False)
        else:
            self.e_score_correction_bias = nn.Parameter(torch.randn(EXPERTS), requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x.float() @ self.weight.float().T, None


class DeepGemmMegaMoEExperts(nn.Module):
    """Called with weights before ids; the experts of EPLB are mapped inside."""

    def __init__(self):
        super().__init__()
        self.got: list[tuple[torch.Tensor, ...]] = []

    def forward(
        self,
        hidden_states: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: nn.Module | None = None,
    ) -> torch.Tensor:
        self.got.append((hidden_states.clone(), topk_ids.clone(), topk_weights.clone()))
        return torch.tanh(hidden_states) * topk_weights.sum(-1, keepdim=True).bfloat16()


class FusedMoE(nn.Module):
    """The experts off MegaMoE: they route inside, where no hook sees it."""

    def __init__(self, moe: DeepseekV4MoE):
        super().__init__()
        self.got: list[tuple[torch.Tensor, ...]] = []
        self.owner = [moe]  # in a list, so that it is no submodule

    def forward(self, hidden_states, router_logits, input_ids=None) -> torch.Tensor:
        weights, ids = self.owner[0].routing(hidden_states, input_ids)
        self.got.append((hidden_states.clone(), ids.clone(), weights.clone()))
        return torch.tanh(hidden_states) * weights.sum(-1, keepdim=True).bfloat16()


class DeepseekV4MoE(nn.Module):
    def __init__(self, layer: int, use_mega_moe: bool, use_sequence_parallel: bool = False):
        super().__init__()
        self.use_native_mega_moe = use_mega_moe
        self.use_sequence_parallel = use_sequence_parallel
        self.scoring_func, self.renormalize = "sqrtsoftplus", True
        self.n_activated_experts, self.routed_scaling_factor = TOP_K, SCALING
        self.gate: Any = GateLinear(hashed=layer < HASHED)
        self.experts = DeepGemmMegaMoEExperts() if use_mega_moe else FusedMoE(self)

    def routing(self, hidden, input_ids) -> tuple[torch.Tensor, torch.Tensor]:
        """fused_topk_bias: weights float32 [T, k], ids int64 [T, k], in this order."""
        scores = softplus(self.gate(hidden)[0]).sqrt()
        if self.gate.tid2eid is not None:
            ids = self.gate.tid2eid[input_ids]
        else:
            ids = (scores + self.gate.e_score_correction_bias).topk(TOP_K).indices
        weights = scores.gather(-1, ids)
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-20) * SCALING, ids

    def forward(
        self,
        hidden_states: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        mega_gate_metadata: Any = None,
    ) -> torch.Tensor:
        if not self.use_native_mega_moe:
            return self.experts(
                hidden_states=hidden_states, router_logits=hidden_states, input_ids=input_ids
            )
        weights, ids = self.routing(hidden_states, input_ids)
        return self.experts(hidden_states, weights, ids, None)


class VllmLayer(nn.Module):
    def __init__(self, *moe: Any):
        super().__init__()
        self.ffn = DeepseekV4MoE(*moe)

    def forward(self, x, positions, input_ids, mega_gate_metadata=None) -> torch.Tensor:
        return self.ffn(x, input_ids, mega_gate_metadata)


class DeepseekV4ForCausalLM(nn.Module):
    """shard: (rank, size) of sequence parallelism, which every layer then runs in."""

    def __init__(self, use_mega_moe: bool, shard: tuple[int, int] = (0, 1)):
        super().__init__()
        torch.manual_seed(0)
        self.shard = shard
        self.embed = nn.Embedding(VOCABULARY, WIDTH).bfloat16()
        self.model: Any = nn.Module()
        self.model.layers = nn.ModuleList(
            VllmLayer(i, use_mega_moe, shard[1] > 1) for i in range(LAYERS)
        )

    @torch.no_grad()
    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
        rank, size = self.shard
        input_ids = nn.functional.pad(input_ids, (0, -len(input_ids) % size)).chunk(size)[rank]
        x = self.embed(input_ids)
        for layer in self.model.layers:
            x = layer(x, positions, input_ids)
        return x

    def got(self) -> list[list[tuple[torch.Tensor, ...]]]:
        """layer -> what its experts were called with, pass by pass."""
        return [layer.ffn.experts.got for layer in self.model.layers]


@dataclass
class SchedulerOutput:
    total_num_scheduled_tokens: int


class GPUModelRunner:
    """vllm.v1.worker.gpu_model_runner: pads a real pass; profile runs go past execute_model."""

    PADDED_TO = 8

    def __init__(self, model: nn.Module):
        self.model = model

    def get_model(self) -> nn.Module:
        return self.model

    def execute_model(self, scheduler_output, intermediate_tensors=None):
        if scheduler_output.total_num_scheduled_tokens == 0:
            return self._dummy_run(1)  # another data-parallel rank has work
        return self._forward(scheduler_output.total_num_scheduled_tokens)

    def _dummy_run(self, num_tokens: int):
        return self._forward(num_tokens)

    def _forward(self, tokens: int):
        rows = -(-tokens // self.PADDED_TO) * self.PADDED_TO
        input_ids = torch.arange(rows) * 7 % VOCABULARY
        return self.model(
            input_ids=input_ids,
            positions=torch.arange(rows) + 5,
            intermediate_tensors=None,
            inputs_embeds=None,
        )


class GPUModelRunnerV2(GPUModelRunner):
    """vllm.v1.worker.gpu.model_runner: dummy runs pass through execute_model."""

    def execute_model(
        self,
        scheduler_output,
        intermediate_tensors=None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        is_profile: bool = False,
        context_len: int = 0,
        valid_dummy_state_slots: bool = False,
        randomize_inputs: bool = False,
    ):
        if not dummy_run and scheduler_output.total_num_scheduled_tokens == 0:
            return None
        return self._forward(scheduler_output.total_num_scheduled_tokens)

    def _dummy_run(self, num_tokens: int):
        return self.execute_model(SchedulerOutput(num_tokens), dummy_run=True)


def vllm_config(**changed: Any) -> Namespace:
    parallel = {
        "data_parallel_rank": 0,
        "data_parallel_size": 1,
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "prefill_context_parallel_size": 1,
        "use_ubatching": False,
    }
    model = {
        "model": "toy-v4",
        "revision": "r1",
        "quantization": "fp8",
        "dtype": torch.bfloat16,
        "enforce_eager": True,
    }
    return Namespace(
        parallel_config=Namespace(**{k: changed.get(k, v) for k, v in parallel.items()}),
        model_config=Namespace(**{k: changed.get(k, v) for k, v in model.items()}),
    )


def vllm_worker(
    extension: type,
    *,
    use_mega_moe=True,
    shard=(0, 1),
    runner=GPUModelRunner,
    rank=0,
    **config: Any,
) -> Any:
    """A worker with the extension injected as WorkerWrapperBase.init_worker does it."""

    class WorkerBase:
        def get_model(self) -> nn.Module:
            return self.model_runner.get_model()  # pyright: ignore[reportAttributeAccessIssue]

    class Worker(WorkerBase):
        def __init__(self):
            self.vllm_config, self.rank = vllm_config(**config), rank
            self.model_runner = runner(DeepseekV4ForCausalLM(use_mega_moe, shard))

        def execute_model(self, scheduler_output):
            return self.model_runner.execute_model(scheduler_output, None)

    for name in dir(extension):
        assert name.startswith("__") or not hasattr(Worker, name)
    Worker.__bases__ = (*Worker.__bases__, extension)
    return Worker()


# SGLang -----------------------------------------------------------------------------------------


class ForwardMode:
    def __init__(self, idle: bool = False):
        self.idle = idle

    def is_idle(self) -> bool:
        return self.idle


@dataclass
class ForwardBatch:
    input_ids: torch.Tensor
    positions: torch.Tensor
    forward_mode: ForwardMode = field(default_factory=ForwardMode)


class SglangExperts:
    def __init__(self, layer_id: int):
        self.layer_id = layer_id
        self.got: list[tuple[Any, ...]] = []


class ModelRunner:
    """sglang.srt.model_executor.model_runner.ModelRunner: pads the batch inside forward, and takes
    the padding away again. sharded: attention-TP ranks get a part of the rows each."""

    PADDED_TO = 8

    def __init__(self, sharded: bool = False):
        self.is_draft_worker = False
        self.sharded = sharded
        self.experts = [SglangExperts(i) for i in range(LAYERS)]

    def forward(
        self,
        forward_batch,
        skip_attn_backend_init=None,
        pp_proxy_tensors=None,
        reinit_attn_backend=False,
        split_forward_count=1,
    ):
        tokens = len(forward_batch.input_ids)
        rows = -(-tokens // self.PADDED_TO) * self.PADDED_TO
        forward_batch.positions = nn.functional.pad(forward_batch.positions, (0, rows - tokens))
        output = self.run_layers(rows, tokens)
        forward_batch.positions = forward_batch.positions[:tokens]
        return output

    def run_layers(self, rows: int, tokens: int):
        """What the model's own forward does; CUDA graphs and dummy runs call it directly."""
        parallel = sys.modules[RUNTIME].get_parallel()  # pyright: ignore[reportAttributeAccessIssue]
        x = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        ids = torch.rand(rows, EXPERTS, generator=torch.Generator().manual_seed(tokens))
        ids = ids.topk(TOP_K).indices.int()
        ids[tokens:] = -1  # topk masks the padding
        weights = torch.rand(rows, TOP_K, generator=torch.Generator().manual_seed(1)).bfloat16()
        parts = parallel.attn_tp_size if self.sharded else 1
        part = parallel.attn_tp_rank if self.sharded else 0
        for experts in self.experts:
            mine = (tensor.chunk(parts)[part] for tensor in (x, ids, weights))
            sys.modules[MEGA_MOE].run_layer(experts, *mine)  # pyright: ignore[reportAttributeAccessIssue]
            x = torch.tanh(x)
        return x


MEGA_MOE = "sglang.srt.layers.moe.mega_moe"
RUNTIME = "sglang.srt.runtime_context"


def server_args(**changed: Any) -> Namespace:
    args: dict[str, Any] = {
        "model_path": "toy-v4",
        "revision": None,
        "quantization": None,
        "dtype": "bfloat16",
    }
    return Namespace(**args | changed)


def sglang_modules(*, cuda_graphs=False, mapped=False, in_buffer=False, **ranks: Any) -> dict:
    """name -> module, to be put into sys.modules. ranks: of get_parallel()."""
    mega_moe: Any = types.ModuleType(MEGA_MOE)

    def run_mega_routed_experts(
        experts,
        hidden_states,
        topk_ids,
        topk_weights,
        *,
        hidden_size,
        intermediate_size,
        top_k,
        num_tokens,
        activation_clamp=None,
        routed_scaling_factor=1.0,
        activation="swiglu",
        num_shared_experts=0,
        shared_l1_weights=None,
        shared_l2_weights=None,
        routing_in_buffer=False,
    ):
        staged = None
        if num_tokens > 0 and not routing_in_buffer:
            staged = topk_weights.to(torch.float32) * routed_scaling_factor
        experts.got.append((hidden_states.clone(), topk_ids, staged))
        return torch.tanh(hidden_states)

    def run_layer(experts, hidden_states, topk_ids, topk_weights):
        """_run_mega_routed: the global name is looked up at each call."""
        tokens = len(hidden_states)
        seen = tokens and not in_buffer
        return mega_moe.run_mega_routed_experts(
            experts,
            hidden_states,
            topk_ids if seen else None,
            topk_weights if seen else None,
            hidden_size=WIDTH,
            intermediate_size=64,
            top_k=TOP_K,
            num_tokens=tokens,
            activation_clamp=10.0,
            routed_scaling_factor=1.0 if in_buffer else SCALING,
            num_shared_experts=0,
            shared_l1_weights=None,
            shared_l2_weights=None,
            routing_in_buffer=in_buffer,
        )

    mega_moe.run_mega_routed_experts, mega_moe.run_layer = run_mega_routed_experts, run_layer

    runtime: Any = types.ModuleType(RUNTIME)
    kinds = ("dp", "attn_dp", "pp", "attn_tp", "attn_cp")
    parallel: dict[str, Any] = {f"{kind}_rank": 0 for kind in kinds} | {
        f"{kind}_size": 1 for kind in kinds
    }
    parallel["dp_rank"] = None  # there is no data-parallel controller
    runtime.get_parallel = lambda: Namespace(**parallel | ranks)
    algorithm = "static" if mapped else None
    runtime.get_exec = lambda: Namespace(moe=Namespace(ep_dispatch_algorithm=algorithm))

    graphs: Any = types.ModuleType("sglang.srt.model_executor.cuda_graph_config")
    graphs.cuda_graph_fully_disabled = lambda: not cuda_graphs

    runner: Any = types.ModuleType("sglang.srt.model_executor.model_runner")
    runner.ModelRunner = type("ModelRunner", (ModelRunner,), {"forward": ModelRunner.forward})

    scheduler: Any = types.ModuleType("sglang.srt.managers.scheduler")

    def run_scheduler_process(
        server_args,
        port_args,
        gpu_id,
        tp_rank,
        pp_rank,
        dp_rank,
        pipe_writer,
        display_tp_rank=None,
        display_dp_rank=None,
        display_moe_ep_rank=None,
    ):
        """Serves two requests, then ends."""
        model_runner = runner.ModelRunner()
        for tokens in (5, 11):
            model_runner.forward(ForwardBatch(torch.arange(tokens), torch.arange(tokens)))

    scheduler.run_scheduler_process = run_scheduler_process
    root: Any = types.ModuleType("sglang")
    root.__version__ = "0.5.23"
    modules = {m.__name__: m for m in (root, mega_moe, runtime, graphs, runner, scheduler)}
    for name in list(modules):  # the packages between them
        parts = name.split(".")
        for i in range(1, len(parts)):
            modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
    return modules
