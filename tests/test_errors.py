"""measure and its frames against the same written out in numpy float64, and what they leave out."""

import math
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sweep_runs import same

import nvfp4lab as nv
from nvfp4lab import errors

DETERMINISTIC = [n for n in nv.recipes() if nv.recipe(n).elements.rounding != "stochastic"]


def gaussian(*shape: int, seed: int = 0, sigma: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * sigma).bfloat16()


def with_specials(*shape: int) -> torch.Tensor:
    """Gaussian rows over many binades, with zeros, -0, NaN, Inf, a zero block and tiny values."""
    x = gaussian(*shape, seed=3).float()
    x *= 2.0 ** torch.randint(-20, 12, (*shape[:-1], 1), generator=torch.Generator().manual_seed(4))
    flat = x.view(-1, 32)
    flat[0], flat[1, 3], flat[2, 5], flat[3, 1] = 0.0, math.nan, math.inf, -math.inf
    flat[4, ::2], flat[5, ::3], flat[6] = 0.0, -0.0, math.nan
    return x.bfloat16()


@pytest.mark.parametrize("recipe", DETERMINISTIC)
def test_measures_equal_their_definitions(recipe):
    x = gaussian(40, 96, seed=1)
    q = nv.quantize(x, recipe)
    a, b = x.double().numpy(), q.dequantize().double().numpy()
    e = b - a
    got = nv.measure(x, q)
    want = {
        "mse": np.mean(e**2),
        "mae": np.mean(abs(e)),
        "nmse": np.sum(e**2) / np.sum(a**2),
        "qsnr_db": -10 * np.log10(np.sum(e**2) / np.sum(a**2)),
        "gain": np.sum(a * b) / np.sum(a**2),
        "cosine": np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b),
        "flushed_share": np.mean(b[a != 0] == 0),
        "max_abs_e": np.max(abs(e)),
        "max_rel_e": np.max(abs(e) / abs(a)),
        "amax": np.max(abs(a)),
        "sum_qq": np.sum(b**2),
        "tokens": 40,
        "blocks": a.size // nv.recipe(recipe).scale.block,
    }
    assert {name: getattr(got, name) for name in want} == pytest.approx(want, rel=1e-12)
    assert got.bias == pytest.approx(np.mean(e), abs=1e-12 * got.mae)


@pytest.mark.parametrize("recipe", nv.recipes())
def test_a_recipe_measures_as_its_quantized_form_to_the_bit(recipe):
    x = with_specials(5, 64 * 1024 + 32)  # several chunks

    def generator():
        return torch.Generator().manual_seed(1) if recipe == "nvfp4-stochastic" else None

    q = nv.quantize(x, recipe, generator=generator())
    assert nv.measure(x, recipe, generator=generator()) == nv.measure(x, q)


def test_a_calibrated_outer_scale_is_used():
    x = gaussian(4, 64)
    calibrated = nv.measure(x, "nvfp4-tensor", outer=0.5)
    assert calibrated == nv.measure(x, nv.quantize(x, "nvfp4-tensor", outer=0.5))


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token", "seed", "mxfp4-floor"])
def test_any_strides_and_shape_measure_alike(recipe):
    x = with_specials(6, 4, 64)
    want = nv.measure(x.reshape(24, 64), recipe)
    assert nv.measure(x, recipe) == want
    odd = x.transpose(0, 1).contiguous().transpose(0, 1)  # no view as rows
    assert nv.measure(odd, recipe) == want
    assert nv.measure(x[0, 0], recipe) == nv.measure(x[:1, 0], recipe)


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token", "nvfp4-tensor", "seed"])
def test_rows_longer_than_a_chunk_measure_alike(recipe, monkeypatch):
    x = with_specials(6, 448)
    want = nv.measure(x, recipe)
    monkeypatch.setattr("nvfp4lab.quantized.CHUNK", 96)  # 4 parts of 6 blocks, and one of 4
    got = nv.measure(x, recipe)
    counts_and_histograms = [n for n in vars(want) if not n.startswith(("sum", "amax_", "quot"))]
    for name in counts_and_histograms:
        if name != "worst" and not name.startswith("channel"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), name)
    assert got.sum_ee == pytest.approx(want.sum_ee, rel=1e-12)
    np.testing.assert_allclose(got.channel_ee, want.channel_ee, rtol=1e-12)
    assert got.worst_blocks().astype(str).equals(want.worst_blocks().astype(str))


