"""identify: which decisions explain a kernel's bytes, given only its input and its output.

`reading` settles how the buffers lie, `inference` finds the recipe that explains a sample of blocks
(all rare kinds among them); here that recipe is held against every block, and blocks that it does
not explain join the sample until nothing is gained. What is said rests on evidence alone: a cause
is named where the plain choice is refuted, never because a named recipe happens to make it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import pandas as pd
import torch

from nvfp4lab import catalogue
from nvfp4lab.checks import require_tensor
from nvfp4lab.diagnose.decisions import DECISIONS, default_of, plain, suggested
from nvfp4lab.diagnose.inference import Fit, evidence, named_recipes
from nvfp4lab.diagnose.leftovers import causes_of, count, counts, near_ties, tells
from nvfp4lab.diagnose.observed import Observed, Output, spread
from nvfp4lab.diagnose.probing import probe
from nvfp4lab.diagnose.reading import BLOCK, Reading, read
from nvfp4lab.quantized import DTYPES
from nvfp4lab.rules import Recipe

ROUNDS = 2  # times that blocks which are not explained join the sample
ADDED = 1536  # of them, at most, each time
READINGS = 3  # readings of the buffers that are fitted


@dataclass(frozen=True)
class Identification:
    """What `identify` found.

    explained: whether one set of decisions gives every scale byte and every code, and the outer
    scale that was given fits them. recipe: those decisions, or the ones that explain the most,
    under a name of the catalogue if one fits. names: every recipe of the catalogue that gives the
    same bytes. causes: what sets the bytes apart from those of `nvfp4` in row-major buffers, the
    gravest first, where the evidence bears it out. decisions: a row a decision: decision, choice,
    verdict, blocks and elements that bear it out against the nearest other choice, the choices
    refuted and those left open. verdict: supported; open, where another choice explains as much;
    unclear, where too much is unexplained to tell. ranking: the named recipes by the shares of
    scales and codes (of the sampled blocks) that they explain. approximate: whether all that is
    unexplained are codes next to a tie.
    """

    explained: bool
    recipe: Recipe
    names: list[str]
    reading: Reading
    decisions: pd.DataFrame
    ranking: pd.DataFrame
    causes: list[str]
    blocks: int
    sampled: int
    unexplained_scales: int
    unexplained_codes: int
    approximate: bool
    of_probe: bool

    @property
    def unexplained(self) -> int:
        """Scales and codes that the decisions do not give."""
        return self.unexplained_scales + self.unexplained_codes

    def __str__(self) -> str:
        causes = "".join(f"\n  {i}. {cause}" for i, cause in enumerate(self.causes, 1))
        table = self.decisions.drop(columns=["refuted", "open"])
        open_ = self.decisions.query("verdict == 'open'")
        rows = open_.to_dict("records")
        left = "".join(f"\n  {r['decision']}: {r['choice']}, or {r['open']}" for r in rows)
        advice = "" if self.of_probe or not left else f"\n  {ADVICE}"
        ranking = self.ranking.head(5).to_string(index=False)
        return (
            f"{self._verdict()}\nwhat sets it apart:{causes or ' nothing'}\n\n"
            f"decisions ({self.sampled} blocks looked at closely; counts are against the nearest "
            f"refuted choice)\n{table.to_string(index=False)}\n"
            + (f"\nleft open by this input:{left}{advice}\n" if left else "")
            + (f"\n{COMPARE}\n" if self.unexplained else "")
            + f"\nnamed recipes under the outer scale that was found, shares explained\n{ranking}\n"
        )

    def _verdict(self) -> str:
        if not self.unexplained:
            others = f" (as well as by {', '.join(self.names[1:])})" if self.names[1:] else ""
            fits = "" if self.explained else "; but a buffer contradicts them: see the first cause"
            what = f"every scale and code of {count(self.blocks, 'block')}{fits}"
            return f"explained by {self.recipe.name}{others}: {what}"
        wrong = counts(self.unexplained_scales, self.unexplained_codes)
        of = count(self.blocks, "block")
        return f"not explained; nearest {self.recipe.name}: {wrong} of {of} differ"

    def to_json(self) -> str:
        """The same as JSON."""
        return json.dumps(
            {
                "explained": self.explained,
                "recipe": self.recipe.name if self.explained else None,
                "nearest": self.recipe.name,
                "names": self.names,
                "causes": self.causes,
                "blocks": self.blocks,
                "unexplained_scales": self.unexplained_scales,
                "unexplained_codes": self.unexplained_codes,
                "decisions": self.decisions.to_dict("records"),
                "ranking": self.ranking.to_dict("records"),
            },
            indent=1,
        )


COMPARE = (
    "block by block, with r the recipe that was found and codes, scales and outer in the layout "
    "that was found: nvfp4lab.compare(nvfp4lab.Quantized.from_buffers(codes, scales, outer, "
    "recipe=r), nvfp4lab.quantize(x, r), x)"
)
ADVICE = "the kernel's output for nvfp4lab.probe() would tell: its blocks separate the decisions"


@torch.no_grad()
def identify(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    outer: float | torch.Tensor | None = None,
) -> Identification:
    """Name the decisions of the kernel that wrote codes, scales and outer for x.

    x: (..., K) bfloat16, float16 or float32, K a multiple of 16. codes: two to a byte, K / 2 a row.
    scales: E4M3 bytes (T, K / 16), int32 words, or flat padded 128x4 tiles. outer: float32 (), (T,)
    or (T, 1), either convention, or None. Nothing is said about layouts: they are inferred.

    Not looked for: stochastic rounding, and a search over all scale codes.

    Raises: TypeError or ValueError for buffers that cannot belong to x.

    >>> from nvfp4lab import quantize
    >>> x = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    >>> q = quantize(x, "vllm-muse")
    >>> identify(x, q.codes, q.scales).explained
    True
    """
    x, codes, scales, outer = _checked(x, codes, scales, outer)
    outputs = (Output(x, reading) for reading in read(x, codes, scales, outer))
    results: list[Identification] = []
    guesses = []
    for output in outputs:
        guess = _first_guess(output)
        if guess or len(results) == READINGS:
            guesses.append((guess, output))
            continue
        results.append(_infer(output))
        if not results[-1].unexplained:
            return results[-1]
    guesses.sort(key=lambda guess: guess[0])
    for guess, output in guesses[: READINGS - len(results)]:
        hopeless = guess > 0.5 * len(output.guessed) * (BLOCK + 1)
        if results and (hopeless or guess > 1.1 * guesses[0][0]):
            break
        results.append(_infer(output))
        if not results[-1].unexplained:
            break
    return min(results, key=lambda f: (f.unexplained > 0, not f.approximate, f.unexplained))


def _checked(x, codes, scales, outer):
    require_tensor("x", x, DTYPES)
    require_tensor("codes", codes)
    require_tensor("scales", scales)
    if x.ndim == 0 or x.shape[-1] % BLOCK or not x.numel():
        shape = tuple(x.shape)
        raise ValueError(f"x is (..., K), not empty, with K a multiple of {BLOCK}, got {shape}")
    if isinstance(outer, (int, float)):
        outer = torch.tensor(float(outer), dtype=torch.float32, device="cpu")
    if outer is not None:
        require_tensor("outer", outer, (torch.float32,))
        outer = outer.detach().cpu()
    return x.reshape(-1, x.shape[-1]).cpu(), codes.detach().cpu(), scales.detach().cpu(), outer


def _first_guess(output: Output) -> int:
    """How many scales and codes of a few blocks the best of the named recipes gets wrong."""
    fit = Fit(output.at(output.guessed), {})
    return min(fit.wrong(recipe) for recipe in named_recipes(output.reading))


def _infer(output: Output) -> Identification:
    """The decisions that explain the most under one reading of the buffers."""
    suggestions = suggested(output)
    sample = output.sample()
    seen = output.at(sample)
    best = Fit(seen, suggestions).best(named_recipes(output.reading))
    scales, codes = output.unexplained(best)
    for _ in range(ROUNDS):
        more = (scales | (codes > 0)).nonzero()[:, 0]
        if not len(more) or not tells(scales, codes):
            break
        more = spread(more, ADDED)
        if torch.isin(more, sample).all():
            break
        sample = torch.cat([sample, more]).unique()
        seen = output.at(sample)
        refined = Fit(seen, suggestions).refined(best, named_recipes(output.reading))
        if refined == best:
            break
        best, (scales, codes) = refined, output.unexplained(refined)

    names: list[str] = []
    nearness = ""
    if not tells(scales, codes):  # what fits so little says nothing
        plain_ones = [r for r in named_recipes(output.reading) if r.search is None]
        best = min(plain_ones, key=Fit(seen, {}).wrong)
        names, (scales, codes) = [best.name], output.unexplained(best)
    elif codes.any():
        best, scales, codes, nearness = near_ties(output, best, scales, codes)
    wrong_scales, wrong_codes = int(scales.sum()), int(codes.sum())
    rows = pd.DataFrame([*output.reading.evidence, *evidence(seen, best, suggestions)])
    apart = [text for text in rows.pop("sets_apart").fillna("") if text]
    explained = not wrong_scales + wrong_codes
    if explained:
        names = _names(output, seen, best)
    causes = causes_of(output, apart, nearness, scales, codes)
    return Identification(
        explained and not output.reading.contradicted,
        _labelled(best, names, output.reading),
        names if explained else [],
        output.reading,
        rows,
        _ranking(seen, output.reading),
        causes,
        len(output),
        len(sample),
        wrong_scales,
        wrong_codes,
        bool(nearness) and not wrong_scales,
        output.x.shape == (256, 512) and torch.equal(output.x, probe(output.x.dtype)),
    )


def _names(output: Output, seen: Observed, best: Recipe) -> list[str]:
    """The recipes of the catalogue that give every byte, the one nearest to `best` first."""
    found = [
        recipe
        for recipe in named_recipes(output.reading)
        if output.reading.has_outer_of(catalogue.recipe(recipe.name), output.x.dtype)
        and not sum(map(int, (seen.wrong_scales(recipe), seen.wrong_codes(recipe))))
        and output.gives(recipe)
    ]
    return [r.name for r in sorted(found, key=lambda r: len(r.differences(best)))]


def _labelled(best: Recipe, names: list[str], reading: Reading) -> Recipe:
    """The named recipe, or the decisions that were found under a name that tells them."""
    if names:
        return catalogue.recipe(names[0])
    words = [
        f"{decision.name} {plain(decision.of(best))}"
        for decision in DECISIONS
        if decision.of(best) != default_of(decision) and decision.text(decision.of(best))
    ]
    if reading.outer is not None:
        which = "each token" if reading.outer_per == "token" else "the tensor"
        rule = f" ({reading.outer_rules[0]})" if reading.outer_rules else ""
        words.insert(0, f"an outer scale for {which}{rule}")
    return replace(
        best,
        name="nvfp4" + (f" with {', '.join(words)}" if words else ""),
        summary="The decisions that `identify` found in a kernel's output.",  # not best's own
        source="inferred from codes and scales",
    )


def _ranking(seen: Observed, reading: Reading) -> pd.DataFrame:
    rows = []
    for recipe in named_recipes(reading):
        scales, codes = seen.differences(recipe)
        rows.append(
            {
                "recipe": recipe.name,
                "scales": 1 - scales.float().mean().item(),
                "codes": 1 - codes.float().mean().item(),
            }
        )
    return pd.DataFrame(rows).sort_values(["scales", "codes"], ascending=False, ignore_index=True)
