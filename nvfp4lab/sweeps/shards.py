"""Which files a sweep reads: the shards of each site, and those that cannot be read.

Files are opened for their shape only. A file that is missing or no record is a `Failure`, not an
error, so that the other shards of a capture of days are still counted. To read another kind of
file, change `_opened` here and `_rows` in `tasks`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nvfp4lab.records import Activations, label_of, load_activations, record_files
from nvfp4lab.rules import Recipe


@dataclass(frozen=True)
class Shard:
    """A record file: rows of one site of one layer."""

    path: str  # absolute
    layer: int
    site: str
    tokens: int
    width: int
    size: int  # of the file, in bytes; with the time it tells whether it has changed since
    mtime_ns: int

    @property
    def label(self) -> str:
        """A name of its site for files and plots, such as layer05.mlp_input."""
        return label_of(self.layer, self.site)


@dataclass(frozen=True)
class Failure:
    """What a sweep could not count: rows start to stop of a file (None: all of it, as many as they
    are), under one recipe (None: under any), and why."""

    path: str
    start: int | None
    stop: int | None
    recipe: str | None
    error: str

    def __str__(self) -> str:
        rows = "" if self.start is None else f", rows {self.start} to {self.stop}"
        return f"{self.path}{rows}{f' ({self.recipe})' if self.recipe else ''}: {self.error}"

    def as_dict(self) -> dict[str, Any]:
        """Its fields by name, for a frame's attributes."""
        return asdict(self)


def find_shards(paths: Any) -> tuple[list[Shard], list[Failure]]:
    """The shards of record files and capture folders, and those that cannot be read.

    paths: one path or several. Of a folder with a capture.json, the files that it names.

    Raises: TypeError for activations in memory; ValueError for a capture that was interrupted, a
    folder without records, a file given twice, or if no shard at all can be read.
    """
    files, failures = [], []
    for path in _as_paths(paths):
        try:
            files += record_files(path)
        except FileNotFoundError as error:
            failures.append(Failure(os.path.abspath(path), None, None, None, str(error)))
    absolute, real = ([f(file) for file in files] for f in (os.path.abspath, os.path.realpath))
    if twice := sorted({path for path in real if real.count(path) > 1}):
        raise ValueError(f"given twice, so its rows would count twice: {', '.join(twice)}")
    shards: list[Shard] = []
    for path in absolute:
        try:
            shards.append(_opened(path, shards))
        except (OSError, ValueError) as error:
            failures.append(Failure(path, None, None, None, str(error)))
    if not shards:
        raise ValueError("no shard can be read: " + "; ".join(map(str, failures)))
    return shards, failures


def check_widths(shards: Iterable[Shard], recipes: Iterable[Recipe]) -> None:
    """Raises: ValueError if a recipe's blocks do not fit into the rows of a site."""
    for recipe in recipes:
        for shard in shards:
            if shard.width % recipe.scale.block:
                raise ValueError(
                    f"{shard.label} has rows of {shard.width} elements, expected a multiple of the "
                    f"block of {recipe.scale.block} of {recipe.name}: leave out one of them"
                )


def _as_paths(paths: Any) -> list[Path]:
    several = [paths] if isinstance(paths, (str, os.PathLike)) else paths
    if isinstance(several, (Activations, torch.Tensor)) or not isinstance(several, Iterable):
        several = [several]
    found = []
    for path in several:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(
                f"a sweep reads files, got {type(path).__name__}: pass paths of record files or "
                "capture folders (nvfp4lab.records.save_activations writes one; nvfp4lab.measure "
                "takes tensors)"
            )
        found.append(Path(path))
    if not found:
        raise ValueError("no shards: expected the path of a record file or a capture folder")
    return found


def _opened(path: str, before: list[Shard]) -> Shard:
    (record,) = load_activations(path)
    tokens, width = record.hidden.shape
    about = os.stat(path)
    new = Shard(path, record.layer, record.site, tokens, width, about.st_size, about.st_mtime_ns)
    for shard in before:
        if shard.label == new.label and shard.width != width:
            raise ValueError(
                f"its rows have {width} elements, those of {shard.path}, of the same {new.label}, "
                f"{shard.width}"
            )
    return new
