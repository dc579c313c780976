"""quantize and Quantized beyond the proofs: shapes, strides, memory, decoding, bad input."""

import os
import subprocess
import sys

import pytest
import torch

import nvfp4lab as nv
from nvfp4lab import layouts
from nvfp4lab.codec import LARGEST_BF16

NAN, INF = float("nan"), float("inf")
DETERMINISTIC = [n for n in nv.recipes() if nv.recipe(n).elements.rounding != "stochastic"]
IN_THE_INPUTS_DTYPE = ("compressed-tensors", "mlx")


def gaussian(*shape: int, dtype=torch.bfloat16, seed: int = 0, sigma: float = 1.0) -> torch.Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * sigma
    return x.to(dtype)


def block(*values: float) -> torch.Tensor:
    return torch.tensor([*values, *[0.0] * (16 - len(values))])


def same(a: nv.Quantized, b: nv.Quantized) -> bool:
    outers = (a.outer is None and b.outer is None) or torch.equal(a.outer, b.outer)  # type: ignore
    return a.codes.equal(b.codes) and a.scales.equal(b.scales) and outers


def test_shapes_of_the_parts():
    q = nv.quantize(gaussian(2, 3, 64), "nvfp4-token")
    assert q.outer is not None
    assert (q.codes.shape, q.scales.shape, q.outer.shape) == ((2, 3, 32), (2, 3, 4), (2, 3, 1))
    assert [t.dtype for t in (q.codes, q.scales)] == [torch.uint8, torch.uint8]
    assert q.outer.dtype == torch.float32
    assert q.shape == (2, 3, 64) and q.dequantize().shape == (2, 3, 64)


@pytest.mark.parametrize("recipe", nv.recipes())
@pytest.mark.parametrize("blocks", [(1,), (5, 2), (2, 3, 3), (0, 1), (3, 0), (4, 0, 1)])
def test_any_leading_shape(recipe, blocks):
    shape = (*blocks[:-1], blocks[-1] * nv.recipe(recipe).scale.block)
    q = nv.quantize(gaussian(*shape), recipe)
    assert q.dequantize().shape == shape


@pytest.mark.parametrize("recipe", DETERMINISTIC)
@pytest.mark.parametrize(
    "view",
    [
        lambda: gaussian(64, 8).t(),
        lambda: gaussian(6, 96)[:, ::3],
        lambda: gaussian(6, 64)[::2, 16:48],
        lambda: gaussian(4, 5, 32).transpose(0, 1),
        lambda: gaussian(1, 32).expand(7, 32),
    ],
    ids=["transposed", "strided", "sliced", "swapped", "expanded"],
)
def test_strides_do_not_matter(recipe, view):
    x = view()
    assert same(nv.quantize(x, recipe), nv.quantize(x.contiguous(), recipe))


