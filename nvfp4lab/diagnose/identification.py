"""identify: which decisions explain a kernel's bytes, given only its input and its output.

First `reading` settles how the buffers lie. Then the decisions of a `Recipe` are inferred one by
one: from the named recipes that agree best, each decision in turn takes the choice that explains
the most bytes, until none improves. A decision is supported where every other choice is
contradicted by some block, open where another explains as much. Scales are judged against the
block's amax, codes against the scale that was stored, so that a wrong scale does not hide how
elements round.

The search looks at a sample of blocks (all rare kinds among them); the outcome is held against
every block, and blocks that it does not explain join the sample until nothing is gained. To let
`identify` find one more choice, add it to the decision's Literal in `rules`, or to NUMBERS.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch

from nvfp4lab import blocks, catalogue
from nvfp4lab.codec import iter_blocks
from nvfp4lab.diagnose.reading import BLOCK, Reading, block_amax, read
from nvfp4lab.formats import E2M1, E4M3
from nvfp4lab.outer import OuterScale, outer_from_amax
from nvfp4lab.rules import Outer, Recipe, Search

SAMPLE = 6144  # blocks that the search looks at, rare kinds not counted
RARE = 192  # blocks of each rare kind
REFITS = 3
STARTS = 3  # named recipes that the search sets out from

NUMBERS: dict[str, tuple] = {
    "scale.amax_floor": (0.0, 1e-12, 1e-4),
    "scale.factor": (1.0, 17 / 16, 1.5),
    "scale.floor": (0.0, 2.0**-9, 2.0**-6),
    "scale.of_raw_zero": (0.0, 1.0),
    "scale.of_zero": (0.0, 2.0**-9, 0.125, 1.0),
    "specials.invalid_scale_code": (None, 0x7E, 0x7F, 0xFE, 0xFF),
    "specials.outer_nan_scale_code": (None, 0x7E),
    "specials.nan_scale_code": (None, 0x7E, 0xFF),
    "specials.zero_divisor": (math.inf, 0.0, 1e-6, 1e8),
    "search": (
        None,
        *(Search((1.0, 1.5), c) for c in ("mse", "mae", "max")),
        *(Search((1.0, 1.5), c, "v * s * amax / n") for c in ("mse", "mae", "max")),
    ),
}
NAMES = {
    "elements.rounding": "ties of elements",
    "scale.rounding": "scale rounding",
    "scale.floor": "scale floor",
    "scale.subnormals": "subnormal scales",
    "scale.overflow": "scale saturation",
    "elements.formula": "divide or reciprocal",
    "elements.scale_read": "scale that divides",
    "elements.zero_sign": "sign of zero",
    "scale.formula": "order of operations of the scale",
    "search": "search over scales",
}
OF_SCALES = (
    "scale.formula",
    "scale.amax_floor",
    "scale.factor",
    "scale.of_raw_zero",
    "scale.floor",
    "scale.rounding",
    "scale.subnormals",
    "scale.overflow",
    "scale.of_zero",
    "scale.precision",
    "specials.nan_in_amax",
    "specials.nan_scale_code",
    "specials.outer_nan_scale_code",
    "specials.invalid_scale_code",
    "search",
    "outer.divides",
)
OF_ELEMENTS = (
    "elements.formula",
    "elements.scale_read",
    "elements.rounding",
    "elements.overflow",
    "elements.zero_sign",
    "elements.precision",
    "specials.zero_divisor",
    "specials.zero_scale",
    "specials.nan_code",
    "specials.inf_over_inf",
    "outer.divides",
)


@dataclass(frozen=True)
class Identification:
    """What `identify` found.

    explained: whether `recipe` gives every scale byte and every code. recipe: the decisions that
    explain the most, under its name if it has one. decisions: a row a decision: decision, choice,
    verdict (supported, open), blocks and elements that bear it out against the nearest other
    choice, the choices refuted and those still open. ranking: the named recipes by the shares of
    scales and codes (of the sampled blocks) that they explain. causes: what sets the bytes apart
    from a sound quantizer's, the gravest first. approximate: whether all that is unexplained are
    codes of quotients within 4 float32 ulp of a tie.
    """

    explained: bool
    recipe: Recipe
    reading: Reading
    decisions: pd.DataFrame
    ranking: pd.DataFrame
    causes: list[str]
    blocks: int
    sampled: int
    unexplained_scales: int
    unexplained_codes: int
    approximate: bool

    def __str__(self) -> str:
        name = self.recipe.name
        verdict = (
            f"explained by {name}: every byte of {self.blocks} blocks"
            if self.explained
            else f"not explained; nearest {name}: {self.unexplained_scales} scales and "
            f"{self.unexplained_codes} codes of {self.blocks} blocks differ"
        )
        causes = "".join(f"\n  {i}. {cause}" for i, cause in enumerate(self.causes, 1))
        table = self.decisions.drop(columns="refuted").to_string(index=False)
        return (
            f"{verdict}\nwhat sets it apart:{causes or ' nothing'}\n\n"
            f"decisions ({self.sampled} blocks looked at closely)\n{table}\n\n"
            f"named recipes\n{self.ranking.head(5).to_string(index=False)}\n"
            + (OPEN if "open" in self.decisions["verdict"].tolist() else "")
        )

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(
            {
                "explained": self.explained,
                "recipe": self.recipe.name,
                "causes": self.causes,
                "blocks": self.blocks,
                "unexplained_scales": self.unexplained_scales,
                "unexplained_codes": self.unexplained_codes,
                "decisions": self.decisions.to_dict("records"),
                "ranking": self.ranking.to_dict("records"),
            },
            indent=1,
        )


OPEN = "\nopen decisions: run the kernel on nvfp4lab.probe(), whose blocks separate them all\n"


@torch.no_grad()
def identify(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    outer: torch.Tensor | None = None,
) -> Identification:
    """Name the decisions of the kernel that wrote codes, scales and outer for x.

    x: (..., K) bfloat16, float16 or float32, K a multiple of 16. codes: two to a byte, K / 2 a row.
    scales: E4M3 bytes (T, K / 16), int32 words, or flat padded 128x4 tiles. outer: (), (T,) or
    (T, 1), either convention, or None. Nothing is said about layouts: they are inferred.

    Raises: TypeError or ValueError for buffers that cannot belong to x.

    >>> x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    >>> from nvfp4lab import quantize
    >>> q = quantize(x, "vllm-muse")
    >>> identify(x, q.codes, q.scales).explained
    True
    """
    if x.ndim == 0 or x.shape[-1] % BLOCK or not x.numel():
        raise ValueError(f"x is (..., K) with K a multiple of {BLOCK}, got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"x is bfloat16, float16 or float32, got {x.dtype}")
    x = x.reshape(-1, x.shape[-1]).cpu()
    outer = None if outer is None else outer.detach().cpu()
    found = read(x, codes.detach().cpu(), scales.detach().cpu(), outer)
    candidates = [_Bytes(x, reading) for reading in (found, *_exact_outers(x, found))]
    tried = []
    for bytes_ in sorted(candidates, key=_Bytes.first_guess):
        tried.append(_infer(bytes_))
        if tried[-1].explained:
            break
    return min(
        tried,
        key=lambda t: (
            not t.explained,
            not t.approximate,
            t.unexplained_scales + t.unexplained_codes,
        ),
    )


def _exact_outers(x: torch.Tensor, found: Reading) -> list[Reading]:
    """The same reading under the outer scales of the rules that come within 2**-20 of it.

    One that was inverted, or was not given, is known to an ulp or so; its rule gives it exactly.
    """
    if found.outer is None:
        return []
    readings, seen = [], [found.outer]
    for name in catalogue.recipes():
        rule = catalogue.recipe(name).outer
        if rule is None:
            continue
        amax = found.outer.amax
        outer = outer_from_amax(amax, replace(rule, per=found.outer_per), x.dtype)
        off = (outer.decode / found.outer.decode - 1).abs()
        near = (off < 2.0**-20) | (amax == 0)
        missing = found.outer_reading.startswith("missing")
        if rule.rounding != "none" and missing:  # up to a factor of 2 above
            near = (off < 1.01) | (amax == 0)
        same = any(
            torch.equal(outer.decode, o.decode) and torch.equal(outer.encode, o.encode)
            for o in seen
        )
        if near.all() and not same:
            seen.append(outer)
            readings.append(replace(found, outer=outer))
    return readings


def _infer(bytes_: _Bytes) -> Identification:
    """The decisions that explain the most under one reading."""
    found = bytes_.found
    chosen = torch.zeros(0, dtype=torch.int64)
    more = bytes_.rare_and_even()
    starts = _starts(found)
    best, wrong_scales, wrong_codes = starts[0], 0, 0
    approximate = False
    for attempt in range(REFITS):
        chosen = torch.cat([chosen, more]).unique()
        sample = bytes_.sample(chosen)
        ranked = sorted(starts, key=lambda r: sum(sample.wrong(r)))
        best = ranked[0]
        if sum(sample.wrong(best)):
            fits = [sample.fit(start, in_pairs=False) for start in ranked[:STARTS]]
            best = min(fits, key=lambda r: sum(sample.wrong(r)))
            if sum(sample.wrong(best)):
                near = next((r for r in ranked if not sample.wrong(r)[0]), ranked[0])
                wrong_scales, wrong_codes, _ = bytes_.unexplained(near)
                approximate = not wrong_scales and wrong_codes == _near_ties(bytes_, near)
                if approximate:
                    best = near
                    break
                if attempt == 0:
                    fits = [sample.fit(fit, in_pairs=True) for fit in fits]
                    best = min(fits, key=lambda r: sum(sample.wrong(r)))
            best = sample.simplified(best)
        wrong_scales, wrong_codes, more = bytes_.unexplained(best)
        if not wrong_scales + wrong_codes:
            break
    sample = bytes_.sample(chosen)
    best = _named(best, sample, found)
    return Identification(
        not wrong_scales + wrong_codes,
        best,
        found,
        pd.DataFrame([*found.evidence, *sample.evidence(best)]),
        sample.ranking(found),
        _causes(found, best, bytes_, wrong_scales, wrong_codes, approximate),
        bytes_.amax.numel(),
        len(chosen),
        wrong_scales,
        wrong_codes,
        approximate,
    )


class _Bytes:
    """A kernel's input and output, block by block."""

    def __init__(self, x: torch.Tensor, found: Reading) -> None:
        self.x, self.found = x, found
        self.amax = block_amax(x).view(-1)
        self.stored = found.scales.reshape(-1, 1)
        self.codes = found.codes.reshape(-1, BLOCK)
        self.columns = x.shape[1] // BLOCK

    def outer(self, blocks: torch.Tensor) -> OuterScale:
        one = torch.ones(())
        if self.found.outer is None:
            return OuterScale(one, one, one)
        rows = blocks // self.columns
        parts = (self.found.outer.decode, self.found.outer.encode, self.found.outer.amax)
        return OuterScale(*(p if p.ndim == 0 else p[rows] for p in parts))

    def sample(self, blocks: torch.Tensor) -> _Sample:
        values = self.x.reshape(-1, BLOCK)[blocks]
        return _Sample(
            values.float(),
            self.stored[blocks],
            self.codes[blocks],
            self.outer(blocks),
            self.x.dtype,
        )

    def first_guess(self) -> int:
        """How many scales and codes of a few blocks the best of the named recipes gets wrong."""
        some = torch.linspace(0, len(self.amax) - 1, min(8 * RARE, len(self.amax))).long()
        sample = self.sample(some.unique())
        return min(sum(sample.wrong(start)) for start in _starts(self.found))

    def rare_and_even(self) -> torch.Tensor:
        """Indices of blocks: evenly spread ones, and some of each rare kind."""
        count = len(self.amax)
        stored = self.stored[:, 0]
        order = self.amax.argsort() if count <= 1 << 22 else torch.arange(count)
        rare = (
            self.amax == 0,
            ~self.amax.isfinite(),
            stored == 0,
            stored == 1,
            (stored > 1) & (stored < 8),
            stored == 0x7E,
            stored >= 0x7F,
            (self.amax / 6 < 2.0**-6) & (self.amax > 0),
            self.amax / 6 > 440,
        )
        kinds = [kind.nonzero()[:, 0] for kind in rare]
        spread = [k[torch.linspace(0, len(k) - 1, min(RARE, len(k))).long()] for k in kinds]
        even = torch.linspace(0, count - 1, min(SAMPLE, count)).long()
        return torch.cat([even, order[:RARE], order[-RARE:], *spread]).unique()

    def unexplained(self, recipe: Recipe) -> tuple[int, int, torch.Tensor]:
        """Over all blocks: scales and codes that differ from the recipe's, and some such blocks."""
        scales = codes = 0
        where: list[torch.Tensor] = []
        for start, stop, values in iter_blocks(self.x, BLOCK):
            blocks = torch.arange(start, stop)
            piece = _Sample(
                values,
                self.stored[start:stop],
                self.codes[start:stop],
                self.outer(blocks),
                self.x.dtype,
            )
            scale_differs, code_differs = piece.differences(recipe)
            scales += int(scale_differs.sum())
            codes += int(code_differs.sum())
            wrong = blocks[scale_differs | code_differs.any(-1)]
            if sum(map(len, where)) < 8 * RARE:
                where.append(wrong[:RARE])
        return scales, codes, torch.cat(where) if where else torch.zeros(0, dtype=torch.int64)


