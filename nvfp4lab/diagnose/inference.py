"""From observed blocks to decisions: the search for a recipe, and the evidence for each decision.

From the named recipes that agree best, each decision in turn takes the choice that explains the
most bytes, until none improves; then each goes back to the plainest choice that explains as many.
Scales come first, then codes under the scales that were stored. May be changed: how long it
searches (STARTS, PAIRS_UP_TO) and when evidence counts (MARGIN, POOR).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from nvfp4lab import catalogue
from nvfp4lab.diagnose.decisions import (
    DECISIONS,
    DECODINGS,
    NUMBERS,
    WITHOUT_OUTER,
    Decision,
    choices,
    default_of,
    plain,
    with_choice,
)
from nvfp4lab.diagnose.observed import Observed
from nvfp4lab.diagnose.reading import BLOCK, Reading
from nvfp4lab.formats import E2M1, E4M3
from nvfp4lab.rules import Outer, Recipe

STARTS = 3  # named recipes that the search sets out from
PAIRS_UP_TO = 0.25  # share that is unexplained above which no pair of decisions is worth trying
MARGIN = 10  # what speaks for a choice, over what speaks against it
POOR = 0.1  # share that is unexplained above which no decision is called supported


def named_recipes(reading: Reading) -> list[Recipe]:
    """Those that could have written such bytes, each under the outer scale that was found."""
    found = []
    for name in catalogue.recipes():
        recipe = catalogue.recipe(name)
        formats = (recipe.scale.format, recipe.elements.format, recipe.scale.block)
        if formats != (E4M3, E2M1, BLOCK) or recipe.elements.rounding == "stochastic":
            continue
        if recipe.search is not None and recipe.search.factors is None:
            continue
        if reading.outer is None:
            changes = _without_outer(recipe)
        elif recipe.outer is not None:
            changes = {"outer.per": reading.outer_per}
        else:
            outer = Outer(per=reading.outer_per)  # type: ignore[arg-type]
            changes = {"outer": outer, "scale.formula": "amax / d / g"}
        found.append(recipe.changed(changes, recipe.name))
    return found


def _without_outer(recipe: Recipe) -> dict[str, object]:
    """What changes where a recipe has no outer scale: its formulas, as they are then read."""
    if recipe.outer is None:
        return {}
    formula, folded = recipe.elements.formula, "1 / d" in recipe.scale.formula
    reciprocal = formula in ("x * min(1 / (s * g), FLOAT32_MAX)", "x * (G / s)")
    changes = {"outer": None, "scale.formula": WITHOUT_OUTER["scale.formula"][folded]}
    if formula not in WITHOUT_OUTER["elements.formula"]:
        changes["elements.formula"] = WITHOUT_OUTER["elements.formula"][reciprocal]
    if recipe.search is not None:
        changes["search.decoding"] = DECODINGS[0]
    return changes


class Fit:
    """The search for the recipe that explains some blocks."""

    def __init__(self, seen: Observed, suggestions: dict[str, tuple]) -> None:
        self.seen, self.suggestions = seen, suggestions

    def best(self, starts: list[Recipe]) -> Recipe:
        """The recipe that explains the most, in as few decisions as do."""
        ranked = sorted(starts, key=self.wrong)
        plainest = next(start for start in starts if start.name == catalogue.NVFP4.name)
        if not self.wrong(plainest):
            return plainest
        if self._hopeless(ranked[0]):
            return ranked[0]
        if not self.wrong(ranked[0]):
            tried = [self._set_out_from(plainest), ranked[0]]
        else:
            scales = min(starts, key=self.seen.wrong_scales)
            codes = min(starts, key=self.seen.wrong_codes)
            mixed = replace(codes, scale=scales.scale, search=scales.search)
            tried = []
            for start in (mixed, *ranked[:STARTS]):
                tried.append(self._set_out_from(start))
                if not self.wrong(tried[-1]):
                    break
        found = [self.simplified(recipe) for recipe in tried]
        return min(found, key=lambda r: (self.wrong(r), len(r.differences(plainest))))

    def _hopeless(self, recipe: Recipe) -> bool:
        """Whether most scales and most codes are something else than the nearest recipe gives."""
        blocks = len(self.seen.codes)
        scales, codes = self.seen.wrong_scales(recipe), self.seen.wrong_codes(recipe)
        return 2 * scales > blocks and 2 * codes > blocks * BLOCK

    def refined(self, recipe: Recipe, starts: list[Recipe]) -> Recipe:
        """The same after more blocks were seen: set out from the recipe that explained the others,
        or from one of the catalogue that explains all of these."""
        for named in starts:
            if not self.wrong(named):
                return self.simplified(named)
        return self.simplified(self._set_out_from(recipe)) if self.wrong(recipe) else recipe

    def wrong(self, recipe: Recipe) -> int:
        """How many scales and codes the recipe does not give."""
        scales, codes = self.seen.differences(recipe)
        return int(scales.sum()) + int(codes.sum())

    def _wrong(self, recipe: Recipe, judged_by: str) -> int:
        seen = self.seen
        return seen.wrong_scales(recipe) if judged_by == "scales" else seen.wrong_codes(recipe)

    def _choices(self, decision: Decision, recipe: Recipe) -> list:
        return choices(decision, recipe, self.seen, self.suggestions)

    def _set_out_from(self, recipe: Recipe) -> Recipe:
        for judged_by in ("scales", "codes"):
            recipe = self._descend(recipe, judged_by)
            left = self._wrong(recipe, judged_by)
            total = len(self.seen.codes) * (1 if judged_by == "scales" else BLOCK)
            if 0 < left < PAIRS_UP_TO * total and recipe.search is None:  # a search is slow
                pair = self._part(recipe, judged_by)._best_pair(recipe, judged_by)
                recipe = self._descend(pair, judged_by)
        return recipe

    def _descend(self, recipe: Recipe, judged_by: str) -> Recipe:
        least, before = self._wrong(recipe, judged_by), None
        while least and least != before:
            before = least
            for decision in _judged_by(judged_by):
                for choice in self._choices(decision, recipe):
                    changed = with_choice(recipe, decision.path, choice)
                    wrong = self._wrong(changed, judged_by)
                    if wrong < least:
                        recipe, least = changed, wrong
        return recipe

    def _best_pair(self, recipe: Recipe, judged_by: str) -> Recipe:
        best, least = recipe, self._wrong(recipe, judged_by)
        decisions = [d for d in _judged_by(judged_by) if d.path != "search"]  # too slow to combine
        for i, first in enumerate(decisions):
            for choice in self._choices(first, recipe):
                one = with_choice(recipe, first.path, choice)
                for second in decisions[i + 1 :]:
                    for other in self._choices(second, one):
                        both = with_choice(one, second.path, other)
                        wrong = self._wrong(both, judged_by)
                        if wrong < least:
                            best, least = both, wrong
        return best

    def _part(self, recipe: Recipe, judged_by: str) -> Fit:
        """Some blocks that the recipe does not explain and as many that it does."""
        scales, codes = self.seen.differences(recipe)
        wrong = scales if judged_by == "scales" else codes.any(-1)
        some = torch.cat([wrong.nonzero()[:256, 0], (~wrong).nonzero()[::7][:512, 0]])
        return Fit(self.seen.at(some), self.suggestions)

    def simplified(self, recipe: Recipe) -> Recipe:
        """The recipe with every decision as plain as explains as much."""
        least, before = self.wrong(recipe), None
        while recipe != before:
            before = recipe
            for decision in reversed(DECISIONS):
                for choice in self._plainer(decision, recipe):
                    plainer = with_choice(recipe, decision.path, choice)
                    if self.wrong(plainer) <= least:
                        recipe = plainer
                        break
        plainer = replace(recipe, specials=catalogue.NVFP4.specials)
        return plainer if self.wrong(plainer) <= least else recipe

    def _plainer(self, decision: Decision, recipe: Recipe) -> list:
        """The choice of `nvfp4`, and those that come before the recipe's own in `rules`."""
        current, default = decision.of(recipe), default_of(decision)
        if current == default or decision.path.startswith("outer"):
            return []
        part, _, name = decision.path.partition(".")
        named = NUMBERS.get(decision.path) or type(getattr(recipe, part)).choices().get(name, ())
        before = named[: named.index(current)] if current in named else ()
        allowed = self._choices(decision, recipe)
        return [default, *(c for c in before if c in allowed and c != default)]