@pytest.mark.parametrize("recipe", DETERMINISTIC)
def test_a_gpu_counts_as_the_cpu_does(recipe, gpu):
    x = with_specials(50, 448)
    got, want = nv.measure(x.to(gpu), recipe), nv.measure(x, recipe)
    assert same(replace(got, worst=want.worst), want)


def test_nothing_gives_empty_statistics():
    got = nv.measure(torch.zeros(0, 16), "nvfp4")
    assert (got.elements, got.tokens) == (0, 0)
    assert math.isnan(got.qsnr_db) and math.isnan(got.mse) and math.isnan(got.gain)


def test_a_gain_of_a_tenth_is_seen_where_cosine_sees_nothing():
    x = gaussian(8, 64)
    q = nv.quantize(x, "nvfp4-tensor")
    tenth = nv.Quantized(q.codes, q.scales, q.outer / 10, q.recipe)  # type: ignore[operator]
    assert nv.measure(x, tenth).cosine == pytest.approx(nv.measure(x, q).cosine, rel=1e-6)
    assert nv.measure(x, tenth).gain == pytest.approx(nv.measure(x, q).gain / 10, rel=1e-6)


def test_nan_and_inf_are_counted_and_enter_no_sum():
    x = gaussian(4, 16)
    poisoned = x.clone()
    poisoned[0, 3], poisoned[1, 5] = math.nan, math.inf
    got = nv.measure(poisoned, "nvfp4")
    assert (got.nonfinite_input, got.nonfinite_output) == (2, 15)
    assert got.counted == 64 - 17 and math.isfinite(got.sum_ee)


def test_a_tensor_of_nan_has_no_measure():
    got = nv.measure(torch.full((1, 16), math.nan), "nvfp4")
    assert got.nonfinite_input == 16
    assert all(math.isnan(v) for v in (got.nmse, got.qsnr_db, got.gain, got.cosine, got.crest))


def test_zero_tensor_has_no_error():
    got = nv.measure(torch.zeros(2, 16), "nvfp4")
    assert (got.nmse, got.qsnr_db, got.gain, got.scale_zero) == (0.0, math.inf, 1.0, 2)


@pytest.mark.filterwarnings("error")
def test_nothing_divides_by_zero_with_a_warning():
    for x in (torch.zeros(2, 16), torch.full((2, 16), math.nan), torch.zeros(0, 16)):
        with np.errstate(all="raise"):
            got = nv.measure(x, "nvfp4")
            frames = [got.to_frame(), got.by_amax(), got.by_quotient(), got.by_channel()]
            frames += [got.qsnr_histogram("token"), got.crest_histogram(), got.worst_blocks()]
            frames += [errors.block_errors(x, "nvfp4"), errors.token_errors(x, "nvfp4")]
        assert all(isinstance(frame, pd.DataFrame) for frame in frames)


@pytest.mark.parametrize(
    ("amax", "counted_as"),
    [
        (0.0, "zero"),
        (2.0**-9, "zero"),  # 2**-9 / 6 rounds to no scale
        (6 * 2.0**-9, "subnormal"),
        (6.0, "normal"),
        (6 * 448.0, "saturated"),
        (1e6, "saturated"),
        (math.nan, "nan"),
    ],
)
def test_scale_classes(amax, counted_as):
    got = nv.measure(torch.tensor([amax] + [0.0] * 15), "nvfp4")
    classes = ("zero", "subnormal", "normal", "saturated", "nan")
    assert [name for name in classes if getattr(got, f"scale_{name}")] == [counted_as]


def test_float32_scales_are_zero_normal_or_nan():
    x = torch.tensor([[0.0] * 16, [1e-30] * 16, [math.nan] * 16])
    got = nv.measure(x, "nvfp4-exact-scale")
    assert (got.scale_zero, got.scale_normal, got.scale_nan, got.blocks) == (1, 1, 1, 3)
    assert got.scale_codes.shape == (0,)


