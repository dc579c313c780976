"""What a sweep has counted, and the folder from which a killed one goes on.

    layer03.expert_input.nvfp4.npz   Statistics, with the rows that they count as the file's note
    largest.json                     each shard's largest magnitude, for outer scales per tensor

Each file is replaced as a whole, so Statistics and their rows always go together: a kill loses what
was counted in the last seconds and nothing is counted twice. May be changed: what the note says,
with NOTE; a folder that is there has to stay readable, or be refused in words.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from filelock import FileLock, Timeout

from nvfp4lab import files
from nvfp4lab.checked_json import COUNT, either, magnitude, parse
from nvfp4lab.records import ABOUT, label_of
from nvfp4lab.rules import Recipe
from nvfp4lab.statistics import Statistics, digest
from nvfp4lab.sweeps.shards import Failure, Shard
from nvfp4lab.sweeps.tasks import Largest

SAVE_EVERY = 5.0  # seconds
LONGEST_NAME = 200  # of a file; file systems end at 255 bytes

Key = tuple[int, str, str]  # layer, site, name of the recipe

# What the files of the folder say in JSON.
LARGEST = (magnitude, bool, bool)
SHARD = {"size": COUNT, "mtime_ns": int}
NOTE = {
    "layer": ABOUT["layer"],
    "site": ABOUT["site"],
    "largest": either(None, LARGEST),
    "shards": {str: SHARD | {"done": [(COUNT, COUNT)]}},
}


@dataclass
class Entry:
    """What is counted of one site under one recipe."""

    layer: int
    site: str
    recipe: Recipe
    statistics: Statistics
    largest: Largest | None = None  # of the site, where the recipe's outer scale comes from it
    done: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # path -> rows counted

    @property
    def key(self) -> Key:
        """By what the sweep knows it."""
        return self.layer, self.site, self.recipe.name

    def add(self, path: str, start: int, stop: int, statistics: Statistics) -> None:
        """Count rows start to stop of a file, which were not counted before."""
        self.statistics += statistics
        merged: list[tuple[int, int]] = []
        for a, b in sorted([*self.done.get(path, []), (start, stop)]):
            if merged and merged[-1][1] == a:
                merged[-1] = (merged[-1][0], b)
            else:
                merged.append((a, b))
        self.done[path] = merged

    def rows_of(self, paths: Iterable[str]) -> int:
        """How many rows of these files are counted."""
        return sum(stop - start for path in paths for start, stop in self.done[path])

    def missing(self, shard: Shard) -> Iterator[tuple[int, int]]:
        """The runs of rows of a shard that are not counted."""
        at = 0
        for start, stop in [*self.done.get(shard.path, []), (shard.tokens, shard.tokens)]:
            if start > at:
                yield at, start
            at = stop


class State:
    """The folder of a sweep; without one it remembers nothing. Use as a context manager.

    While another process uses the folder it can be read: each file is whole. `require_own` is for
    whoever has something to count.
    """

    def __init__(
        self,
        folder: str | Path | None,
        shards: Sequence[Shard],
        unreadable: Iterable[Failure] = (),
    ):
        self.folder = None if folder is None else Path(folder)
        self._fingerprints = {s.path: (s.size, s.mtime_ns) for s in shards}
        self._unreadable = {failure.path for failure in unreadable}
        self._changed: dict[Key, Entry] = {}
        self._saved = time.monotonic()

    def __enter__(self) -> State:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(self.folder / ".lock")
            with suppress(Timeout):
                self._lock.acquire(blocking=False)
            if self._lock.is_locked:
                files.clear(self.folder)  # where all is counted, nothing more is written
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder is not None:
            try:
                self._save()
            finally:
                self._lock.release()

    def require_own(self) -> None:
        """Raises: RuntimeError if another process is using the folder."""
        if self.folder is not None and not self._lock.is_locked:
            raise RuntimeError(f"{self.folder} is in use by another sweep")

    def load(self, empty: Entry) -> Entry:
        """What is already counted of an entry, or the entry itself.

        An outer scale for the tensor that has changed, because a shard was added, makes it start
        again; what was counted of a shard that can no longer be read stays counted. Raises:
        ValueError if the file counts rows of a shard that has changed or is not in this sweep, or
        is of another recipe.
        """
        path = self._file(empty)
        if path is None or not path.exists():
            return empty
        statistics, about = _loaded(path)
        if (about["layer"], about["site"]) != (empty.layer, empty.site):
            raise ValueError(
                f"{path} counts rows of layer {about['layer']} {about['site']!r}, expected those "
                f"of layer {empty.layer} {empty.site!r}: it bears another file's name"
            )
        if statistics.digest != digest(empty.recipe):
            raise ValueError(
                f"{path} is of another {statistics.recipe} than this sweep's: the recipe has "
                "changed since; use another state folder, or remove the file to count again"
            )
        for shard_path, known in about["shards"].items():
            self._check(path, shard_path, known)
        entry = _entry(empty.layer, empty.site, empty.recipe, statistics, about)
        return entry if entry.largest == empty.largest else empty

    def lost(
        self, recipes: Iterable[Recipe], sites: Collection[tuple[int, str]]
    ) -> Iterator[Entry]:
        """What is counted of sites other than these, none of whose shards can be read any more."""
        by_digest = {digest(recipe): recipe for recipe in recipes}
        for path in [] if self.folder is None else sorted(self.folder.glob("*.npz")):
            statistics, about = _loaded(path)
            recipe = by_digest.get(statistics.digest)
            site = about["layer"], about["site"]
            if recipe and site not in sites and about["shards"].keys() <= self._unreadable:
                yield _entry(*site, recipe, statistics, about)

    def changed(self, entry: Entry) -> None:
        """Saves it within the next seconds, or at the end."""
        self._changed[entry.key] = entry
        if time.monotonic() - self._saved > SAVE_EVERY:
            self._save()

    def load_largest(self) -> dict[str, Largest]:
        """Path -> the largest magnitude of each shard that is known and has not changed."""
        path = None if self.folder is None else self.folder / "largest.json"
        if path is None or not path.exists():
            return {}
        about = parse(path.read_bytes(), path, {"shards": {str: SHARD | {"largest": LARGEST}}})
        return {
            shard: Largest(*known["largest"])
            for shard, known in about["shards"].items()
            if self._fingerprints.get(shard) == _fingerprint(known)
        }

    def save_largest(self, largest: Mapping[str, Largest]) -> None:
        """Replace largest.json, where the state has a folder."""
        if self.folder is None:
            return
        known = {
            path: self._described(path, largest=list(value)) for path, value in largest.items()
        }
        with files.replacing(self.folder / "largest.json") as partial:
            partial.write_text(json.dumps({"shards": known}))

    def _check(self, path: Path, shard_path: str, known: Mapping[str, Any]) -> None:
        if shard_path in self._unreadable:
            self._fingerprints[shard_path] = _fingerprint(known)
        found = self._fingerprints.get(shard_path)
        if found is None:
            raise ValueError(
                f"{path} counts rows of {shard_path}, which is not among this sweep's shards; use "
                "another state folder, or remove the file to count the site again"
            )
        if found != _fingerprint(known):
            raise ValueError(
                f"{path} counts rows of {shard_path}, which has changed since: size and time "
                f"{_fingerprint(known)}, now {found}; use another state folder, or remove the file "
                "to count the site again"
            )

    def _save(self) -> None:
        for entry in self._changed.values():
            path = self._file(entry)
            if path is not None:
                shards = {p: self._described(p, done=d) for p, d in entry.done.items()}
                about = {"layer": entry.layer, "site": entry.site}
                about |= {"largest": entry.largest, "shards": shards}
                entry.statistics.save(path, note=json.dumps(about))
        self._changed.clear()
        self._saved = time.monotonic()

    def _described(self, path: str, **more: Any) -> dict[str, Any]:
        size, mtime_ns = self._fingerprints[path]
        return {"size": size, "mtime_ns": mtime_ns, **more}

    def _file(self, entry: Entry) -> Path | None:
        name = quote(f"{label_of(entry.layer, entry.site)}.{entry.recipe.name}", safe="")
        if len(name) > LONGEST_NAME:
            name = f"{name[:LONGEST_NAME]}.{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        return None if self.folder is None else self.folder / f"{name}.npz"


def _entry(
    layer: int, site: str, recipe: Recipe, statistics: Statistics, about: Mapping[str, Any]
) -> Entry:
    largest = None if about["largest"] is None else Largest(*about["largest"])
    done = {p: [(a, b) for a, b in known["done"]] for p, known in about["shards"].items()}
    return Entry(layer, site, recipe, statistics, largest, done)


def _fingerprint(known: Mapping[str, Any]) -> tuple[int, int]:
    return known["size"], known["mtime_ns"]


def _loaded(path: Path) -> tuple[Statistics, dict[str, Any]]:
    """Statistics and the note beside them, which says what rows they count."""
    statistics, note = Statistics.load_with_note(path)
    about = parse(note, path, NOTE)
    spans = [span for known in about["shards"].values() for span in known["done"]]
    if (rows := sum(stop - start for start, stop in spans)) != statistics.tokens:
        raise ValueError(
            f"{path}: expected the {statistics.tokens} rows that it counts, found {rows}"
        )
    return statistics, about