def evidence(seen: Observed, recipe: Recipe, suggestions: dict[str, tuple]) -> list[dict]:
    """A row a decision: what bears the choice out, what is refuted, what is left open.

    A choice is refuted where it contradicts MARGIN times as many scales and codes as it would
    explain instead. Where more than POOR of what would show a decision is unexplained, or as much
    as speaks for it, it is unclear.
    """
    rows = []
    scales, codes = seen.scales(recipe), seen.element_codes(recipe)
    right_scales, right_codes = scales == seen.stored[:, 0], codes == seen.codes
    for decision in DECISIONS:
        refuted, open_, blocks, elements = [], [], [], []
        for choice in choices(decision, recipe, seen, suggestions):
            other = with_choice(recipe, decision.path, choice)
            other_scales, other_codes = seen.scales(other), seen.element_codes(other)
            against_scales = right_scales & (other_scales != scales)
            against_codes = right_codes & (other_codes != codes)
            for_it = int((~right_scales & (other_scales == seen.stored[:, 0])).sum())
            for_it += int((~right_codes & (other_codes == seen.codes)).sum())
            against = int(against_scales.sum()) + int(against_codes.sum())
            if against > MARGIN * for_it:
                refuted.append(choice)
                blocks.append(int((against_scales | against_codes.any(-1)).sum()))
                elements.append(int(against_codes.sum()))
            else:
                open_.append(choice)
        current = decision.of(recipe)
        if not refuted and (not open_ or decision.special):
            continue
        by_scales = decision.judged_by == "scales"
        right = right_scales if by_scales else right_codes
        left = int((~right).sum())
        borne_out = min(blocks if by_scales else elements, default=0)
        unclear = left > POOR * right.numel() or left > borne_out > 0
        rows.append(
            {
                "decision": decision.name,
                "choice": plain(current),
                "verdict": "unclear" if unclear else "open" if open_ else "supported",
                "blocks": min(blocks, default=0),
                "elements": min(elements, default=0),
                "refuted": ", ".join(map(plain, refuted)),
                "open": ", ".join(map(plain, open_)),
                "sets_apart": _sets_apart(decision, current, refuted, unclear),
            }
        )
    return rows


def _sets_apart(decision: Decision, current, refuted: list, unclear: bool) -> str:
    """What to say of a choice that `nvfp4` does not make, where the one it makes is refuted."""
    default = default_of(decision)
    if unclear or current == default or default not in refuted:
        return ""
    return decision.text(current)


def _judged_by(what: str) -> list[Decision]:
    return [d for d in DECISIONS if d.judged_by == what or d.path == "outer.divides"]
