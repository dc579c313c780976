"""What the peers and the recipes are both given: (T, K) tensors by name.

May be changed: cases may be added; each is a function of a dtype, drawn from a fixed seed.
"""

import torch

import nvfp4lab as nv

INF, NAN = float("inf"), float("nan")
K = 64
TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def bits(dtype, rows=512):
    """Random finite bit patterns over the whole range: outer scales reach both ends."""
    generator = torch.Generator().manual_seed(1)
    info = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
    span = 2 ** (15 if info[dtype] == torch.int16 else 31)
    drawn = torch.randint(-span, span - 1, (rows, K), generator=generator).to(info[dtype])
    x = drawn.view(dtype)
    return torch.where(x.isfinite(), x, torch.zeros_like(x))


def bits_near(dtype, exponent=0, rows=2048):
    """Random mantissas and signs, exponents within 2**-12 to 2**4 of 2**exponent."""
    generator = torch.Generator().manual_seed(2)
    mantissa = 1 + torch.rand(rows, K, generator=generator)
    power = torch.randint(-12, 5, (rows, K), generator=generator)
    row = torch.randint(-6, 7, (rows, 1), generator=generator)
    sign = torch.randint(0, 2, (rows, K), generator=generator) * 2 - 1
    return (sign * torch.ldexp(mantissa, power + row + exponent)).to(dtype)


def gauss(dtype, sigma=1.0):
    return (torch.randn(512, 256, generator=torch.Generator().manual_seed(3)) * sigma).to(dtype)


def activations(name):
    def case(dtype):
        sites = nv.activations(name)
        wide = [site.hidden[:64, : site.hidden.shape[1] // 64 * 64] for site in sites]
        width = min(w.shape[1] for w in wide)
        return torch.cat([w[:, :width] for w in wide]).to(dtype)

    return case


def with_largest(largest, *blocks):
    """Rows of four blocks, of which the first row's holds the tensor's largest magnitude."""

    def case(dtype):
        rows = torch.zeros(128, K)
        rows[0, :16] = largest
        for i, block in enumerate(blocks):
            rows[1 + i // 4, i % 4 * 16 : i % 4 * 16 + len(block)] = torch.tensor(block)
        return rows.to(dtype)

    return case


def ties(dtype):
    """Every midpoint times scales whose block maximum is exact, under an outer scale of 1."""
    blocks = []
    for k in range(-3, 4):
        for m in range(8):
            s = (1 + m / 8) * 2.0**k
            blocks.append([6 * s, *(t * s for t in TIES), *(-t * s for t in TIES)])
    return with_largest(2688.0, *blocks)(dtype)


def subnormal_scales(dtype):
    """Blocks whose scales fall from 2**-4 to below 2**-10, under an outer scale of 1."""
    steps = torch.linspace(-4, -12, 500)
    return with_largest(
        2688.0, *([6 * 2.0 ** e.item(), -(2.0 ** e.item()), 2.0 ** e.item() / 3] for e in steps)
    )(dtype)


def saturating(dtype):
    """Largest finite values, and amax near 2688 without an outer scale to take it down."""
    blocks = [[v] for v in (2600.0, 2688.0, 2784.0, 2800.0, 1e4, 3e38, -3e38)]
    return with_largest(1.0, *blocks)(dtype)


CASES = {
    "random bits": bits,
    "random bits, near": bits_near,
    "random bits, small": lambda dtype: bits_near(dtype, -100),
    "gaussian": gauss,
    "smollm2 activations": activations("smollm2"),
    "v4-mini activations": activations("v4-mini"),
    "zero tensor": lambda dtype: torch.zeros(128, K, dtype=dtype),
    "zero blocks": with_largest(1.0, [1.0], [], [-0.0, 0.0], [0.5]),
    "-0 and small negatives": with_largest(
        1.0, [-0.0, 0.0, -1e-3, 1e-3, -1e-30, 1.0], [-1e-20, 1e-20], [-1e-38], [-3e-3, 1e-2]
    ),
    "ties": ties,
    "subnormal scales": subnormal_scales,
    "saturating blocks": saturating,
    "one huge outlier": with_largest(1e30, [1.0, -2.0], [1e20, -3e20], [1e27, 1e24]),
    "tiny tensor": with_largest(1e-36, [1e-37, -1e-38, 3e-39], [1e-40]),
    "Inf": with_largest(1.0, [INF, -INF, 2.0, -3.0], [1.0, -2.0]),
    "NaN": with_largest(1.0, [NAN, 2.0, -3.0], [1.0, -2.0]),
    "-NaN": with_largest(1.0, [-NAN, 2.0, -3.0], [1.0, -2.0]),
}
