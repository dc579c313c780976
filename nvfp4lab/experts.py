"""experts: what the error of staging becomes behind the experts.

One layer's routed experts as DeepSeek V4's MegaMoE computes them, for each token and expert

    x -> [inputs] -> gate, up -> w silu(min(gate, limit)) clamp(up, +-limit) -> [hidden] -> down

and the sum over a token's experts. A recipe in brackets quantizes what stands there and decodes it
again, as one may the weights. The router's weight w goes in before the second quantization, as in
DeepGEMM's first epilogue. Products and sums are float32, so that what differs from `Precision()` is
quantization alone. To study another activation function, change `_hidden_of`.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import torch

from nvfp4lab import catalogue
from nvfp4lab.codec import quantize
from nvfp4lab.records import NO_EXPERT, Activations, ExpertWeights
from nvfp4lab.rules import Recipe
from nvfp4lab.statistics.measures import with_ratios

SWIGLU_LIMIT = "swiglu_limit"  # its name in the provenance of weights
STAGES = ("inputs", "gate, up", "hidden", "hidden staged", "output")


@dataclass(frozen=True)
class Precision:
    """By which recipe, or its name, each operand is quantized; None leaves it as it is.

    inputs: what enters the experts; hidden: what enters the down projection, the second
    quantization; weights: both matrices of every expert, along the dimension that is summed.
    """

    inputs: Recipe | str | None = None
    hidden: Recipe | str | None = None
    weights: Recipe | str | None = None


@dataclass(frozen=True, repr=False)
class Passed:
    """What one pass through the experts gives at each stage, float32.

    inputs [T, D] as the experts read them; for each of the R routes, sorted by expert and then
    token, gate_up [R, 2 I] before the clamp, hidden and hidden_staged [R, I] before and after the
    second quantization; output [T, D], the sum over a token's experts; tokens int64 [R], the token
    of each route.
    """

    inputs: torch.Tensor
    gate_up: torch.Tensor
    hidden: torch.Tensor
    hidden_staged: torch.Tensor
    output: torch.Tensor
    tokens: torch.Tensor

    def at(self, stage: str) -> torch.Tensor:
        """The tensor [rows, width] of one of STAGES."""
        return getattr(self, stage.replace(", ", "_").replace(" ", "_"))


@torch.no_grad()
def through_experts(
    site: Activations,
    weights: ExpertWeights,
    precision: Precision = Precision(),
    *,
    swiglu_limit: float | None = None,
) -> Passed:
    """Pass a site's rows through the experts behind it.

    site: hidden [T, D] with its top-k ids and weights; at a dense site every token goes to the one
    expert, with weight 1. Routes to expert -1 go nowhere. swiglu_limit: V4's clamp, gate <= limit
    and |up| <= limit; None takes that of the weights' provenance, and where it has none clamps
    nothing, as Inf does. Runs on the weights' device.

    Raises: ValueError if site and weights are not of one layer and width, an id has no expert, or a
    dense site meets more than one expert; what `quantize` raises.

    >>> from nvfp4lab.records import activations, expert_weights
    >>> site, weights = activations("smollm2")[0], expert_weights("smollm2")
    >>> through_experts(site.rows(0, 4), weights, Precision(inputs="nvfp4")).output.shape
    torch.Size([4, 576])
    """
    device = weights.down_proj.device
    ids, shares = _routes(site, weights)
    limit = weights.provenance.get(SWIGLU_LIMIT) if swiglu_limit is None else swiglu_limit
    x = site.hidden.to(device)
    inputs = _staged(x, precision.inputs)
    output = torch.zeros(x.shape, dtype=torch.float32, device=device)
    routes: list[tuple[torch.Tensor, ...]] = []  # token, gate_up, hidden, hidden_staged
    with torch.autocast(device.type, enabled=False):  # it would make the products BF16
        for expert in ids[ids != NO_EXPERT].unique().tolist():
            token, choice = (ids == expert).nonzero(as_tuple=True)
            both = inputs[token] @ _staged(weights.gate_up_proj[expert], precision.weights).T
            hidden = _hidden_of(both, limit) * shares[token, choice, None]
            staged = _staged(hidden, precision.hidden)
            down = _staged(weights.down_proj[expert], precision.weights)
            output.index_add_(0, token, staged @ down.T)
            routes.append((token, both, hidden, staged))
    inner = weights.down_proj.shape[-1]
    routes = routes or [(ids.new_zeros(0), *(output.new_zeros(0, n * inner) for n in (2, 1, 1)))]
    tokens, gate_up, hidden, hidden_staged = (torch.cat(part) for part in zip(*routes, strict=True))
    return Passed(inputs, gate_up, hidden, hidden_staged, output, tokens)


def stage_errors(exact: Passed, passed: Passed) -> pd.DataFrame:
    """The error at each stage of a pass against the same pass without quantization.

    A row a stage, in the order of STAGES: stage, xx, ee, xq (sums over elements that are finite in
    both), lost (elements that are finite in `exact` alone), nmse, qsnr_db, gain.

    Raises: ValueError if the two are not passes of the same routes.
    """
    if not torch.equal(exact.tokens, passed.tokens):
        raise ValueError(
            f"expected two passes of the same routes, got {len(exact.tokens)} and "
            f"{len(passed.tokens)}, or other tokens"
        )
    rows = []
    for stage in STAGES:
        x, q = exact.at(stage).double(), passed.at(stage).double()
        lost = x.isfinite() & ~q.isfinite()
        counted = x.isfinite() & q.isfinite()
        x, q = x.where(counted, 0.0), q.where(counted, 0.0)
        sums = {"xx": x.square(), "ee": (q - x).square(), "xq": x * q}
        row = {name: values.sum().item() for name, values in sums.items()}
        rows.append({"stage": stage, **row, "lost": int(lost.sum())})
    return with_ratios(pd.DataFrame(rows))


def _routes(site: Activations, weights: ExpertWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids int64 [T, k] and weights float32 [T, k] of every token's experts."""
    experts, width, _ = weights.down_proj.shape
    if site.layer != weights.layer or site.hidden.shape[1] != width:
        raise ValueError(
            f"expected activations and weights of one layer and width, got {site.label} of "
            f"{site.hidden.shape[1]} and weights of layer {weights.layer} of {width}"
        )
    device = weights.down_proj.device
    if site.topk_ids is None or site.topk_weights is None:
        if experts > 1:
            raise ValueError(f"{site.label} is dense, but the weights have {experts} experts")
        one = torch.ones(len(site), 1, dtype=torch.float32, device=device)
        return one.long() - 1, one
    for expert in site.topk_ids.unique().tolist():
        if expert != NO_EXPERT and not 0 <= expert < experts:
            raise ValueError(f"{site.label} routes to expert {expert}, the weights have {experts}")
    return site.topk_ids.to(device).long(), site.topk_weights.to(device)


def _staged(x: torch.Tensor, recipe: Recipe | str | None) -> torch.Tensor:
    """x as float32, quantized and decoded where there is a recipe."""
    return x.float() if recipe is None else quantize(x, catalogue.recipe(recipe)).dequantize()


def _hidden_of(gate_up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """SwiGLU with V4's clamp: the gate from above, up from both sides."""
    gate, up = gate_up.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return torch.nn.functional.silu(gate) * up
