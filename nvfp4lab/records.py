"""The activation record: one site of one layer as a safetensors file; the shipped sets.

A file holds `hidden` BF16 [T, D], `positions` int64 [T] and, for a routed site, `topk_ids` int32 or
int64 [T, k] and `topk_weights` float32 [T, k]. Its one metadata entry, "nvfp4lab", is JSON: layer,
site, and the provenance (one entry, because safetensors writes several in no fixed order and the
bytes would not repeat). Nothing here knows of recipes, and nothing but safetensors is ever read.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

METADATA_KEY = "nvfp4lab"
DTYPES = {
    "hidden": (torch.bfloat16,),
    "positions": (torch.int64,),
    "topk_ids": (torch.int32, torch.int64),
    "topk_weights": (torch.float32,),
}
REQUIRED = ("hidden", "positions")


@dataclass(frozen=True)
class Activations:
    """What entered one site of one layer, and where it came from.

    hidden: BF16 [T, D]. positions: int64 [T], the token's place in its text. topk_ids: int32 or
    int64 [T, k], the router's experts; topk_weights: float32 [T, k]; both None at a dense site.
    provenance: model, weights, engine, text, licences; `provenance["is"]` says in a sentence what
    the activations are.
    """

    hidden: torch.Tensor
    positions: torch.Tensor
    layer: int
    site: str
    provenance: Mapping[str, Any] = field(repr=False)
    topk_ids: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None

    @property
    def label(self) -> str:
        """A name for files and plots, such as layer05.mlp_input."""
        return f"layer{self.layer:02d}.{self.site}"


def activations(name: str) -> tuple[Activations, ...]:
    """A shipped set, every file's sha256 checked: its sites in the order of the manifest.

    Raises: ValueError for an unknown set (with the nearest names), or a file that is missing,
    altered or damaged.

    >>> activations("smollm2")[0].label
    'layer00.mlp_input'
    """
    folder = data_folder()
    sets = json.loads((folder / "manifest.json").read_text())
    if name not in sets:
        near = difflib.get_close_matches(str(name), sets, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"unknown activation set {name!r}, expected one of {', '.join(sets)}{hint}"
        )
    return tuple(_load(folder / f["path"], f["sha256"]) for f in sets[name]["files"])


def load_activations(
    path: str | Path, *, sha256: Mapping[str, str] | None = None
) -> tuple[Activations, ...]:
    """A user's record, or all the records of a folder in the order of their names.

    sha256: the expected digest of each file name. A file that it does not name is not accepted,
    nor a folder that lacks one that it names.

    Raises: ValueError for anything that is not a whole, well-formed record, FileNotFoundError.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no activations at {path}")
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} holds no .safetensors file")
    if sha256 is None:
        return tuple(_load(file, None) for file in files)
    if unnamed := [f.name for f in files if f.name not in sha256]:
        raise ValueError(f"{path}: no sha256 was given for {', '.join(unnamed)}")
    if path.is_dir() and (lost := sorted(sha256.keys() - {f.name for f in files})):
        raise ValueError(f"{path} lacks {', '.join(lost)}, whose sha256 was given")
    return tuple(_load(file, sha256[file.name]) for file in files)


def save_activations(path: str | Path, record: Activations) -> str:
    """Write one record, whole or not at all; the same record gives the same bytes. Returns sha256.

    Raises: ValueError if `load_activations` would refuse it.
    """
    path = Path(path)
    tensors = {name: getattr(record, name) for name in DTYPES}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items() if t is not None}
    _check_tensors(path, tensors)
    about = {"layer": record.layer, "site": record.site, "provenance": dict(record.provenance)}
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={METADATA_KEY: json.dumps(about, sort_keys=True)})
    os.replace(partial, path)
    return file_sha256(path)


def data_folder() -> Path:
    """Where the shipped sets are: inside an installed wheel, else beside the package."""
    packaged = Path(__file__).parent / "_data"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "data"


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load(path: Path, sha256: str | None) -> Activations:
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    if sha256 is not None and (found := file_sha256(path)) != sha256:
        raise ValueError(f"{path} was altered: its sha256 is {found}, expected {sha256}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, struct.error) as error:
        raise ValueError(
            f"{path} is no whole safetensors file: expected a header and every byte it names, "
            f"found {path.stat().st_size} bytes: {error}"
        ) from error
    _check_tensors(path, tensors)
    return Activations(**tensors, **_read_metadata(path, metadata))


def _read_metadata(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        about = json.loads(metadata[METADATA_KEY])
        layer, site, provenance = about["layer"], about["site"], about["provenance"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} lacks its metadata: expected the entry {METADATA_KEY!r}, JSON with layer, "
            f"site and provenance; found {sorted(metadata)}"
        ) from error
    if type(layer) is not int or not isinstance(site, str) or not isinstance(provenance, dict):
        raise ValueError(
            f"{path}: expected an integer layer, a string site and a provenance object; "
            f"found {layer!r}, {site!r}, {type(provenance).__name__}"
        )
    return {"layer": layer, "site": site, "provenance": provenance}


def _check_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    def refuse(expected: str) -> None:
        found = {name: f"{t.dtype} {tuple(t.shape)}" for name, t in tensors.items()}
        raise ValueError(f"{path}: expected {expected}; found {found}")

    if missing := [name for name in REQUIRED if name not in tensors]:
        refuse(f"the keys {', '.join(REQUIRED)}, without {', '.join(missing)} it is no record")
    if unknown := [name for name in tensors if name not in DTYPES]:
        refuse(f"no keys but {', '.join(DTYPES)}, not {', '.join(unknown)}")
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
    elif ids.numel() and int(ids.min()) < -1:
        refuse(f"expert ids of -1 or more, the smallest is {int(ids.min())}")
