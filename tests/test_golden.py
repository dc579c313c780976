"""The shipped activations give the golden bytes: through quantize, and staged by the kernels.

The golden bytes were written by the oracle (tests/golden/make_golden.py). A change of one bit in
what is staged fails here, with the first ten differences.
"""

import pytest
import torch
from golden import make_golden
from proofs import require_equal
from safetensors.torch import load_file

import nvfp4lab as nv

CASES = [(name, recipe) for name in make_golden.SETS for recipe in make_golden.RECIPES]


def require_golden(q: nv.Quantized, golden: dict[str, torch.Tensor], site: nv.Activations) -> None:
    """Codes, scales and outer scale of q [T, K], byte for byte."""
    got = {"codes": q.codes, "scales": q.scales} | ({} if q.outer is None else {"outer": q.outer})
    values = site.hidden.float().numpy()
    bits = site.hidden.view(torch.int16).numpy().view("uint16")
    first = {
        "codes": 2,
        "scales": 16,
        "outer": values.shape[1],
    }  # elements that an entry stands for
    assert {k.rpartition(".")[2] for k in golden if k.startswith(site.label + ".")} == set(got)
    for part, tensor in got.items():
        want = golden[f"{site.label}.{part}"].numpy()
        step = first[part]
        require_equal(f"{site.label} {part}", tensor, want, values[:, ::step], bits[:, ::step])


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_quantize_gives_the_golden_bytes(name, recipe):
    golden = load_file(make_golden.golden_path(name, recipe))
    for site in nv.activations(name):
        require_golden(nv.quantize(site.hidden, recipe), golden, site)


@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_staging_gives_the_golden_bytes(name, recipe, device):
    """Padded with zeros to a multiple of 128, the padding has blocks of its own; the routing of a
    dense site is made up."""
    golden = load_file(make_golden.golden_path(name, recipe))
    for site in nv.activations(name):
        if device == "cpu":  # the interpreter takes milliseconds for each program
            site = site.rows(0, 8)
        width, ids, weights = site.hidden.shape[1], site.topk_ids, site.topk_weights
        if ids is None or weights is None:
            ids, weights = torch.zeros(len(site), 2, dtype=torch.int64), torch.rand(len(site), 2)
        hidden = torch.nn.functional.pad(site.hidden, (0, -width % 128))
        staged = nv.stage(hidden.to(device), weights.to(device), ids.to(device), recipe=recipe)
        head = {part: array[: len(site)] for part, array in golden.items()}
        require_golden(staged.quantized.without_padding(width), head, site)
        assert staged.topk_idx.cpu().equal(ids.to(staged.topk_idx.dtype))
        assert staged.topk_weights.cpu().equal(weights)


def test_one_flipped_bit_is_found_and_named():
    site = nv.activations("smollm2")[0]
    golden = load_file(make_golden.golden_path("smollm2", "nvfp4"))
    q = nv.quantize(site.hidden, "nvfp4")
    q.codes[3, 7] ^= 1
    with pytest.raises(AssertionError, match=r"layer00.mlp_input codes: 1 of 73728 differ"):
        require_golden(q, golden, site)
