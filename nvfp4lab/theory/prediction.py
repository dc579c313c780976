"""predict: the theory on a tensor's own blocks, held against what is measured there.

Three errors of one recipe stand side by side: of iid elements of a law at the tensor's own sigma;
of elements that are iid within a block only, each block at its own sigma and under its own outer
scale; and the measured one. From the first to the second is what the spread of block
scales does (subnormal and zero scales, saturation), from the second to the third what the shape of
the blocks does that no law with this sigma has.
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
from nvfp4lab.theory.expectation import Expectation, blocks_of, check, expectation, over_all
from nvfp4lab.theory.integrals import UNENCODED, BlockLaw, Sums
from nvfp4lab.theory.laws import Law
from nvfp4lab.theory.laws import law as law_of

GRID = 8  # points an octave of sigma; between them the theory is interpolated, by cubics
NODES = 6
NEVER = 1e-10
SCATTER_DRAWS = 1 << 12  # blocks that tell how root mean squares scatter: to 3 %


@dataclass(frozen=True)
class Prediction:
    """What the theory says of a tensor, and what was measured."""

    one_sigma: Expectation  # all elements iid
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

    x: as `quantize` takes it. law: the shape of a block, as `expected_error` takes it, at the
    block's sigma: its root mean square, less what chance adds to the spread of those. outer: a
    calibrated decode scale in place of x's own. generator: for a recipe that rounds stochastically,
    in the measurement. Blocks with a NaN or an Inf have no root mean square: the theory leaves them
    out, and `blocks_left_out` counts them.

    Raises: NoTheory and what `expected_error` and `quantize` raise; ValueError for a tensor without
    a finite block that is not zero.
    """
    recipe = catalogue.recipe(recipe)
    check(recipe)
    measured = measure(x, recipe, outer=outer, generator=generator)
    shape = law_of(law, 1.0)
    sigma, g, zeros, left_out = _blocks(x, recipe, outer)
    if not len(sigma):
        raise ValueError(
            f"x {tuple(x.shape)} has no block with a magnitude: {zeros} are zero, {left_out} have "
            "a NaN or an Inf"
        )
    rms = np.sqrt(np.square(sigma).sum() / (len(sigma) + zeros))
    one_sigma = _mixture(recipe, shape, np.full_like(g, rms), g, zeros=0)
    sigma = _without_chance(sigma, shape, recipe.scale.block)
    return Prediction(one_sigma, _mixture(recipe, shape, sigma, g, zeros), measured, left_out)


def _blocks(x: torch.Tensor, recipe: Recipe, outer) -> tuple[np.ndarray, np.ndarray, int, int]:
    """Root mean square and outer scale of each finite block that is not zero; how many are zero,
    and how many not finite."""
    block, scales = recipe.scale.block, find_outer(x, recipe, outer)
    sigma, g, zeros, left_out = [], [], 0, 0
    for start, stop, blocks in iter_blocks(x, block):
        rms = blocks.double().square().mean(-1).sqrt()
        decode = scales.of_blocks(x.shape[-1] // block, start, stop).decode
        decode = decode.double().broadcast_to(rms[:, None].shape)[:, 0]
        usable = rms.isfinite() & decode.isfinite() & (rms > 0)
        zeros += int((rms == 0).sum())
        left_out += int((~usable & (rms != 0)).sum())
        sigma.append(rms[usable].cpu().numpy())
        g.append(decode[usable].cpu().numpy())
    return np.concatenate(sigma or [[]]), np.concatenate(g or [[]]), zeros, left_out


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


def _mixture(
    recipe: Recipe, shape: Law, sigma: np.ndarray, g: np.ndarray, zeros: int
) -> Expectation:
    """The theory of blocks with these root mean squares and outer scales, and of blocks of zeros.

    Its `relative_error` is the difference that straight lines between the points of the grid make.
    """
    points, cubic, linear = _on_grid(np.log2(sigma / g))
    count = len(sigma) + zeros
    total, by_lines = _of_zeros(recipe), 0.0
    total = total.scaled(zeros / count)
    for k in np.unique(points):
        at = 2.0 ** (k / GRID)
        blocks = blocks_of(recipe, BlockLaw(shape.scaled(at), recipe.scale.block, NODES, NEVER))
        sums, _ = over_all(blocks, 1.0)
        here = points == k
        energy = np.square(np.broadcast_to(sigma[:, None], points.shape)[here]) / at**2 / count
        total.add(sums.reweighted(float(energy @ cubic[here]), float(cubic[here].sum() / count)))
        by_lines += sums.error * float(energy @ linear[here])
    mean_square = float(np.square(sigma).sum() / count)
    off = abs(by_lines - total.error) / total.error if total.error else 0.0
    return expectation(total, recipe, shape.name, math.sqrt(mean_square), off)


def _of_zeros(recipe: Recipe) -> Sums:
    """The sums of a block of zeros, by the package's own encoder."""
    block, fmt = recipe.scale.block, recipe.scale.format
    _, stored = quantize_blocks(torch.zeros(1, block), OuterScale.one(), recipe, torch.float32)
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
