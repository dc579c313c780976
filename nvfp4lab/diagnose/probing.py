"""probe: an input on which the decisions of a quantizer come apart.

It is made of rows for each decision; a new decision gets a row of its own in `probe`.
"""

from __future__ import annotations

import math

import torch

from nvfp4lab.formats import E2M1
from nvfp4lab.quantized import DTYPES

ROWS, WIDTH = 256, 512
LARGEST = 3 * 2688.0
SCALES = tuple((1 + m / 8) * 2.0**e for e in range(-9, 9) for m in range(8 - (e == 8)))  # E4M3's
MIDPOINTS = tuple(
    (a + b) / 2 for a, b in zip(E2M1.magnitudes[:-1], E2M1.magnitudes[1:], strict=True)
)


def probe(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """An input whose quantized form tells the decisions of a kernel apart: dtype (256, 512).

    Give it to the kernel and its output to `identify`. Every value is finite; K is a multiple of
    128, so that any kernel stages it. Blocks hold every midpoint under every normal scale, amax
    midway between two scales, subnormal and vanishing scales, amax beyond 2688, zero blocks and a
    zero token, zeros of both signs and values that vanish; the rest is random over 25 binades.
    The first rows hold 2688 each, so that an outer scale for each token is 1 there; the tensor's
    largest value is 3 * 2688, and other rows hold the same for its outer scales of 3 and, where
    n is 1536, 5.25. A decision that no such input can tell (an outer scale that lets nothing
    saturate, say) stays open.

    Raises: TypeError for a dtype that `quantize` does not take.

    >>> probe().shape
    torch.Size([256, 512])
    """
    if dtype not in DTYPES:
        raise TypeError(f"a probe is bfloat16, float16 or float32, got {dtype}")
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(
        ROWS, WIDTH // 16, 16, generator=generator, dtype=torch.float32, device="cpu"
    ).clamp(-3.9, 3.9)
    power = torch.randint(-18, 8, (ROWS, WIDTH // 16, 1), generator=generator, device="cpu")
    x = torch.ldexp(noise, power)
    one = _ties(1.0) + _scales(1.0)
    _fill(x[:128], one, first=2688.0)
    _fill(x[128:180], (_ties(3.0) + _scales(3.0))[: 52 * 32])
    _fill(x[180:200], _ties(5.25)[: 20 * 32])
    x[200:216, :, 0] = 6 * torch.linspace(
        440, 1100, 16 * WIDTH // 16, dtype=torch.float32, device="cpu"
    ).view(16, -1)
    x[216] = 0
    x[217, 0, 0] = LARGEST
    return x.view(ROWS, WIDTH).to(dtype)


def _ties(g: float) -> list[list[float]]:
    """Blocks under the scales s * g with every midpoint, and some with zeros and what vanishes."""
    blocks = []
    for s in (scale * g for scale in SCALES[::-1] if 6 * scale * g <= LARGEST):
        ties = [t * s for t in MIDPOINTS]
        blocks.append([6 * s, *ties, *(-t for t in ties), -0.0])
        blocks.append([6 * s, -0.0, 0.0, -s / 8, s / 8, *(t * s * 1.01 for t in MIDPOINTS)])
    return blocks


def _scales(g: float) -> list[list[float]]:
    """Blocks whose scales, under the outer scale g, are ties, subnormal, below them, and zero."""
    blocks = []
    for s in SCALES[:-1]:
        step = 2.0 ** max(-9, math.floor(math.log2(s)) - 3)
        blocks.append([6 * (s + step / 2) * g, 5 * s * g, s * g])
    for e in torch.linspace(-14, -5, 256, dtype=torch.float32, device="cpu").tolist():
        blocks.append([6 * 2.0**e * g, 2.0**e * g, -(2.0**e) / 3 * g, -0.0])
    return [*blocks, *[[], [-0.0], [0.0, -0.0]] * 8]


def _fill(rows: torch.Tensor, blocks: list[list[float]], first: float | None = None) -> None:
    """Put blocks into rows (T, B, 16), one after the other; `first` into each row's first."""
    skip = first is not None
    if skip:
        rows[:, 0] = 0
        rows[:, 0, 0] = first
    per_row = rows.shape[1] - skip
    for i, block in enumerate(blocks[: rows.shape[0] * per_row]):
        row = rows[i // per_row, i % per_row + skip]
        row[:] = 0
        row[: len(block)] = torch.tensor(block, dtype=torch.float32, device="cpu")
