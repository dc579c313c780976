"""Capture from a Hugging Face transformers model: what its experts are called with.

Pre-hooks on `layers.{i}.mlp.experts` see (hidden [T, D], ids [T, k], weights [T, k]), the inputs of
the staging kernel; a layer whose `mlp` has no experts is recorded as a dense site. Hooks on the
module that owns the layers say where a pass begins and which tokens are padding. Transformers is
not imported: the model that is handed in brings it. To support another way of calling experts,
change `_expert_inputs`.
"""

from __future__ import annotations

import datetime
import inspect
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nvfp4lab.capture.recorder import GIGABYTE, Recorder

EXPERTS = re.compile(r"(?P<owner>.*?)\.?layers\.(?P<layer>\d+)\.mlp(?P<routed>\.experts)?")


@contextmanager
def huggingface(
    model: nn.Module,
    out: str | Path,
    *,
    provenance: Mapping[str, Any] | None = None,
    layers: Iterable[int] | None = None,
    tokens: int | None = None,
    keep: float = 1.0,
    seed: int = 0,
    max_bytes: int | None = None,
    shard_bytes: int = GIGABYTE,
) -> Iterator[Recorder]:
    """Record what enters the experts of `model` while the block runs; the model runs as it is.

    model: a transformers model of DeepSeek V4, or any whose layers hold `mlp.experts` called with
    hidden, ids and weights. Hidden states are cast to BF16, weights to float32; ids are taken
    before expert parallelism remaps them. Tokens that a two-dimensional attention mask leaves out
    are dropped. provenance: added to what the model says of itself; give the text's source and
    licence.
    out, layers, tokens, keep, seed, max_bytes, shard_bytes: see Recorder.

    In a transformers whose DeepseekV4RMSNorm returns float32 for BF16 (before 5.18 or so; 5.23 is
    right), it warns and corrects the norm's output inside the block, as without that no BF16 model
    of it runs.

    Raises: ValueError for a model without such layers, or layers that it does not have.

        with nv.capture.huggingface(model, "v4", tokens=100_000) as recorder:
            for batch in batches[recorder.passes:]:  # after a kill, the rest
                model(**batch)
        sites = nv.load_activations("v4")
    """
    owner, sites = _find_sites(model)
    chosen = sorted(sites if layers is None else layers)
    if unknown := [layer for layer in chosen if layer not in sites]:
        raise ValueError(f"the model has no layer {unknown}, expected some of {sorted(sites)}")
    about = describe_model(model) | dict(provenance or {})
    recorder = Recorder(
        out,
        about,
        layers=layers if layers is None else chosen,
        tokens=tokens,
        keep=keep,
        seed=seed,
        max_bytes=max_bytes,
        shard_bytes=shard_bytes,
    )
    with recorder:
        hooks = [
            owner.register_forward_pre_hook(_begin(recorder), with_kwargs=True),
            owner.register_forward_hook(lambda *_: recorder.end()),
            *_correct_norms(model),
        ]
        for layer in chosen:
            module, routed = sites[layer]
            take = _take_experts if routed else _take_dense
            # prepend: before a hook of expert parallelism has remapped the ids
            hook = take(recorder, layer)
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
        try:
            yield recorder
        finally:
            for hook in hooks:
                hook.remove()


