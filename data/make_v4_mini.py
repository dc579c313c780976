"""Makes data/v4-mini: trains a small model of DeepSeek V4's architecture, and captures what enters
its experts. It is not DeepSeek V4: the architecture is, the size and the training are not.

One command on a machine with one CUDA GPU, three stages (corpus, train, capture), each skipped when
its result lies in build/v4-mini. Training stops after --minutes with a checkpoint and the same
command goes on from it. Training is not bit-reproducible; what is made anew replaces the shipped
set only when its statistics lie within BANDS of those recorded in data/v4-mini/training.json.

    make setup
    .venv/bin/pip install -c constraints.txt -e ".[capture]"
    .venv/bin/python data/make_v4_mini.py

To train another model, change PLAN; the corpus is make_v4_mini_corpus.py's.
"""

import argparse
import datetime
import hashlib
import json
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from make_manifest import write_set
from tokenizers import Tokenizer
from torch import nn
from torch.nn.utils import parametrize

import nvfp4lab as nv
from nvfp4lab.records import Activations, ExpertWeights

HERE = Path(__file__).parent
TEXT = HERE / "smollm2" / "text.txt"  # held out by nature: no source of the corpus has it
CURVE_EVERY, EVALUATE_EVERY = 20, 400  # steps


@dataclass(frozen=True)
class Plan:
    """The model and its training. `architecture` goes to DeepseekV4Config as it is."""

    architecture: Mapping[str, Any]
    steps: int
    batch: int = 32
    sequence: int = 512
    learning_rate: float = 1.2e-3
    warm_up: int = 100
    weight_decay: float = 0.1
    bias_step: float = 1e-2  # of the router's correction bias, by the sign of the load error
    held_out: int = 128  # sequences
    capture_tokens: int = 256
    weights_layer: int = 5
    seed: int = 0


PLAN = Plan(
    architecture={
        "vocab_size": 16384,
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "moe_intermediate_size": 64,
        "n_routed_experts": 32,
        "num_experts_per_tok": 6,
        "num_hash_layers": 3,
        "num_attention_heads": 16,
        "head_dim": 128,
        "qk_rope_head_dim": 32,
        "q_lora_rank": 512,
        "o_groups": 4,
        "o_lora_rank": 256,
        "index_n_heads": 8,
        "index_head_dim": 64,
        "index_topk": 64,
        "sliding_window": 128,
        "max_position_embeddings": 2048,
        "pad_token_id": None,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    steps=2500,
)

# Relative half-widths within which a remade set must agree with the recorded one.
BANDS = {"held_out_loss": 0.03, "sigma": 0.15, "kurtosis": 0.25, "channel_max_over_median": 0.25}


# the model --------------------------------------------------------------------------------------


class AsBFloat16(nn.Module):
    """Hands a float32 parameter out as BF16: the grouped product of the experts has no autocast."""

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.bfloat16()


def make_model(plan: Plan, device: str) -> nn.Module:
    """A fresh model in float32, its hash routers filled with distinct experts for each token."""
    torch.manual_seed(plan.seed)
    config = transformers.DeepseekV4Config(**plan.architecture)
    model = transformers.DeepseekV4ForCausalLM(config)
    generator = torch.Generator().manual_seed(plan.seed)
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):  # zeros as built: every token would go to expert 0
            scores = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator)
            table.copy_(scores.topk(config.num_experts_per_tok).indices)
    return nn.Module.to(model, device)


def train_in_bfloat16(model: nn.Module) -> None:
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        if leaf in ("gate_up_proj", "down_proj") and parameter.ndim == 3:
            parametrize.register_parametrization(
                model.get_submodule(owner), leaf, AsBFloat16(), unsafe=True
            )


def experts_in_float32(model: nn.Module) -> None:
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for leaf in list(module.parametrizations):  # pyright: ignore[reportArgumentType, reportCallIssue]
                parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)


def routers(model: nn.Module) -> dict[int, nn.Module]:
    """The gate of every layer."""
    return {i: layer.mlp.gate for i, layer in enumerate(model.model.layers)}  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue, reportArgumentType]


class Load:
    """Counts how many tokens each expert of each layer gets, until `take` reads and clears it."""

    def __init__(self, model: nn.Module, experts: int):
        self.counts: dict[int, torch.Tensor] = {}
        self.experts = experts
        for layer, gate in routers(model).items():
            gate.register_forward_hook(self._hook(layer))

    def _hook(self, layer: int):
        def count(module, arguments, output):
            counted = torch.bincount(output[2].flatten(), minlength=self.experts)
            self.counts[layer] = self.counts.get(layer, 0) + counted

        return count

    def take(self) -> dict[int, torch.Tensor]:
        counts, self.counts = self.counts, {}
        return counts


# training ---------------------------------------------------------------------------------------


