"""Statistics: each histogram and split against numpy, how two add up, and files."""

import itertools
import math
import zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from sweep_runs import same

import nvfp4lab as nv
from nvfp4lab import statistics
from nvfp4lab.statistics import Statistics, bins

RECIPES = ("nvfp4", "nvfp4-token", "seed", "nvfp4-exact-scale", "nvint4", "mxfp8-deepseek-v4")


def drawn(rows: int, width: int = 128, seed: int = 0) -> torch.Tensor:
    """Rows over many binades, with a zero block, zeros, NaN and Inf."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    x *= 2.0 ** torch.randint(-20, 12, (rows, 1), generator=generator)
    x[0, :32] = 0.0
    x[rows // 2, ::5] = 0.0
    x[rows // 3, 3], x[rows // 3, 40], x[-1, 64] = math.nan, math.inf, -math.inf
    return x.bfloat16()


def rows(frame: pd.DataFrame) -> list[SimpleNamespace]:
    return [SimpleNamespace(**row) for row in frame.to_dict("records")]


class Elements:
    """Every element of a tensor under a recipe, in plain float64 numpy: what is counted of it."""

    def __init__(self, x: torch.Tensor, recipe: str):
        self.q, block = nv.quantize(x, recipe), nv.recipe(recipe).scale.block
        shape = (-1, block)
        self.x = x.double().numpy().reshape(shape)
        self.decoded = self.q.dequantize().double().numpy().reshape(shape)
        self.finite = np.isfinite(self.x)
        self.counted = self.finite & np.isfinite(self.decoded)
        self.e = np.where(self.counted, np.nan_to_num(self.decoded) - np.nan_to_num(self.x), 0)
        self.seen = np.where(self.counted, np.nan_to_num(self.x, posinf=0, neginf=0), 0)
        self.amax = np.where(self.finite, np.abs(self.x), 0).max(1)
        s = self.q.decoded_scales().double().numpy().reshape(-1, 1)
        g = 1.0
        if self.q.outer is not None:
            g = self.q.outer.double().expand(self.q.scales.shape).numpy().reshape(-1, 1)
        self.s, self.step = s[:, 0], (s * g)


@pytest.fixture(params=RECIPES)
def recipe(request) -> str:
    return request.param


def test_element_and_scale_codes_are_counted(recipe):
    x = drawn(40)
    q, got = nv.quantize(x, recipe), nv.measure(x, recipe)
    codes = np.bincount(q.element_codes().numpy().ravel(), minlength=len(got.element_codes))
    np.testing.assert_array_equal(got.element_codes, codes)
    if q.recipe.scale.format is not None:
        want = np.bincount(q.scales.numpy().ravel(), minlength=256)
        np.testing.assert_array_equal(got.scale_codes, want)


def test_magnitude_shares_fold_the_signs(recipe):
    x = drawn(40)
    q, got = nv.quantize(x, recipe), nv.measure(x, recipe)
    fmt = q.recipe.elements.format
    values = np.abs(fmt.decode(q.element_codes()).numpy())
    want = [np.isnan(values).mean() if i == fmt.nan_code else (values == m).mean()
            for i, m in enumerate(fmt.magnitudes)]  # fmt: skip
    np.testing.assert_allclose(got.magnitude_shares, want, atol=1e-15)


def test_the_code_below_minus_max_has_no_magnitude():
    q = nv.quantize(torch.ones(1, 16), "nvint4")
    q.codes[0, 0] = 0x88  # -8, -8
    got = nv.measure(torch.ones(1, 16), q)
    assert got.element_codes[8] == 2 and got.magnitude_shares.sum() == 14 / 16


def test_entropy_of_two_codes_is_one_bit():
    assert nv.measure(torch.tensor([6.0, -6.0] * 8), "nvfp4").entropy_bits == 1.0
    assert nv.measure(torch.full((16,), 6.0), "nvfp4").entropy_bits == 0.0


def test_saturated_elements_are_those_beyond_the_largest_code(recipe):
    x = drawn(40) * 1.01
    of = Elements(x, recipe)
    fmt = of.q.recipe.elements.format
    limit = (torch.tensor(of.step) * fmt.max).float().double().numpy()
    want = (of.counted & (np.abs(of.seen) > limit) & (limit > 0)).sum()
    assert nv.measure(x, recipe).saturated == want


def test_nothing_saturates_under_a_zero_scale():
    got = nv.measure(torch.tensor([2.0**-10] + [0.0] * 15), "nvfp4")
    assert (got.saturated, got.flushed, got.scale_zero) == (0, 1, 1)


def test_an_element_above_six_scales_is_saturated():
    """amax 6.4: the scale 1.0625 rounds to 1."""
    got = nv.measure(torch.tensor([6.375, 6.0] + [0.0] * 14), "nvfp4")
    assert got.saturated == 1


def test_the_error_is_split_in_three():
    x = torch.tensor(
        [
            [6.0, 0.25, 5.5, 1.0] + [0.0] * 12,  # the other elements alone: 0.25 and 0.5
            [6.25, -6.25] + [0.0] * 14,  # the first of two alike is the maximum
            [2.0**-11] * 2 + [0.0] * 14,  # scale zero
            [math.nan] + [1.0] * 15,  # nothing
        ]
    )
    got = nv.measure(x, "nvfp4")
    assert got.sum_ee_zero_scale == 2 * 2.0**-22
    assert got.sum_ee_max == 0.25**2
    assert got.sum_ee_other == 0.25**2 + 0.5**2 + 0.25**2


def test_the_three_parts_add_to_the_error(recipe):
    got = nv.measure(drawn(60), recipe)
    parts = got.sum_ee_max + got.sum_ee_other + got.sum_ee_zero_scale
    assert parts == pytest.approx(got.sum_ee, rel=1e-12)


def test_by_amax_puts_every_block_into_its_binade(recipe):
    x = drawn(60)
    of, frame = Elements(x, recipe), nv.measure(x, recipe).by_amax()
    for row in rows(frame):
        here = (of.amax >= row.amax_from) & (of.amax < row.amax_to)
        here = of.amax == 0 if row.amax_to == 0 else here
        assert row.blocks == here.sum() > 0
        assert row.lost == (of.finite & ~of.counted)[here].sum()
        assert row.xx == pytest.approx((of.seen[here] ** 2).sum(), rel=1e-12)
        assert row.ee == pytest.approx((of.e[here] ** 2).sum(), rel=1e-12)
    assert frame.blocks.sum() == len(of.amax)


@pytest.mark.parametrize("amax", [2.0**-149, 2.0**-127, 2.0**-126, 1.0, 3.0e38])
def test_by_amax_has_a_binade_for_every_float32(amax):
    (row,) = rows(nv.measure(torch.tensor([amax] * 16), "nvfp4").by_amax())
    assert row.amax_from <= amax < row.amax_to == 2 * row.amax_from


def test_by_quotient_is_a_sawtooth_with_its_teeth_on_bin_edges(recipe):
    x = drawn(60)
    of, got = Elements(x, recipe), nv.measure(x, recipe)
    frame = got.by_quotient()
    usable = of.counted & (of.step > 0) & np.isfinite(of.step)
    step = np.where(of.step > 0, of.step, 1.0)
    quotient = np.abs(of.seen) / step
    outward = np.sign(of.seen) * of.e / step
    for row in rows(frame):
        here = usable & (quotient >= row.quotient_from) & (quotient < row.quotient_to)
        assert row.elements == here.sum()
        if row.elements:
            assert row.mean_e == pytest.approx(outward[here].mean(), rel=1e-9, abs=1e-12)
            assert row.mse == pytest.approx((outward[here] ** 2).mean(), rel=1e-9)
    assert frame.elements.sum() == usable.sum()


def test_the_thresholds_of_e2m1_are_edges():
    assert set(bins.quotient_edges(bins.quotient_width(6.0))) >= {0.25, 0.75, 1.25, 1.75, 2.5, 5.0}


@pytest.mark.parametrize("of", ["block", "token"])
def test_qsnr_histogram_counts_every_block_and_token(of, recipe):
    x = drawn(60)
    elements, got = Elements(x, recipe), nv.measure(x, recipe)
    length = elements.x.shape[1] if of == "block" else x.shape[-1]
    xx = (elements.seen.reshape(-1, length) ** 2).sum(1)
    ee = (elements.e.reshape(-1, length) ** 2).sum(1)
    lost = (elements.finite & ~elements.counted).reshape(-1, length).any(1)
    with np.errstate(all="ignore"):
        db = np.where(ee > 0, -10 * np.log10(ee / xx), np.inf)
    frame = got.qsnr_histogram(of)
    for row in rows(frame):
        if math.isnan(row.qsnr_from):
            assert row.count == lost.sum()
        else:
            inside = (db >= row.qsnr_from) & ((db < row.qsnr_to) | (row.qsnr_to == np.inf))
            assert row.count == (inside & ~lost).sum(), row
    assert sum(row.count for row in rows(frame)) == len(xx)


def test_qsnr_histogram_ends_are_named():
    x = torch.tensor([[1.0] + [0.0] * 15, [0.0] * 16])
    q = nv.quantize(x, "nvfp4")
    wrong = nv.Quantized(q.codes.clone(), torch.tensor([[0x7E], [0x38]], dtype=torch.uint8), None,
                         q.recipe)  # fmt: skip
    wrong.codes[1] = 0x77
    frame = nv.measure(x, wrong).qsnr_histogram("block")
    assert frame["count"].iloc[0] == 2  # 448 times too large, and not zero any more
    with pytest.raises(ValueError, match="expected 'block' or 'token', got 'row'"):
        nv.measure(x, q).qsnr_histogram("row")  # type: ignore[arg-type]


def test_crest_factors_of_finite_blocks(recipe):
    x = drawn(60)
    of, got = Elements(x, recipe), nv.measure(x, recipe)
    has = of.finite.all(1) & (of.amax > 0)
    crest = of.amax[has] / np.sqrt((of.x[has] ** 2).mean(1))
    assert got.crest_blocks == has.sum()
    assert got.crest == pytest.approx(crest.mean(), rel=1e-12)
    frame = got.crest_histogram()
    want, _ = np.histogram(crest, [*frame.crest_from, np.inf])
    np.testing.assert_array_equal(frame["count"], want)


@pytest.mark.parametrize(("block", "crest"), [([1.0] * 16, 1.0), ([1.0] + [0.0] * 15, 4.0)])
def test_crest_factor_by_hand(block, crest):
    assert nv.measure(torch.tensor(block), "nvfp4").crest == crest


def test_channels_are_those_of_the_columns(recipe):
    x = drawn(60)
    of, frame = Elements(x, recipe), nv.measure(x, recipe).by_channel()
    seen, e = of.seen.reshape(60, -1), of.e.reshape(60, -1)
    np.testing.assert_allclose(frame.xx, (seen**2).sum(0), rtol=1e-12)
    np.testing.assert_allclose(frame.ee, (e**2).sum(0), rtol=1e-12)
    np.testing.assert_allclose(frame.gain * frame.xx, (seen * (seen + e)).sum(0), rtol=1e-9)
    assert frame.share.sum() == pytest.approx(1)


def test_worst_blocks_come_by_elements_lost_then_by_error():
    x = torch.full((15, 32), 6.0)
    for row in range(15):
        x[row, 16:] = torch.tensor([6.0, 0.25 * row / 15] + [0.0] * 14)  # an error by row
    x[3, 0], x[7, 0], x[7, 1] = math.nan, math.nan, math.nan
    frame = nv.measure(x, "nvfp4").worst_blocks()
    assert frame.lost.tolist() == [15, 14] + [0] * 8
    assert frame.token.tolist() == [3, 7, 14, 13, 12, 11, 10, 9, 8, 7]
    assert frame.block.tolist() == [0, 0] + [1] * 8


def test_worst_blocks_that_are_alike_come_in_order():
    frame = nv.measure(torch.tensor([6.0, 0.2] + [0.0] * 14).repeat(30, 2), "nvfp4").worst_blocks()
    assert list(zip(frame.token, frame.block, strict=True)) == [divmod(i, 2) for i in range(10)]


def test_blocks_without_an_error_are_not_among_the_worst():
    x = torch.tensor([[6.0] * 16, [6.0, 0.2] + [0.0] * 14])
    assert nv.measure(x, "nvfp4").worst_blocks().token.tolist() == [1]


@pytest.mark.parametrize("recipe", ["nvfp4", "nvfp4-token", "nvfp4-tensor", "nvfp4-exact-scale"])
def test_a_worst_block_can_be_explained(recipe):
    x = drawn(40)
    row = nv.measure(x, recipe).worst_blocks().iloc[-1]
    explained = nv.explain_block(torch.tensor(row.x), recipe, row.outer)
    assert (explained.elements.error**2).sum() == pytest.approx(row.ee, rel=1e-6)
    width = nv.recipe(recipe).scale.block
    block = x[row.token, row.block * width : (row.block + 1) * width].float()
    np.testing.assert_array_equal(row.x, block)


@pytest.mark.parametrize("recipe", [*RECIPES, "nvfp4-search"])
@pytest.mark.parametrize("cuts", [(0, 61), (0, 1, 61), (0, 20, 21, 40, 61)])
def test_parts_in_any_order_add_up_to_the_whole(recipe, cuts, monkeypatch):
    x = drawn(61)
    monkeypatch.setattr("nvfp4lab.quantized.CHUNK", 1024)
    whole = nv.measure(x, recipe)
    parts = [
        nv.errors.measure_rows(x[a:b], nv.recipe(recipe), first_token=a)
        for a, b in itertools.pairwise(cuts)
    ]
    zero = Statistics.empty(nv.recipe(recipe), 128)
    left, right = zero, zero
    for part in parts:
        left, right = left + part, part + right
    assert same(left, whole) and same(right, whole)
    backwards = zero
    for part in reversed(parts):
        backwards = backwards + part
    assert same(backwards, whole)


def test_addition_is_commutative_to_the_bit():
    a, b = nv.measure(drawn(20), "nvfp4"), nv.measure(drawn(9, seed=1), "nvfp4")
    assert a + b == b + a


def test_a_small_error_is_not_lost_among_large_ones(monkeypatch):
    """400 chunks that round: the running sums carry what they lose."""
    monkeypatch.setattr("nvfp4lab.quantized.CHUNK", 16)
    x = torch.rand(400, 16, generator=torch.Generator().manual_seed(0)) * 1e8
    got, q = nv.measure(x, "nvfp4"), nv.quantize(x, "nvfp4")
    xx = math.fsum((x.double() ** 2).flatten().tolist())
    e = math.fsum((q.dequantize().double() - x.double()).flatten().tolist())
    assert abs(got.sum_xx - xx) <= 2e-16 * xx
    assert abs(got.sum_e - e) <= 1e-15 * got.sum_abs_e


def test_two_recipes_do_not_add_up():
    with pytest.raises(ValueError, match=r"of nvfp4 \(\w+\) and of cublas \(\w+\) do not add up"):
        _ = nv.measure(drawn(4), "nvfp4") + nv.measure(drawn(4), "cublas")


def test_a_changed_recipe_of_the_same_name_does_not_add_up():
    plain = nv.recipe("nvfp4")
    changed = plain.changed({"elements.rounding": "ties-away"}, plain.name)
    with pytest.raises(ValueError, match=r"of nvfp4 .* and of nvfp4 .*: the recipes differ"):
        _ = nv.measure(drawn(4), plain) + nv.measure(drawn(4), changed)


def test_widths_add_up_without_channels_only():
    a, b = nv.measure(drawn(4), "nvfp4"), nv.measure(drawn(4, 256), "nvfp4")
    with pytest.raises(ValueError, match=r"128 elements and of 256 .* drop the channels"):
        _ = a + b
    with pytest.raises(ValueError, match="unknown width and of 256"):
        _ = a.without_channels() + b
    both = a.without_channels() + b.without_channels()
    assert both.tokens == 8 and both.sum_xx == a.sum_xx + b.sum_xx
    with pytest.raises(ValueError, match="channels of these statistics were dropped"):
        both.by_channel()


def test_statistics_add_to_statistics_only():
    with pytest.raises(TypeError):
        _ = nv.measure(drawn(4), "nvfp4") + 1  # type: ignore[operator]


def test_a_frame_is_one_row_of_numbers(recipe):
    frame = nv.measure(drawn(8), recipe).to_frame()
    assert len(frame) == 1
    assert {"recipe", "tokens", "sum_ee", "qsnr_db", "gain", "scale_nan", "crest"} <= {*frame}
    assert all(isinstance(v, (str, int, float, np.number, type(None))) for v in frame.iloc[0])


def test_a_file_keeps_every_bit(recipe, tmp_path):
    got = nv.measure(drawn(40), recipe)
    got.save(tmp_path / "a.npz", note="sü\n{}")
    assert Statistics.load_with_note(tmp_path / "a.npz") == (got, "sü\n{}")
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_a_file_of_nothing_and_of_nan_keeps_every_bit(tmp_path):
    for x in (torch.zeros(0, 16), torch.full((2, 16), math.nan)):
        got = nv.measure(x, "nvfp4").without_channels()
        got.save(tmp_path / "a.npz")
        assert Statistics.load(tmp_path / "a.npz") == got


@pytest.mark.parametrize("width", [1024, 4096])
def test_a_file_is_small(width, tmp_path):
    path = tmp_path / "a.npz"
    nv.measure(drawn(40, width), "nvfp4").save(path)
    assert path.stat().st_size < 12_000 + 24 * width


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "another's", "other version"])
def test_a_damaged_file_is_refused_by_name(damage, tmp_path, monkeypatch):
    path = tmp_path / "hurt.npz"
    nv.measure(drawn(40), "nvfp4").save(path)
    whole = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(whole[: len(whole) // 2])
        case "flipped":
            with zipfile.ZipFile(path) as file:
                at = file.getinfo("element_codes.npy").header_offset + 100
            path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        case "empty":
            path.write_bytes(b"")
        case "another's":
            np.savez(path, x=np.zeros(3))
        case "other version":
            monkeypatch.setattr("nvfp4lab.statistics.merging.VERSION", 0)
    with pytest.raises(ValueError, match=r"hurt.npz is no whole file of statistics"):
        Statistics.load(path)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        Statistics.load(tmp_path / "none.npz")


def test_every_bit_counts_in_comparing():
    a = nv.measure(drawn(4), "nvfp4")
    assert a == nv.measure(drawn(4), "nvfp4")
    assert a != replace(a, sum_xx=math.nextafter(a.sum_xx, 0)) and a != 1


def test_a_digest_tells_recipes_apart():
    digests = {statistics.digest(nv.recipe(name)) for name in nv.recipes()}
    assert len(digests) == len(nv.recipes())


def test_sum_adds_several():
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(3))
    parts = [nv.measure(x[i : i + 2], "nvfp4") for i in (0, 2, 4)]
    assert sum(parts) == parts[0] + parts[1] + parts[2]
    with pytest.raises(TypeError):
        _ = 1 + parts[0]


def test_a_quantile_of_qsnr_is_the_edge_of_the_bin_that_the_share_reaches():
    tokens = np.zeros(123, np.int64)
    tokens[21 + 10], tokens[21 + 20] = 7, 93  # from 10 and from 20 dB
    own = replace(nv.measure(torch.ones(1, 16), "nvfp4"), token_qsnr=tokens)
    quantiles = [own.qsnr_quantile("token", share) for share in (0.0, 0.07, 0.071, 1.0)]
    assert quantiles == [10.0, 10.0, 20.0, 20.0]


def test_a_lost_token_is_the_worst_and_has_no_qsnr():
    tokens = np.zeros(123, np.int64)
    tokens[-1], tokens[0], tokens[41] = 1, 1, 98  # lost, below -20 dB, 20 dB
    own = replace(nv.measure(torch.ones(1, 16), "nvfp4"), token_qsnr=tokens)
    assert math.isnan(own.qsnr_quantile("token", 0.01))
    assert own.qsnr_quantile("token", 0.02) == -math.inf
    assert math.isnan(replace(own, token_qsnr=0 * tokens).qsnr_quantile("token", 0.5))
    with pytest.raises(ValueError, match=r"a share from 0 to 1, got 1\.5"):
        own.qsnr_quantile("token", 1.5)
