"""Controls: fitted as scipy fits, drawn as said, and never taken for a capture."""

import math

import numpy as np
import pytest
import scipy.stats
import torch

import nvfp4lab as nv
from nvfp4lab import controls

LAWS = tuple(controls.LAWS)
TOKENS, WIDTH = 256, 512
SITES = [site for name in ("smollm2", "v4-mini") for site in nv.activations(name)]
each_law = pytest.mark.parametrize("law", LAWS)


def a_site(hidden: np.ndarray | torch.Tensor, label: str = "expert_input") -> nv.Activations:
    hidden = torch.as_tensor(hidden).bfloat16()
    positions = torch.arange(len(hidden))
    return nv.Activations(hidden, positions, 3, label, {"is": "drawn by a test", "model": "none"})


def drawn(law, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(law.rvs(size=(TOKENS, WIDTH), random_state=generator)).bfloat16()


@pytest.mark.parametrize("df", [0.8, 1.5, 3.0, 6.0])
def test_a_student_t_is_found_again(df):
    """Within five standard errors, from the Fisher information of (df, log scale)."""
    found = controls.fit(drawn(scipy.stats.t(df, scale=0.3)), "student-t")
    # curvature of the mean log-likelihood at the truth, by differences on the law itself
    x = np.linspace(-1, 1, 200_001) * scipy.stats.t.ppf(1 - 1e-7, df)
    weight = scipy.stats.t.pdf(x, df) * (x[1] - x[0])
    step = 1e-4

    def score(direction: tuple[float, float]) -> np.ndarray:
        up, down = (
            scipy.stats.t.logpdf(x, df + sign * direction[0], scale=math.exp(sign * direction[1]))
            for sign in (step, -step)
        )
        return (up - down) / (2 * step)

    scores = np.stack([score((1, 0)), score((0, 1))])
    error = np.sqrt(np.diag(np.linalg.inv(scores * weight @ scores.T)) / (TOKENS * WIDTH))
    assert abs(found.args[0] - df) < 5 * error[0]
    # BF16 rounding adds a millionth of the variance, far below the standard error
    assert abs(math.log(found.kwds["scale"] / 0.3)) < 5 * error[1]


@pytest.mark.parametrize("site", SITES[:12:5], ids=lambda site: site.label)
def test_the_fits_are_those_of_scipy(site):
    x = site.hidden.double().flatten().numpy()
    df, loc, scale = scipy.stats.t.fit(x, floc=0)
    found = controls.fit(site.hidden, "student-t")
    assert found.args[0] == pytest.approx(df, rel=1e-3)
    assert found.kwds == {"loc": loc, "scale": pytest.approx(scale, rel=1e-3)}
    for law, reference in (("gauss", scipy.stats.norm), ("laplace", scipy.stats.laplace)):
        loc, scale = reference.fit(x, floc=0)
        assert controls.fit(site.hidden, law).kwds == {"loc": 0.0, "scale": pytest.approx(scale)}


def test_a_gaussian_has_all_the_degrees_of_freedom_there_are():
    found = controls.fit(drawn(scipy.stats.norm(scale=2.0)), "student-t")
    assert found.args[0] > 100


def test_channels_and_tokens_keep_their_sizes():
    """Each root mean square of the draw lies within six standard errors of the site's."""
    channel = np.exp(np.linspace(-2, 4, WIDTH))
    token = np.exp(np.linspace(-1, 1, TOKENS))
    token /= np.sqrt((token**2).mean())
    site = a_site(drawn(controls.ChannelOutlier(channel, token)))
    again = nv.control(site, "channel-outlier").hidden.double()
    x = site.hidden.double()
    weights = (token**4).mean() / TOKENS  # of the mean square of a channel, relative: 2 * this
    ratio = again.square().mean(0) / x.square().mean(0)
    assert (ratio - 1).abs().max() < 6 * math.sqrt(2 * 2 * weights)
    in_units = [y.square() / x.square().mean(0) for y in (again, x)]
    ratio = in_units[0].mean(1) / in_units[1].mean(1)
    assert (ratio - 1).abs().max() < 6 * math.sqrt(2 * 2 / WIDTH)


def test_an_outlier_channel_stays_where_it_was():
    site = SITES[0]
    again = nv.control(site, "channel-outlier")
    rms = [s.hidden.double().square().mean(0).sqrt() for s in (site, again)]
    assert rms[0].argmax() == rms[1].argmax()
    alike = nv.control(site, "gauss").hidden.double().square().mean(0).sqrt()
    assert alike.max() < 2 * alike.median() < 2 * rms[0].max()


@each_law
def test_channels_and_tokens_of_zeros(law):
    hidden = drawn(scipy.stats.norm())
    hidden[:, 5] = 0
    hidden[7:] = 0  # nearly all of it
    again = nv.control(a_site(hidden), law).hidden
    assert again.isfinite().all()
    if law == "channel-outlier":
        assert not again[:, 5].any() and not again[7].any()


@each_law
@pytest.mark.parametrize("site", SITES, ids=lambda site: site.label)
def test_every_shipped_site_has_its_controls(site, law):
    twin = nv.control(site, law)
    assert twin.hidden.shape == site.hidden.shape and twin.hidden.dtype == torch.bfloat16
    assert twin.hidden.isfinite().all()
    assert twin.topk_ids is site.topk_ids and twin.positions is site.positions
    q = nv.quantize(twin.hidden, "nvfp4-token")
    assert math.isfinite(nv.measure(twin.hidden, q).qsnr_db)


@each_law
def test_a_control_says_that_it_is_synthetic(law):
    twin = nv.control(SITES[0], law, seed=3)
    about = twin.provenance
    assert about["captured_or_synthetic"] == "synthetic" and about["seed"] == 3
    assert about["is"].startswith(f"synthetic: {law} (") and "SmolLM2" in about["is"]
    assert about["fitted_to"] == SITES[0].provenance and about["law"] == law
    assert twin.label == f"layer00.mlp_input.{law}"


@each_law
def test_a_control_can_be_saved_and_loaded(law, tmp_path):
    from nvfp4lab.records import save_activations

    twin = nv.control(SITES[-1], law)
    save_activations(tmp_path / "twin.safetensors", twin)
    (loaded,) = nv.load_activations(tmp_path / "twin.safetensors")
    assert loaded.hidden.equal(twin.hidden) and loaded.provenance == twin.provenance


def test_the_seed_law_and_site_decide_the_draw():
    site, other = SITES[:2]
    draws = [
        nv.control(site, "gauss"),
        nv.control(site, "gauss", seed=1),
        nv.control(site, "laplace"),
        nv.control(other, "gauss"),
    ]
    assert nv.control(site, "gauss").hidden.equal(draws[0].hidden)
    signs = [draw.hidden.flatten()[:4096].signbit() for draw in draws]
    for i, a in enumerate(signs):
        for b in signs[:i]:
            assert 0.4 < (a == b).double().mean() < 0.6


def test_the_same_draw_as_ever():
    """So that a figure of a control can be quoted; changes with numpy's streams only."""
    twin = nv.control(a_site(torch.ones(2, 4)), "gauss")
    assert twin.hidden.tolist() == SAME_DRAW


SAME_DRAW = [
    [-1.25, 0.326171875, -1.2421875, -1.3984375],
    [-1.8125, -0.87890625, -0.67578125, -0.15625],
]


@pytest.mark.parametrize(
    ("hidden", "law", "message"),
    [
        (torch.ones(2, 4), "gaus", r"unknown law 'gaus'; did you mean gauss\?"),
        (torch.zeros(2, 4), "gauss", r"to \(2, 4\) without a nonzero element"),
        (torch.full((2, 4), math.nan), "laplace", "8 elements of NaN or Inf"),
        (torch.tensor([[1.0, math.inf]]), "student-t", "1 elements of NaN or Inf"),
        (torch.ones(4), "gauss", r"expected BF16 \[T, D\], got torch.bfloat16 \(4,\)"),
    ],
)
def test_what_no_law_can_be_fitted_to_is_refused(hidden, law, message):
    with pytest.raises(ValueError, match=message):
        controls.fit(hidden.bfloat16(), law)


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"expected BF16 \[T, D\], got torch.float32"):
        controls.fit(torch.ones(2, 4), "gauss")
    with pytest.raises(ValueError, match=r"expected size \(2, 3\), .* got \(3, 2\)"):
        law = controls.ChannelOutlier(np.ones(3), np.ones(2))
        law.rvs((3, 2), np.random.default_rng())
