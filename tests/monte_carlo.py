"""The theory against sampling: what `nv.quantize` does to drawn elements, with standard errors.

`deviations` draws, quantizes and compares every number that the theory gives; test_theory.py runs
it on a few small cases. Run as a program on a GPU it goes through `CASES`, each with 2**26
elements, and writes data/benchmarks/theory.json:

    PYTHONPATH=. python tests/monte_carlo.py --out data/benchmarks/theory.json

`--first 1 --every 4` takes every fourth case from the second on, `--only REGEX` those whose names
it is found in; other cases that --out has are kept.

An outer scale per tensor is sampled as one per row of as many elements, which is the same
arithmetic many times over. Elements are float32, drawn in float64.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import nvfp4lab as nv
from nvfp4lab import quantized
from nvfp4lab.formats import E2M1, E4M3, E8M0, INT4, INT8, UE5M3
from nvfp4lab.rules import Elements, Outer, Recipe, Scale, Search
from nvfp4lab.theory import Expectation, expected_error

LAWS = ("gauss", "laplace", "uniform", ("t", 5.0))  # all with a finite fourth moment
BLOCKS = (8, 16, 32, 64, 128, 256)
ELEMENTS = {"E2M1": E2M1, "INT4": INT4, "INT8": INT8, "E4M3": E4M3}
UNDER_ONE_SCALE = 1 << 14
SCALES = {
    "E4M3": Scale(),
    "UE5M3": Scale(format=UE5M3),
    "E8M0 floor": Scale(format=E8M0, rounding="down"),
    "E8M0 ceil": Scale(format=E8M0, rounding="up"),
    "E8M0 even": Scale(format=E8M0, rounding="up-from-three-quarters"),
    "exact": Scale(format=None),
}
OUTERS = {
    "none": None,
    "tensor": Outer(per="tensor"),
    "power of two": replace(nv.recipe("nvfp4-token").outer),  # type: ignore[type-var]
}


@dataclass(frozen=True)
class Case:
    """A law and a recipe."""

    name: str
    law: object
    sigma: float
    recipe: Recipe

    @property
    def elements(self) -> int | None:
        return None if self.recipe.outer is None else UNDER_ONE_SCALE

    def expected(self) -> Expectation:
        return expected_error(self.law, self.recipe, self.sigma, self.elements)


def cases() -> Iterator[Case]:
    """Every supported combination, then scales that are small or saturated, then 4/6."""
    for law, block, scale, outer, elements, rounding in itertools.product(
        LAWS, BLOCKS, SCALES, OUTERS, ELEMENTS, ("ties-to-even", "stochastic")
    ):
        yield case(law, 1.0, block, scale, outer, elements, rounding)
    for law, sigma, block, scale in itertools.product(
        LAWS, (2.0**-11, 2.0**-8, 2.0**-6, 600.0), (8, 16), ("E4M3", "UE5M3")
    ):
        yield case(law, sigma, block, scale, "none", "E2M1", "ties-to-even")
    for law, block, outer in itertools.product(LAWS, BLOCKS, OUTERS):
        one = case(law, 1.0, block, "E4M3", outer, "E2M1", "ties-to-even")
        recipe = one.recipe.changed({"search": Search(factors=(1.0, 1.5))}, one.recipe.name)
        yield replace(one, name=f"4/6 {one.name}", recipe=recipe)


def case(law, sigma, block, scale, outer, elements, rounding) -> Case:
    fmt = ELEMENTS[elements]
    rule = replace(SCALES[scale], block=block)
    if scale in ("E8M0 floor", "E8M0 even"):
        divisor = 2.0 ** math.floor(math.log2(fmt.max))  # the largest power of two of the elements
    else:
        divisor = fmt.max
    own = OUTERS[outer]
    if own is not None and own.rounding == "none":
        # Under 2**40 the largest of all elements would lie just at a step of "even", 1.75 * 2**n,
        # and float32's roundoff would decide for it.
        largest = {"UE5M3": UE5M3.max, "E8M0 floor": 2.0**40, "E8M0 ceil": 2.0**40}.get(scale, 448)
        own = replace(own, range=fmt.max * largest)
    name = f"{law} sigma {sigma:g} block {block} {scale} outer {outer} {elements} {rounding}"
    recipe = Recipe(name, "", "", replace(rule, divisor=divisor), Elements(fmt, rounding=rounding),
                    own)  # fmt: skip
    return Case(name, law, sigma, recipe)


def drawn(law: object, count: int, generator: torch.Generator) -> torch.Tensor:
    """Elements of a law of variance 1, float32 [count]."""
    device = generator.device

    def uniform() -> torch.Tensor:
        draws = torch.rand(count, generator=generator, device=device, dtype=torch.float64)
        return draws.clamp_min(2.0**-54)

    def normal() -> torch.Tensor:
        return torch.randn(count, generator=generator, device=device, dtype=torch.float64)

    match law:
        case "gauss":
            x = normal()
        case "uniform":
            x = (2 * uniform() - 1) * math.sqrt(3)
        case "laplace":
            x = -uniform().log() * (uniform() - 0.5).sign() / math.sqrt(2)
        case ("t", df):
            # Bailey's polar form: exact, from two uniforms.
            radius = (df * (uniform() ** (-2 / df) - 1)).sqrt()
            x = radius * (2 * math.pi * uniform()).cos() * math.sqrt((df - 2) / df)
        case _:
            raise ValueError(law)
    return x.float()


def deviations(
    of: Case, expected: Expectation, unit: torch.Tensor, generator: torch.Generator
) -> dict[str, float]:
    """(sampled - expected) / standard error of each number, from float32 elements of variance 1.

    Standard errors are those between groups: rows under one outer scale, or of 1024 elements. A
    probability that leaves fewer than 25 groups with or without such a code is left out: there the
    standard error is no measure.
    """
    recipe, group = of.recipe, of.elements or 1024
    if recipe.outer is not None:
        recipe = recipe.changed({"outer.per": "token"}, recipe.name)
    x = (unit * of.sigma).view(-1, group)
    drawing = generator if recipe.elements.rounding == "stochastic" else None
    q = nv.quantize(x, recipe, generator=drawing)
    decoded, exact = q.dequantize().double(), x.double()
    error = (decoded - exact).square()
    blocks = error.view(len(x), -1, recipe.scale.block)
    zero = q.decoded_scales() == 0
    largest = x.abs().view(blocks.shape).argmax(-1, keepdim=True)
    of_largest = blocks.gather(-1, largest)[..., 0].where(~zero, 0).sum(-1)
    of_zero = blocks.sum(-1).where(zero, 0).sum(-1)
    whole = exact.square().sum(-1)
    parts = {
        "nmse": error.sum(-1),
        "gain": (decoded * exact).sum(-1),
        "max_nmse": of_largest,
        "zero_nmse": of_zero,
        "other_nmse": error.sum(-1) - of_largest - of_zero,
    }
    if not len(expected.scale_probabilities):
        del parts["max_nmse"]  # nothing but float32's roundoff: x / s is not quite 6
    zeros = expected.scale_shares["zero"] * zero.numel()
    if min(zeros, zero.numel() - zeros) < 1000:  # too few for a standard error
        del parts["zero_nmse"]
    if zero.numel() - zeros < 1000:
        parts = {"nmse": parts["nmse"]}
    found = {name: _deviation(part, whole, getattr(expected, name)) for name, part in parts.items()}
    codes = q.element_codes().long()
    fmt = recipe.elements.format
    if fmt.negative == "two's complement":
        codes = codes.where(codes < 2 ** (fmt.bits - 1), 2**fmt.bits - codes)
    else:
        codes = codes & (2 ** (fmt.bits - 1) - 1)
    probable = {"code": (codes, expected.code_probabilities)}
    if len(expected.scale_probabilities):
        probable["scale"] = (q.scales.long(), expected.scale_probabilities)
    for name, (of_each, probabilities) in probable.items():
        size = len(probabilities)
        rows = torch.arange(len(x), device=x.device)[:, None] * size
        counts = torch.bincount((of_each + rows).flatten(), minlength=len(x) * size)
        counts = counts.view(len(x), size).double()
        total = torch.full((len(x),), float(of_each.shape[-1]), dtype=torch.float64)
        for value, p in enumerate(probabilities.tolist()):
            if p * len(x) >= 25 and (1 - p) * of_each.numel() >= 25:
                found[f"{name} {value}"] = _deviation(counts[:, value], total.to(x.device), p)
    return found


def _deviation(part: torch.Tensor, whole: torch.Tensor, expected: float) -> float:
    """Of the ratio of sums, by the delta method."""
    ratio = (part.sum() / whole.sum()).item()
    error = ((part - ratio * whole).std() * math.sqrt(len(part)) / whole.sum()).item()
    same = math.isclose(ratio, expected, abs_tol=1e-12)
    return (ratio - expected) / error if error else 0.0 if same else math.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--elements", type=int, default=1 << 26)
    parser.add_argument("--every", type=int, default=1, help="take every so many'th case")
    parser.add_argument("--first", type=int, default=0, help="the first case taken")
    parser.add_argument("--only", type=re.compile, default=re.compile(""), metavar="REGEX")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    generator = torch.Generator(device).manual_seed(26)
    quantized.CHUNK = quantized.CHUNK_ON_GPU if device.type == "cuda" else quantized.CHUNK
    start, rows = time.time(), []
    named = (of for of in cases() if args.only.search(of.name))
    taken = itertools.islice(named, args.first, None, args.every)
    listed = sorted(taken, key=lambda c: str(c.law))
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        expected = pool.map(Case.expected, listed, chunksize=4)
        for law, group in itertools.groupby(listed, key=lambda c: c.law):
            unit = drawn(law, args.elements, generator)
            for of in group:
                theory = next(expected)
                z = deviations(of, theory, unit, generator)
                worst = max(z, key=lambda name: abs(z[name]))
                rows.append(
                    {
                        "case": of.name,
                        "elements": args.elements,
                        "device": name,
                        "nmse": float(theory.nmse),
                        "z_of_nmse": round(float(z["nmse"]), 3),
                        "numbers": len(z),
                        "worst": worst,
                        "z_of_worst": round(float(z[worst]), 3),
                    }
                )
    kept = json.loads(args.out.read_text())["cases"] if args.out.exists() else []
    merged = {row["case"]: row for row in kept + rows}
    lines = ",\n".join(json.dumps(row) for row in merged.values())
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(f'{{"cases": [\n{lines}\n]}}\n')
    beyond = [r for r in rows if abs(r["z_of_nmse"]) > 4]
    numbers = sum(r["numbers"] for r in rows)
    print(f"{len(rows)} cases, {numbers} numbers, {time.time() - start:.0f} s on {name}")
    print(f"NMSE beyond four standard errors in {len(beyond)}:", *beyond[:10], sep="\n")
    for row in sorted(rows, key=lambda r: -abs(r["z_of_worst"]))[:25]:
        print(row)


if __name__ == "__main__":
    main()
