"""The activation record: rows of one site of one layer as a safetensors file; the shipped sets.

A file holds `hidden` BF16 [T, D], `positions` int64 [T] and, for a routed site, `topk_ids` int32 or
int64 [T, k] and `topk_weights` float32 [T, k]. Its one metadata entry, "nvfp4lab", is JSON: layer,
site, and the provenance (one entry, because safetensors writes several in no fixed order and the
bytes would not repeat). A folder of records may hold a capture.json, which then says which files
count (capture/folder.py writes it). Tensors are mapped, not read: a record costs memory only where
its rows are used. Nothing here knows of recipes, and nothing but safetensors and JSON is read. May
be changed: another tensor of a record is added to DTYPES and to `Activations`; files that are there
have to stay readable.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from nvfp4lab import files
from nvfp4lab.checked_json import parse, plain_name
from nvfp4lab.checks import unknown

METADATA_KEY = "nvfp4lab"
CAPTURE_FILE = "capture.json"
NO_EXPERT = -1  # the expert id of a row that goes nowhere
DTYPES = {
    "hidden": (torch.bfloat16,),
    "positions": (torch.int64,),
    "topk_ids": (torch.int32, torch.int64),
    "topk_weights": (torch.float32,),
}
REQUIRED = ("hidden", "positions")
WEIGHTS = ("gate_up_proj", "down_proj")
ABOUT = {"layer": range(2**31), "site": str, "provenance": {str: object}}
LISTED = {"waiting": range(2**63), "files": [{"path": plain_name, "sha256": str}]}
SET = {"files": [{"path": str, "sha256": str}], "weights": {"path": str, "sha256": str}}
LONGEST_LIST = 20  # names in a message


@dataclass(frozen=True, repr=False)
class Activations:
    """What entered one site of one layer, and where it came from.

    hidden: BF16 [T, D]. positions: int64 [T], the token's place in its text. topk_ids: int32 or
    int64 [T, k], the router's experts; topk_weights: float32 [T, k]; both None at a dense site.
    provenance: model, weights, engine, text, licences; `provenance["is"]` says in a sentence what
    the activations are. Tensors of a loaded record are mapped from its file.

    >>> site = activations("smollm2")[0]
    >>> site.label, site.hidden.shape, site.topk_ids is None
    ('layer00.mlp_input', torch.Size([256, 576]), True)
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    layer: int
    site: str
    provenance: Mapping[str, Any]
    topk_ids: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None

    @property
    def label(self) -> str:
        """A name for files and plots, such as layer05.mlp_input."""
        return label_of(self.layer, self.site)

    def __len__(self) -> int:
        return len(self.hidden)

    def __repr__(self) -> str:
        routing = "" if self.topk_ids is None else f", top {self.topk_ids.shape[1]}"
        shape = tuple(self.hidden.shape)
        return f"Activations({self.label}, hidden {shape}{routing}: {self.provenance.get('is')})"

    def rows(self, start: int, stop: int) -> Activations:
        """The record of rows start to stop; of a mapped record it reads only these, when used."""
        names = [name for name in DTYPES if getattr(self, name) is not None]
        return replace(self, **{name: getattr(self, name)[start:stop] for name in names})


@dataclass(frozen=True, repr=False)
class ExpertWeights:
    """The experts behind one site: y = down(silu(gate x) * up x), for each expert.

    gate_up_proj: BF16 [E, 2 I, D], the gate's rows before those of up; down_proj: BF16 [E, D, I].
    A dense MLP is one expert. provenance: as of the activations that enter them.

    >>> expert_weights("v4-mini").down_proj.dtype
    torch.bfloat16
    """

    gate_up_proj: torch.Tensor
    down_proj: torch.Tensor
    layer: int
    provenance: Mapping[str, Any]

    def __repr__(self) -> str:
        experts, width, inner = self.down_proj.shape
        of = f"{experts} of [{width}, {inner}], layer {self.layer}"
        return f"ExpertWeights({of}: {self.provenance.get('is')})"


def label_of(layer: int, site: str) -> str:
    """A name for files and plots: label_of(5, "mlp_input") is layer05.mlp_input."""
    return f"layer{layer:02d}.{site}"


def activations(name: str) -> tuple[Activations, ...]:
    """A shipped set, every file's sha256 checked: its sites in the order of the manifest.

    Raises: ValueError for an unknown set (with the nearest names), or a file that is missing,
    altered or damaged.

    >>> activations("smollm2")[0].label
    'layer00.mlp_input'
    """
    files = _shipped(name)["files"]
    return tuple(_load(data_folder() / f["path"], f["sha256"]) for f in files)


