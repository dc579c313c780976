"""predict: the theory on a tensor's own blocks, held against what is measured there.

Three errors of one recipe stand side by side: of iid elements of a law at the tensor's own sigma;
of elements that are iid within a block only, each block at its own sigma and under its own outer
scale; and the measured one. From the first to the second is what the spread of block scales does
(subnormal and zero scales, saturation), from the second to the third what the shape of the blocks
does that no law with this sigma has. May be changed: GRID and NODES, which say how fine it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from nvfp4lab import catalogue
from nvfp4lab.blocks import quantize_blocks
from nvfp4lab.codec import find_outer, iter_blocks
from nvfp4lab.errors import measure
from nvfp4lab.outer import OuterScale
from nvfp4lab.rules import Recipe
from nvfp4lab.statistics import Statistics
from nvfp4lab.theory.expectation import (
    Expectation,
    blocks_of,
    expectation,
    integrated,
    over_all,
    require_theory,
)
from nvfp4lab.theory.integrals import UNENCODED, BlockLaw, Sums
from nvfp4lab.theory.laws import Law
from nvfp4lab.theory.laws import law as law_of
from nvfp4lab.theory.outer_scales import Blocks

GRID = 8  # points an octave of sigma; between them the theory is interpolated, by cubics
NODES = 6
NEVER = 1e-10
REACHES = 16  # per octave, of largest magnitudes under an outer scale that does not follow them
SCATTER_DRAWS = 1 << 12  # blocks that tell how root mean squares scatter: to 3 %


@dataclass(frozen=True)
class Prediction:
    """What the theory says of a tensor, and what was measured."""

    one_sigma: Expectation  # all elements iid: `expected_error` at x's root mean square
    block_sigmas: Expectation  # iid within each block
    measured: Statistics
    blocks_left_out: int  # with NaN or Inf in them

    def to_frame(self) -> pd.DataFrame:
        """Three rows: source, nmse, qsnr_db, gain, the split of nmse, the scale classes."""
        rows = [
            e.to_frame().drop(columns=["law", "sigma", "recipe", "relative_error", "cosine"])
            for e in (self.one_sigma, self.block_sigmas)
        ]
        m = self.measured
        whole = m.sum_xx or math.nan
        measured = {
            "nmse": m.nmse,
            "qsnr_db": m.qsnr_db,
            "gain": m.gain,
            "max_nmse": m.sum_ee_max / whole,
            "other_nmse": m.sum_ee_other / whole,
            "zero_nmse": m.sum_ee_zero_scale / whole,
            **{f"scale_{name}_share": share for name, share in m.scale_shares.items()},
        }
        frame = pd.concat([*rows, pd.DataFrame([measured])], ignore_index=True)
        frame.insert(0, "source", ["one sigma", "block sigmas", "measured"])
        return frame


@torch.no_grad()
def predict(
    x: torch.Tensor,
    recipe: str | Recipe = "nvfp4",
    *,
    law: object = "gauss",
    outer: float | None = None,
    generator: torch.Generator | None = None,
) -> Prediction:
    """The theory on x's own block scales, and the measured error beside it.

    x: (..., K), as `quantize` takes it. law: the shape of a block, as `expected_error` takes it, at
    the block's sigma: its root mean square, less what chance adds to the spread of those. outer: a
    calibrated decode scale in place of x's own. generator: for a recipe that rounds stochastically,
    in the measurement. Blocks with a NaN or an Inf have no root mean square: the theory leaves them
    out, and `blocks_left_out` counts them.

    Raises: NoTheory and what `expected_error` and `quantize` raise; ValueError for a tensor without
    a finite block that is not zero.

    >>> x = torch.randn(512, 256, generator=torch.Generator().manual_seed(1))
    >>> predict(x, "nvfp4").to_frame()[["source", "qsnr_db"]].round(1).values.tolist()
    [['one sigma', 20.4], ['block sigmas', 20.4], ['measured', 20.4]]
    """
    recipe = catalogue.recipe(recipe)
    require_theory(recipe)
    measured = measure(x, recipe, outer=outer, generator=generator)
    shape, blocks = law_of(law, 1.0), _blocks(x, recipe, outer)
    count = len(blocks.rms) + blocks.zeros
    if not len(blocks.rms):
        raise ValueError(
            f"x {tuple(x.shape)} has no block with a magnitude: {blocks.zeros} are zero, "
            f"{blocks.left_out} have a NaN or an Inf"
        )
    rms = np.sqrt(np.square(blocks.rms).sum() / count)
    elements = x.shape[-1] if recipe.outer_per == "token" else x.numel()
    with np.errstate(all="ignore"):  # a density may overflow far out
        one_sigma = integrated(shape.scaled(float(rms)), recipe, elements, outer)
        sigma = _without_chance(blocks.rms, shape, recipe.scale.block)
        block_sigmas = _mixture(recipe, shape, sigma, blocks)
    return Prediction(one_sigma, block_sigmas, measured, blocks.left_out)


@dataclass(frozen=True)
class _Blocks:
    """What a mixture has of a tensor's blocks that are finite and not zero: arrays [n]."""

    rms: np.ndarray
    g: np.ndarray  # outer scale
    reach: np.ndarray  # the largest magnitude under the same outer scale over g; Inf: g is given
    reaches: np.ndarray  # whether it is this block's
    zeros: int  # blocks of zeros
    left_out: int  # blocks with NaN or Inf