def train(plan: Plan, work: Path, minutes: float, device: str) -> bool:
    """Go on from work/checkpoint.pt, or begin; True when all steps are done.

    training.json keeps the loss curve, the held-out loss, the expert load and the wall time.
    """
    tokens = np.load(work / "train.npy")
    model = make_model(plan, device)
    train_in_bfloat16(model)
    load = Load(model, model.config.n_routed_experts)  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": plan.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=plan.learning_rate,
        betas=(0.9, 0.95),
        fused=device == "cuda",
    )
    log: dict[str, Any] = {"step": 0, "seconds": 0.0, "curve": [], "held_out": []}
    if (work / "checkpoint.pt").exists():
        state = torch.load(work / "checkpoint.pt", map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        log = json.loads((work / "training.json").read_text())

    def save() -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, work / "checkpoint.part")
        (work / "checkpoint.part").replace(work / "checkpoint.pt")
        (work / "training.json").write_text(json.dumps(log, indent=1) + "\n")

    started, before = time.monotonic(), log["seconds"]
    running = torch.zeros((), device=device)
    while log["step"] < plan.steps:
        step = log["step"]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, step)
        batch = crops(tokens, plan, step).to(device)
        loss = loss_of(model, batch, device)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        balance(model, load.take(), plan.bias_step)
        running += loss.detach()
        log["step"] = step = step + 1
        log["seconds"] = before + time.monotonic() - started
        if step % CURVE_EVERY == 0:
            log["curve"].append([step, round(running.item() / CURVE_EVERY, 4)])
            running.zero_()
        if step % EVALUATE_EVERY == 0 or step == plan.steps:
            evaluate(model, plan, work, load, log, device)
            done = f"step {step}/{plan.steps}, {log['seconds']:.0f} s"
            print(f"{done}, loss {log['curve'][-1][1]}, held out {log['held_out'][-1][1]:.4f}")
        if time.monotonic() - started > 60 * minutes and step % CURVE_EVERY == 0:
            break
    finished = log["step"] == plan.steps
    log |= {
        "plan": asdict(plan),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": log["step"] * plan.batch * plan.sequence,
        "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    save()
    return finished


def learning_rate(plan: Plan, step: int) -> float:
    """Linear warm-up, then a cosine to a tenth."""
    if step < plan.warm_up:
        return plan.learning_rate * (step + 1) / plan.warm_up
    done = (step - plan.warm_up) / max(1, plan.steps - plan.warm_up)
    return plan.learning_rate * (0.55 + 0.45 * math.cos(math.pi * done))


def crops(tokens: np.ndarray, plan: Plan, step: int) -> torch.Tensor:
    """[batch, sequence + 1] token ids from random places; the step decides them, so resuming does
    not change what is seen."""
    starts = np.random.default_rng([plan.seed, step]).integers(
        0, len(tokens) - plan.sequence, plan.batch
    )
    return torch.from_numpy(
        np.stack([tokens[s : s + plan.sequence + 1] for s in starts]).astype(np.int64)
    )


def loss_of(model: nn.Module, batch: torch.Tensor, device: str) -> torch.Tensor:
    with torch.autocast(device, torch.bfloat16):
        logits = model(batch[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def balance(model: nn.Module, counts: Mapping[int, torch.Tensor], step: float) -> None:
    """Raise the bias of experts below the mean load and lower it above; transformers leaves it."""
    for layer, gate in routers(model).items():
        if hasattr(gate, "e_score_correction_bias"):
            load = counts[layer].float()
            gate.e_score_correction_bias += step * (load.mean() - load).sign()  # pyright: ignore[reportOperatorIssue]


@torch.no_grad()
def evaluate(model: nn.Module, plan: Plan, work: Path, load: Load, log: dict, device: str) -> None:
    """Append the held-out loss, and replace the expert load by that of the held-out tokens."""
    tokens = np.load(work / "held_out.npy").astype(np.int64)
    rows = min(plan.held_out, (len(tokens) - 1) // plan.sequence)
    starts = plan.sequence * np.arange(rows)
    batches = np.stack([tokens[s : s + plan.sequence + 1] for s in starts])
    model.eval()
    load.take()
    losses = [
        loss_of(model, torch.from_numpy(part).to(device), device).item()
        for part in np.array_split(batches, max(1, rows // plan.batch))
    ]
    model.train()
    log["held_out"].append([log["step"], round(float(np.mean(losses)), 4)])
    log["expert_load"] = {
        str(layer): [round(c / counts.sum().item(), 5) for c in counts.tolist()]
        for layer, counts in load.take().items()
    }


# capture ----------------------------------------------------------------------------------------


def capture(plan: Plan, work: Path, device: str) -> tuple[list[Activations], ExpertWeights]:
    """What enters the experts of the trained model over the study's text, and one layer's experts.

    The model runs in float32 and each hidden state is rounded once to BF16, so that an engine's own
    BF16 sums are not mixed in.
    """
    torch.set_float32_matmul_precision("highest")
    model = make_model(plan, device)
    train_in_bfloat16(model)
    state = torch.load(work / "checkpoint.pt", map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    experts_in_float32(model)
    model.eval()
    ids = Tokenizer.from_file(str(work / "tokenizer.json")).encode(TEXT.read_text()).ids
    if len(ids) < plan.capture_tokens:
        raise SystemExit(f"{TEXT} gives {len(ids)} tokens, {plan.capture_tokens} are needed")
    ids = torch.tensor([ids[: plan.capture_tokens]], device=device)

    about = provenance(plan, work)
    shutil.rmtree(work / "capture", ignore_errors=True)
    with nv.capture.huggingface(model, work / "capture"), torch.no_grad():
        model(ids, use_cache=False)
    records = [
        replace(record, provenance=about) for record in nv.load_activations(work / "capture")
    ]
    experts: Any = model.get_submodule(f"model.layers.{plan.weights_layer}.mlp.experts")
    weights = ExpertWeights(
        gate_up_proj=experts.gate_up_proj.detach().bfloat16().cpu(),
        down_proj=experts.down_proj.detach().bfloat16().cpu(),
        layer=plan.weights_layer,
        provenance=about,
    )
    return records, weights


def provenance(plan: Plan, work: Path) -> dict[str, Any]:
    corpus = json.loads((work / "corpus.json").read_text())
    log = json.loads((work / "training.json").read_text())
    million = log["parameters"] / 1e6
    return {
        "is": f"v4-mini, a {million:.0f} M parameter model of DeepSeek V4's architecture trained "
        f"on {log['tokens_seen'] / 1e6:.0f} M tokens for this study; this is not DeepSeek V4",
        "captured_or_synthetic": "captured",
        "model": "v4-mini",
        "model_licence": "Apache-2.0",
        "architecture": dict(plan.architecture),
        "swiglu_limit": transformers.DeepseekV4Config().swiglu_limit,
        "routed_scaling_factor": transformers.DeepseekV4Config().routed_scaling_factor,
        "weight_quantization": "none: float32; the shipped experts rounded to BF16",
        "trained_on": corpus,
        "engine": f"transformers {transformers.__version__}, "
        f"torch {torch.__version__.split('+')[0]}, {log['device']}, float32, activations rounded "
        "to BF16",
        "text": "two excerpts of CPython 3.11 Lib/heapq.py, prose then code: data/smollm2/text.txt",
        "text_sha256": hashlib.sha256(TEXT.read_bytes()).hexdigest(),
        "text_licence": "PSF-2.0",
        "made": datetime.date.today().isoformat(),
        "made_by": "data/make_v4_mini.py",
    }


def statistics(records: list[Activations], log: Mapping[str, Any]) -> dict[str, Any]:
    """What BANDS are about: the held-out loss, and per layer what describes its distribution."""
    rows: dict[str, Any] = {"held_out_loss": log["held_out"][-1][1]}
    for record in records:
        x = record.hidden.double()
        channel = x.square().mean(0).sqrt()
        rows[f"{record.label} sigma"] = x.std().item()
        rows[f"{record.label} kurtosis"] = (((x - x.mean()) ** 4).mean() / x.var() ** 2).item()
        rows[f"{record.label} channel_max_over_median"] = (channel.max() / channel.median()).item()
    return rows


def outside_bands(found: Mapping[str, float], recorded: Mapping[str, float]) -> list[str]:
    """The statistics that differ from the recorded ones by more than their band."""
    return [
        f"{name}: {found[name]:.4g}, recorded {value:.4g}, band {BANDS[name.split()[-1]]:.0%}"
        for name, value in recorded.items()
        if abs(found[name] - value) > BANDS[name.split()[-1]] * abs(value)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Make data/v4-mini.")
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "v4-mini")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop training after so many")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not (args.work / "corpus.json").exists():
        import make_v4_mini_corpus

        make_v4_mini_corpus.build(args.work)
    if not train(PLAN, args.work, args.minutes, device):
        print("training stopped at a checkpoint; the same command goes on")
        return

    records, weights = capture(PLAN, args.work, device)
    log = json.loads((args.work / "training.json").read_text())
    log["statistics"] = statistics(records, log)
    recorded = HERE / "v4-mini" / "training.json"
    if recorded.exists():
        before = json.loads(recorded.read_text())["statistics"]
        if problems := outside_bands(log["statistics"], before):
            raise SystemExit("not replaced, outside its bands:\n" + "\n".join(problems))
    write_set("v4-mini", weights.provenance, records, weights)
    recorded.write_text(json.dumps(log, indent=1) + "\n")
    print(json.dumps(log["statistics"], indent=1))


if __name__ == "__main__":
    main()