def expert_weights(name: str) -> ExpertWeights:
    """The experts of one layer of a shipped set, sha256 checked.

    Raises: as `activations`.

    >>> expert_weights("smollm2").gate_up_proj.shape
    torch.Size([1, 3072, 576])
    """
    entry = _shipped(name)["weights"]
    path = data_folder() / entry["path"]
    _check_digest(path, entry["sha256"])
    with open_safetensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in WEIGHTS}
        about = _read_metadata(path, file.metadata() or {})
    return ExpertWeights(**tensors, layer=about["layer"], provenance=about["provenance"])


def load_activations(
    path: str | Path, *, sha256: bool | Mapping[str, str] = False
) -> tuple[Activations, ...]:
    """A user's record, or the records of a folder: those that its capture.json names, in its order,
    else all in the order of their names. Several may be shards of one site.

    sha256: True checks every file against capture.json; a mapping gives the digest of each file
    name, and then a file that it does not name is not accepted, nor one that it names missed.

    A file that is cut short after it was loaded ends the process when lost rows are used (SIGBUS),
    as of anything mapped; so nothing here writes into a file that is there.

    Raises: ValueError for anything that is not a whole, well-formed record, or for a capture that
    was interrupted and has rows in no shard; FileNotFoundError; OSError for what cannot be a path.

    >>> [site.label for site in load_activations(data_folder() / "smollm2")][:2]
    ['layer00.down_proj_input', 'layer00.mlp_input']
    """
    path = Path(path)
    paths = record_files(path)
    folder = path if path.is_dir() else path.parent
    listed = _listed(folder)
    if sha256 is True:
        if listed is None:
            raise ValueError(f"{folder} has no {CAPTURE_FILE} to check sha256 against")
        sha256 = listed
    if not sha256 and not isinstance(sha256, Mapping):
        return tuple(_load(file, None) for file in paths)
    if unnamed := [f.name for f in paths if f.name not in sha256]:
        raise ValueError(f"{path}: no sha256 was given for {', '.join(unnamed)}")
    if path.is_dir() and (lost := sorted(sha256.keys() - {f.name for f in paths})):
        raise ValueError(f"{path} lacks {', '.join(lost)}, whose sha256 was given")
    return tuple(_load(file, sha256[file.name]) for file in paths)


def record_files(path: str | Path) -> list[Path]:
    """The files that `load_activations` reads, in its order; whether they are there is not asked.

    Expert weights that lie among the records of a folder are passed over.

    Raises: as `load_activations`, of the path and its capture.json alone.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no activations at {path}")
    listed = _listed(path if path.is_dir() else path.parent)
    if not path.is_dir():
        files = [path]
    elif listed is not None:
        files = [path / name for name in listed]
    else:
        files = sorted(f for f in path.glob("*.safetensors") if not _holds_weights(f))
    if not files:
        raise ValueError(f"{path} holds no record, expected .safetensors files")
    return files


def save_activations(path: str | Path, record: Activations) -> str:
    """Write one record, whole or not at all; the same record gives the same bytes. Returns sha256.

    Raises: ValueError if `load_activations` would refuse it.
    """
    path = Path(path)
    tensors = {name: getattr(record, name) for name in DTYPES}
    tensors = {name: _plain(t) for name, t in tensors.items() if t is not None}
    _check_names(path, tensors)
    _check_tensors(path, tensors)
    about = {"layer": record.layer, "site": record.site, "provenance": dict(record.provenance)}
    _read_metadata(path, {METADATA_KEY: json.dumps(about)})
    return _write(path, tensors, about)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Its values as they lie in a file; safetensors would write a negated view unnegated."""
    return tensor.detach().cpu().contiguous().resolve_neg()


def save_expert_weights(path: str | Path, weights: ExpertWeights) -> str:
    """Write the weights, whole or not at all. Returns sha256."""
    path = Path(path)
    tensors = {"gate_up_proj": weights.gate_up_proj, "down_proj": weights.down_proj}
    about = {"layer": weights.layer, "site": "experts", "provenance": dict(weights.provenance)}
    return _write(path, {name: _plain(t) for name, t in tensors.items()}, about)


def file_entry(path: Path, sha256: str, record: Activations, root: Path) -> dict[str, Any]:
    """What a manifest says of a record's file; paths are relative to the manifest's folder."""
    return {
        "path": path.relative_to(root).as_posix(),
        "sha256": sha256,
        "bytes": path.stat().st_size,
        "layer": record.layer,
        "site": record.site,
        "tokens": record.hidden.shape[0],
        "width": record.hidden.shape[1],
    }


def data_folder() -> Path:
    """Where the shipped sets are: inside an installed wheel, else beside the package."""
    packaged = Path(__file__).parent / "_data"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "data"


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _holds_weights(path: Path) -> bool:
    """Whether it is a file of `save_expert_weights`; a damaged one is not."""
    try:
        with open_safetensors(path) as file:
            return set(file.keys()) == set(WEIGHTS)
    except ValueError:
        return False


def _shipped(name: str) -> dict[str, Any]:
    manifest = data_folder() / "manifest.json"
    sets = parse(manifest.read_bytes(), manifest, {str: SET})
    if name not in sets:
        raise ValueError(unknown("activation set", name, sets))
    return sets[name]


