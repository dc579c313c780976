"""sweep: every recipe over every site, from files to one row each.

The files of a site are cut into tasks of some rows and one recipe, in a fixed order, and what they
give is added up in that order; so executor, workers and interruptions change nothing in the result
(but the last digits of sums on a GPU, or where torch's number of threads differs: both add in
another order).
Where a recipe has one outer scale for the tensor, the tensor is the site: all rows of all its
shards, whose largest magnitude is found in a pass before.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
from tqdm import tqdm

from nvfp4lab import catalogue
from nvfp4lab.records import label_of
from nvfp4lab.rules import Recipe
from nvfp4lab.statistics import Statistics
from nvfp4lab.sweeps.shards import Failure, Shard, check_widths, find_shards
from nvfp4lab.sweeps.state import Entry, Key, State
from nvfp4lab.sweeps.tasks import GRID, Largest, Task, find_largest, measured
from nvfp4lab.sweeps.workers import check_executor, outcomes

ELEMENTS = 1 << 24  # of a task


@dataclass(frozen=True, repr=False)
class Swept:
    """What a sweep gives: Statistics by (layer, site, recipe's name), and what it could not count.

    planned: the rows of each (layer, site) in the shards that could be opened, and those that were
    counted before of a shard that no longer can.
    """

    statistics: Mapping[Key, Statistics]
    failed: tuple[Failure, ...]
    planned: Mapping[tuple[int, str], int]

    def to_frame(self) -> pd.DataFrame:
        """A row a layer, site and recipe: tokens (counted), tokens_failed (in shards that could be
        opened, but not counted), then everything of `Statistics.to_frame`."""
        rows = []
        for (layer, site, recipe), statistics in self.statistics.items():
            (numbers,) = statistics.to_frame().to_dict("records")
            first = {
                "layer": layer,
                "site": site,
                "recipe": recipe,
                "tokens": statistics.tokens,
                "tokens_failed": self.planned[layer, site] - statistics.tokens,
            }
            rows.append({**first, **numbers})
        frame = pd.DataFrame(rows)
        frame.attrs["failed"] = [failure.as_dict() for failure in self.failed]
        return frame

    def concat(self, frame_of: Callable[[Statistics], pd.DataFrame]) -> pd.DataFrame:
        """A frame of each Statistics below one another, with layer, site and recipe before it.

        `swept.concat(Statistics.by_channel)` has a row a layer, site, recipe and channel.
        """
        frames = {key: frame_of(statistics) for key, statistics in self.statistics.items()}
        keyed = pd.concat(frames).reset_index([0, 1, 2], names=["layer", "site", "recipe"])
        return keyed.reset_index(drop=True)

    def __repr__(self) -> str:
        return f"Swept({len(self.statistics)} sites and recipes, {len(self.failed)} failures)"


def sweep(
    shards: Any,
    recipes: str | Recipe | Sequence[str | Recipe],
    executor: Executor | None = None,
    *,
    state: str | Path | None = None,
    progress: bool = True,
    rows: int | None = None,
    in_flight: int = 64,
) -> pd.DataFrame:
    """The error of each recipe at each site of captured activations: a row a layer, site, recipe.

    shards: a record file or capture folder, or several. executor: None, in this process; else any
    concurrent.futures.Executor: threads, `nvfp4lab.sweeps.processes(8)`, or for more than one
    machine, which must all see the files, dask's `client.get_executor()`. Each worker uses a GPU of
    its own where there is one (tested with made-up GPUs only, see `workers`). state: a folder that
    keeps what is counted: the same call goes on after a kill, and computes just what is missing
    after a recipe or shard was added. progress: a bar of elements on stderr. rows: of a task, a
    multiple of 256; None: about 2^24 elements. in_flight: tasks submitted at a time.

    Columns: layer, site, recipe, tokens (counted), tokens_failed, and those of
    `Statistics.to_frame`. What could not be counted is in `frame.attrs["failed"]`, each with path,
    start, stop, recipe and error, and warned of once.

    Raises: TypeError for activations in memory or an executor that is none; ValueError for unknown
    recipes, two of one name, a width that does not fit, a capture that was interrupted, or a state
    that belongs to other shards or recipes; RuntimeError if something is left to count and another
    sweep uses the state.

    >>> from nvfp4lab.records import data_folder
    >>> shard = data_folder() / "smollm2" / "layer00.down_proj_input.safetensors"
    >>> frame = sweep(shard, ["nvfp4", "seed"], progress=False)
    >>> frame[["recipe", "tokens", "qsnr_db"]].round(2).values.tolist()
    [['nvfp4', 256, 22.85], ['seed', 256, 22.04]]
    """
    swept = sweep_statistics(
        shards,
        recipes,
        executor,
        state=state,
        progress=progress,
        rows=rows,
        in_flight=in_flight,
    )
    if swept.failed:
        first = "; ".join(map(str, swept.failed[:3]))
        warnings.warn(
            f'{len(swept.failed)} parts could not be counted, see frame.attrs["failed"]: {first}',
            stacklevel=2,
        )
    return swept.to_frame()


def sweep_statistics(
    shards: Any,
    recipes: str | Recipe | Sequence[str | Recipe],
    executor: Executor | None = None,
    *,
    state: str | Path | None = None,
    progress: bool = True,
    rows: int | None = None,
    in_flight: int = 64,
) -> Swept:
    """As `sweep`, but the Statistics themselves, with histograms, channels and worst blocks; it
    gives no warning of what is in `failed`.

    Raises: as `sweep`.

    >>> from nvfp4lab.records import data_folder
    >>> shard = data_folder() / "smollm2" / "layer00.down_proj_input.safetensors"
    >>> swept = sweep_statistics(shard, "nvfp4", progress=False)
    >>> len(swept.statistics[0, "down_proj_input", "nvfp4"].by_channel())
    1536
    """
    check_executor(executor)
    chosen = _recipes(recipes)
    for name, value, multiple in (("rows", rows, GRID), ("in_flight", in_flight, 1)):
        if value is not None and (value < 1 or value % multiple):
            raise ValueError(f"{name} is a positive multiple of {multiple}, got {value}")
    found, failures = find_shards(shards)
    check_widths(found, chosen)
    by_site: dict[tuple[int, str], list[Shard]] = {}
    for shard in sorted(found, key=lambda s: (s.layer, s.site)):  # stable: files keep their order
        by_site.setdefault((shard.layer, shard.site), []).append(shard)
    with State(state, found, failures) as store:
        run = _Run(executor, rows, in_flight, store, progress, failures)
        largest = run.find_largest(found, [r for r in chosen if r.outer_per == "tensor"])
        entries = {
            (label_of(*site), recipe.name): store.load(_nothing_counted(site, own, recipe, largest))
            for site, own in by_site.items()
            for recipe in chosen
        }
        run.count(entries, [shard for own in by_site.values() for shard in own], largest)
        every = [*entries.values(), *store.lost(chosen, by_site.keys())]
    readable = {shard.path for shard in found}
    planned = {site: sum(shard.tokens for shard in own) for site, own in by_site.items()}
    lost: dict[tuple[int, str], int] = {}  # rows counted of shards that can no longer be read
    for entry in every:
        site = entry.layer, entry.site
        lost[site] = max(lost.get(site, 0), entry.rows_of(entry.done.keys() - readable))
    planned = {site: planned.get(site, 0) + rows for site, rows in lost.items()}
    return Swept({e.key: e.statistics for e in every}, tuple(failures), planned)


@dataclass
class _Run:
    """What the two passes over the shards share."""

    executor: Executor | None
    rows: int | None
    in_flight: int
    store: State
    progress: bool
    failures: list[Failure]

    def find_largest(self, shards: list[Shard], recipes: list[Recipe]) -> dict[str, Largest]:
        """Path -> the largest magnitude of each shard, if a recipe needs it; a shard that could not
        be read to its end is missing, and failed under these recipes."""
        if not recipes:
            return {}
        known = self.store.load_largest()
        left = {shard.path: shard for shard in shards if shard.path not in known}
        found = dict.fromkeys(left, Largest(0.0, False, False))
        tasks = [
            Task(shard.path, shard.label, *span, shard.width)
            for shard in left.values()
            for span in _cut(0, shard.tokens, shard.width, self.rows)
        ]
        failed: dict[str, str] = {}
        total = sum(task.elements for task in tasks)
        for task, result in self._outcomes(find_largest, tasks, total, "largest magnitude"):
            if isinstance(result, Exception):
                failed[task.path] = f"its largest magnitude could not be found: {_said(result)}"
            else:
                found[task.path] = found[task.path].joined(result)
        for path, why in failed.items():
            stop = left[path].tokens
            self.failures += [Failure(path, 0, stop, recipe.name, why) for recipe in recipes]
        known |= {path: value for path, value in found.items() if path not in failed}
        if left:
            self.store.save_largest(known)
        return known

    def count(
        self,
        entries: Mapping[tuple[str, str], Entry],
        shards: list[Shard],
        largest: Mapping[str, Largest],
    ) -> None:
        """Add to each entry, which is named by the site's label and the recipe, what it lacks."""

        def tasks() -> Iterator[Task]:
            for shard in shards:
                own = [e for (label, _), e in entries.items() if label == shard.label]
                yield from _missing(shard, own, largest, self.rows)

        total = sum(task.elements for task in tasks())
        for task, result in self._outcomes(measured, tasks(), total, "sweep"):
            assert task.recipe is not None
            if isinstance(result, Exception):
                name = task.recipe.name
                self.failures.append(Failure(task.path, task.start, task.stop, name, _said(result)))
            else:
                entry = entries[task.label, task.recipe.name]
                entry.add(task.path, task.start, task.stop, result)
                self.store.changed(entry)

    def _outcomes(
        self, work: Callable, tasks: Iterable[Task], total: int, what: str
    ) -> Iterator[tuple[Task, Any]]:
        """Those of the tasks on the executor, with a bar; total: of their elements."""
        if total:
            self.store.require_own()
        shown = self.progress and total > 0
        options: dict[str, Any] = {"unit": "el", "unit_scale": True, "dynamic_ncols": True}
        with tqdm(total=total, desc=what, disable=not shown, **options) as bar:
            for task, result in outcomes(work, tasks, self.executor, self.in_flight):
                yield task, result
                bar.update(task.elements)


def _missing(
    shard: Shard, entries: Iterable[Entry], largest: Mapping[str, Largest], rows: int | None
) -> list[Task]:
    """What the entries of a shard's site lack of it, by rows, so that a file's rows are read for
    one recipe after the other while the operating system still has them in memory."""
    spans = [
        (start, stop, number, entry)
        for number, entry in enumerate(entries)
        if entry.largest is None or shard.path in largest
        for gap in entry.missing(shard)
        for start, stop in _cut(*gap, shard.width, rows)
    ]
    return [
        Task(shard.path, shard.label, start, stop, shard.width, entry.recipe, entry.largest)
        for start, stop, _, entry in sorted(spans, key=lambda span: span[:3])
    ]


def _cut(start: int, stop: int, width: int, rows: int | None) -> Iterator[tuple[int, int]]:
    """Rows start to stop at multiples of `rows`, or of about ELEMENTS."""
    step = rows or max(1, ELEMENTS // max(1, width) // GRID) * GRID
    edges = [start, *range((start // step + 1) * step, stop, step), stop]
    return pairwise(edges) if start < stop else iter(())


def _nothing_counted(
    site: tuple[int, str],
    shards: list[Shard],
    recipe: Recipe,
    largest: Mapping[str, Largest],
) -> Entry:
    """Nothing counted yet of one site under one recipe."""
    of_site = None
    if recipe.outer_per == "tensor":
        of_site = Largest(0.0, False, False)
        for shard in shards:
            of_site = of_site.joined(largest.get(shard.path, of_site))
    return Entry(*site, recipe, Statistics.empty(recipe, shards[0].width), of_site)


def _recipes(given: str | Recipe | Sequence[str | Recipe]) -> list[Recipe]:
    several = [given] if isinstance(given, (str, Recipe)) else given
    chosen = [catalogue.recipe(recipe) for recipe in several]
    names = [recipe.name for recipe in chosen]
    if not chosen or len(set(names)) < len(names):
        raise ValueError(f"expected one recipe or more, each of another name, got {names}")
    return chosen


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
