"""nvfp4lab.experts: the pass is that of transformers' own experts, and quantization is all that a
Precision changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import nvfp4lab as nv
from nvfp4lab.experts import STAGES, Precision, stage_errors, through_experts

SEED = 20261126
WIDTH, INNER, EXPERTS, TOP_K = 64, 32, 4, 2


def made(tokens: int = 24, **changes) -> tuple[nv.Activations, nv.ExpertWeights]:
    """Random routed activations and the experts behind them."""
    rng = torch.Generator().manual_seed(SEED)
    draw = torch.rand(tokens, EXPERTS, generator=rng)
    shares, ids = draw.topk(TOP_K, dim=-1)
    site = nv.Activations(
        hidden=torch.randn(tokens, WIDTH, generator=rng).bfloat16(),
        positions=torch.arange(tokens),
        layer=3,
        site="expert_input",
        provenance={},
        topk_ids=ids.int(),
        topk_weights=shares,
    )
    weights = nv.ExpertWeights(
        torch.randn(EXPERTS, 2 * INNER, WIDTH, generator=rng).bfloat16(),
        torch.randn(EXPERTS, WIDTH, INNER, generator=rng).bfloat16(),
        layer=3,
        provenance={"swiglu_limit": 10.0},
    )
    return replace(site, **changes), weights


def one_at_a_time(site, weights, limit: float | None) -> np.ndarray:
    """The same sum in float64, a token and an expert at a time."""
    out = np.zeros(site.hidden.shape)
    for t, x in enumerate(site.hidden.double().numpy()):
        for expert, share in zip(site.topk_ids[t].tolist(), site.topk_weights[t].tolist()):  # noqa: B905
            both = weights.gate_up_proj[expert].double().numpy() @ x
            gate, up = both[:INNER], both[INNER:]
            if limit is not None:
                gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
            silu = gate / (1 + np.exp(-gate))
            out[t] += share * (weights.down_proj[expert].double().numpy() @ (silu * up))
    return out


@pytest.mark.parametrize("limit", [10.0, 1.0, None])
def test_the_output_is_the_weighted_sum_over_a_tokens_experts(limit):
    site, weights = made()
    weights = replace(weights, provenance={} if limit is None else {"swiglu_limit": limit})
    got = through_experts(site, weights).output.double().numpy()
    want = one_at_a_time(site, weights, limit)
    assert np.abs(got - want).max() < 1e-5 * np.abs(want).max()


def test_a_given_limit_stands_before_the_weights_own():
    site, weights = made()
    got = through_experts(site, weights, swiglu_limit=0.5).output.double().numpy()
    assert np.abs(got - one_at_a_time(site, weights, 0.5)).max() < 1e-4


def test_the_clamp_binds_here():
    site, weights = made()
    assert not np.allclose(one_at_a_time(site, weights, 10.0), one_at_a_time(site, weights, None))


def test_the_output_is_that_of_transformers_experts_on_v4_mini():
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts

    weights = nv.expert_weights("v4-mini")
    site = next(s for s in nv.activations("v4-mini") if s.layer == weights.layer)
    config = transformers.DeepseekV4Config(**weights.provenance["architecture"])
    config._experts_implementation = "eager"
    peer = DeepseekV4Experts(config)
    assert peer.limit == weights.provenance["swiglu_limit"]
    peer.load_state_dict(
        {
            "gate_up_proj": weights.gate_up_proj.float(),
            "down_proj": weights.down_proj.float(),
        }
    )
    assert site.topk_ids is not None
    with torch.no_grad():
        want = peer(site.hidden.float(), site.topk_ids.long(), site.topk_weights)
    got = through_experts(site, weights).output
    assert (got - want).square().sum() < 1e-11 * want.square().sum()


def test_smollm2s_hidden_is_what_was_captured_before_its_down_projection():
    """But for the rounding of its input and weights to BF16: 2**-9 each, about 6e-6 in all."""
    site, captured = nv.activations("smollm2")[:2]
    got = through_experts(site, nv.expert_weights("smollm2")).hidden
    want = captured.hidden.float()
    assert (got - want).square().sum() < 2e-5 * want.square().sum()


@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp4-even", nv.recipe("vllm-muse")])
def test_each_part_of_a_precision_quantizes_its_operand_and_nothing_else(recipe):
    site, weights = made()
    exact = through_experts(site, weights)
    inputs = through_experts(site, weights, Precision(inputs=recipe))
    hidden = through_experts(site, weights, Precision(hidden=recipe))
    assert inputs.inputs.equal(nv.quantize(site.hidden, recipe).dequantize())
    assert inputs.hidden.equal(inputs.hidden_staged)
    assert hidden.inputs.equal(exact.inputs) and hidden.hidden.equal(exact.hidden)
    per_route = [nv.quantize(row, recipe).dequantize() for row in exact.hidden]
    assert hidden.hidden_staged.equal(torch.stack(per_route))


def test_quantized_weights_are_those_that_quantize_gives():
    site, weights = made()
    own = [nv.quantize(m, "nvfp4").dequantize() for m in (weights.gate_up_proj, weights.down_proj)]
    decoded = replace(weights, gate_up_proj=own[0], down_proj=own[1])
    got = through_experts(site, weights, Precision(weights="nvfp4"))
    assert got.output.equal(through_experts(site, decoded).output)


def test_an_outer_scale_for_the_tensor_is_each_experts_own():
    site, weights = made()
    one = weights.gate_up_proj.clone()
    one[2] *= 1000  # would flush the others
    large = replace(weights, gate_up_proj=one)
    got = through_experts(site, large, Precision(weights="nvfp4-tensor"))
    want = through_experts(site, weights, Precision(weights="nvfp4-tensor"))
    others = got.tokens[: int((site.topk_ids < 2).sum())]  # type: ignore[operator]
    assert got.hidden[: len(others)].equal(want.hidden[: len(others)])


def test_the_routers_weight_goes_in_before_the_second_quantization():
    site, weights = made()
    double = replace(site, topk_weights=site.topk_weights * 2)  # type: ignore[operator]
    once, twice = (through_experts(s, weights).hidden for s in (site, double))
    assert twice.equal(2 * once)


def test_a_route_to_no_expert_goes_nowhere():
    site, weights = made()
    ids = site.topk_ids.clone()  # type: ignore[union-attr]
    ids[5] = -1
    got = through_experts(replace(site, topk_ids=ids), weights)
    assert not got.output[5].any() and 5 not in got.tokens.tolist()
    rest = torch.arange(len(site)) != 5
    want = through_experts(site, weights).output[rest]
    assert torch.allclose(got.output[rest], want, rtol=1e-5, atol=1e-4)


def test_no_tokens_give_no_routes():
    site, weights = made()
    got = through_experts(site.rows(0, 0), weights, Precision("nvfp4", "nvfp4", "nvfp4"))
    assert got.output.shape == (0, WIDTH) and got.hidden.shape == (0, INNER)


def test_stage_errors_are_the_sums_by_hand_and_nan_is_counted_apart():
    site, weights = made()
    exact = through_experts(site, weights)
    passed = through_experts(site, weights, Precision(inputs="nvfp4"))
    output = passed.output.clone()
    output[0, 0] = float("nan")
    frame = stage_errors(exact, replace(passed, output=output)).set_index("stage")
    assert list(frame.index) == list(STAGES)
    assert frame["lost"].tolist() == [0, 0, 0, 0, 1]
    keep = torch.ones_like(output, dtype=torch.bool)
    keep[0, 0] = False
    x, q = exact.output[keep].double(), output[keep].double()
    nmse = ((q - x).square().sum() / x.square().sum()).item()
    assert frame.loc["output", "nmse"] == pytest.approx(nmse, rel=1e-12)
    assert frame.loc["output", "gain"] == pytest.approx(((x * q).sum() / (x * x).sum()).item())
    assert stage_errors(exact, exact)["ee"].tolist() == [0.0] * 5


def test_a_nan_scale_of_the_seed_makes_a_whole_output_row_nan():
    site, weights = nv.activations("smollm2")[0], nv.expert_weights("smollm2")
    passed = through_experts(site, weights, Precision(hidden="seed"))
    nan_blocks = passed.hidden_staged.isnan().any(-1)
    assert 0 < nan_blocks.sum() < len(site)
    assert passed.output.isnan().all(-1).equal(nan_blocks)
    assert passed.output.isnan().any(-1).equal(nan_blocks)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer": 4},
            "one layer and width, got layer04.expert_input of 64 and weights of layer 3",
        ),
        ({"hidden": torch.zeros(24, 32).bfloat16()}, "of 32 and weights of layer 3 of 64"),
        ({"topk_ids": None, "topk_weights": None}, "is dense, but the weights have 4 experts"),
        ({"topk_ids": torch.full((24, 2), 4)}, "routes to expert 4, the weights have 4"),
        ({"topk_ids": torch.full((24, 2), -2)}, "routes to expert -2, the weights have 4"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    site, weights = made(**changes)
    with pytest.raises(ValueError, match=message):
        through_experts(site, weights)


def test_passes_of_other_routes_are_not_compared():
    site, weights = made()
    with pytest.raises(ValueError, match="two passes of the same routes"):
        stage_errors(through_experts(site, weights), through_experts(site.rows(0, 9), weights))


def test_it_runs_on_the_weights_device(gpu):
    site, weights = made()
    there = replace(
        weights, gate_up_proj=weights.gate_up_proj.to(gpu), down_proj=weights.down_proj.to(gpu)
    )
    got = through_experts(site, there, Precision("nvfp4", "nvfp4", "mxfp4-even"))
    assert got.output.device.type == "cuda"
    errors = stage_errors(through_experts(site, there), got)
    want = stage_errors(
        through_experts(site, weights),
        through_experts(site, weights, Precision("nvfp4", "nvfp4", "mxfp4-even")),
    )
    assert np.allclose(errors["nmse"], want["nmse"], rtol=0.02)