def _listed(folder: Path) -> dict[str, str] | None:
    """File name -> sha256 of a finished capture; None where there is no capture.json."""
    file = folder / CAPTURE_FILE
    if not file.is_file():
        return None
    state = parse(file.read_bytes(), file, LISTED)
    waiting, listed = state["waiting"], {f["path"]: f["sha256"] for f in state["files"]}
    if len(listed) < len(state["files"]):
        raise ValueError(f"{file} names a file twice, so its rows would count twice")
    if waiting:
        raise ValueError(
            f"{folder} is a capture that was interrupted: {waiting} rows are in no shard yet; run "
            "the same capture again to go on, or nvfp4lab.capture.seal(folder) to keep these"
        )
    return listed


@contextmanager
def open_safetensors(path: Path) -> Iterator[safe_open]:
    """The file, mapped; its tensors outlive it.

    Raises: ValueError that names it, for anything but a whole safetensors file.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing")
    if not path.is_file():  # to open a pipe would wait for ever
        raise ValueError(f"{path} is no regular file, expected a safetensors file")
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, struct.error) as error:
        raise ValueError(
            f"{path} is no whole safetensors file: expected a header and every byte it names, "
            f"found {path.stat().st_size} bytes: {error}"
        ) from error


def named(names: Iterable[str]) -> str:
    """The names of a file's tensors for a message: the first of them, and nothing unprintable."""
    first = [name if name.isprintable() else repr(name) for name in islice(names, LONGEST_LIST + 1)]
    return ", ".join([*first[:LONGEST_LIST], *["..."] * (len(first) > LONGEST_LIST)])


def _load(path: Path, sha256: str | None) -> Activations:
    _check_digest(path, sha256)
    with open_safetensors(path) as file:
        _check_names(path, file.keys())  # before a million others are taken for tensors
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = _read_metadata(path, file.metadata() or {})
    _check_tensors(path, tensors)
    return Activations(**tensors, **about)


def _check_digest(path: Path, sha256: str | None) -> None:
    if sha256 is None or not path.is_file():  # which `open_safetensors` refuses
        return
    if (found := file_sha256(path)) != sha256:
        raise ValueError(f"{path} was altered: its sha256 is {found}, expected {sha256}")


def _write(path: Path, tensors: dict[str, torch.Tensor], about: dict[str, Any]) -> str:
    metadata = {METADATA_KEY: json.dumps(about, sort_keys=True)}
    with files.replacing(path) as partial:
        try:
            save_file(tensors, partial, metadata=metadata)
        except SafetensorError as error:  # which hides the system's error in its text
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
    return file_sha256(path)


def _read_metadata(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if METADATA_KEY not in metadata:
        raise ValueError(
            f"{path} lacks its metadata: expected the entry {METADATA_KEY!r}, JSON with layer, "
            f"site and provenance; found [{named(metadata)}]"
        )
    about = parse(metadata[METADATA_KEY], f"{path}, metadata {METADATA_KEY!r}", ABOUT)
    return {name: about[name] for name in ABOUT}


def _check_names(path: Path, names: Iterable[str]) -> None:
    names = set(names)
    if missing := [name for name in REQUIRED if name not in names]:
        raise ValueError(
            f"{path}: expected the keys {', '.join(REQUIRED)}, without {', '.join(missing)} it is "
            f"no record; found {named(names)}"
        )
    if unknown := sorted(names - DTYPES.keys()):
        raise ValueError(f"{path}: expected no keys but {', '.join(DTYPES)}, not {named(unknown)}")


def _check_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    def refuse(expected: str) -> None:
        found = {name: f"{t.dtype} {_shape(t)}" for name, t in tensors.items()}
        raise ValueError(f"{path}: expected {expected}; found {found}")

    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES[name]:
            refuse(f"{name} of dtype {' or '.join(map(str, DTYPES[name]))}")
    hidden, positions = tensors["hidden"], tensors["positions"]
    if hidden.ndim != 2 or positions.shape != hidden.shape[:1]:
        refuse("hidden [T, D] and positions [T]")
    ids, weights = tensors.get("topk_ids"), tensors.get("topk_weights")
    if ids is None and weights is None:
        return
    if ids is None or weights is None:
        refuse("both topk_ids and topk_weights, or neither")
    elif ids.ndim != 2 or ids.shape != weights.shape or len(ids) != len(hidden):
        refuse("topk_ids and topk_weights [T, k]")
    elif ids.numel() and int(ids.min()) < NO_EXPERT:
        refuse(f"expert ids of {NO_EXPERT} or more, the smallest is {int(ids.min())}")


def _shape(tensor: torch.Tensor) -> object:
    return tuple(tensor.shape) if tensor.ndim < 9 else f"of {tensor.ndim} dimensions"
