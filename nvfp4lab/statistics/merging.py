"""`Statistics`: the contents and their measures, with addition, equality and files.

Two add up field by field: identities must agree, largest values take the larger one, the worst
blocks are chosen again, all else adds. To save more, see `contents`.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Self

import numpy as np

from nvfp4lab import files
from nvfp4lab.checked_json import COUNT, either, parse
from nvfp4lab.statistics.contents import CHANNELS, WORST, arrays_of
from nvfp4lab.statistics.measures import Measures

KEPT = 10  # worst blocks
VERSION = 1  # of the file; contents or bins that change get another one

_IDENTITY = (
    "recipe",
    "digest",
    "element_format",
    "scale_format",
    "block",
    "quotient_width",
    "magnitude_of_code",
    "width",
)
_LARGEST = ("max_abs_e", "max_rel_e", "amax")
_SIGNED = ("sum_xq", "sum_e", "quotient_e", "channel_xq", "magnitude_of_code")
_DAMAGE = (
    EOFError,
    KeyError,
    MemoryError,
    OSError,
    OverflowError,
    RuntimeError,  # a zip's features that Python has not
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)
_LARGEST_FILE = 1 << 28  # bytes unpacked; it is the note that grows, by some 700 a shard
_LARGEST_NUMBERS = 1 << 16  # bytes


class Statistics(Measures):
    """The measured error of one recipe on any number of tensors; what `measure` returns.

    `a + b` is what one pass over both gives, in any order and however rows were cut: counts,
    histograms and largest values exactly, sums to 1e-12 of the sum of magnitudes. So are the worst
    blocks where their source and token tell them apart, as a sweep's do.

    Counts: tokens, elements, nonfinite_input and nonfinite_output (in no sum), nonzero, flushed (of
    these, decoded to zero), saturated (beyond their block's largest value), blocks, scale_zero,
    _subnormal, _normal, _saturated, _nan (blocks by the class of their scale); element_codes and
    scale_codes by code. Sums, with e = q - x: sum_xx, _qq, _xq, _ee, _abs_e, _e; sum_ee_max,
    _other, _zero_scale part sum_ee into each block's largest element, its others, and blocks of
    scale zero; max_abs_e, max_rel_e (|e| / |x|), amax. Measures are properties, each with a line of
    its own here; tidy frames come from the methods that begin with by_, and the histograms'.

    Raises: ValueError in `a + b` for other recipes or widths.

    >>> import torch
    >>> from nvfp4lab import measure
    >>> x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    >>> parts = measure(x[:3], "nvfp4") + measure(x[3:], "nvfp4")
    >>> parts.tokens, parts.blocks, parts.max_abs_e == measure(x, "nvfp4").max_abs_e
    (8, 32, True)
    """

    def __repr__(self) -> str:
        return (
            f"Statistics({self.recipe}, {self.tokens} tokens, {self.elements} elements, "
            f"QSNR {self.qsnr_db:.2f} dB, gain {self.gain:.4f})"
        )

    def __eq__(self, other: object) -> bool:
        """Whether every bit is the same."""
        if not isinstance(other, Statistics):
            return NotImplemented
        mine, theirs = self._arrays(), other._arrays()
        return mine.keys() == theirs.keys() and all(
            (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
            for a, b in zip(mine.values(), theirs.values(), strict=True)
        )

    __hash__ = None  # type: ignore[assignment]

    def __radd__(self, other: object) -> Self:
        """So that `sum` of several works: it begins with 0."""
        if isinstance(other, int) and other == 0:
            return self
        return NotImplemented

    def __add__(self, other: Self) -> Self:
        """Of both tensors. Raises: ValueError for two recipes, or two widths K."""
        if not isinstance(other, Statistics):
            return NotImplemented
        if self.digest != other.digest:
            raise ValueError(
                f"statistics of {self.recipe} ({self.digest}) and of {other.recipe} "
                f"({other.digest}) do not add up: the recipes differ"
            )
        if self.width != other.width:
            raise ValueError(
                f"statistics of rows of {_width(self)} and of {_width(other)} do not add up; "
                "drop the channels of both first: a.without_channels() + b.without_channels()"
            )
        return replace(self, **{n: _merged(n, self, other) for n in _names() if n not in _IDENTITY})

    def without_channels(self) -> Self:
        """The same without the sums of channels, so that other widths can be added to it."""
        return replace(self, width=None, **{name: np.zeros(0) for name in CHANNELS})

    def save(self, path: str | Path, note: str = "") -> None:
        """Write one .npz, whole or not at all. note: any text to keep beside it."""
        arrays: dict = {**self._arrays(), "note": np.array(note)}
        with files.replacing(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """What `save` wrote, bit for bit.

        Raises: ValueError for a file that is damaged or none of these; FileNotFoundError.
        """
        return cls.load_with_note(path)[0]

    @classmethod
    def load_with_note(cls, path: str | Path) -> tuple[Self, str]:
        """As `load`, with the note beside it.

        Raises: as `load`.
        """
        path = Path(path)
        if path.exists() and not path.is_file():  # to open a pipe would wait for ever
            raise ValueError(f"{path} is no regular file, expected one of statistics")
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                _check_sizes(file)
                texts = {n: _text(file, n) for n in ("note", "scalars")}
                scalars = parse(texts["scalars"], "its numbers", {"version": int})
                if (version := scalars.pop("version")) != VERSION:
                    raise ValueError(f"version {version}, this nvfp4lab reads {VERSION}")
                arrays = {n: file[n] for n in file.files if n not in texts}
            worst = {name: arrays.pop(f"worst.{name}") for name in WORST}
            if unlike := sorted(set(_names()) ^ {*arrays, *scalars, "worst"}):
                raise ValueError(f"missing or unknown: {', '.join(unlike)}")
            _check(scalars, arrays, worst)
            return cls(**scalars, **arrays, worst=worst), texts["note"]
        except FileNotFoundError:
            raise
        except _DAMAGE as error:
            raise ValueError(f"{path} is no whole file of statistics: {error!s:.300}") from error

    def _arrays(self) -> dict[str, np.ndarray]:
        """All of it as arrays; the numbers and names are one, JSON, which keeps every bit."""
        values = {name: getattr(self, name) for name in _names() if name != "worst"}
        arrays = {name: v for name, v in values.items() if isinstance(v, np.ndarray)}
        scalars = {name: v for name, v in values.items() if name not in arrays}
        arrays |= {f"worst.{name}": column for name, column in self.worst.items()}
        return {"scalars": np.array(json.dumps({"version": VERSION, **scalars})), **arrays}


def _check_sizes(file: np.lib.npyio.NpzFile) -> None:
    """Before any of it is unpacked: a zip of some kB may hold GBs. Raises: ValueError."""
    assert file.zip is not None  # as long as the file is open
    members = file.zip.infolist()
    numbers = sum(one.file_size for one in members if one.filename == "scalars.npy")
    for what, size, most in (
        ("it", sum(one.file_size for one in members), _LARGEST_FILE),
        ("scalars", numbers, _LARGEST_NUMBERS),
    ):
        if size > most:
            raise ValueError(f"{what} unpacks to {size} bytes, expected {most} or fewer")


def _text(file: np.lib.npyio.NpzFile, name: str) -> str:
    """A string that was saved as an array without dimensions."""
    array = file[name]
    if array.dtype.kind != "U" or array.ndim:
        raise ValueError(f"{name} is a string, found {array.dtype} {array.shape}")
    return str(array)


def _check(scalars: dict, arrays: dict[str, np.ndarray], worst: dict[str, np.ndarray]) -> None:
    """Hold what a file gave to what `Contents.empty` makes. Raises: ValueError."""
    kinds = {"int": COUNT, "float": float, "str": str}
    kinds |= {"int | None": either(None, COUNT), "str | None": either(None, str)}
    shape = {f.name: kinds[f.type] for f in fields(Statistics) if f.type in kinds}
    parse(json.dumps(scalars), "its numbers", shape)
    codes, scale_codes = len(arrays["magnitude_of_code"]), scalars["scale_format"] is not None
    for name, (length, dtype) in arrays_of(codes, scale_codes, scalars["width"]).items():
        _require(name, arrays[name], (length,), dtype)
    rows, block = min(len(worst["token"]), KEPT), scalars["block"]
    for name, dtype in WORST.items():
        _require(f"worst.{name}", worst[name], (rows, block) if name == "x" else (rows,), dtype)
    for name, value in {**scalars, **arrays}.items():
        number = isinstance(value, (int, float, np.ndarray))
        if number and name not in _SIGNED and not np.all(np.asarray(value) >= 0):
            raise ValueError(f"{name} is never below 0")


def _require(name: str, array: np.ndarray, shape: tuple[int, ...], dtype: type | str) -> None:
    kind = array.dtype.kind == "U" if dtype == "U1" else array.dtype == np.dtype(dtype)
    if array.shape != shape or not kind:
        raise ValueError(f"{name} is {dtype} {shape}, found {array.dtype} {array.shape}")


def merged_worst(*parts) -> dict[str, np.ndarray]:
    """The ten worst of several: most lost, largest error, then source, token and block."""
    columns = {name: np.concatenate([part[name] for part in parts]) for name in WORST}
    keys = ("block", "token", "source")
    order = np.lexsort([*(columns[k] for k in keys), -columns["ee"], -columns["lost"]])[:KEPT]
    kept = {name: column[order] for name, column in columns.items()}
    return kept | {"source": np.array(kept["source"].tolist(), dtype=str)}  # no wider than it needs


def _merged(name: str, a: Statistics, b: Statistics):
    mine, theirs = getattr(a, name), getattr(b, name)
    if name == "worst":
        return merged_worst(mine, theirs)
    return max(mine, theirs) if name in _LARGEST else mine + theirs


def _names() -> tuple[str, ...]:
    return tuple(f.name for f in fields(Statistics))


def _width(statistics: Statistics) -> str:
    return "unknown width" if statistics.width is None else f"{statistics.width} elements"