def test_scale_histogram_sums_to_one_and_finds_the_byte():
    frame = errors.scale_histogram(nv.quantize(torch.full((3, 16), 6.0), "nvfp4"))
    columns = frame["scale_code"], frame["share"]
    assert sum(columns[1]) == 1
    assert [c for c, share in zip(*columns, strict=True) if share == 1] == [0x38]


def test_float32_scales_have_no_histogram():
    with pytest.raises(ValueError, match="nvfp4-exact-scale keeps its scales in float32"):
        errors.scale_histogram(nv.quantize(torch.ones(16), "nvfp4-exact-scale"))


X, Q = torch.ones(4, 16), nv.quantize(torch.ones(4, 16))


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((X[:2], Q), {}, ValueError, r"x is \(2, 16\), its quantized form \(4, 16\)"),
        ((Q, X), {}, TypeError, "the tensor comes first, its quantized form second"),
        ((Q, "nvfp4"), {}, TypeError, "the tensor comes first"),
        ((X, X), {}, TypeError, r"q is a Quantized or a recipe, got a tensor \(4, 16\)"),
        (([1.0], Q), {}, TypeError, "x is a torch.Tensor, got list"),
        ((X, Q), {"outer": 1.0}, ValueError, "for quantizing; q is quantized already"),
        ((X, Q), {"generator": torch.Generator()}, ValueError, "q is quantized already"),
        ((X, "nvfp5"), {}, ValueError, "unknown recipe 'nvfp5'"),
        ((X, "nvfp4"), {"outer": 1.0}, ValueError, "nvfp4 has no outer scale"),
        ((X[:, :8], "nvfp4"), {}, ValueError, r"multiple of the block of 16, got \(4, 8\)"),
    ],
)
def test_measure_refuses(arguments, options, error, message):
    with pytest.raises(error, match=message):
        nv.measure(*arguments, **options)


@pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak is read from Linux's /proc"
)
@pytest.mark.parametrize("what", ["'nvfp4'", "'nvfp4-token'", "nv.quantize(x, 'nvfp4')"])
def test_memory_beyond_the_input_stays_under_64_mb(what):
    """The peak resident size above input (and codes), in a process of its own.

    Of 2**25 elements, whose copy in bfloat16 is 67 MB: a single one fails.
    """
    code = f"""if True:
    import os, torch, nvfp4lab as nv
    torch.set_num_threads(1)
    x = torch.ones(1 << 15, 1 << 10, dtype=torch.bfloat16)
    nv.measure(x[:1000], 'nvfp4-token')
    q = {what}
    open('/proc/self/clear_refs', 'w').write('5')
    def kilobytes(name):
        return int(open('/proc/self/status').read().split(name + ':')[1].split()[0])
    before = kilobytes('VmRSS')
    nv.measure(x, q)
    print((kilobytes('VmHWM') - before) * 1024)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64e6


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token", "nvfp4-tensor", "seed", "nvint4"])
def test_element_errors_are_those_of_the_tensor(recipe):
    x = with_specials(6, 64)
    q = nv.quantize(x, recipe)
    frame = errors.element_errors(x, recipe)
    assert len(frame) == x.numel()
    at = frame[(frame.token == 3) & (frame.channel == 35)].iloc[0]
    want = q.dequantize()[3, 35].item()
    assert (at.x, at.q, at.block) == (x[3, 35].item(), want, 2)
    assert at.e == want - x[3, 35].item() and at.code == q.element_codes()[3, 35].item()


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token", "seed", "nvfp4-exact-scale"])
def test_block_and_token_errors_add_up_to_the_tensors(recipe):
    x = with_specials(6, 64)
    whole = nv.measure(x, recipe)
    for frame in (errors.block_errors(x, recipe), errors.token_errors(x, recipe)):
        total = frame[["xx", "ee", "flushed", "lost"]].sum()
        want = (whole.sum_xx, whole.sum_ee, whole.flushed, whole.nonfinite_output)
        assert tuple(total) == pytest.approx(want, rel=1e-12)
        assert frame.amax.max() == whole.amax


def test_a_block_of_the_frame_by_hand():
    x = torch.tensor([[0.0] * 16, [6.0, 0.2, 0.3] + [0.0] * 13])
    row = errors.block_errors(x, "nvfp4").iloc[1]
    assert (row.token, row.block, row.amax, row.scale_code, row.scale) == (1, 0, 6.0, 0x38, 1.0)
    assert row.outer is None and (row.flushed, row.lost) == (1, 0)
    assert row.ee == pytest.approx(0.2**2 + 0.2**2, rel=1e-6)
    assert row.qsnr_db == pytest.approx(10 * math.log10(36.13 / 0.08), rel=1e-6)
    assert row.crest == pytest.approx(6 / math.sqrt(36.13 / 16), rel=1e-6)


def test_a_token_of_the_frame_has_its_outer_scale():
    x = torch.tensor([[2688.0] + [0.0] * 31, [2 * 2688.0] + [0.0] * 31])
    frame = errors.token_errors(x, "nvfp4-token")
    assert frame.outer.tolist() == [1.0, 2.0] and frame.qsnr_db.tolist() == [math.inf] * 2


FRAMES = (errors.element_errors, errors.block_errors, errors.token_errors)


def test_frames_take_a_tensor_that_requires_grad():
    x = gaussian(2, 32).float().requires_grad_()
    assert [len(frame_of(x, "nvfp4")) for frame_of in FRAMES] == [64, 4, 2]


@pytest.mark.parametrize("frame_of", FRAMES)
def test_frames_refuse_swapped_arguments(frame_of):
    with pytest.raises(TypeError, match="the tensor comes first"):
        frame_of(Q, X)


@pytest.mark.parametrize("shape", [(0, 32), (8, 0)])
def test_frames_of_nothing_are_empty(shape):
    assert [len(frame_of(torch.zeros(shape), "nvfp4-token")) for frame_of in FRAMES] == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32])
def test_a_tensor_of_another_dtype_is_refused_with_bytes_too(dtype):
    x = torch.ones(2, 16)
    with pytest.raises(TypeError, match="x is bfloat16, float16 or float32, got torch"):
        nv.measure(x.to(dtype), nv.quantize(x))


def test_zeros_that_decode_to_something_are_in_the_error_by_quotient():
    x = (gaussian(20, 256).float() * 1e-40).bfloat16()
    q = nv.quantize(x, "torchao")
    assert q.outer is not None and ((x == 0) & (q.dequantize() != 0)).any()
    step = (q.decoded_scales().double() * q.outer.double())[..., None]
    e = (q.dequantize().double() - x.double()).unflatten(-1, (-1, 16)) / step
    assert nv.measure(x, q).quotient_ee.sum() == pytest.approx(e.square().sum().item(), rel=1e-9)


def test_a_scale_with_a_sign_bit_is_classed_by_its_magnitude():
    x = torch.full((1, 16), 448.0 * 6)
    q = nv.quantize(x)
    negative = nv.Quantized(q.codes, q.scales | 0x80, None, q.recipe)
    got = nv.measure(x, negative)
    assert (got.scale_saturated, got.saturated, got.quotient_elements.sum()) == (1, 0, 16)


def test_the_nmse_of_sampled_rows_is_the_whole_tensors():
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    nmse, _ = errors.sampled_nmse(errors.token_errors(x, "nvfp4"))
    assert nmse == pytest.approx(errors.measure(x, "nvfp4").nmse, rel=1e-9)


def test_the_standard_error_of_a_sampled_nmse_is_the_spread_of_samples():
    x = torch.randn(400, 32, 64, generator=torch.Generator().manual_seed(4))
    samples = [errors.sampled_nmse(errors.token_errors(one, "nvfp4")) for one in x]
    nmse, error = np.array(samples).T
    assert np.sqrt(np.square(error).mean()) == pytest.approx(nmse.std(), rel=0.15)


def test_a_sampled_nmse_of_one_row_has_no_standard_error_and_of_none_is_refused():
    frame = errors.token_errors(torch.ones(1, 16), "nvfp4")
    assert np.isnan(errors.sampled_nmse(frame)[1])
    with pytest.raises(ValueError, match="no row"):
        errors.sampled_nmse(frame.iloc[:0])