@dataclass(frozen=True)
class _Sample:
    """Blocks with what a kernel made of them."""

    x: torch.Tensor  # float32 [n, 16]
    stored: torch.Tensor  # scale bytes [n, 1]
    codes: torch.Tensor  # [n, 16]
    outer: OuterScale  # () or [n, 1]
    dtype: torch.dtype

    def predicted_scales(self, recipe: Recipe) -> torch.Tensor:
        if recipe.search is not None:
            return blocks.quantize_blocks(self.x, self.outer, recipe, self.dtype)[1]
        return blocks.encode_scale(self._prepared(recipe), recipe)[:, 0]

    def predicted_codes(self, recipe: Recipe) -> torch.Tensor:
        """The codes that the recipe gives under the scales that the kernel stored."""
        return blocks.encode_elements(self._prepared(recipe), self.stored, recipe)

    def _prepared(self, recipe: Recipe) -> blocks.Blocks:
        return blocks.prepare(self.x, self.outer, recipe, self.dtype)

    def differences(self, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
        """Which scales [n] and which codes [n, 16] differ from the recipe's."""
        scales = self.predicted_scales(recipe) != self.stored[:, 0]
        return scales, self.predicted_codes(recipe) != self.codes

    def wrong(self, recipe: Recipe) -> tuple[int, int]:
        scales, codes = self.differences(recipe)
        return int(scales.sum()), int(codes.sum())

    def fit(self, recipe: Recipe, in_pairs: bool) -> Recipe:
        """From this recipe, each decision in turn set to the choice that explains the most.

        In pairs: where no single decision improves, two at a time, on a part of the sample.
        """
        for decisions, index in ((OF_SCALES, 0), (OF_ELEMENTS, 1)):
            recipe = self._descend(recipe, decisions, index)
            if in_pairs and self._wrong_of(recipe, index):
                pair = self._part(recipe, index)._best_pair(recipe, decisions, index)
                recipe = self._descend(pair, decisions, index)
        return recipe

    def _descend(self, recipe: Recipe, decisions: tuple[str, ...], index: int) -> Recipe:
        least, before = self._wrong_of(recipe, index), None
        while least and least != before:
            before = least
            for decision in decisions:
                for choice in self.choices(decision, recipe):
                    changed = with_choice(recipe, decision, choice)
                    wrong = self._wrong_of(changed, index)
                    if wrong < least:
                        recipe, least = changed, wrong
        return recipe

    def _best_pair(self, recipe: Recipe, decisions: tuple[str, ...], index: int) -> Recipe:
        best, least = recipe, self._wrong_of(recipe, index)
        for i, first in enumerate(decisions):
            for choice in self.choices(first, recipe):
                one = with_choice(recipe, first, choice)
                if one.search is not None:  # too slow to combine, and seldom half of the answer
                    continue
                for second in decisions[i + 1 :]:
                    if second == "search":
                        continue
                    for other in self.choices(second, one):
                        both = with_choice(one, second, other)
                        wrong = self._wrong_of(both, index)
                        if wrong < least:
                            best, least = both, wrong
        return best

    def _part(self, recipe: Recipe, index: int) -> _Sample:
        """Some blocks that the recipe does not explain and as many that it does."""
        differs = self.differences(recipe)[index]
        wrong = differs if index == 0 else differs.any(-1)
        some = torch.cat([wrong.nonzero()[:, 0][:256], (~wrong).nonzero()[:, 0][::7][:512]])
        o = self.outer
        outer = OuterScale(*(p if p.ndim == 0 else p[some] for p in (o.decode, o.encode, o.amax)))
        return _Sample(self.x[some], self.stored[some], self.codes[some], outer, self.dtype)

    def simplified(self, recipe: Recipe) -> Recipe:
        """The recipe with every decision as in `nvfp4` where that explains as much."""
        least = sum(self.wrong(recipe))
        for decision in dict.fromkeys((*OF_SCALES, *OF_ELEMENTS)):
            part, _, name = decision.partition(".")
            if part == "outer":
                continue
            default = getattr(catalogue.NVFP4, part)
            plain = with_choice(recipe, decision, getattr(default, name) if name else default)
            if plain != recipe and sum(self.wrong(plain)) <= least:
                recipe = plain
        return recipe

    def _wrong_of(self, recipe: Recipe, index: int) -> int:
        if index == 0:
            return int((self.predicted_scales(recipe) != self.stored[:, 0]).sum())
        return int((self.predicted_codes(recipe) != self.codes).sum())

    def choices(self, decision: str, recipe: Recipe) -> list[Any]:
        """The other choices of a decision that mean something for this recipe and sample."""
        part, _, name = decision.partition(".")
        if decision == "outer.divides" and recipe.outer is None:
            return []
        current = getattr(recipe, part) if not name else getattr(getattr(recipe, part), name)
        if decision == "specials.nan_code":
            nan = self.x.isnan() | self.predicted_nan(recipe)
            every = tuple(self.codes[nan].unique().tolist()) if nan.any() else ()
        elif decision in NUMBERS:
            every = NUMBERS[decision]
        else:
            every = type(getattr(recipe, part)).choices()[name]
        if decision in ("scale.formula", "elements.formula") and recipe.outer is None:
            every = [c for c in every if c in PLAIN_FORMULAS]
        if decision == "elements.scale_read" and not (self.stored & 0x7F == 0x7F).any():
            every = [c for c in every if c != "encoder's"]  # it differs for a NaN code alone
        return [c for c in every if c not in (current, "stochastic")]

    def predicted_nan(self, recipe: Recipe) -> torch.Tensor:
        before = self._prepared(recipe)
        s = blocks.divisor_scale(self.stored, before.raw_scale, recipe)
        return blocks.quotient_of(before, s, recipe).isnan()

    def ranking(self, found: Reading) -> pd.DataFrame:
        rows = []
        for recipe in _starts(found):
            scales, codes = self.differences(recipe)
            rows.append(
                {
                    "recipe": recipe.name,
                    "scales": 1 - scales.float().mean().item(),
                    "codes": 1 - codes.float().mean().item(),
                }
            )
        frame = pd.DataFrame(rows)
        return frame.sort_values(["scales", "codes"], ascending=False, ignore_index=True)

    def evidence(self, recipe: Recipe) -> list[dict]:
        """A row a decision: what bears the choice out, what is refuted, what is left open."""
        rows = []
        scales, codes = self.predicted_scales(recipe), self.predicted_codes(recipe)
        right_scales, right_codes = scales == self.stored[:, 0], codes == self.codes
        for decision in dict.fromkeys((*OF_SCALES, *OF_ELEMENTS)):
            refuted, open_, blocks, elements = [], [], [], []
            for choice in self.choices(decision, recipe):
                other = with_choice(recipe, decision, choice)
                against_scales = right_scales & (self.predicted_scales(other) != scales)
                against_codes = right_codes & (self.predicted_codes(other) != codes)
                against = int(against_scales.sum()), int(against_codes.sum())
                if sum(against):
                    refuted.append(_text(choice))
                    blocks.append(int((against_scales | against_codes.any(-1)).sum()))
                    elements.append(against[1])
                else:
                    open_.append(_text(choice))
            if not refuted and not open_:
                continue
            part, _, name = decision.partition(".")
            current = getattr(recipe, part) if not name else getattr(getattr(recipe, part), name)
            rows.append(
                {
                    "decision": NAMES.get(decision, decision),
                    "choice": _text(current),
                    "verdict": "open" if open_ else "supported",
                    "blocks": min(blocks, default=0),
                    "elements": min(elements, default=0),
                    "refuted": ", ".join(refuted),
                    "open": ", ".join(open_),
                }
            )
        return rows


PLAIN_FORMULAS = ("amax / d / g", "amax * (1 / d)", "x / (s * g)", "x * (1 / (s * g))", "x")


def with_choice(recipe: Recipe, decision: str, choice: Any) -> Recipe:
    """The recipe with one decision, "scale.rounding" or "search", set to another choice."""
    part, _, name = decision.partition(".")
    if not name:
        return replace(recipe, **{part: choice})
    return replace(recipe, **{part: replace(getattr(recipe, part), **{name: choice})})


def _text(choice: Any) -> str:
    if isinstance(choice, Search):
        return f"{choice.criterion} over factors {choice.factors}, {choice.decoding}"
    return f"{choice:g}" if isinstance(choice, float) else str(choice)


def _starts(found: Reading) -> list[Recipe]:
    """The named recipes, each under the outer scale that was found."""
    starts = []
    for name in catalogue.recipes():
        recipe = catalogue.recipe(name)
        plain = recipe.scale.format is E4M3 and recipe.elements.format is E2M1
        if not plain or recipe.scale.block != BLOCK or recipe.elements.rounding == "stochastic":
            continue
        if recipe.search is not None and recipe.search.factors is None:
            continue
        if found.outer is None:
            outer = None
        elif recipe.outer is not None:
            outer = replace(recipe.outer, per=found.outer_per)
        else:
            outer = Outer(per=found.outer_per)  # type: ignore[arg-type]
        starts.append(replace(recipe, outer=outer))
    return starts


def _named(best: Recipe, sample: _Sample, found: Reading) -> Recipe:
    """The named recipe that explains the sample as well, else `best`, named by what it changes."""
    least = sum(sample.wrong(best))
    for start in _starts(found):
        own = catalogue.recipe(start.name).outer
        if (own.per if own else None) == found.outer_per and sum(sample.wrong(start)) == least:
            return start

    def changes(start: Recipe) -> dict:
        differs = best.differences(start)
        return {k: v for k, v in differs.items() if not k.startswith("outer")}

    nearest = min(_starts(found), key=lambda start: len(changes(start)))
    differs = changes(nearest)
    if not differs:
        return replace(best, name=nearest.name)
    text = ", ".join(f"{NAMES.get(k, k)} {_text(v[0])}" for k, v in differs.items())
    return replace(best, name=f"{nearest.name} with {text}")


def _causes(
    found: Reading,
    recipe: Recipe,
    bytes_: _Bytes,
    wrong_scales: int,
    wrong_codes: int,
    approximate: bool,
) -> list[str]:
    """What sets the bytes apart from a sound quantizer's, the gravest first."""
    causes = []
    dead = bool((bytes_.amax == 0).all()) and found.outer is not None
    if dead and (bytes_.stored & 0x7F == 0x7F).any():
        causes.append("an all-zero input: its outer scale is 0 or Inf, its block scales NaN")
    if found.layout == "128x4":
        causes.append("the scales lie in 128x4 tiles, not row by row")
    if found.nibbles != "low nibble first":
        causes.append(f"nibble order: {found.nibbles}")
    if found.outer_reading == "encode":
        causes.append("the outer scale is the encode scale, the inverse of a decode multiplier")
    elif found.outer_reading not in ("none", "decode"):
        causes.append(f"outer scale {found.outer_reading}")
    causes += found.faults
    scale, elements = recipe.scale, recipe.elements
    if scale.overflow == "nan":
        causes.append("scales beyond 448 become NaN: the cast to E4M3 has no clamp")
    elif scale.overflow == "mantissa-kept":
        causes.append("scales beyond 448 keep their mantissa: NaN or 256 and more")
    if elements.scale_read == "unrounded":
        causes.append("elements are divided by the unrounded scale")
    elif elements.scale_read == "subnormals as normals":
        causes.append("subnormal scale bytes are decoded as normal ones: 0x01 as 0.0088, not 2**-9")
    zero = (bytes_.stored[:, 0] == 0) & (bytes_.codes & 7).any(-1)
    if zero.any():
        causes.append(f"{int(zero.sum())} blocks have scale 0 and codes that are not 0: no floor")
    if scale.subnormals != "gradual":
        causes.append(f"subnormal scales: {scale.subnormals}")
    if scale.rounding != "ties-to-even":
        causes.append(f"scales round {scale.rounding}")
    if elements.rounding != "ties-to-even":
        causes.append(f"ties of elements: {elements.rounding}")
    if elements.formula.startswith(("x * (", "x * min(")):
        causes.append(f"elements are multiplied by a reciprocal: {elements.formula}")
    if approximate:
        causes.insert(0, f"approximate division: all {wrong_codes} codes are within 4 ulp of a tie")
    elif wrong_scales or wrong_codes:
        causes.append(f"{wrong_scales} scales and {wrong_codes} codes have no explanation")
    return causes


def _near_ties(bytes_: _Bytes, recipe: Recipe) -> int:
    """How many unexplained codes have a quotient within 4 float32 ulp of a midpoint."""
    near = 0
    steps = torch.tensor(E2M1.magnitudes[: E2M1.code_of_max + 1], dtype=torch.float64)
    middles = (steps[1:] + steps[:-1]) / 2
    for start, stop, values in iter_blocks(bytes_.x, BLOCK):
        outer = bytes_.outer(torch.arange(start, stop))
        piece = _Sample(
            values, bytes_.stored[start:stop], bytes_.codes[start:stop], outer, bytes_.x.dtype
        )
        wrong = piece.predicted_codes(recipe) != piece.codes
        s = E4M3.decode(piece.stored).double() * outer.decode.double()
        quotient = (values.double() / s).abs()[wrong]
        if len(quotient):
            off = (quotient[:, None] / middles - 1).abs().amin(-1)
            near += int((off <= 4 * 2.0**-23).sum())
    return near