@pytest.mark.parametrize("recipe", [n for n in DETERMINISTIC if n not in IN_THE_INPUTS_DTYPE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_bf16_value_quantizes_alike_in_a_wider_dtype(recipe, dtype):
    x = gaussian(64, 128)
    x = x[(x.float().abs() > 2.0**-13).all(-1)]  # exact in float16 too
    assert same(nv.quantize(x, recipe), nv.quantize(x.to(dtype), recipe))


def test_input_is_left_alone():
    x = gaussian(4, 32, dtype=torch.float32)
    before = x.clone()
    for recipe in nv.recipes():
        nv.quantize(x, recipe)
    assert x.equal(before)


def test_no_gradient_is_recorded():
    x = gaussian(4, 32, dtype=torch.float32).requires_grad_()
    q = nv.quantize(x, "nvfp4-tensor")
    assert q.outer is not None and not q.outer.requires_grad
    assert nv.measure(x, q).elements == 128


def test_chunks_do_not_show(monkeypatch):
    x = gaussian(37, 160)
    whole = {recipe: nv.quantize(x, recipe) for recipe in DETERMINISTIC}
    monkeypatch.setattr("nvfp4lab.quantized.CHUNK", 16 * 7)
    for recipe, q in whole.items():
        again = nv.quantize(x, recipe)
        assert same(again, q)
        torch.testing.assert_close(
            again.dequantize(), q.dequantize(), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is read from Linux's /proc"
)
@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token", "nvfp4-tensor"])
@pytest.mark.parametrize("layout", ["contiguous", "one row", "strided"])
def test_extra_memory_stays_under_64_mb(recipe, layout):
    """The peak resident size above input and output, in a process of its own.

    Of 2**25 elements, whose copy in bfloat16 is 67 MB: a single one fails.
    """
    shape = (1, 2**25) if layout == "one row" else (2**13, 2**12)
    stored = (shape[0], shape[1] * 2) if layout == "strided" else shape
    script = f"""
import resource, torch, nvfp4lab as nv
x = torch.ones({stored}, dtype=torch.bfloat16)[:, :{shape[1]}]
nv.quantize(x[:1, :1024], {recipe!r}).dequantize()
current = lambda: int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()
def extra(work):
    open('/proc/self/clear_refs', 'w').write('5')
    before, result = current(), work()
    status = open('/proc/self/status').read()
    peak = int(status.split('VmHWM:')[1].split()[0]) * 1024
    kept = result if isinstance(result, torch.Tensor) else None
    owned = kept.nbytes if kept is not None else result.codes.nbytes + result.scales.nbytes
    print(peak - before - owned)
    return result
q = extra(lambda: nv.quantize(x, {recipe!r}))
extra(lambda: q.dequantize(torch.bfloat16))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    quantizing, dequantizing = (int(line) for line in done.stdout.split())
    assert max(quantizing, dequantizing) < 64e6, (quantizing, dequantizing)


def test_zero_block_keeps_signs():
    q = nv.quantize(block(0.0, -0.0), "nvfp4")
    assert (q.scales.item(), q.codes[0].item()) == (0, 0x80)


def test_nan_takes_its_block_and_no_other():
    q = nv.quantize(torch.stack([block(1.0, NAN, -2.0), block(1.0)]), "nvfp4")
    assert q.scales.flatten().tolist() == [0x7F, nv.formats.E4M3.encode(torch.tensor(1 / 6)).item()]
    assert q.codes[0].tolist() == [0x77] * 8
    assert q.dequantize()[0].isnan().all() and q.dequantize()[1].isfinite().all()


def test_inf_saturates_its_block():
    q = nv.quantize(block(INF, -INF, 448.0), "nvfp4")
    assert q.dequantize()[:4].tolist() == [2688.0, -2688.0, 448.0, 0.0]


@pytest.mark.parametrize(
    ("row", "outer"),
    [
        (block(0.0), 1.0),
        (block(NAN), 1.0),
        (block(2688.0), 1.0),
        (block(2689.0), 2.0),
        (block(1344.0), 0.5),
        (block(1e-38), 2.0**-100),
        (block(INF), 2.0**117),
        (block(LARGEST_BF16), 2.0**117),
        (block(NAN, 2688.0), 1.0),
    ],
)
def test_outer_scale_of_a_token(row, outer):
    assert nv.quantize(row[None], "nvfp4-token").outer.item() == outer  # type: ignore[union-attr]


def test_token_decoding_clamps_to_the_largest_finite_value():
    x = block(LARGEST_BF16, -LARGEST_BF16)[None]
    q = nv.quantize(x, "nvfp4-token")
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        largest = torch.finfo(dtype).max
        got = q.dequantize(dtype)[0, :2].tolist()
        assert all(abs(v) <= largest for v in got) and got[0] == -got[1] > 0.9 * min(
            largest, LARGEST_BF16
        )


def test_calibrated_outer_scale_replaces_the_tensors_own():
    x = gaussian(8, 32, seed=3)
    own = nv.quantize(x, "nvfp4-tensor")
    assert own.outer == x.float().abs().max() / torch.tensor(2688.0)
    again = nv.quantize(x, "nvfp4-tensor", outer=own.outer)
    assert same(own, again)
    assert nv.quantize(x, "nvfp4-tensor", outer=1.0).outer == 1.0


def test_outer_scale_of_a_zero_tensor_is_one():
    assert nv.quantize(torch.zeros(2, 16), "nvfp4-tensor").outer == 1.0


def test_generator_makes_stochastic_rounding_repeat():
    x = gaussian(16, 64, seed=4)
    draws = [
        nv.quantize(x, "nvfp4-stochastic", generator=torch.Generator().manual_seed(s)).codes
        for s in (1, 1, 2)
    ]
    assert draws[0].equal(draws[1]) and not draws[0].equal(draws[2])


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token", "nvfp4-tensor"])
@pytest.mark.parametrize(
    ("layout", "place"),
    [
        ("mega_moe", layouts.to_words),
        ("mega_moe", lambda s: s),
        ("linear", lambda s: s.view(torch.float8_e4m3fn)),
        ("128x4", layouts.to_tiles),
        ("mn_major", layouts.to_mn_major),
    ],
)
def test_from_buffers_reads_every_layout(recipe, layout, place):
    q = nv.quantize(gaussian(130, 128, seed=5), recipe)
    codes = q.codes.view(torch.float4_e2m1fn_x2)
    read = nv.Quantized.from_buffers(codes, place(q.scales), q.outer, recipe=recipe, layout=layout)
    assert same(read, q)


@pytest.mark.parametrize("shape", [(130,), (130, 1)])
def test_from_buffers_inverts_the_encode_convention(shape):
    q = nv.quantize(gaussian(130, 128, seed=6), "nvfp4-token")
    encode = (1 / q.outer).reshape(shape)  # type: ignore[operator]
    read = nv.Quantized.from_buffers(
        q.codes, q.scales, encode, recipe="nvfp4-token", outer_is="encode"
    )
    assert same(read, q)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": torch.ones(4, 17)}, ValueError, r"multiple of the block of 16, got \(4, 17\)"),
        ({"x": torch.tensor(1.0)}, ValueError, r"got \(\)"),
        ({"x": torch.ones(16, dtype=torch.float64)}, TypeError, "got torch.float64"),
        ({"x": [1.0] * 16}, TypeError, "x is a torch.Tensor, got list"),
        ({"recipe": "nvfp5"}, ValueError, "unknown recipe 'nvfp5'; did you mean nvfp4"),
        ({"outer": 1.0}, ValueError, "outer scale was given, but nvfp4 has no outer scale"),
        (
            {"recipe": "nvfp4-token", "outer": 1.0},
            ValueError,
            "nvfp4-token has an outer scale for each token",
        ),
        ({"recipe": "nvfp4-tensor", "outer": 0.0}, ValueError, "positive finite .* got 0.0"),
        ({"recipe": "nvfp4-tensor", "outer": 1e-50}, ValueError, "positive finite .* got 1e-50"),
        ({"recipe": "nvfp4-tensor", "outer": NAN}, ValueError, "positive finite .* got nan"),
        (
            {"recipe": "nvfp4-tensor", "outer": torch.ones(4)},
            ValueError,
            "one positive finite float32 decode scale",
        ),
        ({"generator": torch.Generator()}, ValueError, "nvfp4 draws no random numbers"),
    ],
)
def test_quantize_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        nv.quantize(**({"x": torch.ones(4, 16)} | arguments))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"layout": "swizzled"},
            ValueError,
            "unknown scale layout 'swizzled'; .* mega_moe",
        ),
        ({"outer_is": "inverse"}, ValueError, "'decode' or 'encode', got 'inverse'"),
        ({"codes": torch.zeros(4, 32)}, TypeError, "codes are bytes .* got torch.float32"),
        (
            {"codes": torch.zeros(4, 7, dtype=torch.uint8)},
            ValueError,
            "rows of 14 elements, not a multiple of the block of 16",
        ),
        (
            {"scales": torch.zeros(4, 3, dtype=torch.uint8)},
            ValueError,
            r"need 16 scales of shape \(4, 4\) .* got \(4, 3\)",
        ),
        ({"scales": torch.zeros(4, 4)}, TypeError, "scales are bytes .* got torch.float32"),
        ({"outer": torch.ones(())}, ValueError, "nvfp4 has no outer scale; one was given"),
        ({"recipe": "nvfp4-token"}, ValueError, "nvfp4-token has an outer scale; none was given"),
        (
            {"recipe": "nvfp4-token", "outer": torch.ones(3)},
            ValueError,
            r"outer scale of shape \(4, 1\), got \(3,\)",
        ),
        (
            {"recipe": "nvfp4-tensor", "outer": torch.ones((), dtype=torch.float64)},
            TypeError,
            "outer scale is float32, got torch.float64",
        ),
        ({"layout": "mn_major"}, TypeError, "scale words are int32, got torch.uint8"),
    ],
)
def test_from_buffers_refuses(arguments, error, message):
    buffers = {
        "codes": torch.zeros(4, 32, dtype=torch.uint8),
        "scales": torch.zeros(4, 4, dtype=torch.uint8),
        "recipe": "nvfp4",
    }
    with pytest.raises(error, match=message):
        nv.Quantized.from_buffers(**(buffers | arguments))


def test_dequantize_refuses_other_dtypes():
    with pytest.raises(TypeError, match=r"got torch.float64"):
        nv.quantize(torch.ones(16)).dequantize(torch.float64)