def describe_model(model: nn.Module) -> dict[str, Any]:
    """The provenance that a model tells by itself."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or type(model).__name__
    quantization = getattr(config, "quantization_config", None) or {}
    if not isinstance(quantization, Mapping):
        quantization = quantization.to_dict()
    library = type(model).__module__.split(".")[0]
    version = getattr(sys.modules.get(library), "__version__", "of no version")
    return {
        "is": f"what enters the experts of {name} ({type(model).__name__})",
        "captured_or_synthetic": "captured",
        "model": name,
        "model_revision": getattr(config, "_commit_hash", None),
        "model_type": getattr(config, "model_type", None),
        "weight_quantization": quantization.get("quant_method", "none"),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "engine": f"{library} {version}, torch {torch.__version__}",
        "date": datetime.date.today().isoformat(),
    }


def _find_sites(model: nn.Module) -> tuple[nn.Module, dict[int, tuple[nn.Module, bool]]]:
    """The module that owns the layers, and layer -> (its experts or dense mlp, whether routed)."""
    sites: dict[int, tuple[nn.Module, bool]] = {}
    owners = set()
    for name, module in model.named_modules():
        if match := EXPERTS.fullmatch(name):
            layer, routed = int(match["layer"]), match["routed"] is not None
            sites[layer] = (module, routed)  # the experts come after their mlp
            owners.add(match["owner"])
    if len(owners) != 1:
        found = sorted(owners) or "none"
        raise ValueError(
            f"expected one stack of layers with .mlp or .mlp.experts in {type(model).__name__}, "
            f"found {found}"
        )
    return model.get_submodule(owners.pop()), sites


def _begin(recorder: Recorder):
    def begin(owner: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(owner.forward).bind(*args, **kwargs).arguments
        ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
        batch, length = (embeds if ids is None else ids).shape[:2]  # pyright: ignore[reportOptionalMemberAccess]
        mask, positions = given.get("attention_mask"), given.get("position_ids")
        valid = None
        if isinstance(mask, torch.Tensor) and mask.ndim == 2:
            valid = mask[:, -length:].bool().flatten()
            if positions is None:
                positions = (mask.long().cumsum(-1) - 1)[:, -length:]
        elif mask is not None and batch > 1:
            raise ValueError(
                "capture needs the two-dimensional attention mask to know which rows are padding, "
                f"got {type(mask).__name__} for a batch of {batch}: call the model with it, or "
                "with one text at a time"
            )
        if positions is None:
            cache = given.get("past_key_values")
            start = cache.get_seq_length() if cache is not None else 0
            positions = torch.arange(start, start + length)[None]
        recorder.discard()  # a pass that an error ended
        recorder.begin(positions.expand(batch, length).flatten(), valid)

    return begin


def _expert_inputs(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """hidden, ids, weights, in the order that transformers calls experts with."""
    hidden, ids, weights = (*args, *kwargs.values())[:3]
    return hidden, ids, weights


def _take_experts(recorder: Recorder, layer: int):
    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recorder.take(layer, *_expert_inputs(args, kwargs))

    return take


def _take_dense(recorder: Recorder, layer: int):
    def take(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = (*args, *kwargs.values())[0]
        recorder.take(layer, hidden.flatten(0, -2), site="mlp_input")

    return take


def _correct_norms(model: nn.Module) -> list[Any]:
    """Hooks for norms that return float32 for BF16; none where transformers is right."""

    def norm(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor):
        x = args[0].float()
        normalised = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)  # pyright: ignore
        return (module.weight * normalised).to(args[0].dtype)  # pyright: ignore[reportOperatorIssue]

    faulty = [m for m in model.modules() if type(m).__name__ == "DeepseekV4RMSNorm"]
    in_bfloat16 = any(p.dtype == torch.bfloat16 for p in model.parameters())
    if not in_bfloat16 or not faulty or not _returns_float32(faulty[0]):
        return []
    warnings.warn(
        "this transformers' DeepseekV4RMSNorm returns float32 for BF16 input, and no BF16 model of "
        "it runs; its output is computed as 5.23 does while capturing",
        stacklevel=4,
    )
    return [module.register_forward_hook(norm) for module in faulty]


@torch.no_grad()
def _returns_float32(norm: nn.Module) -> bool:
    weight: torch.Tensor = norm.weight  # pyright: ignore[reportAssignmentType]
    probe = torch.ones(1, weight.shape[0], dtype=torch.bfloat16, device=weight.device)
    return norm(probe).dtype == torch.float32