def _blocks(x: torch.Tensor, recipe: Recipe, outer) -> _Blocks:
    block, rule, scales = recipe.scale.block, recipe.outer, find_outer(x, recipe, outer)
    found, zeros, left_out = [], 0, 0
    for start, stop, blocks in iter_blocks(x, block):
        rms = blocks.double().square().mean(-1).sqrt()
        own = scales.of_blocks(x.shape[-1] // block, start, stop)
        g, largest = (p.double().broadcast_to(len(rms), 1)[:, 0] for p in (own.decode, own.amax))
        usable = rms.isfinite() & g.isfinite() & (rms > 0)
        zeros += int((rms == 0).sum())
        left_out += int((~usable & (rms != 0)).sum())
        columns = rms, g, largest, blocks.abs().amax(-1).double()
        found.append(torch.stack(columns)[:, usable].cpu().numpy())
    rms, g, largest, amax = np.concatenate(found or [np.zeros((4, 0))], axis=1)
    reach = np.full_like(rms, math.inf)
    if rule is not None and outer is None:
        coarse = 2.0 ** (np.round(REACHES * np.log2(largest / g)) / REACHES)
        reach = np.where(np.isclose(largest / g, rule.range, rtol=1e-5), rule.range, coarse)
    return _Blocks(rms, g, reach, amax == largest, zeros, left_out)


def _without_chance(rms: np.ndarray, shape: Law, block: int) -> np.ndarray:
    """Root mean squares of blocks -> the sigmas of their laws, with the same sum of squares.

    The root mean square of a few elements scatters about sigma; logarithms are drawn to their mean
    until their variance is less by what that scatter has. Iid elements come out with one sigma.
    """
    draws = shape.isf(np.random.default_rng(0).random((SCATTER_DRAWS, block)))
    scatter = np.log(np.square(draws).mean(-1)).var() / 4
    logs = np.log(rms)
    kept = math.sqrt(max(0.0, 1 - scatter / logs.var())) if logs.var() else 0.0
    sigma = np.exp(logs.mean() + kept * (logs - logs.mean()))
    return sigma * np.sqrt(np.square(rms).sum() / np.square(sigma).sum())


def _mixture(recipe: Recipe, shape: Law, sigma: np.ndarray, blocks: _Blocks) -> Expectation:
    """The theory of blocks with these sigmas under their outer scales, and of blocks of zeros.

    No block goes beyond what its outer scale comes from, and one has that as its largest magnitude.
    `relative_error` is the difference that straight lines between the points of the grid make.
    """
    count = len(sigma) + blocks.zeros
    points, cubic, linear = _on_grid(np.log2(sigma / blocks.g))
    total, by_lines = _of_zeros(recipe).scaled(blocks.zeros / count), 0.0
    per_block = np.stack([blocks.reach, blocks.reaches & np.isfinite(blocks.reach)], axis=1)
    kinds, kind = np.unique(per_block, axis=0, return_inverse=True)
    for k in np.unique(points):
        at = 2.0 ** (k / GRID)
        block, sums_of = BlockLaw(shape.scaled(at), recipe.scale.block, NODES, NEVER), {}
        for i in np.unique(kind[(points == k).any(axis=1)]):
            reach, reaches = float(kinds[i, 0]), bool(kinds[i, 1])
            here = (points == k) & (kind == i)[:, None]
            sums = _up_to(blocks_of(recipe, block), reach, reaches, sums_of)
            energy = np.square(np.broadcast_to(sigma[:, None], points.shape)[here]) / at**2 / count
            squares, counts = float(energy @ cubic[here]), float(linear[here].sum() / count)
            total.add(sums.reweighted(squares, counts))
            by_lines += sums.error * float(energy @ linear[here])
    mean_square = float(np.square(sigma).sum() / count)
    off = abs(by_lines - total.error) / total.error if total.error else 0.0
    return expectation(total, recipe, shape.name, math.sqrt(mean_square), off)


def _up_to(blocks: Blocks, reach: float, reaches: bool, known: dict[str, Sums]) -> Sums:
    """A block's sums if its largest magnitude is at most `reach`, or if it is that. known: what
    blocks of the same law without a limit have, once it is worked out."""
    of = blocks.of
    if reaches or reach <= of.lowest:
        return blocks.at(reach, 1.0)
    if of.law.largest_cdf(np.array(reach), of.block) < 1 - NEVER:
        below = blocks.between(of.lowest, reach, 1.0)
        return below.scaled(1 / below.probability)
    if "free" not in known:
        known["free"], _ = over_all(blocks, 1.0)
        known["free"].energy = of.block * of.law.second_moment - known["free"].lost_energy
    return known["free"]


def _of_zeros(recipe: Recipe) -> Sums:
    """The sums of a block of zeros, by the package's own encoder."""
    block, fmt = recipe.scale.block, recipe.scale.format
    zeros = torch.zeros(1, block, dtype=torch.float32, device="cpu")
    _, stored = quantize_blocks(zeros, OuterScale.one(), recipe, zeros.dtype)
    sums = Sums.zero(recipe.elements.format.code_of_max + 1)
    sums.probability = 1.0
    sums.scales[UNENCODED if fmt is None else int(stored[0])] = 1.0
    if fmt is None or math.isfinite(fmt.values[int(stored[0])]):
        sums.codes[0] = block
    return sums


def _on_grid(octaves: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[n, 4] points of the grid around each place, and their weights in a cubic and in a line."""
    place = octaves * GRID
    first = np.floor(place)
    t = (place - first)[:, None]
    points = (first[:, None] + np.arange(-1, 3)).astype(np.int64)
    zero = np.zeros_like(t)
    cubic = np.concatenate(
        [
            -t * (t - 1) * (t - 2) / 6,
            (t + 1) * (t - 1) * (t - 2) / 2,
            -(t + 1) * t * (t - 2) / 2,
            (t + 1) * t * (t - 1) / 6,
        ],
        axis=1,
    )
    return points, cubic, np.concatenate([zero, 1 - t, t, zero], axis=1)
