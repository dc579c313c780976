"""Controls: synthetic twins of a captured site, drawn from a law that was fitted to it.

What a law does not keep of the site, the difference between the two shows. A law is a function from
the site's hidden states to what can draw: scipy's frozen distributions, or an object with their
`rvs`. All laws are symmetric about 0. To add one, write its function and name it in LAWS.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.optimize
import scipy.stats
import torch

from nvfp4lab.checks import unknown
from nvfp4lab.records import Activations

BF16_MAGNITUDES, BF16_INFINITY = 2**15, 0x7F80
DEGREES_OF_FREEDOM = (0.3, 1000.0)  # range of the Student-t fit: mostly zeros, to a Gaussian


def control(site: Activations, law: str, *, seed: int = 0) -> Activations:
    """The site with hidden states drawn from `law` as fitted to it; positions and routing are kept.

    law: "gauss", "laplace", "student-t" (all elements alike), or "channel-outlier", which keeps
    each channel's and each token's size: sigma_c * g_t * z with Gaussian z. The same seed, law and
    label give the same draw under one version of numpy and scipy. The record says that it is
    synthetic, and how it was fitted.

    Raises: what `fit` raises.

    >>> from nvfp4lab.records import activations
    >>> control(activations("smollm2")[0], "gauss").label
    'layer00.mlp_input.gauss'
    """
    if not isinstance(site, Activations):
        raise TypeError(f"site is Activations, got {type(site).__name__}")
    fitted = fit(site.hidden, law)
    tokens, width = site.hidden.shape
    entropy = [seed, *f"{law} of {site.label}".encode()]
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
    drawn = fitted.rvs(size=(tokens, width), random_state=generator)
    parameters = describe(fitted)
    said = ", ".join(f"{name} {value:.4g}" for name, value in parameters.items())
    return replace(
        site,
        hidden=torch.from_numpy(drawn).bfloat16(),
        site=f"{site.site}.{law}",
        provenance={
            "is": f"synthetic: {law} ({said}) fitted to {site.label} of "
            f"{site.provenance.get('is')}",
            "captured_or_synthetic": "synthetic",
            "law": law,
            "parameters": parameters,
            "seed": seed,
            "fitted_to": dict(site.provenance),
        },
    )


def fit(hidden: torch.Tensor, law: str) -> Any:
    """The law fitted to hidden, BF16 [T, D].

    Returns scipy's frozen norm, laplace or t with loc 0, of the largest likelihood, or a
    `ChannelOutlier`, whose channels have the root mean squares of the site's. A Student-t of 2
    degrees of freedom or fewer has no variance; where that fits best, that is what is returned.

    Raises: ValueError for an unknown law (with the nearest name), a tensor that is not BF16 [T, D],
    one with NaN or Inf, and one without a nonzero element.
    """
    if law not in LAWS:
        raise ValueError(unknown("law", law, LAWS))
    if hidden.dtype != torch.bfloat16 or hidden.ndim != 2:
        raise ValueError(f"expected BF16 [T, D], got {hidden.dtype} {tuple(hidden.shape)}")
    counts = magnitude_counts(hidden)
    if unbounded := int(counts[BF16_INFINITY:].sum()):
        raise ValueError(f"no law is fitted to {unbounded} elements of NaN or Inf: drop them first")
    if not counts[1:].sum():
        raise ValueError(f"no law is fitted to {tuple(hidden.shape)} without a nonzero element")
    return LAWS[law](hidden)


def describe(law: Any) -> dict[str, float]:
    """The parameters of a fitted law, by name."""
    if isinstance(law, ChannelOutlier):
        return {
            "channel sigma median": float(np.median(law.channel)),
            "channel sigma max": float(law.channel.max()),
            "token gain max": float(law.token.max()),
        }
    return dict(zip(["df"], map(float, law.args), strict=False)) | {"scale": law.kwds["scale"]}


def magnitude_counts(hidden: torch.Tensor) -> np.ndarray:
    """int64 [2**15]: how often each magnitude occurs, by its bits. However many the elements are,
    a sum over all of them is then a sum over these."""
    bits = hidden.contiguous().view(torch.int16).flatten().cpu() & (BF16_MAGNITUDES - 1)
    return torch.bincount(bits.int(), minlength=BF16_MAGNITUDES).numpy()


def _occurring(hidden: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """float64 magnitudes that occur in finite BF16, and their shares of the elements."""
    counts = magnitude_counts(hidden)
    bits = np.flatnonzero(counts)
    values = torch.from_numpy(bits.astype(np.int16)).view(torch.bfloat16).double().numpy()
    return values, counts[bits] / counts.sum()


def _gauss(hidden: torch.Tensor) -> Any:
    values, share = _occurring(hidden)
    return scipy.stats.norm(loc=0.0, scale=float(np.sqrt(share @ values**2)))


def _laplace(hidden: torch.Tensor) -> Any:
    values, share = _occurring(hidden)
    return scipy.stats.laplace(loc=0.0, scale=float(share @ values))


def _student_t(hidden: torch.Tensor) -> Any:
    values, share = _occurring(hidden)
    rms = np.sqrt(share @ values**2)

    def mean_surprise(logarithms: np.ndarray) -> float:
        df, scale = np.exp(logarithms)
        return float(-share @ scipy.stats.t.logpdf(values / rms, df, scale=scale))

    found = scipy.optimize.minimize(
        mean_surprise,
        x0=np.log([4.0, 0.7]),
        bounds=[tuple(np.log(DEGREES_OF_FREEDOM)), (-30.0, 3.0)],
        method="L-BFGS-B",
        options={"ftol": 1e-13, "gtol": 1e-8},
    )
    df, scale = np.exp(found.x)
    return scipy.stats.t(float(df), loc=0.0, scale=float(scale * rms))


@dataclass(frozen=True)
class ChannelOutlier:
    """sigma_c * g_t * z: the size of each channel times that of each token times a Gaussian.

    channel: float64 [D], each channel's root mean square. token: float64 [T], the root mean square
    of a token's elements in units of their channels; over the tokens its mean square is 1.
    """

    channel: np.ndarray
    token: np.ndarray

    def rvs(self, size: tuple[int, int], random_state: np.random.Generator) -> np.ndarray:
        """float64 [T, D]. Raises: ValueError for a size other than that of the site."""
        expected = (len(self.token), len(self.channel))
        if size != expected:
            raise ValueError(f"expected size {expected}, that of the fitted site, got {size}")
        return random_state.standard_normal(size) * self.channel * self.token[:, None]


def _channel_outlier(hidden: torch.Tensor) -> ChannelOutlier:
    squares = hidden.cpu().double().square().numpy()
    channel = squares.mean(axis=0)
    alive = channel > 0  # a channel of zeros has no unit
    token = (squares[:, alive] / channel[alive]).mean(axis=1)
    return ChannelOutlier(np.sqrt(channel), np.sqrt(token))


LAWS: dict[str, Callable[[torch.Tensor], Any]] = {
    "gauss": _gauss,
    "laplace": _laplace,
    "student-t": _student_t,
    "channel-outlier": _channel_outlier,
}
