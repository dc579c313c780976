"""A capture folder: rows of every site appended pass by pass, sealed into shards, safe from a kill.

    capture.json                         what is in the folder; the one source of truth
    layer03.expert_input.00000.safetensors   a sealed shard, a record of records.py
    rows/layer03.expert_input.hidden     committed rows that no shard holds yet, raw

A pass is written to rows/, then capture.json is replaced: a kill before that leaves bytes beyond
the committed rows, which are cut off when the capture goes on, and a kill after it loses nothing. A
shard counts once capture.json names it. The engines know nothing of this: they call recorder.py.
May be changed: what is kept in capture.json, with STATE; captures that are there have to stay
readable.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from nvfp4lab import files
from nvfp4lab.checked_json import COUNT, either, parse, plain_name
from nvfp4lab.records import (
    ABOUT,
    CAPTURE_FILE,
    DTYPES,
    LISTED,
    REQUIRED,
    Activations,
    file_entry,
    label_of,
    save_activations,
)

ROWS, LOCK = "rows", ".lock"
COUNTS = ("shards", "waiting", "rows", "bytes", "passes", "tokens_seen")
SITE = {
    "layer": ABOUT["layer"],
    "site": str,
    "columns": {str: (str, either(None, COUNT))},  # name -> dtype, width
}
STATE = {
    "provenance": {str: object},
    "settings": {str: object},
    "sites": {str: SITE},
    **dict.fromkeys(COUNTS, COUNT),
    "files": LISTED["files"],
}


class CaptureFolder:
    """Opens or goes on with the capture in `path`; `commit` a pass at a time, then `finish`.

    provenance: goes into every record. A folder is gone on with only if its provenance, apart from
    "date", and its settings are the same: mixing two models or two samplings would go unnoticed.

    Raises: ValueError for a folder of another capture, or one that is no capture and not empty;
    RuntimeError if another process is writing it.
    """

    def __init__(
        self,
        path: str | Path,
        provenance: Mapping[str, Any],
        settings: Mapping[str, Any],
        shard_bytes: int,
    ):
        self.path = Path(path)
        self._shard_bytes = shard_bytes
        fresh = {
            "provenance": dict(provenance),
            "settings": dict(settings),
            "sites": {},  # label -> {layer, site, columns: {name: [dtype, width]}}
            "files": [],
            "shards": 0,  # sealed so far, at every site
            "waiting": 0,  # committed rows that are in rows/
            "rows": 0,
            "bytes": 0,
            "passes": 0,
            "tokens_seen": 0,
        }
        fresh = json.loads(json.dumps(fresh))  # what JSON gives back, so that two can be compared
        if (self.path / CAPTURE_FILE).exists():
            self._read_state(fresh)
        elif self.path.is_dir() and any(not _is_own(p.name) for p in self.path.iterdir()):
            raise ValueError(
                f"{self.path} is not empty and holds no {CAPTURE_FILE}: expected a new folder, or "
                "one of a capture to go on with"
            )
        _refuse_links(self.path / ROWS)
        self._lock = self._locked()
        self.state = fresh
        if (self.path / CAPTURE_FILE).exists():  # again: it may have grown until it was ours
            self._read_state(fresh)
        self._cut_uncommitted()
        self._write_state()

    def commit(
        self, records: Mapping[tuple[int, str], Mapping[str, torch.Tensor]], tokens_seen: int
    ) -> None:
        """Append one pass: for each (layer, site) its columns, CPU tensors [rows, ...].

        All sites have the same number of rows: row i of every site is the same token. An OSError,
        such as of a full disk, leaves the folder as it was: the same pass may be given again.

        Raises: ValueError where they do not, or for other sites, dtypes or widths than before.
        """
        columns_of = {label_of(*key): columns for key, columns in records.items()}
        described = describe(records)
        if self.state["sites"] and described and described != self.state["sites"]:
            raise ValueError(
                f"{self.path}: this pass gave {_differing(described, self.state['sites'])}; "
                "expected the sites, dtypes and widths of the passes before it"
            )
        rows = {len(columns["hidden"]) for columns in records.values()} or {0}
        if len(rows) > 1:
            raise ValueError(f"expected as many rows at every site, got {sorted(rows)}")
        (count,) = rows
        changes: dict[str, Any] = {"passes": self.state["passes"] + 1, "tokens_seen": tokens_seen}
        if count:
            fullest = max(map(row_bytes, described.values()))
            if self.state["waiting"] and (self.state["waiting"] + count) * fullest > (
                self._shard_bytes
            ):
                self._seal()
            self._cut_uncommitted()  # of a shard just sealed, or of a pass that found the disk full
            for label, columns in columns_of.items():
                for name, tensor in columns.items():
                    files.append(self._rows_file(label, name), _raw(tensor))
            changes["sites"] = described
            for total, added in (
                ("waiting", count),
                ("rows", count),
                ("bytes", count * sum(map(row_bytes, described.values()))),
            ):
                changes[total] = self.state[total] + added
        self._write_state(**changes)

    def finish(self) -> None:
        """Seal what waits, and give the folder up; it can then be read, or gone on with."""
        try:
            if self.state["waiting"]:
                self._seal()
            for file in (self.path / ROWS).iterdir():  # the lock too, while it is held
                file.unlink()
            with suppress(OSError):  # a process that goes on with the capture has made a new lock
                (self.path / ROWS).rmdir()
        finally:
            self._lock.release()

    def abandon(self) -> None:
        """Give the folder up as it is: what was committed waits for the capture to go on."""
        self._lock.release()

    def _seal(self) -> None:
        """Write the waiting rows of every site as a shard; they count when capture.json says so."""
        entries = []
        for label, about in self.state["sites"].items():
            columns = {
                name: _mapped(self._rows_file(label, name), self.state["waiting"], dtype, width)
                for name, (dtype, width) in about["columns"].items()
            }
            record = Activations(
                **columns,
                layer=about["layer"],
                site=about["site"],
                provenance=self.state["provenance"],
            )
            path = self.path / f"{label}.{self.state['shards']:05d}.safetensors"
            sha256 = save_activations(path, record)
            entries.append(file_entry(path, sha256, record, self.path))
        self._write_state(
            files=[*self.state["files"], *entries], shards=self.state["shards"] + 1, waiting=0
        )

    def _cut_uncommitted(self) -> None:
        """Rows beyond the committed ones go, and files of sites that were never committed."""
        committed = {
            self._rows_file(label, name): self.state["waiting"] * column_bytes(dtype, width)
            for label, about in self.state["sites"].items()
            for name, (dtype, width) in about["columns"].items()
        }
        for file in (self.path / ROWS).iterdir():
            if file not in committed and file.name != LOCK:
                file.unlink()
        for file, size in committed.items():
            file.touch()
            if (found := file.stat().st_size) < size:
                raise ValueError(
                    f"{file} holds {found} bytes, expected the {size} that were committed"
                )
            if found > size:
                os.truncate(file, size)

    def _locked(self) -> FileLock:
        rows = self.path / ROWS
        while True:
            rows.mkdir(parents=True, exist_ok=True)
            lock = FileLock(rows / LOCK)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise RuntimeError(f"{self.path} is being written by another process") from None
            except FileNotFoundError:  # a capture that has just ended took the folder away
                continue
            return lock

    def _read_state(self, fresh: dict[str, Any]) -> None:
        self.state = read_state(self.path)
        self._require_same(fresh)

    def _require_same(self, fresh: dict[str, Any]) -> None:
        for part in ("settings", "provenance"):
            wanted, found = dict(fresh[part]), dict(self.state[part])
            wanted.pop("date", None)
            found.pop("date", None)
            if wanted != found:
                raise ValueError(
                    f"{self.path} holds a capture with another {_differing(wanted, found)}: use "
                    "another folder, or the same settings to go on"
                )

    def _write_state(self, **changes: Any) -> None:
        """What counts from now on: in the file first, so that a full disk changes nothing."""
        state = self.state | changes
        with files.replacing(self.path / CAPTURE_FILE) as partial:
            partial.write_text(json.dumps(state, indent=1))
        self.state = state

    def _rows_file(self, label: str, column: str) -> Path:
        return self.path / ROWS / f"{label}.{column}"


def seal(path: str | Path) -> None:
    """Make the committed rows of a capture that was interrupted readable, without going on with it.

    Raises: ValueError for a folder that is no capture; RuntimeError if it is still being written.
    """
    file = Path(path) / CAPTURE_FILE
    if not file.is_file():
        raise ValueError(f"{path} is no capture: expected a {CAPTURE_FILE} in it")
    state = read_state(path)
    CaptureFolder(path, state["provenance"], state["settings"], shard_bytes=1).finish()


def read_state(path: str | Path) -> dict[str, Any]:
    """The capture.json of a folder, of which every name that becomes a file's stays in the folder.

    Raises: ValueError for what `CaptureFolder` has not written.
    """
    file = Path(path) / CAPTURE_FILE
    state = parse(file.read_bytes(), file, STATE)
    if state["waiting"] and not state["sites"]:
        raise ValueError(f"{file}: expected the sites of {state['waiting']} waiting rows")
    for label, about in state["sites"].items():
        if not plain_name(label) or label != label_of(about["layer"], about["site"]):
            raise ValueError(f"{file}: expected the label of layer {about['layer']}, got {label!r}")
        if not about["columns"].keys() >= set(REQUIRED):
            raise ValueError(f"{file}: expected {' and '.join(REQUIRED)} of {label}")
        for name, (dtype, _) in about["columns"].items():
            known = [str(t).removeprefix("torch.") for t in DTYPES.get(name, ())]
            if dtype not in known:
                raise ValueError(
                    f"{file}: {label}: expected columns {', '.join(DTYPES)} with their dtypes, "
                    f"found {name!r} of {dtype!r}"
                )
    return state


def _refuse_links(rows: Path) -> None:
    """Files of rows are cut and removed: a link would have that done to another file."""
    entries = [rows, *rows.iterdir()] if rows.is_dir() else [rows]
    for entry in entries:
        if entry.is_symlink() or (entry.exists() and entry != rows and not entry.is_file()):
            raise ValueError(f"{entry} is a link or no file, expected rows of this capture")


def folder_of_rank(out: Path, **ranks: tuple[int, int]) -> Path:
    """`out`, or a folder in it for each kind of parallelism, name=(rank, size), with a size above
    1: out/dp1/pp0."""
    for name, (rank, size) in ranks.items():
        out = out / f"{name}{rank}" if size > 1 else out
    return out


def _is_own(name: str) -> bool:
    """Whether a capture that was killed before its first capture.json may have left it."""
    return name == ROWS or name.startswith(files.SCRATCH)


def column_bytes(dtype: str, width: int | None) -> int:
    """Bytes of one row of a column; width None is one number a row."""
    return getattr(torch, dtype).itemsize * (1 if width is None else width)


def row_bytes(site: Mapping[str, Any]) -> int:
    """Bytes of one row of a site, all columns."""
    return sum(column_bytes(*column) for column in site["columns"].values())


def describe(
    records: Mapping[tuple[int, str], Mapping[str, torch.Tensor]],
) -> dict[str, dict[str, Any]]:
    """Each site's layer, name and columns (dtype, width), as capture.json holds them."""
    return {
        label_of(layer, site): {
            "layer": layer,
            "site": site,
            "columns": {
                name: [str(t.dtype).removeprefix("torch."), t.shape[1] if t.ndim == 2 else None]
                for name, t in columns.items()
            },
        }
        for (layer, site), columns in records.items()
    }


def _differing(got: Mapping[str, Any], want: Mapping[str, Any]) -> str:
    keys = [k for k in {**got, **want} if got.get(k) != want.get(k)]
    return ", ".join(f"{k} ({got.get(k)!r}, there {want.get(k)!r})" for k in keys[:3])


def _raw(tensor: torch.Tensor) -> memoryview:
    return tensor.contiguous().view(torch.uint8).numpy().data


def _mapped(path: Path, rows: int, dtype: str, width: int | None) -> torch.Tensor:
    """The first rows of a file as a tensor that is read when it is used."""
    size = rows * (1 if width is None else width)
    flat = torch.from_file(str(path), shared=False, size=size, dtype=getattr(torch, dtype))
    return flat if width is None else flat.view(rows, width)
